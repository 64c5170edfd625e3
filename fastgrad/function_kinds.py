"""What kinds of functions there are, as far as it matters whose rows their results have.

A function that is in none of these tables is not trusted: see :mod:`fastgrad.trials`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrad.ownership import functions


def _is_pointwise(name: str) -> bool:
    """PyTorch tags its operators."""
    packet = getattr(torch.ops.aten, name.strip("_"), None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return False
    return any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads())


# also reductions, by other arguments
_NOT = {"max", "min", "equal", "prelu"}
_BY_ELEMENT = (
    "clone", "contiguous", "to", "type", "type_as", "float", "half", "bfloat16", "double", "int",
    "long", "bool", "short", "byte", "char", "cfloat", "cdouble", "cpu", "cuda", "requires_grad_",
    "conj", "resolve_conj", "resolve_neg", "real", "imag", "negative", "absolute", "square",
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout",
    "relu", "relu6", "relu_", "relu6_", "elu_", "gelu", "silu", "mish", "selu", "hardswish",
    "hardsigmoid", "hardtanh", "logsigmoid", "softsign", "tanhshrink", "softshrink", "threshold",
    "leaky_relu", "rrelu", "sigmoid", "tanh", "softplus", "where", "masked_fill", "masked_fill_",
    "normal", "poisson", "_standard_gamma", "binomial",
    "fill_", "zero_", "copy_", "bernoulli", "bernoulli_", "normal_", "uniform_", "isin", "isreal",
    "fix", "arccos", "arcsin", "arctan", "arctan2", "erfinv",
    "__and__", "__or__", "__xor__", "__invert__", "__floordiv__", "__mod__", "__rmod__",
    "__truediv__", "__rtruediv__", "__radd__", "__rmul__", "__rpow__", "__iadd__", "__isub__",
    "__imul__", "__itruediv__", "__iand__", "__ior__", "__ixor__", "__rand__", "__ror__",
    "__lshift__", "__rshift__", "__rfloordiv__", "__pos__", "multiply", "multiply_", "subtract",
    "subtract_", "divide", "divide_", "greater", "greater_equal", "less", "less_equal",
    "tril", "triu", "tril_", "triu_", "not_equal", "floor_divide", "floor_divide_",
    "fake_quantize_per_tensor_affine",
)  # fmt: skip


def _pointwise() -> set[Any]:
    found = functions(*_BY_ELEMENT)
    for place in (torch, Tensor, F, torch.special):
        for name in dir(place):
            if name not in _NOT and not name.startswith("_") and _is_pointwise(name):
                found.add(getattr(place, name))
    dunders = [n for n in dir(Tensor) if n.startswith("__") and _is_pointwise(n)]
    found |= functions(*dunders)
    found |= {getattr(Tensor, n).__get__ for n in ("real", "imag", "data")}
    return found - functions(*_NOT)


# Each element of the result is made of those at the same place, after broadcasting.
POINTWISE = _pointwise()
DETACHES = functions("detach", "detach_") | {Tensor.data.__get__}  # type: ignore[attr-defined]
POINTWISE |= functions("detach", "detach_")

# Of the names: where their dimensions are given, and what they are by default. The result has the
# size that its argument has.
_ALONG: dict[str, tuple[int, Any]] = {
    "softmax": (1, None), "log_softmax": (1, None), "softmin": (1, None), "cumsum": (1, None),
    "cumprod": (1, None), "cumsum_": (1, None), "cumprod_": (1, None), "logcumsumexp": (1, None),
    "cummax": (1, None), "cummin": (1, None), "normalize": (2, 1), "glu": (1, -1),
    "gumbel_softmax": (4, -1), "sort": (1, -1), "argsort": (1, -1), "topk": (2, -1),
    "kthvalue": (2, -1), "diff": (2, -1),
}  # fmt: skip
_FOURIER = {"fft": -1, "ifft": -1, "rfft": -1, "irfft": -1, "hfft": -1, "ihfft": -1,
            "fft2": (-2, -1), "ifft2": (-2, -1), "rfft2": (-2, -1), "irfft2": (-2, -1)}  # fmt: skip
# The dimensions go, or shrink to one.
_REDUCE: dict[str, tuple[int, Any]] = {
    "sum": (1, "all"), "mean": (1, "all"), "nansum": (1, "all"), "nanmean": (1, "all"),
    "max": (1, "all"), "min": (1, "all"), "amax": (1, "all"), "amin": (1, "all"),
    "aminmax": (1, "all"), "argmax": (1, "all"), "argmin": (1, "all"), "median": (1, "all"),
    "nanmedian": (1, "all"), "mode": (1, -1), "prod": (1, "all"), "var": (1, "all"),
    "std": (1, "all"), "var_mean": (1, "all"), "std_mean": (1, "all"), "norm": (2, "all"),
    "logsumexp": (1, None), "all": (1, "all"), "any": (1, "all"), "count_nonzero": (1, "all"),
    "quantile": (2, "all"), "nanquantile": (2, "all"), "cosine_similarity": (2, 1),
    "pairwise_distance": (99, -1),
}  # fmt: skip


def _by_function(table: dict[str, tuple[int, Any]]) -> dict[Any, tuple[int, Any]]:
    return {func: where for name, where in table.items() for func in functions(name)}


ALONG = _by_function(_ALONG)
ALONG |= {getattr(torch.fft, name): (2, default) for name, default in _FOURIER.items()}
REDUCE = _by_function(_REDUCE)
REDUCE |= {getattr(torch.linalg, n): (2, "all") for n in ("norm", "vector_norm")}
# Losses: of each row, then summed or averaged.
CLASSES = functions("cross_entropy", "nll_loss", "multi_margin_loss", "multilabel_margin_loss")
VECTORS = functions(
    "cosine_embedding_loss", "triplet_margin_loss", "triplet_margin_with_distance_loss"
)
LOSSES = CLASSES | VECTORS | functions(
    "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "kl_div",
    "binary_cross_entropy_with_logits", "poisson_nll_loss", "gaussian_nll_loss", "ctc_loss",
    "margin_ranking_loss", "hinge_embedding_loss", "soft_margin_loss",
    "multilabel_soft_margin_loss",
)  # fmt: skip
# A sum over examples of what each gives: the gradient is a sum as well.
SUMS = functions("sum", "mean", "nansum", "nanmean") | LOSSES
# What picks or ranks elements by their values makes the result depend on all of them.
RANKS = functions("sort", "argsort", "topk", "kthvalue", "msort")
# Each row of the result stands for one example still, although others are in it.
KEEPING = functions(
    "softmax", "log_softmax", "softmin", "cumsum", "cumprod", "cumsum_", "cumprod_",
    "logcumsumexp", "normalize", "gumbel_softmax",
)  # fmt: skip
_REARRANGE = functions(
    "reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as",
    "permute", "transpose", "expand", "expand_as", "stack", "cat", "concat", "concatenate",
    "__getitem__", "select", "unbind", "__iter__", "chunk", "split", "contiguous", "clone", "to",
    "float", "double", "half", "bfloat16", "type", "type_as", "cpu", "cuda", "detach", "repeat",
    "atleast_1d", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "narrow", "broadcast_to",
    "flip", "roll", "tensor_split", "sum_to_size", "cumsum", "broadcast_tensors",
    "index_select", "gather", "take", "hstack", "vstack", "dstack",
)  # fmt: skip
# Linear in all that they are given, so a sum over examples stays one.
LINEAR = (SUMS - LOSSES) | _REARRANGE | functions(
    "add", "add_", "sub", "sub_", "subtract", "neg", "negative", "positive", "rsub", "zeros_like",
    "ones_like", "empty_like", "full_like", "__add__", "__radd__", "__sub__", "__rsub__",
    "__iadd__", "__isub__", "__neg__", "__pos__", "requires_grad_", "retain_grad",
    "trace", "diagonal", "diag",
)  # fmt: skip
LINEAR |= {getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH")}
# Linear in one of two factors, if the other does not depend on the parameters.
PRODUCTS_OF_TWO = functions(
    "mul", "mul_", "multiply", "div", "div_", "divide", "true_divide", "__mul__", "__rmul__",
    "__imul__", "__truediv__", "__itruediv__", "dot", "vdot", "inner", "outer", "mv", "mm",
    "matmul", "__matmul__", "bmm", "linear", "where", "masked_fill",
)  # fmt: skip


# Where examples meet, unless their dimension is one that the function leaves apart.
MIXERS = (set(ALONG) | set(REDUCE) | functions(
    "layer_norm", "rms_norm", "group_norm", "instance_norm", "scaled_dot_product_attention",
    "cdist", "msort", "conv1d", "conv2d", "conv3d", "conv_transpose1d",
    "conv_transpose2d", "conv_transpose3d", "interpolate", "fold", "grid_sample",
    "local_response_norm",
    *(f"{kind}_pool{d}d" for d in (1, 2, 3) for kind in (
        "max", "avg", "lp", "adaptive_avg", "adaptive_max")),
)) - SUMS  # fmt: skip


def along(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> set[int] | None:
    """The dimensions that a function of :data:`ALONG` or :data:`REDUCE` works along, all of them
    if they cannot be read; None for other functions."""
    where = ALONG.get(func) or REDUCE.get(func)
    if where is None:
        return None
    place, default = where
    given = kwargs.get("dim", kwargs.get("axis", kwargs.get("dims")))
    if given is None and place < len(args):
        given = args[place]
    given = default if given is None or isinstance(given, bool) else given
    given = (given,) if isinstance(given, int) else given
    if not isinstance(given, list | tuple) or not all(type(d) is int for d in given) or not given:
        return set(range(x.ndim))
    return {d % max(x.ndim, 1) for d in given}


def is_pointwise(func: Any, args: tuple[Any, ...]) -> bool:
    """Also the larger of two tensors, which is a reduction if there is only one."""
    if func in POINTWISE:
        return True
    return func in _EXTREMES and len(args) > 1 and isinstance(args[1], Tensor)


_EXTREMES = functions("max", "min")
