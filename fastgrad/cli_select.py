"""``fastgrad select``: what to train, from a measurement and one budget."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from fastgrad.cli_common import Json, beside, emit, emit_json, note, usage
from fastgrad.cli_models import load_model, meta_model
from fastgrad.cli_values import batch_shape_of, dtype_of, granularity_of, shares_of, source_of


def select_command(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="A model's folder, gradient_blueprint.json, a hub "
                                              "id, or statistics that `fastgrad probe` wrote."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where the selection goes.")
    ] = Path("selection.json"),
    fraction: Annotated[float | None, typer.Option(help="Share of all parameters.")] = None,
    count: Annotated[int | None, typer.Option(help="Number of blocks.")] = None,
    submodules: Annotated[
        int | None, typer.Option(help="Number of parameters to choose blocks of.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory of a training step, such as 16GiB.")
    ] = None,
    flops: Annotated[
        str | None, typer.Option(help="FLOPs of a training step, such as 2.5T; with --batch.")
    ] = None,
    k_star: Annotated[
        str | None,
        typer.Option("--k-star", help="The blueprint's own k*: memory, flops, or time or energy "
                                      "where it holds measurements of them.")
    ] = None,
    ranking: Annotated[
        str,
        typer.Option(help="norm, rms, relative; of statistics also l1, alignment, "
                          "alignment_density; controls: random, magnitude, first, last."),
    ] = "rms",
    direction: Annotated[
        str | None, typer.Option(help="Name of the target direction, for alignment.")
    ] = None,
    blocks: Annotated[
        list[str] | None,
        typer.Option(help="Granularity or head; the source's by default. Or PATTERN=GRANULARITY, "
                          "repeatable: the first that matches a name counts."),
    ] = None,
    include: Annotated[list[str] | None, typer.Option(help="Name pattern; repeatable.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Name pattern; repeatable.")] = None,
    floor: Annotated[
        list[str] | None,
        typer.Option(help="Least share of each group: 0.05, or PATTERN=0.05, repeatable."),
    ] = None,
    cap: Annotated[
        list[str] | None, typer.Option(help="Largest share of each group, likewise.")
    ] = None,
    spread_by: Annotated[
        str | None, typer.Option(help="Groups of --floor and --cap: layer, parameter or kind.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of --ranking random; 0 by default.")
    ] = None,
    domain: Annotated[
        str | None,
        typer.Option(help="Tag of the blueprint's domain; the primary one by default."),
    ] = None,
    local: Annotated[
        Path | None, typer.Option(help="Statistics of a local sample, to blend in.")
    ] = None,
    weight: Annotated[
        str | None,
        typer.Option(help="With --local: weight of the blueprint in the blend, or auto (the "
                          "default)."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model folder or hub id; by default the blueprint's, where one is "
                          "needed."),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(help="With --memory or --flops: adamw (the default), torch-adamw, "
                          "sgd-momentum or sgd."),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(help="With --memory or --flops: rows x tokens, such as 8x2048."),
    ] = None,
    master: Annotated[
        str | None, typer.Option(help="With --memory: dtype of master copies.")
    ] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Choose what to train from a measurement and one budget.

    Example: [bold]fastgrad select my-model/ --fraction 0.2 -o selection.json[/]

    At least 2 % and at most half of each layer, as much as fits into 16 GiB:
    [bold]fastgrad select my-model/ --memory 16GiB --batch 8x2048 --floor 0.02 --cap 0.5[/]
    """
    from fastgrad.blocks import in_words
    from fastgrad.choosing import select
    from fastgrad.granularity import HEAD

    planned = memory is not None or flops is not None
    _no_idle_options({
        "--optimizer": (optimizer, planned, "--memory or --flops"),
        "--batch": (batch, planned, "--memory or --flops"),
        "--master": (master, memory is not None, "--memory"),
        "--weight": (weight, local is not None, "--local"),
        "--seed": (seed, ranking == "random", "--ranking random"),
    })  # fmt: skip
    shape, dtype = batch_shape_of(batch), dtype_of(master)
    granularity = granularity_of(blocks)
    measured = source_of(source, local, weight or "auto", domain)
    reads_weights = ranking in ("magnitude", "relative")
    reference = model
    if reference is None and (
        planned or ranking == "magnitude" or granularity == HEAD or isinstance(granularity, dict)
    ):
        reference = beside(source)
    net = None
    if reference is not None:
        net = load_model(reference) if reads_weights else meta_model(reference)
    with warnings.catch_warnings():
        # It stands in the note, which is part of what is printed.
        warnings.filterwarnings("ignore", message="the blueprint is a private release")
        selection = select(
            measured, net, fraction=fraction, count=count, submodules=submodules, memory=memory,
            flops=flops, k_star=k_star, blocks=granularity, ranking=ranking, direction=direction,
            include=include or None, exclude=exclude or None, floor=shares_of("floor", floor),
            cap=shares_of("cap", cap), spread_by=spread_by, seed=seed or 0,
            optimizer=optimizer or "adamw", batch_shape=shape, master_dtype=dtype,
        )  # fmt: skip
    selection.save(output)
    if as_json:
        emit_json({
            "path": str(output),
            "n_parameters": selection.n_parameters,
            "n_total": selection.n_total,
            "fraction": selection.fraction,
            "n_blocks": selection.n_blocks,
            "blocks": in_words(selection.spec, selection.specs),
            "selected": {name: selection.n_selected(name) for name in selection.names},
            "meta": dict(selection.meta),
        })  # fmt: skip
    else:
        emit(selection.summary())
        note(f"wrote {output}")
        note("not compared with any weights; `fastgrad blueprint verify` and make_partial do that")


def _no_idle_options(options: dict[str, tuple[object, bool, str]]) -> None:
    """An option that would change nothing is a mistake, and is said to be one."""
    for option, (value, counts, needed) in options.items():
        if value is not None and not counts:
            usage(f"it would change nothing: it goes with {needed}", option)
