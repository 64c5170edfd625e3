"""How much memory will training take: each term by itself, before anything is allocated.

Works on a model of any device; on the meta device nothing at all is allocated, so a
configuration file is enough.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgrad.blocks import BlockGrid
from fastgrad.errors import ResourceError
from fastgrad.identity import model_parameters
from fastgrad.selection import Selection

STEP_BYTES = 4  # one float32 step count per trained tensor

# Bytes of optimizer state per trained element, as (fixed float32 moments, moments in the
# trained tensor's own dtype).
OPTIMIZERS = {
    "adamw": (8, 0),  # fg.SparseAdamW: two float32 moments
    "torch-adamw": (0, 2),  # torch.optim.AdamW: two moments in the parameter's dtype
    "sgd-momentum": (0, 1),
    "sgd": (0, 0),
}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of each term of a training step.

    Attributes:
        terms: ``weights``, ``buffers``, ``packed`` (trained copies of selected blocks),
            ``gradients``, ``optimizer`` and, if a batch shape was given, ``activations`` (what
            the forward pass saves for the backward pass).
        full_terms: the same for training every weight with the same optimizer.
        n_trained, n_total: number of weights.
        notes: what the figures leave out.
    """

    terms: dict[str, int]
    full_terms: dict[str, int]
    n_trained: int
    n_total: int
    notes: tuple[str, ...] = field(default=())

    @property
    def total(self) -> int:
        return sum(self.terms.values())

    @property
    def full_total(self) -> int:
        return sum(self.full_terms.values())

    @property
    def saved(self) -> int:
        """Bytes saved against training every weight."""
        return self.full_total - self.total

    def table(self) -> str:
        """A plain text table, one line per term."""
        lines = [
            f"trained weights: {self.n_trained:,} of {self.n_total:,} "
            f"({self.n_trained / self.n_total:.1%})",
            f"{'term':<12}{'selection':>14}{'full tuning':>14}{'saved':>14}",
        ]
        for term, size in self.terms.items():
            full = self.full_terms[term]
            lines.append(f"{term:<12}{human(size):>14}{human(full):>14}{human(full - size):>14}")
        lines.append(
            f"{'total':<12}{human(self.total):>14}{human(self.full_total):>14}"
            f"{human(self.saved):>14}"
        )
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        return {
            "terms_bytes": self.terms,
            "full_terms_bytes": self.full_terms,
            "total_bytes": self.total,
            "full_total_bytes": self.full_total,
            "n_trained": self.n_trained,
            "n_total": self.n_total,
            "notes": list(self.notes),
        }


