"""What may be given to a probe, checked before anything is measured."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fastgrad.blocks import BlockGrid
from fastgrad.errors import ProbeError

Direction = Mapping[str, Tensor]


def refuse_compiled(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise ProbeError(
                f"{name or 'the model'} is compiled with torch.compile, which would bypass the "
                "taps. Remedy: probe the model before compiling it"
            )


def matches(name: str, patterns: Sequence[str] | None) -> bool:
    return patterns is None or any(fnmatch.fnmatchcase(name, p) for p in patterns)


def check_patterns(
    patterns: Sequence[str] | None, names: Mapping[str, object], argument: str
) -> None:
    for pattern in patterns or ():
        if not any(fnmatch.fnmatchcase(n, pattern) for n in names):
            raise ProbeError(
                f"{argument}: the pattern {pattern!r} matches no parameter; names are "
                f"like {', '.join(list(names)[:3])}"
            )


def chosen_names(
    everything: Mapping[str, nn.Parameter],
    params: Sequence[str] | None,
    frozen: Sequence[str] | None,
) -> list[str]:
    """Names of the parameters to probe, in the model's order.

    Raises:
        ProbeError: if a pattern matches nothing, nothing is left, or a frozen parameter is not
            made of floating point numbers (a quantised weight).
    """
    check_patterns(params, everything, "params")
    check_patterns(frozen, everything, "frozen")
    names = []
    for name, parameter in everything.items():
        thawed = frozen is not None and matches(name, frozen) and not parameter.requires_grad
        if thawed and not parameter.is_floating_point():
            raise ProbeError(
                f"frozen: {name} holds {parameter.dtype}, which has no gradient. Remedy: leave it "
                "out of the pattern, or load the model without quantisation"
            )
        if thawed or (parameter.requires_grad and matches(name, params)):
            names.append(name)
    if not names:
        raise ProbeError(
            "no parameter to probe: none requires a gradient"
            + (f" and matches {list(params)}" if params else "")
            + ". Remedy: call requires_grad_(True) on what you want to measure, or name frozen "
            "parameters with frozen=[...]"
        )
    return names


def named_directions(
    targets: Direction | Mapping[str, Direction] | None,
    everything: Mapping[str, nn.Parameter],
    probed: Sequence[str],
) -> dict[str, Direction]:
    if not targets:
        return {}
    flat = all(isinstance(v, Tensor) for v in targets.values())
    named = cast(dict[str, Direction], {"target": targets} if flat else dict(targets.items()))
    for label, direction in named.items():
        for name, tensor in direction.items():
            if name not in everything:
                raise ProbeError(f"direction {label!r} names {name!r}, which the model lacks")
            if tensor.shape != everything[name].shape:
                raise ProbeError(
                    f"direction {label!r}: {name} is {tuple(tensor.shape)}, the "
                    f"parameter {tuple(everything[name].shape)}"
                )
        if not set(direction) & set(probed):
            raise ProbeError(f"direction {label!r} touches no probed parameter")
    return named


def stacked(
    directions: Mapping[str, Direction], name: str, parameter: nn.Parameter, grid: BlockGrid
) -> Tensor | None:
    """One parameter's part of every direction, ``[k, rows, cols]`` float32 on its device; None
    without directions."""
    if not directions:
        return None
    rows = [
        d[name].detach().to(parameter.device).reshape(grid.rows, grid.cols)
        if name in d
        else torch.zeros(grid.rows, grid.cols, device=parameter.device)
        for d in directions.values()
    ]
    return torch.stack([r.float() for r in rows])
