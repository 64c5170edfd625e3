"""Are the layers that repeat run one after the other, each once, with nothing else in between?

A short model cannot tell. One that runs layer 30 a second time by its number, or does something
after layer 20 only, looks like any other with four layers. So the whole model's own code is run
once, with the first layer and with stand-ins for all others that give back what the first one
gave: all that is seen is what goes on around the layers, which takes little more time than one of
them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves

from fastgrad.dry_run import DryRun
from fastgrad.errors import ResourceError
from fastgrad.folding import Irregular, Repeats
from fastgrad.mode_queries import DEVICE, answer_of_class
from fastgrad.packed import PartialModule, class_before


class _Around(TorchDispatchMode):
    """Follows a run: which layer begins, what it is given, and what is done outside of layers."""

    def __init__(self, path: str, count: int) -> None:
        super().__init__()
        self.path, self.count = path, count
        self.begun = 0
        self.inside = False
        self.given: Any = None
        self.output: Any = None
        self._done: list[Any] = []
        self._between: list[Any] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE:
            return answer_of_class(func, types, args)
        out = func(*args, **(kwargs or {}))
        if not self.inside:
            self._done.append((str(func), [_kind(t) for t in tree_leaves(out)]))
        return out

    def begin(self, number: int, args: Any, kwargs: Any) -> None:
        """Layer ``number`` is called.

        Raises:
            Irregular: if another one's turn it is, or what it is given or what was done since the
                layer before differs from the others'.
        """
        name = f"{self.path}.{number}"
        if self.inside or number != self.begun:
            turn = f"after {self.begun} of {self.count} layers" if self.begun else "as the first"
            raise Irregular(f"{name} is run {turn}, out of its turn")
        leaves, structure = tree_flatten((args, kwargs))
        given = [_kind(x) for x in leaves], structure
        if number == 0:
            self.given = given
        elif given != self.given:
            raise Irregular(f"{name} is given something else than {self.path}.0")
        if number == 1:
            self._between = self._done
        elif number > 1 and self._done != self._between:
            raise Irregular(f"something is done before {name} that is not before {self.path}.1")
        self.begun += 1
        self.inside = True

    def end(self) -> None:
        """The layer is over."""
        self.inside, self._done = False, []


def _kind(value: Any) -> Any:
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else type(value)


def check_turns(model: nn.Module, batch_shape: tuple[int, int], repeats: Repeats) -> None:
    """Run what is around the layers of the whole model.

    Args:
        model, batch_shape: as for :class:`~fastgrad.dry_run.DryRun`.
        repeats: of the model.

    Raises:
        Irregular: naming the layer that is not like the others, or if the model's code needs more
            of its layers than their outputs.
    """
    around = _Around(repeats.path, repeats.count)

    def stand_in(number: int, layer: nn.Module) -> nn.Module:
        def forward(*args: Any, **kwargs: Any) -> Any:
            around.begin(number, args, kwargs)
            around.end()
            return around.output

        return _hollow(layer, forward)

    try:
        run = DryRun(model, batch_shape, repeats, [0], stand_in)
        first = run.layers[0]
        real = first.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            around.begin(0, args, kwargs)
            around.output = real(*args, **kwargs)
            around.end()
            return around.output

        first.__dict__["forward"] = forward
        with run.active(), around:
            run.loss()
    except ResourceError as error:
        raise Irregular(f"the model does not run without its layers: {error}") from error
    if around.begun != repeats.count:
        raise Irregular(f"{repeats.path}.{around.begun} is not run")


def _hollow(layer: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """A module of the layer's class with its plain attributes, without parameters, children and
    hooks, that does ``forward``."""
    kind = class_before(layer) if isinstance(layer, PartialModule) else type(layer)
    made: nn.Module = object.__new__(kind)
    own = {k: v for k, v in layer.__dict__.items() if not k.startswith("_fastgrad")}
    made.__dict__.update(own | nn.Module().__dict__ | {"forward": forward})
    return made


__all__ = ["check_turns"]