def human(size: float) -> str:
    """Bytes with a decimal unit (1 GB = 1e9 bytes, as DESIGN's figures and memory makers do)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def plan_memory(
    model: nn.Module,
    selection: Selection | None = None,
    *,
    optimizer: str = "adamw",
    batch_shape: tuple[int, int] | None = None,
    master_dtype: torch.dtype | None = None,
) -> MemoryPlan:
    """Memory of a training step with ``selection`` (all weights if None).

    Args:
        model: on any device, the meta device included.
        selection: what is trained, see :func:`fastgrad.select`.
        optimizer: ``adamw`` (SparseAdamW, float32 moments), ``torch-adamw``, ``sgd-momentum``
            or ``sgd``.
        batch_shape: ``(rows, tokens)`` of a text model's batch, to plan saved activations too:
            a forward pass on the meta device counts the tensors that autograd keeps.
        master_dtype: as for :func:`fastgrad.make_partial`.

    Raises:
        ResourceError: for an unknown optimizer, or if the model cannot run on the meta device.
    """
    if optimizer not in OPTIMIZERS:
        raise ResourceError(f"unknown optimizer {optimizer!r}; known: {', '.join(OPTIMIZERS)}")
    if batch_shape is not None and not (
        isinstance(batch_shape, tuple | list)
        and len(batch_shape) == 2
        and all(isinstance(n, int) and n > 0 for n in batch_shape)
    ):
        raise ResourceError(
            f"batch_shape is (rows, tokens), such as (8, 2048), not {batch_shape!r}"
        )
    own = model_parameters(model)
    shapes = {n: tuple(p.shape) for n, p in own.items()}
    full = _static_terms(model, own, None, optimizer, master_dtype)
    terms = _static_terms(model, own, selection, optimizer, master_dtype)
    notes = ["temporary buffers inside a single operation are not counted"]
    if batch_shape is None:
        notes.append("activations are not counted: no batch_shape was given")
    else:
        full["activations"] = _activations(model, set(shapes), batch_shape)
        chosen = set(shapes) if selection is None else set(selection.blocks)
        terms["activations"] = _activations(model, chosen, batch_shape)
    total = sum(p.numel() for p in own.values())
    trained = total if selection is None else sum(selection.n_selected(n) for n in selection.blocks)
    return MemoryPlan(terms, full, trained, total, tuple(notes))


def _static_terms(
    model: nn.Module,
    own: dict[str, nn.Parameter],
    selection: Selection | None,
    optimizer: str,
    master_dtype: torch.dtype | None,
) -> dict[str, int]:
    fixed, moments = OPTIMIZERS[optimizer]
    packed = gradients = state = 0
    for name, p in own.items():
        if selection is not None and name not in selection.blocks:
            continue
        dtype = master_dtype or p.dtype
        if selection is None or selection.is_whole(name):
            elements, copied = p.numel(), dtype != p.dtype
        else:
            grid: BlockGrid = selection.grid(name)
            elements = len(selection.blocks[name]) * grid.block_rows * grid.block_cols
            copied = True
            packed += 8 * len(selection.blocks[name])  # the int64 block numbers
        packed += elements * dtype.itemsize if copied else 0
        gradients += elements * dtype.itemsize
        state += elements * (fixed + moments * dtype.itemsize)
        state += STEP_BYTES if fixed or moments == 2 else 0
    return {
        "weights": sum(p.numel() * p.element_size() for p in own.values()),
        "buffers": sum(b.numel() * b.element_size() for b in model.buffers()),
        "packed": packed,
        "gradients": gradients,
        "optimizer": state,
    }


def _activations(model: nn.Module, trained: set[str], batch_shape: tuple[int, int]) -> int:
    """Bytes that autograd saves in one forward pass, weights themselves left out.

    Runs on fake tensors that claim the model's device (the host's for a model on meta), so that
    PyTorch chooses the same attention kernel as in the real step, and allocates nothing.
    """
    saved: dict[int, tuple[int, Any]] = {}
    constant: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in constant:
            saved[storage._cdata] = (storage.nbytes(), storage)  # kept, so that ids stay unique
        return tensor

    own = model_parameters(model)
    device = next(iter(own.values())).device
    device = torch.device("cpu") if device.type == "meta" else device
    try:
        with FakeTensorMode():
            fakes: dict[int, Tensor] = {}
            state: dict[str, Tensor] = {}
            for name, t in (
                *model.named_parameters(remove_duplicate=False),
                *model.named_buffers(remove_duplicate=False),
            ):
                if id(t) not in fakes:  # tied weights stay tied, or they would count twice
                    fakes[id(t)] = torch.empty_strided(
                        t.shape, t.stride(), dtype=t.dtype, device=device
                    )
                state[name] = fakes[id(t)]
            for name, p in own.items():
                fakes[id(p)].requires_grad_(name in trained)
            constant |= {t.untyped_storage()._cdata for t in fakes.values()}
            ids = torch.zeros(batch_shape, dtype=torch.int64, device=device)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                torch.func.functional_call(
                    model, state, args=(), kwargs={"input_ids": ids, "labels": ids}
                )
    except Exception as error:
        raise ResourceError(
            f"the activations of {type(model).__name__} cannot be planned: its forward pass does "
            f"not run without data ({type(error).__name__}: {error}). Remedy: leave "
            "batch_shape out and measure them in one real step"
        ) from error
    return sum(size for size, _ in saved.values())
