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

_PLAIN = {Tensor, nn.Parameter}
_NOTHING: dict[str, Any] = {}


class _List(NamedTuple):
    """What one update call takes: of one group, the parameters at ``places`` among those that have
    a gradient."""

    group: int
    places: list[int]
    prepared: Prepared


class _Look(NamedTuple):
    seen: list[Any]
    grads: list[Tensor]
    objects: list[Any]


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
        look: _Look,
        lists: list[_List],
        blocks: list[Any],
        targeted: list[Any],
    ) -> None:
        self.keys, self._lists, self.blocks = keys, lists, blocks
        self._targeted = targeted
        self.written = frozenset(id(b) for b in targeted)
        self._seen, self._held = look.seen, look.objects  # what is known by its id has to live on

    def gradients(self, optimizer: Any) -> list[Tensor] | None:
        """Gradients in order, or None if something is not as it was and has to be looked at."""
        now = _look(optimizer)
        if now is None or now.seen != self._seen:
            return None
        if len(self._lists) == 1:  # as a rule: all of one group and dtype, in order
            return now.grads if self._lists[0].prepared.takes(now.grads) else None
        for entry in self._lists:
            if not entry.prepared.takes([now.grads[i] for i in entry.places]):
                return None
        return now.grads

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


def _look(optimizer: Any) -> _Look | None:
    """What must not change between two steps, as numbers; the gradients; the objects behind the
    numbers. None where tensors are more than memory (shards, fakes).

    Places in memory tell of ``tensor.data = ...``, of a model or a state that was moved; the
    version of block numbers of a change in place. Lists are gone through in one pass each, by C
    code where there is some: this is asked at each step.
    """
    groups = [g["params"] for g in optimizer.param_groups]
    every = [p for params in groups for p in params]
    found = [p.grad for p in every]
    grads = [g for g in found if g is not None]
    params = [p for p, g in zip(every, found, strict=True) if g is not None]
    states = [optimizer.state.get(p, _NOTHING) for p in params]
    moments = [t for s in states for t in (s.get(MOMENTS[0]), s.get(MOMENTS[1]))]
    steps = [s.get("step") for s in states]
    blocks = [b for p in params if (b := p.__dict__.get("_fastgrad_blocks")) is not None]
    fulls, ids = [b.full for b in blocks], [b.ids for b in blocks]
    placed = [*params, *moments, *fulls, *steps]
    if not {*map(type, placed), *map(type, grads)} <= _PLAIN:
        return None
    objects = [*every, *moments, *steps, *blocks, *fulls, *ids]
    seen = [
        [*map(len, groups)],
        [g is None for g in found],
        [*map(id, objects)],
        [*map(Tensor.data_ptr, placed)],
        [*map(Tensor.stride, placed)],
        [None if t.is_inference() else t._version for t in ids],
    ]
    return _Look(seen, grads, objects)


def signature(optimizer: Any) -> list[Any]:
    """Which parameters have a gradient."""
    return [
        id(p) if p.grad is not None else None for g in optimizer.param_groups for p in g["params"]
    ]


def prepare(optimizer: Any) -> PreparedStep | None:
    """After a step: the same step prepared, or None where it has to be looked at each time."""
    every = [p for g in optimizer.param_groups for p in g["params"]]
    look = _look(optimizer)
    if look is None or not look.grads:
        return None
    if not all(type(p) in _PLAIN and p.is_cpu and not p.is_complex() for p in every):
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
                [s[MOMENTS[0]] for s in states],
                [s[MOMENTS[1]] for s in states],
                [s["step"] for s in states],
                [full for full, _ in targets],
                [ids for _, ids in targets],
            )
            if prepared is None:
                return None
            lists.append(_List(g, [place for place, _ in chosen], prepared))
            with_blocks += [b for b in blocks if b is not None]
            targeted += [b for b, (full, _) in zip(blocks, targets, strict=False) if full.numel()]
    return PreparedStep(keys, look, lists, with_blocks, targeted)
