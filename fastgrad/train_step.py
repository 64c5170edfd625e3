"""Forward and backward pass on fake tensors, and what is alive in each part of them.

The passes of a model whose layers repeat are put together from those of a short model
(:class:`FoldedPasses`): what a layer takes depends on its structure, on what is selected in it and
on whether its input needs a gradient, not on which one it is. Four layers are always run with the
candidate's own selection: the first and the last, for what comes before and behind them; the lowest
one that needs a gradient; and the next, which is the first to save what all layers are given, such
as rotary embeddings. Where a model does not keep to that, which is looked at in every run and, for
what a short model cannot show, once around the layers of the whole one (:mod:`fastgrad.turns`), the
whole model is run instead.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastgrad.dry_run import DryRun
from fastgrad.errors import ResourceError
from fastgrad.folding import Irregular, Repeats
from fastgrad.identity import model_parameters
from fastgrad.live_bytes import LiveBytes, Section
from fastgrad.selection import Selection
from fastgrad.turns import check_turns

_BEFORE = -1  # the section before the first layer


@dataclass
class Passes:
    """Bytes in the two passes.

    Attributes:
        forward, backward: by kind, when most were alive.
        saved: what the forward pass saved for the backward pass.
        left: bytes by kind after both.
    """

    forward: Counter[str]
    backward: Counter[str]
    saved: int
    left: Counter[str]


@dataclass
class Recorded:
    """One run of both passes.

    Attributes:
        passes: of the model that was run.
        start: bytes by kind before.
        forward, backward: sections by number of the layer. The first forward section is
            numbered -1; the last layer's goes on to the loss. The last layer's backward section
            begins with the loss, and that of the lowest one that has any goes on to the end.
        feeding: trained parameters that the input of the first layer depends on.
    """

    passes: Passes
    start: Counter[str]
    forward: dict[int, Section] = field(default_factory=dict)
    backward: dict[int, Section] = field(default_factory=dict)
    feeding: set[str] = field(default_factory=set)


def run_passes(run: DryRun, bytes_: LiveBytes) -> Recorded:
    """Run both passes of ``run``, whose selection is set. Call it when active.

    Args:
        bytes_: has seen what there is before the step.

    Raises:
        ResourceError: if the model does not run on fake tensors.
        Irregular: if a layer is not run once.
    """
    assert run.partial is not None
    names = {id(p): name for name, p in run.partial.named_parameters()}
    last = len(run.layers) - 1
    found = Recorded(Passes(Counter(), Counter(), 0, Counter()), Counter(bytes_.live))
    at_work = True

    def enter(number: int, args: Any, kwargs: Any) -> None:
        if not at_work:
            return  # a forward pass that is run again for the backward pass
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if ("forward", number) in bytes_.sections or ("forward", number - 1) not in bytes_.sections:
            raise Irregular("a layer is not run once, in its turn")
        bytes_.begin(("forward", number), number)
        hidden = inputs[0]
        bytes_.adopt([hidden])
        if number == 0:
            found.feeding = _leaves(hidden, names)
        if hidden.requires_grad and number > 0:
            hidden.register_hook(lambda _: bytes_.begin(("backward", number - 1), number - 1))

    def keep(tensor: Tensor) -> Tensor:
        bytes_.mark([tensor], "activations")
        return tensor

    for p in run.partial.parameters():
        p.register_post_accumulate_grad_hook(lambda p: bytes_.mark([p.grad], "gradients"))
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, i=i: enter(i, args, kwargs), with_kwargs=True
        )
        for i, layer in enumerate(run.layers)
    ]
    passes = found.passes
    bytes_.restart()
    try:
        with bytes_:
            bytes_.begin(("forward", _BEFORE), _BEFORE)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                loss = run.loss()
            at_work = False
            bytes_.end()
            passes.saved = bytes_.live["activations"]
        passes.forward = bytes_.at_most
        bytes_.restart()
        with bytes_, run.explained("backward pass"):
            bytes_.begin(("backward", last), last)
            loss.backward()
            del loss
            bytes_.end()
        passes.backward, passes.left = bytes_.at_most, Counter(bytes_.live)
    finally:
        for hook in hooks:
            hook.remove()
    for (direction, number), section in bytes_.sections.items():
        getattr(found, direction)[number] = section
    return found


def _leaves(tensor: Tensor, names: dict[int, str]) -> set[str]:
    """Parameters behind a tensor."""
    found, seen, stack = set(), set(), [tensor.grad_fn]
    while stack:
        node: Any = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable") and id(node.variable) in names:
            found.add(names[id(node.variable)])
        stack += [n for n, _ in node.next_functions]
    return found


def mark_standing(run: DryRun, bytes_: LiveBytes) -> None:
    """What a partial model has before the step, but for the optimizer's state."""
    assert run.partial is not None
    bytes_.mark(model_parameters(run.model).values(), "weights")
    bytes_.mark(run.model.buffers(), "buffers")
    bytes_.mark((b.packed for b in run.partial.packed), "packed")
    bytes_.mark((b.ids for b in run.partial.packed if not b.whole), "packed")


