"""What does T cost? A training step with the full cross-influence tensor against a plain step.

    python bench/step_overhead.py                 # the table of the README
    python bench/step_overhead.py --rounds 3      # quick look

A step is zero_grad, forward and backward of a Llama-architecture model; the optimizer, which is
the same for all, is left out, so that the ratios are the strict ones. Before anything is timed,
T is compared with one-example-at-a-time backward. Peer: Opacus' ghost norms. The C library keeps
freed memory for all contenders alike (--system-malloc leaves it as it is).
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
import fastgrad as fg
from timing import environment, interleaved, keep_freed_memory

VOCAB = 4096


def build(width: int, layers: int, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=width,
            intermediate_size=int(width * 8 / 3) // 16 * 16,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            max_position_embeddings=4096,
            tie_word_embeddings=tied,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            use_cache=False,
        )
    )


def check_T(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """Largest relative error of T against the definition; raises above 1e-4.

    Norms below a thousandth of the example's largest are judged against that thousandth: both
    sides hold rounding of the whole backward pass.
    """
    with fg.Probe(model, strict=True, hash_weights=False) as probe:
        model(input_ids=ids, labels=ids).loss.backward()
    stats = probe.stats()
    T = stats.influence("example_mean")
    worst = 0.0
    for j in range(ids.shape[0]):
        model.zero_grad()
        model(input_ids=ids[j : j + 1], labels=ids[j : j + 1]).loss.backward()
        own = dict(model.named_parameters())
        expected = np.array([float(own[n].grad.double().norm()) for n in stats.names])
        error = abs(T[:, j] - expected) / np.maximum(expected, 1e-3 * expected.max())
        worst = max(worst, float(error.max()))
    model.zero_grad()
    if worst > 1e-4:
        raise SystemExit(f"T is off by {worst:.1e} relative: no timing on wrong numbers")
    return worst


def opacus_step(model: LlamaForCausalLM, ids: torch.Tensor) -> Callable[[], object] | str:
    """A step with Opacus' ghost norms, or why it cannot run."""
    try:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping
    except ImportError:
        return "not installed (pip install 'fastgrad[bench]')"

    def make() -> Callable[[], object]:
        wrapped = GradSampleModuleFastGradientClipping(
            model,
            batch_first=True,
            loss_reduction="mean",
            max_grad_norm=1.0,
            use_ghost_clipping=True,
            strict=False,
        )

        def step() -> object:
            model.zero_grad()
            wrapped(input_ids=ids, labels=ids).loss.backward()
            return wrapped.get_norm_sample()

        return step

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            step = make()
            step()
        except Exception as error:
            return f"fails: {type(error).__name__}: {str(error).splitlines()[0][:70]}"
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens in a batch")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tied", action="store_true", help="tie embedding and output weights")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--system-malloc", action="store_true", help="leave the heap as it is")
    args = parser.parse_args()
    if not args.system_malloc and not keep_freed_memory():
        print("this C library cannot keep freed memory: page faults are in the figures")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # Opacus' hooks
    console = Console()
    rows = []
    for tokens in args.tokens:
        n = max(2, args.batch_tokens // tokens)
        model = build(args.width, args.layers, args.tied)
        ids = torch.randint(3, VOCAB, (n, tokens), generator=torch.Generator().manual_seed(1))
        error = check_T(model, ids)

        def plain(model=model, ids=ids) -> None:
            model.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()

        def probed(blocks: str, per_example: bool, model=model, ids=ids) -> Callable[[], object]:
            probe = fg.Probe(model, blocks, per_example=per_example, hash_weights=False)

            def step() -> None:
                model.zero_grad()
                with probe:
                    model(input_ids=ids, labels=ids).loss.backward()

            return step

        contenders: dict[str, Callable[[], object]] = {
            "plain step": plain,
            "gradient norms": probed("module", False),
            "T, per parameter": probed("module", True),
            "T, 128x128 tiles": probed("128x128", True),
        }
        opacus = opacus_step(build(args.width, args.layers, args.tied), ids)
        if callable(opacus):
            contenders["Opacus ghost norms"] = opacus
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task(f"{n} x {tokens} tokens", total=args.rounds + 2)
            result = interleaved(contenders, args.rounds, progress=partial(bar.advance, task))
        table = Table(title=f"{args.layers} layers of width {args.width}, {n} x {tokens} tokens")
        for column in ("step", "ms (median)", "ratio to plain", "quartiles"):
            table.add_column(column, justify="left" if column == "step" else "right")
        for name, t in result.items():
            figures = (f"{t.seconds * 1e3:.1f}", f"{t.ratio:.3f}", f"{t.low:.3f}–{t.high:.3f}")
            table.add_row(name, *figures)
            rows.append(
                {
                    "tokens": tokens,
                    "examples": n,
                    "step": name,
                    "ratio": t.ratio,
                    "low": t.low,
                    "high": t.high,
                    "seconds": t.seconds,
                }
            )
        if not callable(opacus):
            table.add_row("Opacus ghost norms", "–", "–", str(opacus))
        console.print(table)
        console.print(f"T against one-example-at-a-time backward: {error:.1e} relative at worst\n")
    if args.output:
        settings = {k: v for k, v in vars(args).items() if k != "output"}
        data = {"environment": environment(), "settings": settings, "rows": rows}
        args.output.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
