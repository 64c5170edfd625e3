"""What select_jointly's core costs at 10,000 blocks x 100,000 examples of heavy-tailed influence.

The matrix lies in a file (4 GB), as a measurement larger than memory does; time and highest memory
are those of the choice alone, in a process of its own for each strategy, and the result is checked
against sums made anew from the file. The file has just been written or checked, so where memory has
room for it, it is read from the system's cache.

    python bench/joint_cost.py --output bench/results/joint_cost.json   # about four minutes
    python bench/joint_cost.py --blocks 500 --examples 5000
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

STRATEGIES = ("marginal", "alternating", "low_rank")
AIM_SECONDS, AIM_BYTES = 60.0, 4 * 2**30


def write(path: Path, blocks: int, examples: int, seed: int) -> None:
    """Lognormal margins, a handful of patterns, noise; written in stretches."""
    rng = np.random.default_rng(seed)
    strength = rng.lognormal(0, 1, examples).astype(np.float32)
    sides = rng.normal(0, 1, (4, examples)).astype(np.float32)
    out = np.lib.format.open_memmap(path, "w+", np.float32, (blocks, examples))
    for start in range(0, blocks, 100):
        rows = min(100, blocks - start)
        loads = rng.normal(0, 0.3, (rows, 4)).astype(np.float32)
        part = np.exp(loads @ sides + 0.5 * rng.standard_normal((rows, examples), np.float32))
        part *= strength * rng.lognormal(0, 2, (rows, 1)).astype(np.float32)
        out[start : start + rows] = part
    out.flush()


def measure(path: Path, strategy: str, parameters: float, examples: float) -> dict[str, Any]:
    """In this process: choose, and say what it took."""
    from fastgrad.joint import choose_jointly
    from fastgrad.mass import MassMatrix, NpyRows
    from fastgrad.meter import peak_memory_bytes

    start = time.perf_counter()
    mass = MassMatrix.of(NpyRows(path))
    found = choose_jointly(mass, parameters, examples, strategy=strategy)  # type: ignore[arg-type]
    seconds, peak = time.perf_counter() - start, peak_memory_bytes()
    again = np.load(path, mmap_mode="r")
    columns = np.flatnonzero(found.examples)
    held = sum(float(again[i, columns].sum(dtype=np.float64)) for i in np.flatnonzero(found.blocks))
    total = sum(float(row.sum(dtype=np.float64)) for row in again)
    if abs(held / total - found.share) > 1e-6 * found.share:
        raise SystemExit(f"{strategy}: a share of {found.share} is reported, {held / total} found")
    return {"strategy": strategy, "seconds": seconds, "peak_bytes": peak, "share": found.share,
            "ratio": found.ratio, "rounds": found.rounds}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", type=int, default=10_000)
    parser.add_argument("--examples", type=int, default=100_000)
    parser.add_argument("--parameters-share", type=float, default=0.2)
    parser.add_argument("--examples-share", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the matrix goes for the while")
    parser.add_argument("--matrix", type=Path, help="a file to write it to, if it is not there "
                        "already, and to keep")  # fmt: skip
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--measure", nargs=2, metavar=("FILE", "STRATEGY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    shares = args.parameters_share, args.examples_share
    if args.measure:
        print(json.dumps(measure(Path(args.measure[0]), args.measure[1], *shares)))
        return
    from timing import environment

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = args.matrix or Path(folder) / "influence.npy"
        if not path.exists():
            write(path, args.blocks, args.examples, args.seed)
        elif (shape := np.load(path, mmap_mode="r").shape) != (args.blocks, args.examples):
            parser.error(f"{path} holds another matrix, {shape}. Remedy: another --matrix")
        rows = []
        for strategy in STRATEGIES:
            command = [sys.executable, __file__, "--measure", str(path), strategy]
            command += ["--parameters-share", str(shares[0]), "--examples-share", str(shares[1])]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr or f"{strategy} failed")
            rows.append(json.loads(done.stdout))
            row = rows[-1]
            met = row["seconds"] <= AIM_SECONDS and row["peak_bytes"] <= AIM_BYTES
            print(f"{strategy}: {row['seconds']:.1f} s, {row['peak_bytes'] / 2**20:,.0f} MiB at "
                  f"most, share {row['share']:.3f}, {row['rounds']} rounds: aim "
                  f"{'met' if met else 'missed'}")  # fmt: skip
    if args.output:
        left_out = ("output", "measure", "folder", "matrix")
        settings = {k: v for k, v in vars(args).items() if k not in left_out}
        env = environment() | {"numpy": np.__version__}
        data = {"environment": env, "settings": settings, "rows": rows,
                "aim": {"seconds": AIM_SECONDS, "bytes": AIM_BYTES}}  # fmt: skip
        args.output.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
