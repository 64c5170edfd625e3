"""A step of SparseAdamW on the host whose tensors are those of the step before.

Finding out what a step has to do, tensor by tensor, takes longer than to do it where little is
trained. A training loop steps with the same tensors again and again: what was found out is kept,
and used as long as each of them still is what it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastgrad.optim_arguments import MOMENTS
from fastgrad_kernels import adamw_cpu
from fastgrad_kernels.adamw_prepared import Prepared


class _List(NamedTuple):
    """What one update call takes: of one group, the parameters at ``places`` among those that have
    a gradient."""

    group: int
    places: list[int]
    prepared: Prepared


class PreparedStep:
    """The step of an optimizer, prepared for the parameters that have a gradient now.

    Attributes:
        keys: group and place in it of each parameter with a gradient, in order.
        blocks: packed blocks of these parameters.
        written: ids of those blocks that the update writes through itself.
    """

    def __init__(
        self,
        keys: list[tuple[int, int]],
        seen: list[Any],
        lists: list[_List],
        blocks: list[Any],
        targeted: list[Any],
        held: list[Any],
    ) -> None:
        self.keys, self._seen, self._lists, self.blocks = keys, seen, lists, blocks
        self._targeted = targeted
        self.written = frozenset(id(b) for b in targeted)
        self._held = held  # what is compared by id has to live on

    def gradients(self, optimizer: Any) -> list[Tensor] | None:
        """Gradients in order, or None if something is not as it was and has to be looked at."""
        found, grads, _ = _look(optimizer)
        if found != self._seen:
            return None
        for entry in self._lists:
            if not entry.prepared.takes([grads[i] for i in entry.places]):
                return None
        return grads

    def __call__(self, optimizer: Any, grads: Sequence[Tensor], scalar: Any) -> None:
        """Update and write through. ``scalar`` makes a tensor of a learning rate."""
        for entry in self._lists:
            group = optimizer.param_groups[entry.group]
            beta1, beta2 = group["betas"]
            hyper = adamw_cpu.hyper_of(
                scalar(group["lr"]), float(beta1), float(beta2), group["eps"],
                group["weight_decay"], group["maximize"],
            )  # fmt: skip
            entry.prepared([grads[i] for i in entry.places], hyper)
            entry.prepared.tell_autograd()
        for blocks in self._targeted:
            blocks.written()


def _look(optimizer: Any) -> tuple[list[Any], list[Tensor], list[Any]]:
    """What must not change between two steps, as numbers; the gradients; the objects behind the
    numbers.

    Places in memory tell of ``tensor.data = ...``, of a model or a state that was moved or loaded;
    the version of block numbers of a change in place.
    """
    seen: list[Any] = []
    grads: list[Tensor] = []
    objects: list[Any] = []
    state = optimizer.state
    for group in optimizer.param_groups:
        seen.append(len(group["params"]))
        for p in group["params"]:
            seen.append(id(p))
            grad = p.grad
            if grad is None:
                seen.append(None)
                continue
            grads.append(grad)
            own = state.get(p) or {}
            m, v, step = own.get(MOMENTS[0]), own.get(MOMENTS[1]), own.get("step")
            if type(grad) is not Tensor or type(m) is not Tensor or type(v) is not Tensor:
                return [], [], []
            seen += (
                p.data_ptr(), p.stride(), id(m), m.data_ptr(), id(v), v.data_ptr(), id(step),
                grad.device,
            )  # fmt: skip
            objects += (p, m, v, step)
            blocks = p.__dict__.get("_fastgrad_blocks")
            if blocks is not None:
                full, ids = blocks.full, blocks.ids
                version = 0 if ids.is_inference() else ids._version
                seen += (id(blocks), id(full), full.data_ptr(), full.stride(), id(ids), version)
                objects += (blocks, full, ids)
    return seen, grads, objects


def signature(optimizer: Any) -> list[Any]:
    """Which parameters have a gradient."""
    return [
        id(p) if p.grad is not None else None for g in optimizer.param_groups for p in g["params"]
    ]


def prepare(optimizer: Any) -> PreparedStep | None:
    """After a step: the same step prepared, or None where it has to be looked at each time."""
    every = [p for g in optimizer.param_groups for p in g["params"]]
    if not all(type(p) in (Tensor, nn.Parameter) and p.device.type == "cpu" for p in every):
        return None
    seen, grads, held = _look(optimizer)
    if not grads or any(p.is_complex() for p in every):
        return None
    keys: list[tuple[int, int]] = []
    lists: list[_List] = []
    with_blocks: list[Any] = []
    targeted: list[Any] = []
    for g, group in enumerate(optimizer.param_groups):
        kinds: dict[Any, list[tuple[int, Tensor]]] = {}
        for i, p in enumerate(group["params"]):
            if p.grad is not None:
                kinds.setdefault(p.dtype, []).append((len(keys), p))
                keys.append((g, i))
        for chosen in kinds.values():
            params: list[Any] = [p for _, p in chosen]
            states = [optimizer.state[p] for p in params]
            blocks = [p.__dict__.get("_fastgrad_blocks") for p in params]
            targets = optimizer._targets(params)
            prepared = adamw_cpu.prepare(
                params,
                *([s[key] for s in states] for key in (*MOMENTS, "step")),
                [full for full, _ in targets],
                [ids for _, ids in targets],
            )
            if prepared is None:
                return None
            lists.append(_List(g, [place for place, _ in chosen], prepared))
            with_blocks += [b for b in blocks if b is not None]
            targeted += [
                b for b, (full, _) in zip(blocks, targets, strict=False) if full.numel()
            ]
    return PreparedStep(keys, seen, lists, with_blocks, targeted, held)
