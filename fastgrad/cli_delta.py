"""``fastgrad delta``: show, stack and apply delta files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from fastgrad.cli_common import Json, busy, emit, emit_json, usage, verb
from fastgrad.cli_models import transformers_module
from fastgrad.cli_values import shard_size_of

delta_app = typer.Typer(
    help="Show, stack and apply deltas: what partial training changed.", no_args_is_help=True
)

DeltaPath = Annotated[
    Path, typer.Argument(metavar="DELTA", help="A file of fg.save_delta or fastgrad delta stack.")
]


@verb(delta_app, "info")
def info(path: DeltaPath, as_json: Json = False) -> None:
    """Show what a delta changes and which weights it belongs to.

    Example: [bold]fastgrad delta info delta.safetensors[/]
    """
    from fastgrad.blocks import in_words
    from fastgrad.delta_files import read_delta_file

    delta, size = read_delta_file(path), os.path.getsize(path)
    value_bytes = sum(v.numel() * v.element_size() for v in delta.values.values())
    changed = {
        name: delta.grid(name).numel
        if ids is None
        else int(delta.grid(name).sizes()[ids.numpy()].sum())
        for name, ids in delta.ids.items()
    }
    if as_json:
        emit_json({
            "path": str(path), "bytes": size, "value_bytes": value_bytes,
            "n_parameters": delta.n_parameters, "n_blocks": delta.n_blocks,
            "blocks": in_words(delta.spec, delta.specs), "base_hash": delta.base_hash,
            "result_hash": delta.result_hash, "changed": changed,
        })  # fmt: skip
        return
    lines = [
        f"{delta.n_parameters:,} weights in {delta.n_blocks:,} blocks of granularity "
        f"{in_words(delta.spec, delta.specs)}",
        f"{size:,} bytes, {value_bytes:,} of them values",
        f"trained from {delta.base_hash}",
        f"results in   {delta.result_hash or '(not said: saved by an older version)'}",
        "",
        f"{'changed':>14}  {'of it':>6}  parameter",
    ]
    lines += [
        f"{count:>14,}  {count / delta.grid(name).numel:>6.1%}  {name}"
        for name, count in changed.items()
    ]
    emit("\n".join(lines))


@verb(delta_app, "stack")
def stack(
    paths: Annotated[
        list[Path], typer.Argument(metavar="DELTA...", help="In the order they were trained.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the merged delta goes.")],
    as_json: Json = False,
) -> None:
    """Merge deltas that were trained one on top of another into one for the first base.

    Example: [bold]fastgrad delta stack first.safetensors second.safetensors -o both.safetensors[/]
    """
    from fastgrad.delta_stack import stack_deltas

    size = stack_deltas(paths, output)
    if as_json:
        emit_json({"path": str(output), "bytes": size})
    else:
        emit(f"wrote {output}, {size:,} bytes")


@verb(delta_app, "apply")
def apply(
    base: Annotated[
        Path,
        typer.Argument(metavar="BASE_DIR", exists=True, file_okay=False,
                       help="The base model's folder, or one of safetensors files."),
    ],
    path: DeltaPath,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A new folder for the full checkpoint.")
    ],
    max_shard_size: Annotated[
        str | None, typer.Option(help="Of a transformers model, such as 5GB.")
    ] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Write the base model with a delta as a full checkpoint.

    Example: [bold]fastgrad delta apply my-model/ delta.safetensors -o adapted/[/]
    """
    from fastgrad.delta_merge import merge_delta

    size = shard_size_of(max_shard_size)
    if size is not None and not (base / "config.json").is_file():
        usage("it is of a transformers model, and this folder has no config.json: its files are "
              "copied as they are", "--max-shard-size")  # fmt: skip
    if (base / "config.json").is_file():
        transformers_module()  # without its progress bars
    with busy("reading, hashing and writing the weights", quiet=as_json):
        made = merge_delta(base, path, output, max_shard_size=size)
    if as_json:
        files = sorted(p.name for p in made.iterdir())
        emit_json({"path": str(made), "files": files})
    else:
        emit(f"wrote {made}")
