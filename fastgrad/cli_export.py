"""``fastgrad export``: what a measurement ranks first, as other tools want to be told it."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastgrad.cli_common import Json, beside, emit, emit_json, note, verb
from fastgrad.cli_models import config_of, kind_of, load_model, meta_model
from fastgrad.cli_values import source_of

if TYPE_CHECKING:
    from torch import nn

    from fastgrad.selection import Selection

export_app = typer.Typer(
    help="Tell other tools what to train: PEFT, or whatever takes a regex or layer numbers.",
    no_args_is_help=True,
)

Source = Annotated[
    str,
    typer.Argument(metavar="SOURCE", help="A model's folder, gradient_blueprint.json, a hub id, "
                                          "or statistics that `fastgrad probe` wrote."),
]  # fmt: skip
Model = Annotated[
    str | None, typer.Option(help="Model folder or hub id; by default the source's.")
]
Fraction = Annotated[
    float | None, typer.Option(help="Share of all parameters that the chosen weights make up.")
]
Count = Annotated[int | None, typer.Option(help="Number of weights, instead.")]
Chosen = Annotated[
    Path | None, typer.Option("--selection", help="What `fastgrad select` wrote, instead.")
]
Ranking = Annotated[
    str, typer.Option(help="norm, rms or relative; controls: random, magnitude, first, last.")
]
Include = Annotated[list[str] | None, typer.Option(help="Name pattern; repeatable.")]
Exclude = Annotated[list[str] | None, typer.Option(help="Name pattern; repeatable.")]

# What PEFT calls the kinds of model; it has no name for masked ones.
_TASKS = {"decoder": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM"}
CONFIG_NAME = "adapter_config.json"


@verb(export_app, "peft")
def peft(
    source: Source,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for adapter_config.json; without it, it is "
                                            "printed."),
    ] = None,
    model: Model = None,
    fraction: Fraction = None,
    count: Count = None,
    selection: Chosen = None,
    rank: Annotated[
        int, typer.Option("--rank", "-r", help="That all would have with an even gradient.")
    ] = 8,
    budget: Annotated[
        int | None, typer.Option(min=1, help="Parameters of all adapters together, instead.")
    ] = None,
    min_rank: Annotated[int, typer.Option(min=1, help="Least rank of an adapter.")] = 1,
    max_rank: Annotated[
        int | None, typer.Option(min=1, help="Largest rank; four times --rank by default.")
    ] = None,
    alpha_ratio: Annotated[float, typer.Option(help="lora_alpha by rank.")] = 2.0,
    whole: Annotated[
        bool, typer.Option("--whole", help="Train whole what LoRA does not apply to.")
    ] = False,
    tied: Annotated[
        bool, typer.Option("--tied", help="Adapt an embedding that is the output layer too.")
    ] = False,
    ranking: Ranking = "rms",
    include: Include = None,
    exclude: Exclude = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Write a LoRA configuration for PEFT: which weights, and a rank for each by its gradient.

    Every name is compared with the model. With --json, what was chosen is printed, and what of it
    LoRA does not apply to.

    Example: [bold]fastgrad export peft my-model/ --fraction 0.3 --rank 8 -o lora/[/]
    """
    from fastgrad.integrations.peft_export import lora_plan, peft_config

    measured = source_of(source, None, "auto")
    chosen, net, reference = _model(source, model, selection, ranking)
    what: dict[str, Any] = {
        "fraction": fraction, "count": count, "selection": chosen, "r": rank, "budget": budget,
        "min_rank": min_rank, "max_rank": max_rank, "whole": whole, "tied": tied,
        "ranking": ranking, "include": include or None, "exclude": exclude or None,
    }  # fmt: skip
    base: dict[str, Any] = {}
    if not Path(reference).exists():  # a hub id; a folder of this machine is nobody else's affair
        base["base_model_name_or_path"] = reference.rpartition("@")[0] or reference
    task = _TASKS.get(kind_of(config_of(reference)))
    with _noted(silent=as_json):
        config = peft_config(
            measured, net, **what, alpha_ratio=alpha_ratio, task_type=task, **base
        )
        plan = lora_plan(measured, net, **what)
    text = _text_of(config)
    path = None if output is None else output / CONFIG_NAME
    if path is not None:
        from fastgrad.files import write_text

        write_text(path, text)
    if as_json:
        emit_json({
            "path": None if path is None else str(path), "ranks": plan.ranks,
            "n_parameters": plan.n_parameters, "whole": plan.whole, "n_whole": plan.n_whole,
            "left_out": plan.left_out, "config": json.loads(text),
        })  # fmt: skip
    elif path is None:
        emit(text, end="", raw=True)
    else:
        width = max(len(name) for name in plan.ranks)
        emit("\n".join([
            f"{plan.n_parameters:,} parameters in adapters of {len(plan.ranks)} weights",
            *([f"{plan.n_whole:,} weights trained whole"] if plan.whole else []),
            "", f"{'weight':<{width}}  rank",
            *(f"{name:<{width}}  {r:>4}" for name, r in plan.ranks.items()),
        ]))  # fmt: skip
        note(f"wrote {path}")


