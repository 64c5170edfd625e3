"""What the options of the ``fastgrad`` command say: texts become values, or wrong usage."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from fastgrad.cli_common import open_blueprint
from fastgrad.cli_imports import importing

if TYPE_CHECKING:
    import torch

    from fastgrad.blueprint import Blueprint
    from fastgrad.stats import GradientStats

DTYPES = ("float32", "bfloat16", "float16")


def source_of(
    reference: str, local: Path | None, weight: str, domain: str | None = None
) -> Blueprint | GradientStats:
    """What to select from: statistics, or a blueprint with a local sample blended in."""
    from fastgrad.stats import GradientStats

    path, share = Path(reference), weight_of(weight)
    if _holds_statistics(path):
        if local is not None:
            raise typer.BadParameter("--local is blended into a blueprint, and this source is "
                                     "statistics. Remedy: fastgrad blueprint create first")
        if domain is not None:
            raise typer.BadParameter("it is of a blueprint, and this source is statistics",
                                     param_hint="--domain")  # fmt: skip
        return GradientStats.load(path, blocks=False)
    blueprint = open_blueprint(reference)
    if domain is not None:
        blueprint = blueprint.domain(domain)
    if local is None:
        return blueprint
    return blueprint.blend(GradientStats.load(local, blocks=False), weight=share)


def _holds_statistics(path: Path) -> bool:
    """Whether it is a file or folder of statistics, whatever its name: safetensors begins with the
    length of its header, a blueprint is JSON."""
    from fastgrad.stats_shards import INDEX_NAME

    if not path.is_file():
        return path.suffix == ".safetensors" or (path / INDEX_NAME).is_file()
    with path.open("rb") as file:
        head = file.read(9)
    is_json = head.lstrip().startswith(b"{")
    return path.suffix == ".safetensors" or (head[8:] == b"{" and not is_json)


def granularity_of(values: Sequence[str] | None) -> str | dict[str, str] | None:
    """``row``, or several ``PATTERN=GRANULARITY``."""
    if not values:
        return None
    if len(values) == 1 and "=" not in values[0]:
        return spec_of(values[0])
    return {pattern: spec_of(text) for pattern, text in _pairs("blocks", values).items()}


def spec_of(text: str) -> str:
    """One granularity of blocks; which stripes heads are, the model says."""
    with importing():
        from fastgrad.blocks import check_spec
        from fastgrad.errors import BlockSpecError

    try:
        return text if text == "head" else check_spec(text)
    except BlockSpecError as error:
        raise typer.BadParameter(str(error), param_hint="--blocks") from None


def shares_of(option: str, values: Sequence[str] | None) -> float | dict[str, float] | None:
    """``0.05``, or several ``PATTERN=0.05``."""
    if not values:
        return None
    if len(values) == 1 and "=" not in values[0]:
        return _share(option, values[0])
    return {pattern: _share(option, text) for pattern, text in _pairs(option, values).items()}


def _share(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(
            f"--{option} is a share such as 0.05, or PATTERN=0.05, not {text!r}"
        ) from None


def _pairs(option: str, values: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for value in values:
        pattern, _, right = value.rpartition("=")
        if not pattern or pattern in pairs:
            raise typer.BadParameter(
                f"--{option} {value!r}: several are written PATTERN=VALUE, each pattern once"
            )
        pairs[pattern] = right
    return pairs


def batch_shape_of(text: str | None) -> tuple[int, int] | None:
    """``8x2048``: rows and tokens."""
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d{0,8})x([1-9]\d{0,8})", text, re.ASCII)
    if match is None:
        raise typer.BadParameter(f"{text!r} is not rows x tokens, such as 8x2048")
    return int(match[1]), int(match[2])


def shard_size_of(text: str | None) -> str | int | None:
    """``5GB``, or a number of bytes."""
    if text is None:
        return None
    if text.isascii() and text.isdecimal() and int(text) > 0:
        return int(text)
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])B", text, re.ASCII | re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise typer.BadParameter(
            f"{text!r} is no size: a number with KB, MB, GB or TB, such as 5GB, or a number of "
            "bytes", param_hint="--max-shard-size",
        )  # fmt: skip
    return f"{match[1]}{match[2].upper()}B"


def dtype_of(text: str | None) -> torch.dtype | None:
    """One of :data:`DTYPES`."""
    if text is None:
        return None
    if text not in DTYPES:
        raise typer.BadParameter(f"{text!r} is no dtype; use {', '.join(DTYPES)}")
    with importing():
        import torch

    found: torch.dtype = getattr(torch, text)
    return found


def weight_of(text: str) -> float | Literal["auto"]:
    """``auto``, or a share of a blend."""
    if text == "auto":
        return "auto"
    try:
        weight = float(text)
    except ValueError:
        weight = -1.0
    if not 0.0 <= weight <= 1.0:
        raise typer.BadParameter(
            f"it is 'auto' or a number from 0 to 1, not {text!r}. Remedy: 1 is the blueprint "
            "alone, 0 the local sample alone", param_hint="--weight",
        )  # fmt: skip
    return weight
