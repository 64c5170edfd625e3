"""``ops.adamw_`` on a GPU: lists of tensors through prepared steps that are kept.

Preparing a step, tables of addresses and chunks, takes milliseconds on the host; a training loop
calls with the same tensors again and again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from fastgrad_kernels.configs import on_device
from fastgrad_kernels.dispatch import capturing
from fastgrad_kernels.sparse_adam import _TYPES, AdamStep, Packed

_KEPT = 16
_steps: OrderedDict[object, AdamStep] = OrderedDict()
# Steps that a CUDA graph holds: their tables are read at each replay, so they are neither refilled
# nor freed again.
_captured: list[AdamStep] = []


def unsupported(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    fulls: Sequence[Tensor],
    ids: Sequence[Tensor],
) -> str | None:
    """Why the kernel cannot do this, in words, or None if it can."""
    device = params[0].device
    for name, tensors in (
        ("parameter", params),
        ("gradient", grads),
        ("first moment", exp_avgs),
        ("second moment", exp_avg_sqs),
        ("full weight", fulls),
    ):
        for i, t in enumerate(tensors):
            if t.numel() == 0:
                continue
            if t.dtype not in _TYPES:
                return f"{name} {i} is {t.dtype}: the kernel computes in float32"
            if t.device != device:
                return f"{name} {i} is on {t.device}, parameter 0 on {device}"
            rows = name == "full weight" and t.ndim == 2 and t.stride(1) == 1
            if name != "gradient" and not (t.is_contiguous() or rows):
                return f"{name} {i} is not contiguous: strides {t.stride()}"
    for i, (m, v) in enumerate(zip(exp_avgs, exp_avg_sqs, strict=True)):
        if m.dtype != torch.float32 or v.dtype != torch.float32:
            return f"moments {i} are {m.dtype} and {v.dtype}: the kernel keeps float32"
    for i, s in enumerate(steps):
        if s.device != device or s.dtype != torch.float32 or not s.is_contiguous():
            return f"step count {i} is {s.dtype} on {s.device}: float32 on {device} is needed"
    for i, (full, blocks) in enumerate(zip(fulls, ids, strict=True)):
        if full.numel() and not full.is_contiguous() and blocks.numel() == 0:
            return f"full weight {i} is not contiguous: strides {full.stride()}"
        if blocks.numel() and params[i][0].numel() >= 2**31:
            return f"parameter {i} has blocks of 2^31 elements or more"
    return None


def _key(tensors: Sequence[Tensor]) -> tuple[object, ...]:
    return tuple((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors)


def adamw_lists_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    fulls: Sequence[Tensor],
    ids: Sequence[Tensor],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    seed: Tensor | None,
) -> None:
    """See :func:`fastgrad_kernels.ops.adamw_`."""
    device = params[0].device
    grads = [g.contiguous() for g in grads]
    per_block = [
        s.numel() > 1 and not (fulls and fulls[i].numel() and ids[i].numel())
        for i, s in enumerate(steps)
    ]
    if any(per_block):  # counts per block without blocks of a weight: leading index by the rest
        params, grads, exp_avgs, exp_avg_sqs = (
            [t.reshape(t.shape[0], 1, -1) if b else t for t, b in zip(ts, per_block, strict=True)]
            for ts in (params, grads, exp_avgs, exp_avg_sqs)
        )
    # A step holds addresses: tensors at the same places with the same shapes are the same to it.
    lists = (params, exp_avgs, exp_avg_sqs, steps, fulls, ids)
    key = (device, *map(_key, lists), tuple(g.dtype for g in grads))
    step = _steps.pop(key, None)
    if capturing(device) and (step is None or not step.knows(grads)):
        raise RuntimeError(
            "fastgrad_kernels: this step cannot be captured in a CUDA graph yet: its tables are "
            "not on the device. Remedy: before the capture run one step with the same parameters "
            "and gradients, and keep the gradients (zero_grad(set_to_none=False))"
        )
    if step is None:
        items = []
        for i, (p, m, v, s) in enumerate(zip(params, exp_avgs, exp_avg_sqs, steps, strict=True)):
            full = fulls[i] if fulls and fulls[i].numel() else None
            blocks = ids[i] if full is not None and ids[i].numel() else None
            if per_block[i]:
                blocks = torch.arange(p.shape[0], device=device)
                full = None if full is None else full.view(p.shape[0], -1)
            items.append(Packed(p, m, v, s, full, blocks))
        step = AdamStep(items, grads)
        step.kept = [i.ids for i in items if i.ids is not None]  # the tables hold addresses alone
    if capturing(device):
        step.captured = True
        _captured.append(step)
    else:
        _steps[key] = step  # the youngest last
    if len(_steps) > _KEPT:
        _steps.popitem(last=False)
    with on_device(params[0]):
        step(
            grads, lr.to(device).reshape(()), (beta1, beta2), eps, weight_decay,
            maximize=maximize, grad_scale=grad_scale, found_inf=found_inf, seed=seed,
        )  # fmt: skip
