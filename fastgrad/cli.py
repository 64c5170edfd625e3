"""The ``fastgrad`` command.

Data goes to standard output, everything else to standard error. Exit codes: 0 done, 1 refused
(one line says why and what to do), 2 wrong usage.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import fastgrad
from fastgrad.cli_delta import delta_app
from fastgrad.cli_values import (
    DTYPES,
    batch_shape_of,
    dtype_of,
    granularity_of,
    shares_of,
    source_of,
)
from fastgrad.errors import FastgradError, MissingExtraError, ProbeError, ResourceError

if TYPE_CHECKING:
    import torch
    from torch import nn

app = typer.Typer(
    help="Measure where a model's gradient is concentrated, and train only there.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    add_completion=False,
)
blueprint_app = typer.Typer(
    help="Make, show and check gradient_blueprint.json.", no_args_is_help=True
)
app.add_typer(blueprint_app, name="blueprint")
app.add_typer(delta_app, name="delta")

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
BlueprintPath = Annotated[
    Path, typer.Argument(metavar="BLUEPRINT", help="A model's folder or gradient_blueprint.json.")
]
ModelPath = Annotated[
    Path,
    typer.Argument(metavar="MODEL_DIR", exists=True, file_okay=False,
                   help="A transformers model folder (config.json, weights, tokenizer)."),
]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: like :data:`app`, with our own errors, and files that cannot be read or written,
    as one red line and exit code 1."""
    try:
        app(args=None if argv is None else list(argv), prog_name="fastgrad")
    except BrokenPipeError:
        raise
    except (FastgradError, OSError) as error:
        line = " ".join(str(error).split())
        if not isinstance(error, FastgradError):
            line = f"{type(error).__name__}: {line}. Remedy: another path, or room and rights there"
        Console(stderr=True).print(f"[bold red]error:[/] [red]{escape(line)}[/]", soft_wrap=True,
                                   highlight=False)  # fmt: skip
        raise SystemExit(1) from None


def _print(text: str) -> None:
    """Text that may hold brackets and long lines: neither markup nor wrapping."""
    Console().print(text, markup=False, soft_wrap=True, highlight=sys.stdout.isatty())


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def _note(text: str) -> None:
    Console(stderr=True).print(text, markup=False, soft_wrap=True, highlight=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastgrad {fastgrad.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True,
                           help="Print the version and exit.")
    ] = False,
) -> None:  # fmt: skip
    pass


# -- blueprint -----------------------------------------------------------------------------------


