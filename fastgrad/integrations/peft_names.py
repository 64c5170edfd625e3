"""Names of modules in the ways that people and PEFT write them: suffixes, layers, expressions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fastgrad.errors import SelectionError

_LAYER = re.compile(r"^(?P<container>.*?)\.?(?P<layer>(?<![^.])\d+)\.(?P<rest>.+)$")


@dataclass(frozen=True)
class Brief:
    """``target_modules`` of PEFT, with the layers that they are meant in.

    Attributes:
        target_modules: ends of names, or an expression that matches a whole name.
        layers: numbers of the layers, or None for all.
        layers_pattern: name of the list of layers, where there are ``layers``.
    """

    target_modules: list[str] | str
    layers: list[int] | None = None
    layers_pattern: str | None = None


def split_layer(name: str) -> tuple[str, int, str] | None:
    """``("model.layers", 3, "mlp.up_proj")`` of ``model.layers.3.mlp.up_proj``; None without a
    numbered layer. The first number counts."""
    found = _LAYER.match(name)
    return (found["container"], int(found["layer"]), found["rest"]) if found else None


def brief_targets(
    wanted: Sequence[str], reads: Callable[[Brief], set[str]], *, as_list: bool = False
) -> Brief:
    """The shortest way to name exactly the modules ``wanted``.

    Args:
        reads: names that PEFT takes a :class:`Brief` for, in this model.
        as_list: never an expression.

    Raises:
        SelectionError: if there is none.
    """
    aim = set(wanted)
    for brief in _ways(wanted, as_list):
        if reads(brief) == aim:
            return brief
    raise SelectionError(f"PEFT cannot be told to adapt exactly {len(aim)} modules such as "
                         f"{wanted[0]}: their names end others' names")  # fmt: skip


def _ways(wanted: Sequence[str], as_list: bool) -> Iterator[Brief]:
    split = [split_layer(name) for name in wanted]
    inside = [s for s in split if s is not None]
    outside = [name for name, s in zip(wanted, split, strict=True) if s is None]
    kinds = sorted({rest for _, _, rest in inside})
    for length in range(1, max((k.count(".") for k in kinds), default=0) + 2):
        ends = sorted({".".join(k.split(".")[-length:]) for k in kinds})
        yield Brief([*outside, *ends])
    containers = {container.rpartition(".")[2] for container, _, _ in inside}
    if len(containers) == 1 and not outside:
        layers = sorted({layer for _, layer, _ in inside})
        (pattern,) = containers
        for length in range(1, max(k.count(".") for k in kinds) + 2):
            ends = sorted({".".join(k.split(".")[-length:]) for k in kinds})
            yield Brief(ends, layers, pattern or None)
    yield Brief(list(wanted))
    if not as_list:
        yield Brief(_expression(wanted))


def regex_of(wanted: Sequence[str], names: Sequence[str]) -> str:
    """An expression that matches as a whole exactly ``wanted`` of all ``names``.

    Raises:
        SelectionError: if it matches anything else.
    """
    expression = _expression(wanted)
    read = {name for name in names if re.fullmatch(expression, name)}
    if read != set(wanted):
        other = sorted(read ^ set(wanted))[0]
        raise SelectionError(f"no expression separates the chosen modules: {other!r}")
    return expression


def _expression(wanted: Sequence[str]) -> str:
    """Layers with the same modules are written together."""
    alternatives: list[str] = []
    layers: dict[tuple[str, int], list[str]] = {}
    for name in wanted:
        split = split_layer(name)
        if split is None:
            alternatives.append(re.escape(name))
        else:
            layers.setdefault(split[:2], []).append(split[2])
    groups: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for (container, layer), rests in layers.items():
        groups.setdefault((container, tuple(sorted(rests))), []).append(layer)
    for (container, ends), numbers in groups.items():
        start = re.escape(container) + r"\." if container else ""
        alternatives.append(
            rf"{start}{_any_of(map(str, sorted(numbers)))}\.{_any_of(map(re.escape, ends))}"
        )
    return "|".join(alternatives)


def _any_of(parts: Iterator[str]) -> str:
    found = list(parts)
    return found[0] if len(found) == 1 else f"(?:{'|'.join(found)})"


def layers_by_gradient(
    squares: Mapping[str, float],
    shapes: Mapping[str, tuple[int, ...]],
    fraction: float | None,
    count: int | None,
    container: str | None,
) -> list[int]:
    """Numbers of the layers with the largest rms gradient, ascending; see
    :func:`fastgrad.integrations.peft_export.layer_list`."""
    split = {name: split_layer(name) for name in shapes}
    lists = sorted({s[0] for s in split.values() if s})
    if not lists:
        raise SelectionError("no parameter belongs to a numbered layer")
    if container is None and len(lists) > 1:
        raise SelectionError(f"the model has several lists of layers. Remedy: container= one of "
                             f"{', '.join(lists)}")
    container = lists[0] if container is None else container
    if container not in lists:
        raise SelectionError(f"there is no list of layers {container!r}; known: {', '.join(lists)}")
    energy: dict[int, float] = {}
    measured: dict[int, int] = {}
    size: dict[int, int] = {}
    for name, place in split.items():
        if place and place[0] == container:
            size[place[1]] = size.get(place[1], 0) + math.prod(shapes[name])
            if name in squares:
                energy[place[1]] = energy.get(place[1], 0.0) + squares[name]
                measured[place[1]] = measured.get(place[1], 0) + math.prod(shapes[name])
    order = sorted(energy, key=lambda i: (-energy[i] / max(measured[i], 1), i))
    if count is not None:
        if not 1 <= count <= len(order):
            raise SelectionError(f"count is {count}, but {len(order)} layers were measured")
        return sorted(order[:count])
    assert fraction is not None
    if not 0 < fraction <= 1:
        raise SelectionError(f"fraction is {fraction}; it must be above 0 and at most 1")
    left, chosen = fraction * sum(size.values()), []
    for layer in order:
        if size[layer] <= left + 1e-9:
            chosen.append(layer)
            left -= size[layer]
    if not chosen:
        raise SelectionError(f"not one layer fits into {fraction:.3g} of all layers. Remedy: a "
                             "larger fraction")
    return sorted(chosen)


__all__ = ["Brief", "brief_targets", "layers_by_gradient", "regex_of", "split_layer"]
