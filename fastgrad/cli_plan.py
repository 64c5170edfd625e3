"""``fastgrad plan``: memory and operations of a training step, from a config alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastgrad.cli_common import Json, ModelRef, emit_json, emit_text, usage
from fastgrad.cli_imports import importing
from fastgrad.cli_models import meta_model
from fastgrad.cli_values import DTYPES, batch_shape_of, dtype_of


def plan(
    model: ModelRef,
    selection: Annotated[
        Path | None, typer.Option(help="A selection; all parameters without one.")
    ] = None,
    optimizer: Annotated[
        str, typer.Option(help="adamw, torch-adamw, sgd-momentum or sgd.")
    ] = "adamw",
    batch: Annotated[
        str | None, typer.Option(help="Rows x tokens, such as 8x2048, for a step's peak.")
    ] = None,
    flops: Annotated[
        bool, typer.Option("--flops", help="Plan operations too; needs --batch.")
    ] = False,
    master: Annotated[
        str | None, typer.Option(help=f"dtype of master copies: {', '.join(DTYPES)}.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="dtype of the weights; the config's by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Plan the memory of a training step, and its operations, from a model's config alone.

    Nothing is allocated and no weights are read: config.json is enough. How long that takes for 70
    billion weights, seconds from the start of the command, is measured in docs/selection.md.

    Example: [bold]fastgrad plan my-model/ --selection selection.json --batch 8x2048[/]
    """
    shape, master_dtype, weights = batch_shape_of(batch), dtype_of(master), dtype_of(dtype)
    if flops and shape is None:
        usage("it is for one step and needs --batch, such as 8x2048", "--flops")
    chosen = None
    if selection is not None:
        from fastgrad.selection import Selection

        chosen = Selection.load(selection)
    net = meta_model(model, weights)
    with importing():
        from fastgrad.planner import plan_memory

    if chosen is not None:
        chosen.check_model(net, allow_other_weights=True)  # a meta model has no weights to compare
    found = plan_memory(
        net, chosen, optimizer=optimizer, batch_shape=shape, master_dtype=master_dtype
    )
    cost = None
    if flops and shape is not None:
        from fastgrad.flops import plan_flops

        cost = plan_flops(net, chosen, batch_shape=shape, optimizer=optimizer)
    if as_json:
        emit_json(found.to_dict() | ({} if cost is None else {"flops": cost.to_dict()}))
    else:
        emit_text(found.table() + ("" if cost is None else f"\n\n{cost.table()}"))