@blueprint_app.command("create")
def create(
    stats: Annotated[
        Path,
        typer.Argument(metavar="STATS", help="What `fastgrad probe` or a ShardWriter wrote."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write into.")],
    domain: Annotated[
        list[str] | None, typer.Option(help="What the data is about; may be repeated.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Hub id of the model.")] = None,
    created: Annotated[
        str | None, typer.Option(help="ISO date to write; today by default.")
    ] = None,
    tokens_per_step: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a training step, for k* of FLOPs.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a blueprint of measured statistics.

    Example: [bold]fastgrad blueprint create stats.safetensors -o my-model/ --domain python[/]
    """
    from fastgrad.blueprint import Blueprint
    from fastgrad.stats import GradientStats

    blueprint = Blueprint.from_stats(
        GradientStats.load(stats, blocks=False), domain_tags=domain or [], name_or_path=name,
        created=created, tokens_per_step=tokens_per_step,
    )  # fmt: skip
    path = blueprint.save_pretrained(output)
    if as_json:
        _print_json({"path": str(path), "n_submodules": len(blueprint.names)})
    else:
        _print(blueprint.summary())
        _note(f"wrote {path}")


@blueprint_app.command("show")
def show(path: BlueprintPath, as_json: Json = False) -> None:
    """Show what a blueprint says.

    Example: [bold]fastgrad blueprint show my-model/[/]
    """
    from fastgrad.blueprint import Blueprint

    blueprint = Blueprint.from_pretrained(path)
    if as_json:
        typer.echo(blueprint.to_json(), nl=False)
    else:
        _print(blueprint.summary())


@blueprint_app.command("validate")
def validate(path: BlueprintPath, as_json: Json = False) -> None:
    """Check that a file is a well-formed blueprint; exit code 1 if not.

    Example: [bold]fastgrad blueprint validate my-model/gradient_blueprint.json[/]
    """
    from fastgrad.blueprint import Blueprint

    blueprint = Blueprint.from_pretrained(path)
    if as_json:
        _print_json({"valid": True, "schema_version": blueprint.file.schema_version})
    else:
        _print(f"{path} is a valid blueprint, schema {blueprint.file.schema_version}")


@blueprint_app.command("verify")
def verify(
    path: BlueprintPath,
    model: Annotated[
        Path | None, typer.Option(help="Model folder; by default the one the blueprint is in.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check that a blueprint was made for the weights beside it; exit code 1 if not.

    Example: [bold]fastgrad blueprint verify my-model/[/]
    """
    from fastgrad.blueprint import Blueprint

    blueprint = Blueprint.from_pretrained(path)
    folder = model or (path if path.is_dir() else path.parent)
    blueprint.verify(_load_model(folder))
    if as_json:
        _print_json({"verified": True, "weights_hash": blueprint.weights_hash})
    else:
        _print(f"{path} was made for the weights in {folder} ({blueprint.weights_hash})")


@blueprint_app.command("schema")
def schema() -> None:
    """Print the JSON Schema of the file.

    Example: [bold]fastgrad blueprint schema > blueprint.schema.json[/]
    """
    from fastgrad.blueprint_schema import json_schema

    typer.echo(json_schema(), nl=False)


# -- select, plan --------------------------------------------------------------------------------


@app.command("select")
def select_command(
    path: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="A model's folder, gradient_blueprint.json, or "
                                              "statistics that `fastgrad probe` wrote."),
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
        str | None, typer.Option("--k-star", help="memory or flops: the blueprint's own k*.")
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
    seed: Annotated[int, typer.Option(help="Of the random ranking.")] = 0,
    local: Annotated[
        Path | None, typer.Option(help="Statistics of a local sample, to blend in.")
    ] = None,
    weight: Annotated[
        str, typer.Option(help="Weight of the blueprint in the blend, or auto.")
    ] = "auto",
    model: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False,
                     help="Model folder; by default the blueprint's, where one is needed."),
    ] = None,
    optimizer: Annotated[str, typer.Option(help="For a budget of memory or FLOPs.")] = "adamw",
    batch: Annotated[
        str | None,
        typer.Option(help="For a budget of memory or FLOPs: rows x tokens, such as 8x2048."),
    ] = None,
    master: Annotated[
        str | None, typer.Option(help="For a memory budget: dtype of master copies.")
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

    source = source_of(path, local, weight)
    granularity = granularity_of(blocks)
    reads_weights = ranking in ("magnitude", "relative")
    planned = memory is not None or flops is not None
    folder = model
    if folder is None and (
        planned or ranking == "magnitude" or granularity == HEAD or isinstance(granularity, dict)
    ):
        folder = path if path.is_dir() else path.parent
    net = None
    if folder is not None:
        net = _load_model(folder) if reads_weights else _meta_model(folder)
    selection = select(
        source, net, fraction=fraction, count=count, submodules=submodules, memory=memory,
        flops=flops, k_star=k_star, blocks=granularity, ranking=ranking, direction=direction,
        include=include or None, exclude=exclude or None, floor=shares_of("floor", floor),
        cap=shares_of("cap", cap), spread_by=spread_by, seed=seed, optimizer=optimizer,
        batch_shape=batch_shape_of(batch), master_dtype=dtype_of(master),
    )  # fmt: skip
    selection.save(output)
    if as_json:
        _print_json({
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
        _print(selection.summary())
        _note(f"wrote {output}")
        _note("not compared with any weights; `fastgrad blueprint verify` and make_partial do that")


@app.command("plan")
def plan(
    model: ModelPath,
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

    Nothing is allocated and no weights are read: config.json is enough.

    Example: [bold]fastgrad plan my-model/ --selection selection.json --batch 8x2048[/]
    """
    from fastgrad.selection import Selection

    net = _meta_model(model, dtype_of(dtype))
    chosen = None if selection is None else Selection.load(selection)
    if chosen is not None:
        chosen.check_model(net, allow_other_weights=True)  # a meta model has no weights to compare
    shape = batch_shape_of(batch)
    if flops and shape is None:
        raise typer.BadParameter("--flops is for one step: it needs --batch, such as 8x2048")
    found = fastgrad.plan_memory(
        net, chosen, optimizer=optimizer, batch_shape=shape, master_dtype=dtype_of(master)
    )
    cost = None
    if flops and shape is not None:
        cost = fastgrad.plan_flops(net, chosen, batch_shape=shape, optimizer=optimizer)
    if as_json:
        _print_json(found.to_dict() | ({} if cost is None else {"flops": cost.to_dict()}))
    else:
        _print(found.table() + ("" if cost is None else f"\n\n{cost.table()}"))


# -- probe, quickstart ---------------------------------------------------------------------------


@app.command("probe")
def probe(
    model: ModelPath,
    text: Annotated[
        Path, typer.Argument(metavar="TEXT_FILE", exists=True, dir_okay=False, help="UTF-8 text.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where the statistics go.")
    ] = Path("stats.safetensors"),
    blocks: Annotated[
        str,
        typer.Option(help="module, row, column, expert, head, a tile such as 128x128 or a stripe "
                          "such as 64x*."),
    ] = "module",
    length: Annotated[int, typer.Option(min=2, help="Tokens per row.")] = 128,
    rows: Annotated[int, typer.Option(min=1, help="Rows per batch.")] = 8,
    limit: Annotated[
        int, typer.Option(min=1, help="Rows in all, spread evenly over the text.")
    ] = 256,
    seed: Annotated[int, typer.Option(help="Of the masks of a masked model.")] = 0,
    dtype: Annotated[
        str | None, typer.Option(help="dtype to load the weights in; as stored by default.")
    ] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Measure a causal or masked language model on a text file.

    Example: [bold]fastgrad probe my-model/ sample.txt -o stats.safetensors[/]
    """
    import torch

    from fastgrad.blocks import in_words
    from fastgrad.probe import Probe

    net = _load_model(model, dtype_of(dtype)).eval()
    tokenizer = _tokenizer(model)
    ids = _rows(tokenizer, text, length, limit)
    masked = _is_masked(net.config)
    generator = torch.Generator().manual_seed(seed)
    with Probe(net, blocks=blocks) as measuring, _progress(not as_json) as progress:
        for start in progress.track(range(0, len(ids), rows), description="probing"):
            batch = ids[start : start + rows]
            inputs, labels = (
                _mask(batch, tokenizer, generator) if masked else (batch, batch)
            )
            net.zero_grad(set_to_none=True)
            net(input_ids=inputs, labels=labels).loss.backward()
    stats = measuring.stats()
    stats.save(output)
    statuses = [c.status for c in stats.coverage_list]
    coverage = {s: statuses.count(s) for s in sorted(set(statuses))}
    if as_json:
        _print_json({
            "path": str(output), "n_examples": stats.n_examples, "n_batches": stats.n_batches,
            "blocks": in_words(stats.spec, stats.specs), "coverage": coverage,
        })  # fmt: skip
    else:
        counts = ", ".join(f"{n} {status}" for status, n in coverage.items())
        _print(f"{stats.n_examples} rows of {length} tokens in {stats.n_batches} batches; "
               f"coverage: {counts}")  # fmt: skip
        _note(f"wrote {output}")


@app.command("quickstart")
def quickstart(
    output: Annotated[Path, typer.Option(help="Folder for all results.")] = Path("quickstart-out"),
    fast: Annotated[bool, typer.Option("--fast", help="Smaller, in under 90 seconds.")] = False,
    seed: Annotated[int, typer.Option(help="Of everything.")] = 0,
) -> None:
    """Train, measure, select and adapt a small model on real text, against control arms.

    Example: [bold]fastgrad quickstart --fast --output /tmp/quickstart[/]
    """
    from fastgrad.quickstart.run import run_quickstart

    raise typer.Exit(run_quickstart(output, fast, seed))


# -- helpers -------------------------------------------------------------------------------------


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "hf") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _config(folder: Path) -> Any:
    transformers = _transformers()
    if not (folder / "config.json").is_file():
        raise ProbeError(f"{folder} holds no config.json: it is not a transformers model folder")
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ProbeError(f"the config in {folder} cannot be read: {error}") from error


def _is_masked(config: Any) -> bool:
    return any(name.endswith("ForMaskedLM") for name in config.architectures or ())


def _auto_class(config: Any) -> Any:
    transformers = _transformers()
    return (
        transformers.AutoModelForMaskedLM if _is_masked(config)
        else transformers.AutoModelForCausalLM
    )  # fmt: skip


def _load_model(folder: Path, dtype: torch.dtype | None = None) -> Any:
    from safetensors import SafetensorError

    config = _config(folder)
    try:
        return _auto_class(config).from_pretrained(
            folder, config=config, dtype=dtype or "auto", local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ProbeError(f"the model in {folder} cannot be loaded: {_first_line(error)}") from error


def _meta_model(folder: Path, dtype: torch.dtype | None = None) -> nn.Module:
    import torch

    config = _config(folder)
    wanted = dtype or getattr(config, "dtype", None) or torch.float32
    try:
        with torch.device("meta"):
            model: nn.Module = _auto_class(config).from_config(config, dtype=wanted)
    except (ValueError, KeyError) as error:
        raise ResourceError(
            f"no model can be built from {folder}/config.json: {_first_line(error)} Remedy: the "
            "command line knows causal and masked language models; in Python fastgrad takes any "
            "module"
        ) from error
    return model


def _first_line(error: Exception) -> str:
    """What transformers says, without its list of two hundred classes."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]


def _tokenizer(folder: Path) -> Any:
    try:
        return _transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ProbeError(f"no tokenizer can be loaded from {folder}: {error}") from error


def _rows(tokenizer: Any, path: Path, length: int, limit: int) -> torch.Tensor:
    """``[rows, length]`` token numbers: the text cut into rows, the last incomplete one dropped."""
    import torch

    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ProbeError(f"{path} is not UTF-8 text: {error}") from error
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    n = len(ids) // length
    if n == 0:
        raise ProbeError(f"{path} has {len(ids)} tokens, fewer than one row of {length}. Remedy: "
                         "more text, or a smaller --length")
    table = torch.tensor(ids[: n * length], dtype=torch.int64).reshape(n, length)
    if n > limit:
        table = table[torch.linspace(0, n - 1, limit).round().long()]
    return table


def _mask(
    ids: torch.Tensor, tokenizer: Any, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels with 15 % of the tokens masked, at least one in each row."""
    import torch

    if tokenizer.mask_token_id is None:
        raise ProbeError("a masked model needs a tokenizer with a mask token")
    chance = torch.rand(ids.shape, generator=generator)
    chosen = chance < 0.15
    chosen[torch.arange(len(ids)), chance.argmin(1)] = True
    return ids.masked_fill(chosen, tokenizer.mask_token_id), ids.masked_fill(~chosen, -100)


@contextlib.contextmanager
def _progress(shown: bool) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        yield progress


if __name__ == "__main__":
    main()
