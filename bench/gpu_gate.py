"""Are the kernels right, and are they fast? One command, under eight minutes on an H200.

    python bench/gpu_gate.py                        # all, and bench/results/gpu_gate.json
    python bench/gpu_gate.py --rows adam,stats      # some rows, correctness first all the same
    python bench/gpu_gate.py --device cpu           # the gate's own code at small sizes, anywhere

First every operator is compared with float64 on fresh random inputs; nothing is timed if one is
wrong. Then each row is timed against its peers, interleaved, on the device's clock, and judged by
its aim. Exit status: 1 if a check failed, 0 otherwise; a missed aim is printed, not hidden.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import gate_checks
import gate_rows
from fastgrad_kernels import dispatch
from gate_rows import Row
from timing import environment


def correctness(device: torch.device) -> tuple[list[gate_checks.Check], bool]:
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checks = list(gate_checks.run(device))
    for text in sorted({str(w.message) for w in caught if "blocked PyTorch" in str(w.message)}):
        print(f"note: {text}")
    if device.type == "cpu":
        which = "the operators' CPU form (TRITON_INTERPRET=1 runs the Triton kernels)"
        if dispatch.interpreted():
            which = "the Triton kernels, interpreted"
        print(f"checked: {which}")
    bad = [c for c in checks if not c.ok]
    for c in bad:
        print(f"WRONG {c.name}: error {c.error:.2e}, allowed {c.bound:.2e}")
    seconds = time.perf_counter() - start
    print(
        f"{len(checks) - len(bad)} of {len(checks)} checks passed in {seconds:.0f} s on {device}\n"
    )
    return checks, not bad


def table(rows: list[Row]) -> str:
    """Plain text, so that it can be read in any log."""
    head = ("measured", "against", "ratio", "quartiles", "aim", "", "ours, ms", "theirs, ms")
    lines = [head]
    for r in rows:
        verdict = "" if r.aim is None else "met" if r.met else "MISSED"
        aim = "–" if r.aim is None else f"{'>=' if r.at_least else '<='} {r.aim:g}"
        lines.append(
            (
                r.measured,
                r.against,
                f"{r.ratio:.3f}",
                f"{r.low:.3f}–{r.high:.3f}",
                aim,
                verdict,
                f"{r.ours * 1e3:.3f}",
                f"{r.theirs * 1e3:.3f}",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = []
    for line in lines:
        cells = [
            c.ljust(w) if i in (0, 1, 5) else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ]
        text.append("  ".join(cells).rstrip())
    text.insert(1, "─" * max(map(len, text)))
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (15 on a GPU, 3 on a CPU)")
    parser.add_argument(
        "--rows", default="", help=f"comma-separated, of: {', '.join(gate_rows.ALL)}"
    )
    parser.add_argument("--skip-checks", action="store_true", help="time without checking first")
    parser.add_argument("--output", type=Path, help="JSON; on a GPU bench/results/gpu_gate.json")
    parser.add_argument("--commit", help="the commit measured, where there is no git to ask")
    args = parser.parse_args()
    wanted = [r for r in args.rows.split(",") if r] or list(gate_rows.ALL)
    if unknown := sorted(set(wanted) - set(gate_rows.ALL)):
        parser.error(f"unknown rows {', '.join(unknown)}; there are {', '.join(gate_rows.ALL)}")
    if args.device.partition(":")[0] not in ("cuda", "cpu"):
        parser.error(f"device {args.device!r}: cuda, cuda:N or cpu")
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is visible to PyTorch; --device cpu runs the gate at small sizes")
    start = time.perf_counter()
    checks: list[gate_checks.Check] = []
    if not args.skip_checks:
        checks, right = correctness(device)
        if not right:
            sys.exit("nothing is timed on wrong results")
    rounds = args.rounds or (15 if device.type == "cuda" else 3)
    rows: list[Row] = []
    for name in wanted:
        began = time.perf_counter()
        found = list(gate_rows.ALL[name](device, rounds))
        if device.type != "cuda":  # the aims are about full sizes on a GPU
            found = [replace(r, aim=None) for r in found]
        rows += found
        print(f"{name}: {len(found)} rows in {time.perf_counter() - began:.0f} s", flush=True)
    print(f"\n{table(rows)}\n")
    if device.type != "cuda":
        print(
            "Small sizes on a CPU: these ratios say that the gate works, not how fast kernels are."
        )
    print(f"{time.perf_counter() - start:.0f} s in all")
    output = args.output
    if output is None and device.type == "cuda":
        output = Path(__file__).parent / "results" / "gpu_gate.json"
    if output is not None:
        env = environment() | ({"commit": args.commit} if args.commit else {})
        data = {
            "environment": env | {"device": str(device), "rounds": rounds},
            "checks": [vars(c) | {"ok": c.ok} for c in checks],
            "rows": [vars(r) | {"met": r.met} for r in rows],
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(data, indent=1) + "\n")
        print(f"written: {output}")


if __name__ == "__main__":
    main()
