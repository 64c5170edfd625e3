"""A training step without data and without memory: the model's own code on fake tensors.

What a plan says is what the code does, since the code itself runs: the partial model's layers,
the loss, autograd, the optimizer. Tensors have shapes, dtypes and devices, and no contents but
the few that shapes follow from (:mod:`fastgrad.known_values`).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from fastgrad.errors import ResourceError
from fastgrad.folding import Irregular, Repeats, configs_of, layer_lists, numbers_of
from fastgrad.identity import model_parameters, unwrapped
from fastgrad.known_values import MOST_INTEGERS, KnownValues
from fastgrad.packed import PartialModule, uninstall
from fastgrad.partial import Partial, make_partial
from fastgrad.readings import Reading
from fastgrad.selection import Selection


class _FakeReading(Reading, FakeTensor):
    """A fake tensor that remembers whose values it holds, as real readings do."""


class _FakeMode(FakeTensorMode):
    """Lets ``as_subclass`` work on fake tensors: it takes an alias and gives it a class, which
    PyTorch refuses for one that has a class already, unless that is a subclass."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            return _grouped_mm(*args[:3])
        out = super().__torch_dispatch__(func, types, args, kwargs or {})
        if func is torch.ops.aten.alias.default and type(out) is FakeTensor:
            out.__class__ = _FakeReading
        return out


MANY_BLOCKS = 4096


