"""Fake tensors whose contents are known: block numbers, token numbers, counters.

Code that runs on fake tensors has shapes but no numbers, and stops where a shape follows from a
number: ``nonzero``, ``unique``, a mask as an index, ``.item()``. Such numbers are small integers
as a rule, and can be carried along for real beside the fake tensors at no cost. Where they come
out of floating-point values that nobody has, as the experts that a router picks, an even spread
stands in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from fastgrad.mode_queries import DEVICE, answer_of_class

# Contents are carried along up to these sizes: block and token numbers are, activations are not.
MOST_INTEGERS = 2**22
MOST_FLOATS = 2**10

aten = torch.ops.aten
# Choices by value, and which argument says along which dimension.
_CHOICES = {aten.topk.default: 2, aten.argmax.default: 1, aten.max.dim: 1, aten.argsort.default: 1}
_INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
_DYNAMIC = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


class KnownValues(TorchDispatchMode):
    """Inside a ``FakeTensorMode``: carry the contents of small tensors along.

    Args:
        fake: the mode that is active outside of this one.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self._fake = fake
        self._values: Any = WeakIdKeyDictionary()  # fake tensor: its contents on the host
        self._spoiled: set[int] = set()  # storages of contents that are no longer right
        self._kept: list[Tensor] = []  # spoiled contents, so that their numbers stay unique

    def know(self, value: Tensor, device: torch.device) -> Tensor:
        """A fake tensor on ``device`` with the contents of ``value``."""
        fake = torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device=device
        )
        self._values[fake] = value
        return fake

    def _value(self, tensor: Tensor) -> Tensor | None:
        value: Tensor | None = self._values.get(tensor)
        if value is None or value.untyped_storage()._cdata in self._spoiled:
            return None
        return value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE:
            return answer_of_class(func, types, args)
        flat, spec = tree_flatten((args, kwargs or {}))
        flat = [self._faked(x) if isinstance(x, Tensor) else x for x in flat]
        values = {id(x): self._value(x) for x in flat if isinstance(x, Tensor)}
        if all(v is not None for v in values.values()) and _is_a_function(func):
            return self._known(func, flat, spec, values)
        args, kwargs = tree_unflatten(flat, spec)
        if func in _INDEXED:
            args = (args[0], self._without_masks(args[1]), *args[2:])
        out = func(*args, **kwargs)
        self._forget(func, args)
        if func in _CHOICES:
            position = _CHOICES[func]
            self._spread(out, args[0].shape[args[position] if len(args) > position else -1])
        return out

    def _faked(self, tensor: Tensor) -> Tensor:
        """Tensors from outside (of NumPy arrays, attributes of modules) become fake ones."""
        if isinstance(tensor, FakeTensor):
            return tensor
        fake = self._fake.from_tensor(tensor)
        if _is_small(fake) and not tensor.is_meta:
            with _disable_current_modes():
                self._values[fake] = tensor.detach().cpu()
        return fake

    def _known(self, func: Any, flat: list[Any], spec: Any, values: dict[int, Any]) -> Any:
        """The result of known contents, and fake tensors around it."""
        args, kwargs = tree_unflatten(flat, spec)
        dynamic = _DYNAMIC & set(func.tags) or func is aten.index.Tensor
        out = None
        if not dynamic:  # run as it is, so that views and in-place changes stay what they are
            out = func(*args, **kwargs)
            results = [x for x in tree_flatten(out)[0] if isinstance(x, Tensor)]
            if not all(_is_small(x) for x in results):
                self._forget(func, args)
                return out
        real = [
            values[id(x)]
            if isinstance(x, Tensor)
            else torch.device("cpu")
            if isinstance(x, torch.device)
            else x
            for x in flat
        ]
        with _disable_current_modes():
            real_args, real_kwargs = tree_unflatten(real, spec)
            result = func(*real_args, **real_kwargs)
        if dynamic:
            device = next(x.device for x in flat if isinstance(x, Tensor))
            return tree_map_only(Tensor, lambda t: self.know(t, device), result)
        for fake, value in zip(tree_flatten(out)[0], tree_flatten(result)[0], strict=True):
            if isinstance(fake, Tensor):
                self._values[fake] = value
        return out

    def _without_masks(self, indices: Any) -> list[Any]:
        """Boolean indices as the positions that they select."""
        found: list[Any] = []
        for index in indices:
            value = None if index is None else self._value(index)
            if index is None or index.dtype != torch.bool or value is None:
                found.append(index)
                continue
            with _disable_current_modes():
                places = value.nonzero(as_tuple=True)
            found += [self.know(p, index.device) for p in places]
        return found

    def _forget(self, func: Any, args: Any) -> None:
        """Contents that were changed by something unknown are unknown, in all their views."""
        for argument, given in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for tensor in tree_flatten(given)[0]:
                value = self._values.get(tensor) if isinstance(tensor, Tensor) else None
                if value is not None:
                    self._spoiled.add(value.untyped_storage()._cdata)
                    self._kept.append(value)

    def _spread(self, out: Any, choices: int) -> None:
        for fake in tree_flatten(out)[0]:
            if isinstance(fake, Tensor) and fake.dtype == torch.int64 and _is_small(fake):
                with _disable_current_modes():
                    value = (torch.arange(fake.numel()) % choices).reshape(fake.shape)
                self._values[fake] = value


def _is_small(tensor: Tensor) -> bool:
    wide = tensor.is_floating_point() or tensor.is_complex()
    return tensor.numel() <= (MOST_FLOATS if wide else MOST_INTEGERS)


def _is_a_function(func: Any) -> bool:
    """Of its arguments alone: the same result each time."""
    return (
        func.namespace in ("aten", "prims")
        and torch.Tag.nondeterministic_seeded not in func.tags
        and not func.__name__.startswith(("empty", "new_empty"))
    )
