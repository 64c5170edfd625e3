"""Granularity as a user says it, and what it means for each parameter of a model."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from fastgrad.blocks import NAMED_SPECS, check_spec
from fastgrad.errors import BlockSpecError

if TYPE_CHECKING:
    from torch import nn

HEAD = "head"
Blocks = str | Mapping[str, str]


def check_blocks(blocks: object) -> Blocks:
    """``blocks`` if it is a granularity, ``head``, or a mapping of name patterns to these.

    Raises:
        BlockSpecError: for anything else.
    """
    if isinstance(blocks, str):
        return blocks if blocks == HEAD else check_spec(blocks)
    if not isinstance(blocks, Mapping) or not blocks:
        raise BlockSpecError(
            f"blocks is {blocks!r}; give one of {', '.join(NAMED_SPECS)}, {HEAD}, a tile such as "
            "'128x128', a stripe such as '64x*', or a mapping of name patterns to these"
        )
    for pattern, spec in blocks.items():
        if not isinstance(pattern, str) or not isinstance(spec, str):
            raise BlockSpecError(f"blocks: {pattern!r}: {spec!r} is not a name pattern with a "
                                 "granularity")  # fmt: skip
        check_blocks(spec)
    return blocks


def resolve(
    model: nn.Module, blocks: Blocks = "module", names: Collection[str] | None = None
) -> dict[str, str]:
    """Parameter name -> granularity, for every parameter of ``model``.

    Args:
        blocks: one granularity for all (see :class:`fastgrad.BlockGrid`); ``head`` for attention
            heads, where parameters outside attention, biases and norms stay whole; or a mapping
            of name patterns (``fnmatch``) to these. The first pattern that matches a name counts;
            what none matches stays whole.
        names: only these parameters; those that are not looked at need no known heads.

    A head is one stripe: rows of a projection to queries, keys or values, columns of the
    projection back. Where query, key and value share one matrix, each head has one stripe for
    each of the three, or one for all where the model stores them side by side (GPT-NeoX, Bloom).

    Raises:
        BlockSpecError: for an unknown granularity, a pattern that matches nothing, ``head`` where
            there is no attention, or an attention matrix whose heads are not known.
    """
    from fastgrad.identity import model_parameters

    check_blocks(blocks)
    everything = list(model_parameters(model))
    wanted = None if names is None else set(names)
    asked = {"*": blocks} if isinstance(blocks, str) else blocks
    for pattern in asked if not isinstance(blocks, str) else ():
        if not any(fnmatch.fnmatchcase(n, pattern) for n in everything):
            raise BlockSpecError(
                f"blocks: the pattern {pattern!r} matches no parameter; names are like "
                f"{', '.join(everything[:3])}"
            )
    chosen = {
        n: next((s for p, s in asked.items() if fnmatch.fnmatchcase(n, p)), "module")
        for n in everything
        if wanted is None or n in wanted
    }
    return _with_heads(model, chosen) if HEAD in chosen.values() else chosen


def _with_heads(model: nn.Module, chosen: Mapping[str, str]) -> dict[str, str]:
    from fastgrad.heads import find_heads

    report = find_heads(model)
    wanted = [n for n, spec in chosen.items() if spec == HEAD]
    if unknown := [n for n in wanted if n in report.unresolved]:
        named = "; ".join(f"{n}: {report.unresolved[n]}" for n in unknown[:3])
        more = f"; and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise BlockSpecError(
            f"the attention heads of {len(unknown)} parameters are not known: {named}{more}. "
            f"Remedy: say how they divide, before the rest: blocks={{{unknown[0]!r}: 'module', "
            "'*': 'head'}"
        )
    if not any(n in report.specs for n in wanted):
        raise BlockSpecError(
            f"no attention heads were found in {type(model).__name__}"
            + (f" among {wanted[0]} and others" if len(wanted) < len(chosen) else "")
            + ". Remedy: say how its parameters divide, for instance blocks={'*.q_proj.weight': "
            "'64x*'}"
        )
    return {n: report.specs.get(n, "module") if s == HEAD else s for n, s in chosen.items()}
