"""``fastgrad influence``: what the cross-influence says, scores of examples, and both choices."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Annotated

import typer

from fastgrad.cli_common import Json, busy, emit, emit_json, emit_text, note, usage, verb

influence_app = typer.Typer(
    help="Which blocks and which examples, and which of them together.", no_args_is_help=True
)

Stats = Annotated[
    Path,
    typer.Argument(metavar="STATS", help="Statistics that `fastgrad probe` wrote, with examples; "
                                         "or the folder of a shard writer."),
]  # fmt: skip
Scale = Annotated[
    str, typer.Option(help="contribution, example_mean or example_sum; see docs/statistics.md.")
]
Whole = Annotated[bool, typer.Option("--whole", help="Parameters as blocks, without their parts.")]


@verb(influence_app, "report")
def report(
    stats: Stats,
    scale: Scale = "contribution",
    whole: Whole = False,
    bootstrap: Annotated[
        int, typer.Option(min=1, help="Resamples of the intervals; fewer than 50: no verdicts.")
    ] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Of the resamples and draws.")] = 0,
    as_json: Json = False,
) -> None:
    """Say how concentrated both margins are, how many patterns there are, whether examples differ
    in where they pull, and whether choosing blocks and examples multiplies; with intervals.

    Example: [bold]fastgrad influence report stats.safetensors[/]
    """
    from fastgrad.influence import influence_report
    from fastgrad.stats import GradientStats

    _known(scale)
    with busy("resampling", quiet=as_json):
        found = influence_report(
            GradientStats.load(stats, blocks=not whole), scale=scale, blocks=not whole,  # type: ignore[arg-type]
            n_bootstrap=bootstrap, n_permutations=bootstrap, seed=seed,
        )  # fmt: skip
    if as_json:
        emit_json(found.to_dict())
    else:
        emit_text(found.summary())


@verb(influence_app, "scores")
def scores(
    stats: Stats,
    by: Annotated[
        str, typer.Option(help="norm; with a target direction also alignment, cosine.")
    ] = "norm",
    scale: Annotated[
        str | None,
        typer.Option(help="As for report; example_mean by default, where it is known."),
    ] = None,
    direction: Annotated[
        str | None, typer.Option(help="Name of the target direction, where there are several.")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Name pattern of parameters; repeatable.")
    ] = None,
    top: Annotated[int | None, typer.Option(min=1, help="The best only.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write CSV there instead of printing it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Score every example, best first: lines of id and score as CSV.

    Example: [bold]fastgrad influence scores stats.safetensors --top 20[/]
    """
    import numpy as np

    from fastgrad.scores import example_scores
    from fastgrad.stats import GradientStats

    if by not in ("norm", "alignment", "cosine"):
        usage("use norm, alignment or cosine", "--by")
    if scale is not None:
        _known(scale)
    read = GradientStats.load(stats, blocks=False)
    found = example_scores(
        read, by, include=include or None, direction=direction, scale=scale,  # type: ignore[arg-type]
    )  # fmt: skip
    order = np.argsort(-found, kind="stable")[:top]
    rows = [(int(read.example_ids[i]), float(found[i])) for i in order]
    if output is None and as_json:
        emit_json([{"id": i, "score": score} for i, score in rows])
        return
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerows([("id", "score"), *((i, repr(score)) for i, score in rows)])
    if output is None:
        emit(table.getvalue(), end="")
        return
    from fastgrad.files import write_text

    write_text(output, table.getvalue())
    if as_json:
        emit_json({"path": str(output), "n": len(rows)})
    else:
        note(f"wrote {output}")


@verb(influence_app, "choose")
def choose(
    stats: Stats,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where the selection of blocks goes.")
    ] = Path("selection.json"),
    ids: Annotated[
        Path, typer.Option(help="Where the ids of the chosen examples go, one a line, best first.")
    ] = Path("examples.txt"),
    parameters: Annotated[float | None, typer.Option(help="Share of all parameters.")] = None,
    examples: Annotated[float | None, typer.Option(help="Share of the examples.")] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="Instead of one or both: most that k times q may be, 1 being all."),
    ] = None,
    strategy: Annotated[
        str, typer.Option(help="marginal, alternating or low_rank.")
    ] = "alternating",
    include: Annotated[list[str] | None, typer.Option(help="Name pattern; repeatable.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Name pattern; repeatable.")] = None,
    scale: Scale = "contribution",
    whole: Whole = False,
    as_json: Json = False,
) -> None:
    """Choose the blocks to train and the examples to train them on, each with an eye on the other.

    Example: [bold]fastgrad influence choose stats.safetensors --parameters 0.2 --examples 0.1[/]
    """
    from fastgrad.files import write_text
    from fastgrad.joint import STRATEGIES
    from fastgrad.jointly import select_jointly
    from fastgrad.stats import GradientStats

    _known(scale)
    if strategy not in STRATEGIES:
        usage(f"use {', '.join(STRATEGIES)}", "--strategy")
    if budget is None and (parameters is None or examples is None):
        usage("give --parameters and --examples, or --budget")
    found = select_jointly(
        GradientStats.load(stats, blocks=not whole), parameters, examples, budget=budget,
        strategy=strategy, include=include or None, exclude=exclude or None,
        scale=scale, blocks=not whole,  # type: ignore[arg-type]
    )  # fmt: skip
    write_text(ids, "".join(f"{i}\n" for i in found.example_ids.tolist()))
    found.selection.save(output)
    choice = found.choice
    if as_json:
        emit_json({
            "path": str(output), "ids": str(ids), "parameters": choice.parameters,
            "examples": len(found.example_ids), "share": choice.share,
            "by_parameters": choice.by_blocks, "by_examples": choice.by_examples,
            "ratio": choice.ratio, "cost": choice.cost, "strategy": choice.strategy,
        })  # fmt: skip
    else:
        emit_text(found.summary())
        note(f"wrote {output} and {ids}")


def _known(scale: str) -> None:
    if scale not in ("contribution", "example_mean", "example_sum"):
        usage("use contribution, example_mean or example_sum", "--scale")