@verb(export_app, "regex")
def regex(
    source: Source,
    model: Model = None,
    fraction: Fraction = None,
    count: Count = None,
    selection: Chosen = None,
    ranking: Ranking = "rms",
    include: Include = None,
    exclude: Exclude = None,
    as_json: Json = False,
) -> None:
    """Print a regular expression of the module names that LoRA would be put on.

    It matches whole names, as PEFT reads target_modules where that is text.

    Example: [bold]fastgrad export regex my-model/ --fraction 0.3[/]
    """
    from fastgrad.integrations.peft_export import target_regex

    measured = source_of(source, None, "auto")
    chosen, net, _ = _model(source, model, selection, ranking)
    with _noted(silent=False):
        found = target_regex(
            measured, net, fraction=fraction, count=count, selection=chosen, ranking=ranking,
            include=include or None, exclude=exclude or None,
        )  # fmt: skip
    if as_json:
        emit_json({"regex": found})
    else:
        emit(found)


@verb(export_app, "layers")
def layers(
    source: Source,
    fraction: Annotated[
        float | None, typer.Option(help="Share of all layers' parameters.")
    ] = None,
    count: Annotated[int | None, typer.Option(help="Number of layers, instead.")] = None,
    container: Annotated[
        str | None,
        typer.Option(help="The list of layers, such as model.layers, where there are several."),
    ] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Print the numbers of the layers with the largest gradient per weight, in ascending order.

    Example: [bold]fastgrad export layers my-model/ --count 4[/]
    """
    from fastgrad.integrations.peft_export import layer_list

    found = layer_list(source_of(source, None, "auto"), fraction=fraction, count=count,
                       container=container)  # fmt: skip
    if as_json:
        emit_json({"layers": found})
    else:
        emit(",".join(map(str, found)))


def _model(
    source: str, model: str | None, selection: Path | None, ranking: str
) -> tuple[Selection | None, nn.Module, str]:
    """A selection if there is one, and a model, with its weights only where they are compared or
    ranked."""
    from fastgrad.selection import Selection

    reference = beside(source) if model is None else model
    chosen = None if selection is None else Selection.load(selection)
    weighed = chosen is not None or ranking in ("magnitude", "relative")
    return chosen, load_model(reference) if weighed else meta_model(reference), reference


def _text_of(config: Any) -> str:
    """What PEFT itself would write."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        data = json.loads((Path(folder) / CONFIG_NAME).read_text("utf-8"))
    if isinstance(data["target_modules"], list):
        data["target_modules"].sort()  # a set, which has another order in every process
    return json.dumps(data, indent=2, sort_keys=True) + "\n"


@contextmanager
def _noted(silent: bool) -> Iterator[None]:
    """Warnings as lines on standard error instead of with their place in the code."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", module=r"fastgrad\.")
        yield
    for warning in found if not silent else []:
        note(f"warning: {warning.message}")