@dataclass(frozen=True)
class _Layer:
    """What a layer takes, whichever one it is."""

    forward: Section
    backward: Section | None
    at_the_end: Counter[str]  # that it holds until the forward pass is over, and not longer

    def like(self, other: _Layer) -> bool:
        """It takes the same."""
        pairs = [(self.forward, other.forward), (self.backward, other.backward)]
        return _same(self.at_the_end, other.at_the_end) and all(
            (a is None) == (b is None)
            and (a is None or b is None or (_same(a.change, b.change) and _same(a.most, b.most)))
            for a, b in pairs
        )


def _same(a: Counter[str] | None, b: Counter[str] | None) -> bool:
    return (a is None) == (b is None) and Counter.__eq__(a or Counter(), b or Counter())


class FoldedPasses:
    """Plans the passes of many selections of a model whose layers repeat.

    Args:
        model, batch_shape: as for :class:`~fastgrad.dry_run.DryRun`.
        master_dtype: as for :func:`fastgrad.make_partial`.
        repeats: of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        batch_shape: tuple[int, int],
        master_dtype: torch.dtype | None,
        repeats: Repeats,
    ) -> None:
        self._model, self._shape, self._master = model, batch_shape, master_dtype
        self._repeats = repeats
        self._layers: dict[Any, _Layer] = {}
        self._checked: set[Any] = set()
        self._feeding: set[str] | None = None
        self._in_turn = False
        self._latest: DryRun | None = None

    def of(self, selection: Selection, standing: Counter[str]) -> Passes:
        """The passes with a selection.

        Args:
            standing: bytes by kind before the step.

        Raises:
            Irregular: if they cannot be put together, saying why.
            ResourceError: if the model does not run on fake tensors.
        """
        if not self._in_turn:
            check_turns(self._model, self._shape, self._repeats)
            self._in_turn = True
        count = self._repeats.count
        keys, lowest = self._keys(selection)
        ends = {i for i in (0, lowest, lowest + 1, count - 1) if i < count}
        middle = [i for i in range(count) if i not in ends]
        kept = set(ends)
        new: dict[Any, list[int]] = {}
        for i in middle:
            if keys[i] in self._layers:
                continue
            kind = (keys[i][0], keys[i][1] is None)
            found = new.setdefault(keys[i], [])
            # of the first of each kind a second one, to see that they are alike
            if not found or (len(found) == 1 and kind not in self._checked):
                found.append(i)
                kept.add(i)
                if len(found) == 2:
                    self._checked.add(kind)
        order = sorted(kept)
        recorded = self._run(selection, order)
        place = {i: position for position, i in enumerate(order)}
        self._check(recorded, place, lowest)
        for key, layers in new.items():
            measured = [self._layer(recorded, place[i], place[count - 1]) for i in layers]
            if len(measured) == 2 and not measured[0].like(measured[1]):
                raise Irregular("two layers that are alike take different amounts")
            self._layers[key] = measured[0]
        return self._put_together(recorded, keys, place, ends, lowest, standing)

    def _keys(self, selection: Selection) -> tuple[list[Any], int]:
        """Of each layer what its amounts depend on, and the lowest one that needs a gradient."""
        repeats = self._repeats
        chosen = [
            tuple((rest, _choice(selection, name)) for rest, name in local.items()
                  if name in selection.blocks)
            for local in repeats.local
        ]  # fmt: skip
        lowest = next((i for i, c in enumerate(chosen) if c), repeats.count)
        outside = set(repeats.outside) & set(selection.blocks)
        if lowest and outside and outside & self._find_feeding():
            lowest = 0
        keys = [
            (repeats.structures[i], None if i < lowest else c) for i, c in enumerate(chosen)
        ]
        return keys, lowest

    def _find_feeding(self) -> set[str]:
        if self._feeding is None:
            self._feeding = self._run(None, [0, self._repeats.count - 1]).feeding
        return self._feeding

    @property
    def run(self) -> DryRun:
        """The latest one, for what else is to be run on fake tensors."""
        assert self._latest is not None
        return self._latest

    def _run(self, selection: Selection | None, kept: list[int]) -> Recorded:
        self._latest = run = DryRun(self._model, self._shape, self._repeats, kept)
        some = None if selection is None else self._repeats.shortened(selection, kept)
        if selection is not None and some is None:
            raise Irregular("nothing is trained")
        run.select(some, self._master)
        bytes_ = LiveBytes()
        with run.active():
            mark_standing(run, bytes_)
            for kind, tensors in (
                ("weights", model_parameters(run.model).values()), ("buffers", run.model.buffers())
            ):  # fmt: skip
                if bytes_.live[kind] != sum(t.numel() * t.element_size() for t in tensors):
                    raise Irregular("storages are shared")
            try:
                return run_passes(run, bytes_)
            except ResourceError as error:  # the whole model may run, or says why not
                raise Irregular(str(error)) from error

    def _check(self, recorded: Recorded, place: dict[int, int], lowest: int) -> None:
        last = place[self._repeats.count - 1]
        first = place.get(lowest, last)
        if set(recorded.forward) != set(range(_BEFORE, last + 1)):
            raise Irregular("not all layers are run")
        if set(recorded.backward) != set(range(first, last + 1)):
            raise Irregular("the backward pass does not go from layer to layer")

    def _layer(self, recorded: Recorded, position: int, last: int) -> _Layer:
        end = recorded.forward[last]
        if position in end.early:
            raise Irregular("a layer's tensors are freed in the midst of what follows the layers")
        for number, section in recorded.forward.items():
            if position in section.freed and number != last:
                raise Irregular("a layer's tensors are freed in another layer")
        return _Layer(
            recorded.forward[position],
            recorded.backward.get(position),
            end.freed.get(position, Counter()),
        )

    def _put_together(
        self,
        recorded: Recorded,
        keys: list[Any],
        place: dict[int, int],
        ends: set[int],
        lowest: int,
        standing: Counter[str],
    ) -> Passes:
        last = self._repeats.count - 1
        live, forward = Counter(standing), Counter(standing)

        def go_on(section: Section, most: Counter[str]) -> Counter[str]:
            if section.most is not None:
                then = _sum(live, section.most)
                if then.total() > most.total():
                    most = then
            live.update(section.change)
            return most

        forward = go_on(recorded.forward[_BEFORE], forward)
        for i in range(last + 1):
            own = i in ends
            forward = go_on(
                recorded.forward[place[i]] if own else self._layers[keys[i]].forward, forward
            )
        # What the layers hold until the end is freed there: those of the short model were.
        for i in set(range(last + 1)) - ends:
            live.subtract(self._layers[keys[i]].at_the_end)
            if i in place:
                live.update(recorded.forward[place[last]].freed.get(place[i], Counter()))
        saved = live["activations"]
        backward = Counter(live)
        for i in range(last, min(lowest, last) - 1, -1):
            if i in ends:
                section = recorded.backward[place[i]]
            else:
                section = self._layers[keys[i]].backward  # type: ignore[assignment]
            backward = go_on(section, backward)
        if live["activations"] or any(n < 0 for n in live.values()):
            raise Irregular("bytes of the passes do not add up")
        return Passes(forward, backward, saved, live)


def _sum(a: Counter[str], b: Counter[str]) -> Counter[str]:
    found = Counter(a)
    found.update(b)
    return found


def _choice(selection: Selection, name: str) -> Any:
    """What the amounts of a layer depend on, of what is selected of one of its parameters."""
    if selection.is_whole(name):
        return "whole"
    grid, ids = selection.grid(name), selection.blocks[name]
    if len(grid.shape) <= 2 and (grid.grid_cols == 1 or (grid.grid_rows == grid.block_cols == 1)):
        return grid.spec, len(ids), selection.n_selected(name)
    return grid.spec, ids.tobytes()
