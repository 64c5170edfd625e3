"""How long does `fastgrad plan` take for a model of 70 billion weights, from start to end?

    python bench/plan_start.py                                         # two minutes
    python bench/plan_start.py --json bench/results/plan_start.json

The command runs as a process of its own, on one thread, with nothing but a config.json: the fastest
of several runs, in turn, by the clock and in processor time (whatever else a machine does only adds
to it), beside a process that does nothing but import transformers' module of the model. Python
keeps what it has compiled, as it does unless told otherwise. Before anything is timed: a plan's
weights are as many as the shape has.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from timing import environment

AIM = 5.0  # seconds
#: Shapes as their makers published them, and the number of weights that follows.
CONFIGS: dict[str, tuple[dict[str, Any], int]] = {
    "Llama 3 70B": (
        {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
            "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
            "max_position_embeddings": 8192,
        },
        70_553_706_496,
    ),
    "Qwen2 72B": (
        {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "dtype": "bfloat16",
            "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 152064,
            "max_position_embeddings": 32768,
        },
        72_706_203_648,
    ),
    "Mixtral 8x22B": (
        {
            "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "dtype": "bfloat16",
            "hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56,
            "num_attention_heads": 48, "num_key_value_heads": 8, "vocab_size": 32768,
            "max_position_embeddings": 65536, "num_local_experts": 8, "num_experts_per_tok": 2,
        },
        140_630_071_296,
    ),
}  # fmt: skip
OPTIONS = {
    "memory at rest": [],
    "peak of a step": ["--batch", "8x2048"],
    "peak and operations": ["--batch", "8x2048", "--flops"],
}
IMPORT = "the import alone"


def run(command: list[str]) -> tuple[float, float, str]:
    """Seconds by the clock, in processor time (user and system), and the standard output."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True,
                          env=env | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, spent, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (config, weights) in CONFIGS.items():
            Path(folder, "config.json").write_text(json.dumps(config))
            command = [sys.executable, "-m", "fastgrad.cli", "plan", folder]
            found = json.loads(run([*command, "--json"])[2])["n_total"]  # and warms the disk cache
            assert found == weights, f"{name}: {found} weights planned, {weights} by its shape"
            kind = config["model_type"]
            imports = f"import transformers.models.{kind}.modeling_{kind}"
            lines = {what: [*command, *options] for what, options in OPTIONS.items()}
            lines[IMPORT] = [sys.executable, "-c", imports]
            runs = [{what: run(line)[:2] for what, line in lines.items()} for _ in range(args.runs)]
            for what in lines:
                wall, spent = min(r[what] for r in runs)
                rows.append({"model": name, "what": what, "seconds": wall, "cpu_seconds": spent})
                print(f"| {name} | {what} | {wall:.1f} | {spent:.1f} |", flush=True)
    slowest = max(r["seconds"] for r in rows if r["what"] in OPTIONS)
    print(f"slowest plan: {slowest:.1f} s; aim: under {AIM:g} s")
    if args.json:
        env = environment() | {"transformers": importlib.metadata.version("transformers")}
        rows_ = {"environment": env, "aim_seconds": AIM, "runs": args.runs, "rows": rows}
        args.json.write_text(json.dumps(rows_, indent=2) + "\n")


if __name__ == "__main__":
    main()
