"""Compile the shipped kernels for chips that are not here, and say what came out.

Each kernel module declares a tuple ``SHIPPED`` of :class:`Shipped` entries: a kernel together
with the signature, constants, warps and stages it is launched with. This tool compiles them for
CUDA and HIP targets without a GPU or a driver and reports registers, stack (spills), shared
memory, matrix instructions and 128-bit loads.

    python -m fastgrad_kernels.compile_check                       # all, one line each
    python -m fastgrad_kernels.compile_check --markdown            # the table of docs/kernels.md
    python -m fastgrad_kernels.compile_check cross_influence --target cuda:90 --only bf16

Other programs call :func:`check`, which runs this file in a process of its own: the interpreter
flag of the caller is read at decoration time and would leave nothing to compile, and a compiler
that aborts must not take the caller along.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
# Modules that may declare SHIPPED; one that does not exist is passed over.
MODULES = (
    "cross_influence",
    "gram",
    "sparse_wgrad",
    "grad_stats",
    "norm_taps",
    "embedding",
    "sparse_adam",
)
# Shared memory one program may ask for, in bytes: the opt-in limits of the CUDA programming
# guide (A100 163 KiB, H100/H200 and B200 227 KiB) and the 64 KiB of LDS on a CDNA3 unit.
SHARED_LIMIT = {"cuda:80": 166912, "cuda:90": 232448, "cuda:100": 232448, "hip:gfx942": 65536}


@dataclass(frozen=True)
class Shipped:
    """One compiled form of a kernel.

    Args:
        name: unique, e.g. ``"cross_influence/bf16/128x128"``.
        kernel: the ``@triton.jit`` function (its module's global).
        signature: argument name to type (``"*bf16"``, ``"i32"``, ``"i64"``, ``"fp32"``) for
            every argument that is not a constant, in any order.
        constexprs: argument name to value for the constants.
        aligned: arguments that are divisible by 16: pointers and strides of ordinary tensors.
        targets: the chips this form is shipped for.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] = ()
    targets: tuple[str, ...] = TARGETS


def in_tf32(entries: Iterable[Shipped]) -> tuple[Shipped, ...]:
    """The float32 forms among ``entries`` as they are where PyTorch was told that TF32 will do."""
    return tuple(
        dataclasses.replace(
            e,
            name=e.name.replace("/fp32/", "/tf32/"),
            constexprs={**e.constexprs, "PRECISION": "tf32"},
        )
        for e in entries
        if "/fp32/" in e.name
    )


@dataclass(frozen=True)
class Facts:
    """What the compiler made of one entry for one target."""

    name: str
    target: str
    num_warps: int
    num_stages: int
    shared: int  # bytes per program
    registers: int  # per thread; vector registers on HIP
    stack: int  # bytes per thread; more than 0 means that registers were spilled
    matrix: Mapping[str, int] = field(default_factory=dict)  # matrix instruction -> count
    wide_loads: int = 0  # 128-bit loads from global memory, asynchronous copies included
    overlapped: int = 0  # waits that leave a Hopper matrix instruction of the last turn in flight
    seconds: float = 0.0

    @property
    def fits(self) -> bool:
        return self.shared <= SHARED_LIMIT[self.target]


_MATRIX = {
    "wgmma": re.compile(r"wgmma\.mma_async"),
    "tcgen05": re.compile(r"tcgen05\.mma"),
    "mma.sync": re.compile(r"(?<!g)mma\.sync"),
    "mfma": re.compile(r"\bv_mfma_"),
}
_WIDE = re.compile(
    r"ld\.global[\w.:]*\.(?:v4\.(?:b32|f32|u32)|v2\.(?:b64|f64|u64))"
    r"|cp\.async\.c[ag]\.shared\.global[^\n]*, (?:0x10|16)\b"
    r"|cp\.async\.bulk"
    r"|(?:global|buffer)_load_dwordx4"
)


