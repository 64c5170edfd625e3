"""Which stripes of which parameters belong to one attention head.

A projection to queries, keys or values has a head's features next to each other in its output
dimension, the projection back has them in its input dimension. How many features that are
follows from the number of heads, which is read from the attention module or its configuration,
and from the parameter's shape: where the two do not fit, or an attention module has a matrix
that no rule here knows, it is named with the reason. Nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastgrad.identity import model_parameters, unwrapped


def _roles(table: Mapping[str, str]) -> dict[str, str]:
    return {name: role for role, names in table.items() for name in names.split()}


#: What the modules (or parameters) inside attention modules are called, and what they are.
ROLES = _roles(
    {
        "query": "q_proj query q q_lin q_attn query_proj pos_query_proj pos_q_proj query_global "
        "to_q wq q_b_proj q_proj_weight linear_q linear_pos relative_k_proj pos_proj",
        "key_value": "k_proj v_proj key value k v k_lin v_lin key_proj value_proj pos_key_proj "
        "key_global value_global to_k to_v wk wv kv_b_proj k_proj_weight v_proj_weight linear_k "
        "linear_v",
        "fused": "c_attn qkv_proj qkv Wqkv wqkv query_key_value in_proj in_proj_weight to_qkv "
        "kv_proj",
        "out": "o_proj out_proj dense o out_lin c_proj to_out wo Wo proj linear_out post",
        "bias_table": "relative_attention_bias relative_position_bias_table",
        "shared": "q_a_proj kv_a_proj_with_mqa distance_embedding",
    }
)

# Fused projections whose output is [heads, (query, key, value), features]: one stripe is a head.
# In all others a stripe is one head's query, key or value.
_INTERLEAVED = re.compile(r"^(GPTNeoX|Bloom|Falcon)")

_ATTENTION_CLASS = re.compile(r"(Attention|Attn)\d*$")
_ATTENTION_NAME = re.compile(r"(attention|attn)\d*$", re.IGNORECASE)
# Some layers that are named for their attention have a feed-forward part too.
_NOT_ATTENTION = {"mlp", "ffn", "feed_forward", "fc1", "fc2", "intermediate"}

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_q_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")
_WIDTH = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "d_head")

Path = list[tuple[str, nn.Module]]  # prefix and module, from the model down to the owner


@dataclass(frozen=True)
class HeadReport:
    """Attention heads of a model.

    Attributes:
        specs: parameter name -> stripe granularity.
        unresolved: name -> why the heads of this attention parameter are not known.
    """

    specs: dict[str, str]
    unresolved: dict[str, str]


class _UnknownError(Exception):
    """The heads of a parameter cannot be told; says why."""


@dataclass(frozen=True)
class _Geometry:
    """Heads of one attention module, and how many features a head may have."""

    heads: int
    kv_heads: int
    widths: tuple[int, ...]
    compressed: int  # features of keys and values together, of a head in latent attention, or 0


def find_heads(model: nn.Module) -> HeadReport:
    """The stripes that are attention heads, in every parameter of ``model`` that has them.

    Biases and norms stay whole, and so does everything outside attention modules.
    """
    modules = dict(unwrapped(model).named_modules())
    specs: dict[str, str] = {}
    unresolved: dict[str, str] = {}
    outputs: dict[str, str] = {}  # output projections -> the attention that they belong to
    with_queries: set[str] = set()
    for name, p in model_parameters(model).items():
        if p.ndim < 2 or p.numel() == p.shape[-1] or not p.is_floating_point():
            continue
        path = _path(name, modules)
        attentions = [i for i, (prefix, m) in enumerate(path) if _is_attention(prefix, m)]
        if not attentions:
            continue
        below = name.removeprefix(path[attentions[-1]][0]).lstrip(".").split(".")
        if _NOT_ATTENTION.intersection(below):
            continue
        role = next((ROLES[part] for part in reversed(below) if part in ROLES), None)
        try:
            geometry = _geometry(path, attentions)
            found = _stripes(tuple(p.shape), role, below, path, geometry)
        except _UnknownError as error:
            unresolved[name] = str(error)
            continue
        if found is None:
            continue
        specs[name] = found
        group = path[attentions[0]][0]
        if role == "out":
            outputs[name] = group
        elif role in ("query", "fused"):
            with_queries.add(group)
    for name, group in outputs.items():
        if group not in with_queries:  # linear attention and the like, whose heads are others
            del specs[name]
            unresolved[name] = "its module has no query projection that is known here"
    return HeadReport(specs, unresolved)


# -- where a parameter stands --------------------------------------------------------------------


def _path(name: str, modules: Mapping[str, nn.Module]) -> Path:
    parts = name.split(".")[:-1]
    return [(p, modules[p]) for i in range(len(parts) + 1) for p in [".".join(parts[:i])]]


def _is_attention(prefix: str, module: nn.Module) -> bool:
    last = prefix.rpartition(".")[2]
    if last in ROLES:  # GPT-2 calls a projection c_attn
        return False
    named = _ATTENTION_NAME.search(last) or _ATTENTION_CLASS.search(type(module).__name__)
    return named is not None


def _geometry(path: Path, attentions: Sequence[int]) -> _Geometry:
    """From the nearest attention module; where it only holds others, from those; else from the
    nearest configuration."""
    nearest = path[attentions[-1]][1]
    around = [nearest, *nearest.modules(), *(path[i][1] for i in reversed(attentions))]
    source: Any = next((m for m in around if _number(m, _HEADS)), None)
    configs = [m.config for m in [*around, *(m for _, m in reversed(path))] if hasattr(m, "config")]
    config: Any = next((c for c in configs if _number(c, _HEADS)), None)
    heads = _number(source, _HEADS) or _number(config, _HEADS)
    if not heads:
        raise _UnknownError("neither its module nor a configuration says how many heads there are")
    if _number(config, _HEADS) != heads:
        config = None  # of another part of the model
    own = source if source is not None else nearest
    groups = _number(own, ("num_key_value_groups",))
    kv = _number(own, _KV_HEADS) or (heads // groups if groups else 0)
    latent, value = _number(own, ("qk_head_dim",)), _number(own, ("v_head_dim",))
    width = latent or _number(own, _WIDTH) or _number(config, ("head_dim",))
    if not width:
        hidden = _number(config, ("hidden_size", "d_model"))
        width = hidden // heads if hidden % heads == 0 else 0
    return _Geometry(
        heads,
        kv or _number(config, _KV_HEADS) or heads,
        tuple(w for w in (width, value) if w),
        _number(own, ("qk_nope_head_dim",)) + value if latent else 0,
    )


def _number(thing: Any, names: Sequence[str]) -> int:
    """The first of these attributes that is a positive whole number, else 0."""
    for name in names:
        value = getattr(thing, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0


# -- stripes -------------------------------------------------------------------------------------


def _stripes(
    shape: tuple[int, ...], role: str | None, below: Sequence[str], path: Path, g: _Geometry
) -> str | None:
    """Granularity of one parameter of an attention module; None if heads do not divide it.

    Raises:
        _UnknownError: if its role or its shape is not one that is known.
    """
    if len(below) == 1 and shape[-2:] in [(g.heads, w) for w in g.widths]:
        return f"*x{shape[-1]}" if len(shape) > 2 else "1x*"  # [..., heads, features]
    if role is None:
        raise _UnknownError("no rule says what a matrix of this name does in an attention module")
    inner, outer = "lora_A" in below, "lora_B" in below
    if role == "shared" or (outer if role == "out" else inner):
        return None
    if len(shape) != 2:
        raise _UnknownError(f"its shape {shape} is not that of a matrix")
    if role == "bias_table":
        if shape[1] != g.heads:
            raise _UnknownError(f"it has {shape[1]} columns for {g.heads} heads")
        return "*x1"
    transposed = type(path[-1][1]).__name__ == "Conv1D"  # transformers': weight [in, out]
    size = shape[1] if (role == "out") != transposed else shape[0]
    wanted = _widths(role, below, path, g)
    if not g.widths and role != "fused" and size % g.heads == 0:
        wanted = [(g.heads, size // g.heads)]  # their number alone says it
    for count, width in wanted:
        if size == count * width:
            return f"*x{width}" if (role == "out") != transposed else f"{width}x*"
    expected = " or ".join(f"{count} x {width}" for count, width in wanted)
    raise _UnknownError(f"{size} features are not those of its heads ({expected or 'unknown'})")


def _widths(
    role: str, below: Sequence[str], path: Path, g: _Geometry
) -> list[tuple[int, int]]:
    """``(stripes, features)`` that a projection of this role may have, the likeliest first."""
    if role == "out":
        return [(g.heads, w) for w in g.widths]
    if role == "query":  # twice as wide where a gate stands beside each head's query
        return [(g.heads, k * w) for k in (1, 2) for w in g.widths]
    if role == "key_value":
        if "kv_b_proj" in below:
            return [(g.heads, g.compressed)] if g.compressed else []
        return [(n, w) for n in (g.kv_heads, g.heads) for w in g.widths]
    found = []
    for w in g.widths[:1]:
        if any(_INTERLEAVED.match(type(m).__name__) for _, m in path):
            found.append((g.heads, 3 * w))
        for n in (g.heads + 2 * g.kv_heads, 3 * g.heads, 2 * g.heads, 2 * g.kv_heads, g.heads + 2):
            found.append((n, w))
    return found
