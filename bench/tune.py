"""Try other tiles and launch sizes than the shipped ones, each checked before it is timed.

    python bench/tune.py                         # every kernel; bench/results/tune.json
    python bench/tune.py --kernels influence,wgrad --rounds 5
    TRITON_INTERPRET=1 python bench/tune.py --device cpu     # small sizes, without a GPU

Prints time as a multiple of the peer's, the shipped configuration first. What wins belongs into
configs.py, with the figure in docs/kernels.md. In a name such as "128x128x64 w8 s4 g8" stand the
tile's rows and columns, the depth of a step, warps, pipeline stages and the rows of tiles that run
together. In the interpreter the times mean nothing. A variant that does not fit the chip, spills
or is wrong is named and left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from fastgrad_kernels import dispatch
from fastgrad_kernels.configs import (
    FUSED_IN_MEMORY,
    Tile,
    architecture,
    fused_tile,
    gram_tile,
    sparse_tile,
)
from fastgrad_kernels.layout import gather_blocks
from gate_checks import distance
from gate_rows import llama_shapes, offsets_of, release, timed
from timing import environment


@dataclass(frozen=True)
class Trial:
    kernel: str
    where: str
    variant: str
    ratio: float
    seconds: float
    shipped: bool = False


Variants = dict[str, Callable[[], object]]


def trials(
    device: torch.device,
    rounds: int,
    kernel: str,
    where: str,
    peer: Callable[[], object],
    variants: Variants,
    check: Callable[[object], float],
    bound: float,
) -> Iterator[Trial]:
    """Check each variant's result, then time those that are right, beside the peer. The first is
    the shipped one."""
    right: Variants = {}
    for name, call in variants.items():
        try:
            error = check(call())
        except Exception as problem:  # out of shared memory or registers: not for this chip
            print(f"{kernel} {where} {name}: {type(problem).__name__}: {str(problem)[:90]}")
            continue
        if not error <= bound:
            print(f"{kernel} {where} {name}: WRONG by {error:.1e}, allowed {bound:.1e}")
            continue
        right[name] = call
    found = timed(device, rounds, {"peer": peer} | right)
    for name in right:
        t = found[name]
        yield Trial(kernel, where, name, t.ratio, t.seconds, name == next(iter(variants)))


def label(tile: Tile) -> str:
    name = f"{tile.rows}x{tile.cols}x{tile.depth} w{tile.warps} s{tile.stages} g{tile.group}"
    return name + (" in memory" if tile.total == "memory" else "")


def influence(device: torch.device, rounds: int) -> Iterator[Trial]:
    """Fused against Gram, and tiles of each, in bfloat16; peer: the weight gradient alone."""
    from fastgrad_kernels import cross_influence as fused
    from fastgrad_kernels import gram

    big = device.type == "cuda"
    shapes = ((4096, 4096), (14336, 4096)) if big else ((40, 24),)
    batches = ((8, 2048), (8, 512), (64, 128), (128, 64)) if big else ((3, 20),)
    arch = architecture(device)
    shipped = fused_tile(torch.bfloat16, arch, True, 0)
    tiles = [shipped]
    tiles += [replace(shipped, stages=s) for s in (2, 3, 5)]
    tiles += [replace(shipped, group=g) for g in (4, 16)]
    tiles += [replace(shipped, depth=shipped.depth // 2, stages=s) for s in (4, 6)]
    tiles += [replace(FUSED_IN_MEMORY, group=g) for g in (8, 4, 16)]
    tiles += [Tile(256, 128, 32, 8, 4, 8, "memory"), Tile(128, 256, 32, 8, 3, 8, "memory")]
    tiles += [Tile(64, 256, 64, 8, 3), Tile(256, 64, 64, 8, 3)]
    if not big:
        tiles = [Tile(16, 16, 16, 1, 1), Tile(16, 32, 16, 1, 1, total="memory")]
    pairs = gram_tile(torch.bfloat16, arch)
    gram_tiles = [pairs, replace(pairs, depth=pairs.depth // 2), Tile(128, 128, 64, 8, 3)]
    if not big:
        gram_tiles = [Tile(16, 16, 16, 1, 1)]
    for rows, cols in shapes:
        for examples, tokens in batches:
            left = torch.randn(examples * tokens, rows, device=device).bfloat16()
            right = torch.randn(examples * tokens, cols, device=device).bfloat16()
            offsets = offsets_of(examples, tokens).to(device)
            want = torch.stack(
                [
                    (a.float().T @ b.float()).double().square().sum()
                    for a, b in zip(left.split(tokens), right.split(tokens), strict=True)
                ]
            )
            dense = left.float().T @ right.float()

            def off(got: object, want: Tensor = want, dense: Tensor = dense) -> float:
                """Error over what is allowed: T by float32 sums, the gradient by its rounding."""
                assert isinstance(got, tuple)
                return max(
                    distance(got[1].reshape(-1), want) / 1e-5, distance(got[0], dense) / 4e-3
                )

            def fuse(
                tile: Tile, a: Tensor = left, b: Tensor = right, o: Tensor = offsets
            ) -> Callable[[], object]:
                whole = (a.shape[1], b.shape[1], None, True)
                return lambda: fused.launch_fused(
                    a, b, o, *whole, grad_dtype=torch.bfloat16, tile=tile
                )

            def pair(
                tile: Tile, a: Tensor = left, b: Tensor = right, o: Tensor = offsets
            ) -> Callable[[], object]:
                return lambda: (a.T @ b, gram.gram_norms(a, b, o, tile=tile))

            variants: Variants = {f"fused {label(t)}": fuse(t) for t in tiles}
            if tokens <= 512:
                variants |= {f"Gram {label(t)}": pair(t) for t in gram_tiles}
            yield from trials(
                device,
                rounds,
                "influence",
                f"{rows}x{cols}, {examples} x {tokens}",
                lambda a=left, b=right: a.T @ b,
                variants,
                off,
                1.0,
            )
            release(device)


def wgrad(device: torch.device, rounds: int) -> Iterator[Trial]:
    from fastgrad_kernels import sparse_wgrad as kernel

    big = device.type == "cuda"
    rows, cols, n, size = (4096, 4096, 16384, 128) if big else (64, 48, 40, 16)
    left = torch.randn(n, rows, device=device).bfloat16()
    right = torch.randn(n, cols, device=device).bfloat16()
    count = (rows // size) * (cols // size)
    ids = torch.randperm(count, device=device)[: round(0.2 * count)].sort().values
    tile = sparse_tile(torch.bfloat16, architecture(device), size, size)
    variants: Variants = {
        f"{label(tile)}, splits by model": lambda: kernel.sparse_wgrad(left, right, ids, size, size)
    }
    choices = [replace(tile, stages=s) for s in (2, 3, 4)] if big else [tile]
    choices += [replace(tile, depth=tile.depth * 2, stages=2)] if big else []
    for t in choices:
        for splits in (1, 2, 3, 5) if big else (1, 2):
            variants[f"{label(t)}, {splits} splits"] = lambda t=t, s=splits: kernel.sparse_wgrad(
                left, right, ids, size, size, tile=t, splits=s
            )
    want = gather_blocks((left.T.float() @ right.float()), ids, size, size)
    yield from trials(
        device,
        rounds,
        "wgrad",
        f"20% of {size}x{size} of {rows}x{cols}, {n} tokens",
        lambda: left.T @ right,
        variants,
        lambda got: distance(got, want),
        1e-3,
    )


def stats(device: torch.device, rounds: int) -> Iterator[Trial]:
    from fastgrad_kernels import grad_stats as kernel

    big = device.type == "cuda"
    count, rows, cols = (250, 976, 4096) if big else (3, 20, 16)
    grads = [torch.randn(rows, cols, device=device).bfloat16() for _ in range(count)]
    want = torch.stack([g.double().square().sum() for g in grads])
    base = kernel.DEFAULT
    configs = [base]
    if big:
        configs += [replace(base, chunk=c) for c in (base.chunk // 2, base.chunk * 2)]
        configs += [replace(base, num_warps=w) for w in (2, 8)]
        configs += [replace(base, unroll=u) for u in (1, 2, 4, 8) if u != base.unroll]
    variants: Variants = {
        str(c): lambda c=c: kernel.grad_stats(grads, config=c).tensors[0] for c in configs
    }
    yield from trials(
        device,
        rounds,
        "stats",
        f"{count} x {rows}x{cols} bf16",
        lambda: torch.nn.utils.get_total_norm(grads),
        variants,
        lambda got: distance(got, want),
        1e-5,
    )


def adam(device: torch.device, rounds: int) -> Iterator[Trial]:
    from fastgrad_kernels.sparse_adam import DEFAULT, AdamConfig, AdamStep, Packed

    big = device.type == "cuda"
    shapes = llama_shapes(200_000_000, 4096) if big else [(32, 32)]
    size = 128 if big else 16
    rate = torch.tensor(1e-3, device=device)
    configs = [DEFAULT]
    if big:
        configs += [AdamConfig(chunk=c, rows=r) for c in (2048, 4096, 8192) for r in (32, 64)]
        configs += [replace(DEFAULT, num_warps=8, rows=64)]
    variants: Variants = {}
    torch.manual_seed(0)
    starts = [torch.randn(s, device=device) for s in shapes]
    grads = []
    for config in configs:
        items = []
        for start in starts:
            full = start.bfloat16()
            blocks = -(-full.shape[0] // size) * -(-full.shape[1] // size)
            ids = torch.arange(0, blocks, 5, device=device)
            packed = gather_blocks(full, ids, size, size).float()
            state = [torch.zeros_like(packed) for _ in range(2)]
            items.append(Packed(packed, *state, torch.zeros((), device=device), full, ids))
        if not grads:
            grads = [torch.randn_like(i.param).bfloat16() for i in items]
        step = AdamStep(items, grads, config)

        def run(
            step: AdamStep = step,
            first: Tensor = items[0].param,
            grads: list[Tensor] = grads,
        ) -> Tensor:
            step(grads, rate)
            return first

        variants[str(config)] = run
    peers = [torch.nn.Parameter(s) for s in starts]
    for p in peers:
        p.grad = torch.randn_like(p)
    peer = torch.optim.AdamW(peers, fused=True)
    reference: list[Tensor] = []

    def check(got: object) -> float:
        assert isinstance(got, Tensor)
        reference.append(got.clone())
        return distance(got, reference[0])  # one step each from the same start

    yield from trials(
        device, rounds, "adam", f"20% of {size}x{size}", peer.step, variants, check, 1e-6
    )


ALL: dict[str, Callable[[torch.device, int], Iterator[Trial]]] = {
    "influence": influence,
    "wgrad": wgrad,
    "stats": stats,
    "adam": adam,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kernels", default=",".join(ALL))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="JSON; on a GPU bench/results/tune.json")
    args = parser.parse_args()
    if args.device.partition(":")[0] not in ("cuda", "cpu"):
        parser.error(f"device {args.device!r}: cuda, cuda:N or cpu")
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is visible to PyTorch")
    if device.type == "cpu" and not dispatch.interpreted():
        parser.error("on a CPU the kernels run in the interpreter: set TRITON_INTERPRET=1")
    found: list[Trial] = []
    for name in args.kernels.split(","):
        if name not in ALL:
            parser.error(f"unknown kernel {name!r}; there are {', '.join(ALL)}")
        for trial in ALL[name](device, args.rounds):
            found.append(trial)
            mark = "  (shipped)" if trial.shipped else ""
            print(
                f"{trial.kernel:10} {trial.where:36} {trial.ratio:7.3f} x peer "
                f"{trial.seconds * 1e3:9.3f} ms  {trial.variant}{mark}",
                flush=True,
            )
    output = args.output
    if output is None and device.type == "cuda":
        output = Path(__file__).parent / "results" / "tune.json"
    if output is not None:
        data = {"environment": environment(), "trials": [asdict(t) for t in found]}
        output.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