def _bin(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _usage_cuda(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes per thread, as the disassembler reads them off the binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        done = subprocess.run(
            [_bin("cuobjdump"), "-res-usage", f.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout + done.stderr)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage said nothing of registers: {done.stdout!r}")
    return int(found[1]), int(found[2])


def _usage_hip(assembly: str) -> tuple[int, int]:
    """Vector registers, and scratch bytes per lane (4 per spilled register, at the least)."""

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        return int(found[1]) if found else 0

    stack = max(number("private_segment_fixed_size"), 4 * number("vgpr_spill_count"))
    return number("vgpr_count"), stack


def compile_one(entry: Shipped, target: str) -> tuple[Facts, Any]:
    """Compile in this process; returns the facts and Triton's compiled kernel (``.asm``)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    family, _, arch = target.partition(":")
    gpu = GPUTarget("cuda", int(arch), 32) if family == "cuda" else GPUTarget("hip", arch, 64)
    names = entry.kernel.arg_names
    signature = {n: "constexpr" if n in entry.constexprs else entry.signature[n] for n in names}
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in entry.aligned}
    source = ASTSource(entry.kernel, signature, dict(entry.constexprs), attrs)
    options = {"num_warps": entry.num_warps, "num_stages": entry.num_stages}
    start = time.perf_counter()
    compiled = triton.compile(source, target=gpu, options=options)
    seconds = time.perf_counter() - start
    text = compiled.asm["ptx"] if family == "cuda" else compiled.asm["amdgcn"]
    if family == "cuda":
        registers, stack = _usage_cuda(compiled.asm["cubin"])
    else:
        registers, stack = _usage_hip(text)
    matrix = {name: len(p.findall(text)) for name, p in _MATRIX.items() if p.search(text)}
    facts = Facts(
        entry.name,
        target,
        entry.num_warps,
        entry.num_stages,
        compiled.metadata.shared,
        registers,
        stack,
        matrix,
        len(_WIDE.findall(text)),
        len(re.findall(r"wgmma\.wait_group\.sync\.aligned [1-9]", text)),
        round(seconds, 2),
    )
    return facts, compiled


def shipped(modules: Iterable[str] = MODULES) -> Iterator[Shipped]:
    """Every declared entry of the named modules of this package, in order."""
    for module in modules:
        name = f"fastgrad_kernels.{module}"
        if importlib.util.find_spec(name) is not None:
            yield from getattr(importlib.import_module(name), "SHIPPED", ())


def check(
    modules: Iterable[str] = MODULES, targets: Iterable[str] = TARGETS, only: str = ""
) -> list[Facts]:
    """Compile in a process of its own and return the facts.

    Args:
        modules: modules of this package, without the package's name.
        targets: of :data:`TARGETS`.
        only: regular expression that an entry's name must contain.

    Raises:
        RuntimeError: if a kernel does not compile, with the compiler's message.
    """
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastgrad_kernels.compile_check", *modules, "--json"]
    command += [part for t in targets for part in ("--target", t)]
    done = subprocess.run(
        [*command, "--only", only], capture_output=True, text=True, env=env, check=False
    )
    if done.returncode:
        raise RuntimeError(f"compilation failed:\n{done.stderr[-6000:]}")
    return [Facts(**json.loads(line)) for line in done.stdout.splitlines() if line[:1] == "{"]


def markdown(facts: Iterable[Facts]) -> str:
    """The table of ``docs/kernels.md``: one row per entry and target."""
    lines = [
        "| kernel | target | warps | stages | registers | stack | shared KiB | matrix | 128-bit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for f in facts:
        matrix = ", ".join(f"{k} x{v}" for k, v in f.matrix.items()) or "none"
        lines.append(
            f"| {f.name} | {f.target} | {f.num_warps} | {f.num_stages} | {f.registers} | {f.stack}"
            f" | {f.shared / 1024:.1f} | {matrix} | {f.wide_loads} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="fastgrad_kernels.compile_check")
    parser.add_argument("modules", nargs="*", default=list(MODULES))
    parser.add_argument("--target", action="append", choices=TARGETS)
    parser.add_argument("--only", default="", help="regular expression on the entries' names")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print the table of the docs")
    form.add_argument("--json", action="store_true", help="print one JSON object per line")
    args = parser.parse_args(argv)
    rows = []
    for entry in shipped(args.modules):
        for target in args.target or TARGETS:
            if target not in entry.targets or not re.search(args.only, entry.name):
                continue
            facts, _ = compile_one(entry, target)
            rows.append(facts)
            if args.json:
                print(json.dumps(dataclasses.asdict(facts)), flush=True)
            elif not args.markdown:
                print(facts, flush=True)
    if args.markdown:
        print(markdown(rows))


if __name__ == "__main__":
    main()