def simpler(selection: Selection, model: nn.Module) -> Selection:
    """A selection of as many elements that a CPU takes in fewer operations: whole rows in place of
    tiles, where linear layers alone read the weight. On a CPU each tile is a product of its own.

    A selection of up to :data:`MANY_BLOCKS` blocks is returned as it is. The memory is the same
    but for the float32 copy of one layer's input or output, which tiles of bfloat16 weights need
    whole and rows in part.
    """
    if selection.n_blocks <= MANY_BLOCKS:
        return selection
    readers: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                readers.setdefault(id(p), []).append(module)
    blocks: Any = dict(selection.blocks)
    specs = dict(selection.specs)
    for name, p in model_parameters(model).items():
        grid = selection.grid(name)
        if name not in blocks or selection.is_whole(name) or grid.grid_cols == 1:
            continue
        if all(isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D" for m in readers[id(p)]):
            elements = len(blocks[name]) * grid.block_rows * grid.block_cols
            rows = min(-(-elements // grid.cols), grid.rows)
            blocks[name], specs[name] = np.arange(rows), "row"
    return Selection(selection.shapes, selection.spec, blocks, specs=specs)


def whole_model(own: Mapping[str, Tensor]) -> Selection:
    """All parameters that can be trained."""
    shapes = {n: tuple(p.shape) for n, p in own.items()}
    blocks: Any = {n: [0] for n, p in own.items() if p.is_floating_point() and p.numel()}
    return Selection(shapes, "module", blocks)


def _grouped_mm(a: Tensor, b: Tensor, offsets: Tensor | None = None) -> Tensor:
    """The shape of a grouped product, in the dtypes for which PyTorch has a kernel and no shape."""
    groups = () if offsets is None or a.ndim != b.ndim else (offsets.shape[0],)
    if a.ndim == b.ndim == 3:
        groups = (a.shape[0],)
    return a.new_empty(*groups, a.shape[-2], b.shape[-1])


class DryRun:
    """A copy of a model on fake tensors, ready for one training step.

    The copy is in training mode and claims the model's device (the host's for a model on the
    meta device), so that PyTorch chooses the same kernels as in the real step. The model itself is
    not changed.

    Args:
        model: on any device, the meta device included.
        batch_shape: ``(rows, tokens)`` of a text model's batch.
        repeats, kept: copy these layers alone of the ones that repeat, in this order.
        stand_in: ``(number, layer) -> module`` for the other layers; without it the copy has none
            in their place.

    Raises:
        ResourceError: if ``batch_shape`` is no pair of positive numbers, or the model cannot be
            copied.
    """

    def __init__(
        self,
        model: nn.Module,
        batch_shape: tuple[int, int],
        repeats: Repeats | None = None,
        kept: Sequence[int] = (),
        stand_in: Callable[[int, nn.Module], nn.Module] | None = None,
    ) -> None:
        check_batch_shape(batch_shape)
        self.batch_shape = batch_shape
        self._fake = _FakeMode(allow_non_fake_inputs=True)
        self._known = KnownValues(self._fake)
        own = model_parameters(model)
        if not own:
            raise ResourceError("a model without parameters cannot be planned")
        device = next(iter(own.values())).device
        self.device = torch.device("cpu") if device.type == "meta" else device
        self.model = self._copy(unwrapped(model), repeats, kept, stand_in)
        #: The layers that repeat, of which there may be fewer than in the model.
        self.layers = [] if repeats is None else list(self.model.get_submodule(repeats.path))  # type: ignore[call-overload]
        self.partial: Partial | None = None

    def _copy(
        self,
        model: nn.Module,
        repeats: Repeats | None,
        kept: Sequence[int],
        stand_in: Callable[[int, nn.Module], nn.Module] | None,
    ) -> nn.Module:
        memo: dict[int, Any] = {}
        layers: Any = None if repeats is None else model.get_submodule(repeats.path)
        dropped: set[nn.Module] = set()
        if layers is not None:
            gone = (layer for i, layer in enumerate(layers) if i not in kept)
            dropped = {m for layer in gone for m in layer.modules()}
        with self._fake:
            for module in (m for m in model.modules() if m not in dropped):
                for p in module._parameters.values():
                    if p is not None and id(p) not in memo:
                        memo[id(p)] = nn.Parameter(self._empty_like(p), p.requires_grad)
                for b in module._buffers.values():
                    if b is not None and id(b) not in memo:
                        memo[id(b)] = self._buffer(b)
        try:
            if layers is not None:
                copies = {i: copy.deepcopy(layers[i], memo) for i in kept}
                if stand_in is not None:
                    copies = {
                        i: copies[i] if i in copies else stand_in(i, layer)
                        for i, layer in enumerate(layers)
                    }
                memo[id(layers)] = nn.ModuleList(copies.values())
            twin = copy.deepcopy(model, memo)
        except Exception as error:
            raise ResourceError(
                f"{type(model).__name__} cannot be copied for a plan ({type(error).__name__}: "
                f"{error}). Remedy: leave batch_shape out and measure one real step"
            ) from error
        for module in twin.modules():
            if isinstance(module, PartialModule):
                uninstall(module)
        if layers is not None and stand_in is None:
            for position, (i, layer) in enumerate(zip(kept, memo[id(layers)], strict=True)):
                for module in layer.modules():
                    module.__dict__.update(dict.fromkeys(numbers_of(module, i), position))
            own = {id(c) for c in configs_of(model)}
            for config in (c for c in configs_of(twin) if id(c) not in own):
                for key, value in layer_lists(config, len(layers)).items():
                    config.__dict__[key] = [value[i] for i in kept]
        return twin.train()

    def _buffer(self, buffer: Tensor) -> Tensor:
        """Integer buffers are often indices, which must be known; on meta they count as zeros."""
        if buffer.is_floating_point() or buffer.numel() > MOST_INTEGERS:
            return self._empty_like(buffer)
        with _disable_current_modes():
            value = torch.zeros_like(buffer, device="cpu") if buffer.is_meta else buffer.cpu()
        return self._known.know(value, self.device)

    def _empty_like(self, tensor: Tensor) -> Tensor:
        return torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device
        )

    def select(
        self, selection: Selection | None, master_dtype: torch.dtype | None = None
    ) -> Partial:
        """Let the copy train ``selection`` (all weights that can be trained, if None)."""
        if selection is None:
            selection = whole_model(model_parameters(self.model))
        with self.active():
            self.partial = make_partial(
                self.model, selection, master_dtype, hash_base=False, allow_other_weights=True
            )
        return self.partial

    def release(self) -> None:
        """The copy is an ordinary model again."""
        if self.partial is not None:
            with self.active():
                self.partial.remove()
            self.partial = None

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Whatever runs inside is run on fake tensors."""
        with self._fake, self._known:
            yield

    def batch(self) -> dict[str, Tensor]:
        """Token numbers spread over the vocabulary, as inputs and labels. Call it when active."""
        rows, tokens = self.batch_shape
        vocabulary = self._vocabulary()
        with _disable_current_modes():
            place = torch.arange(rows * tokens, dtype=torch.int64)
            # Multiplicative hashing (Knuth, TAOCP 3, 6.4): repeats like random tokens, no pattern
            ids = (place * 2_654_435_761 % 2**32 * vocabulary >> 32).reshape(rows, tokens)
        fake = self._known.know(ids, self.device)
        return {"input_ids": fake, "labels": fake}

    def _vocabulary(self) -> int:
        tables = [m.num_embeddings for m in self.model.modules() if isinstance(m, nn.Embedding)]
        get: Any = getattr(self.model, "get_input_embeddings", None)
        own = get() if get is not None else None
        return int(getattr(own, "num_embeddings", None) or min(tables, default=1))

    def loss(self) -> Tensor:
        """Run the forward pass. Call it when active.

        Raises:
            ResourceError: if the model does not run on fake tensors or gives no loss.
        """
        batch = self.batch()
        with self.explained("forward pass"):
            return self.model(**batch).loss

    @contextlib.contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Any error inside as ours, with the remedy."""
        try:
            yield
        except Irregular:
            raise
        except Exception as error:
            raise ResourceError(
                f"the training step of {type(self.model).__name__} cannot be planned: its {what} "
                f"does not run without data ({type(error).__name__}: {error}). Remedy: leave "
                "batch_shape out and measure one real step"
            ) from error


def check_batch_shape(batch_shape: object) -> None:
    """Refuse what is not ``(rows, tokens)``.

    Raises:
        ResourceError: naming it.
    """
    if not (
        isinstance(batch_shape, tuple | list)
        and len(batch_shape) == 2
        and all(type(n) is int and n > 0 for n in batch_shape)
    ):
        raise ResourceError(
            f"batch_shape is (rows, tokens), such as (8, 2048), not {batch_shape!r}"
        )
