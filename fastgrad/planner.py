"""How much memory will training take: each term by itself, before anything is allocated.

Works on a model of any device; on the meta device nothing at all is allocated, so a
configuration file is enough. With a batch shape a whole training step is run on fake tensors
(:mod:`fastgrad.dry_run`), so the plan says what the code does: the most bytes of tensors that are
alive at once, in a step of a loop that has run before (moments exist), keeps nothing of the
forward pass but the loss, and sets gradients to None after the step.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad.blocks import BlockGrid
from fastgrad.dry_run import DryRun, check_batch_shape, simpler
from fastgrad.errors import ResourceError
from fastgrad.identity import model_parameters
from fastgrad.live_bytes import TEMPORARY, LiveBytes
from fastgrad.optim import SparseAdamW
from fastgrad.selection import Selection
from fastgrad_kernels.adamw_cpu import PIECE

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
        terms: ``weights``, ``buffers``, ``packed`` (trained copies of selected blocks, masters
            included, and their block numbers), ``gradients``, ``optimizer`` (moments and counts).
            If a batch shape was given also ``activations`` (what the forward pass saves for the
            backward pass), ``temporary`` (all else that is alive at the peak: gradients of
            activations, logits, dense gradients that are cut, working copies) and
            ``not_at_once`` (negative: the part of the terms that is not alive at the peak). They
            add up to ``total``.
        full_terms: the same for training every weight with the same optimizer.
        n_trained, n_total: number of weights.
        notes: what the figures leave out.
        phases: with a batch shape, the most bytes alive at once in the ``forward`` pass, the
            ``backward`` pass and the ``optimizer`` step; the largest of them is ``total``.
        full_phases: the same for training every weight.
    """

    terms: dict[str, int]
    full_terms: dict[str, int]
    n_trained: int
    n_total: int
    notes: tuple[str, ...] = field(default=())
    phases: dict[str, int] = field(default_factory=dict)
    full_phases: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes of all terms; with a batch shape the peak of a training step."""
        return sum(self.terms.values())

    @property
    def full_total(self) -> int:
        """:attr:`total` for training every weight."""
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
            f"{'term':<18}{'selection':>14}{'full tuning':>14}{'saved':>14}",
        ]

        def row(name: str, size: int, full: int) -> None:
            lines.append(
                f"{name.replace('_', ' '):<18}{human(size):>14}{human(full):>14}"
                f"{human(full - size):>14}"
            )

        for term, size in self.terms.items():
            row(term, size, self.full_terms[term])
        row("peak" if self.phases else "total", self.total, self.full_total)
        for phase, size in self.phases.items():
            row(f"  in {phase}", size, self.full_phases[phase])
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return {
            "terms_bytes": self.terms,
            "full_terms_bytes": self.full_terms,
            "total_bytes": self.total,
            "full_total_bytes": self.full_total,
            "phases_bytes": self.phases,
            "full_phases_bytes": self.full_phases,
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

    To plan many selections of one model, build a :class:`MemoryPlanner` once.

    Args:
        model: on any device, the meta device included.
        selection: what is trained, see :func:`fastgrad.select`.
        optimizer: ``adamw`` (SparseAdamW, float32 moments), ``torch-adamw``, ``sgd-momentum``
            or ``sgd``.
        batch_shape: ``(rows, tokens)`` of a text model's batch, to plan the peak of a step with
            its activations and temporary tensors too.
        master_dtype: as for :func:`fastgrad.make_partial`.

    Raises:
        ResourceError: for an unknown optimizer, or if the model cannot run on fake tensors.
    """
    planner = MemoryPlanner(
        model, optimizer=optimizer, batch_shape=batch_shape, master_dtype=master_dtype
    )
    return planner.plan(selection)


class MemoryPlanner:
    """Plans many selections of one model: what does not depend on them is found once.

    Without a batch shape a plan is arithmetic. With one, a step is run on fake tensors for each
    selection; the same selection is not run twice.

    Args:
        model, optimizer, batch_shape, master_dtype: as for :func:`plan_memory`.

    Raises:
        ResourceError: for an unknown optimizer or a batch shape that is none.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: str = "adamw",
        batch_shape: tuple[int, int] | None = None,
        master_dtype: torch.dtype | None = None,
    ) -> None:
        if optimizer not in OPTIMIZERS:
            raise ResourceError(f"unknown optimizer {optimizer!r}; known: {', '.join(OPTIMIZERS)}")
        if batch_shape is not None:
            check_batch_shape(batch_shape)
        self._model, self._own = model, model_parameters(model)
        self._optimizer, self._batch_shape = optimizer, batch_shape
        self._master_dtype = master_dtype
        self._runs: dict[Any, tuple[dict[str, int], dict[str, int]]] = {}

    def plan(self, selection: Selection | None = None) -> MemoryPlan:
        """The plan of one selection (all weights if None).

        Raises:
            ResourceError: if the model cannot run on fake tensors.
        """
        full, full_phases = self._terms(None)
        terms, phases = (full, full_phases) if selection is None else self._terms(selection)
        if self._batch_shape is None:
            notes = ["activations and temporary tensors are not counted: no batch_shape was given"]
        else:
            notes = [
                "the peak of a step that keeps nothing of the forward pass but the loss; scratch "
                "inside operators, libraries and code are not counted"
            ]
        total = sum(p.numel() for p in self._own.values())
        trained = total if selection is None else selection.n_parameters
        return MemoryPlan(
            dict(terms), dict(full), trained, total, tuple(notes), dict(phases), dict(full_phases)
        )

    def _terms(self, selection: Selection | None) -> tuple[dict[str, int], dict[str, int]]:
        key = None if selection is None else selection_key(selection)
        if key not in self._runs:
            terms = _static_terms(
                self._model, self._own, selection, self._optimizer, self._master_dtype
            )
            phases: dict[str, int] = {}
            if self._batch_shape is not None:
                phases = self._step(selection, self._batch_shape, terms)
            self._runs[key] = terms, phases
        return self._runs[key]

    def _step(
        self, selection: Selection | None, batch_shape: tuple[int, int], terms: dict[str, int]
    ) -> dict[str, int]:
        """Run a step on fake tensors: the peak of each phase. Completes ``terms``."""
        run = DryRun(self._model, batch_shape)
        if selection is not None:
            selection = simpler(selection, self._model)
        partial = run.select(selection, self._master_dtype)
        bytes_ = LiveBytes()
        with run.active():
            optimizer = _OPTIMIZERS[self._optimizer](list(partial.parameters()))
            _make_state(optimizer, run)
            bytes_.mark((p for p in model_parameters(run.model).values()), "weights")
            bytes_.mark(run.model.buffers(), "buffers")
            bytes_.mark((b.packed for b in partial.packed), "packed")
            bytes_.mark((b.ids for b in partial.packed if not b.whole), "packed")
            for state in optimizer.state.values():
                bytes_.mark((t for t in state.values() if isinstance(t, Tensor)), "optimizer")
            moments = _Peaks(bytes_)

            def keep(tensor: Tensor) -> Tensor:
                bytes_.mark([tensor], "activations")
                return tensor

            for p in partial.parameters():
                p.register_post_accumulate_grad_hook(
                    lambda p: bytes_.mark([p.grad], "gradients")
                )
            with bytes_, moments.of("forward"):
                with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                    loss = run.loss()
                terms["activations"] = bytes_.live["activations"]
            with bytes_, moments.of("backward"), run.explained("backward pass"):
                loss.backward()
                del loss
            copies = working_copies(optimizer) if self._optimizer == "adamw" else 0
            with bytes_, moments.of("optimizer", copies), run.explained("optimizer step"):
                optimizer.step()
        terms[TEMPORARY] = moments.at_most[TEMPORARY]
        terms["not_at_once"] = sum(
            moments.at_most[term] - size for term, size in terms.items() if term != TEMPORARY
        )
        return moments.phases


class _Peaks:
    """The most bytes of each phase, and by kind in the phase with the most."""

    def __init__(self, bytes_: LiveBytes) -> None:
        self._bytes = bytes_
        self.phases: dict[str, int] = {}
        self.at_most: Counter[str] = Counter()

    @contextlib.contextmanager
    def of(self, phase: str, unseen: int = 0) -> Iterator[None]:
        """``unseen``: temporary bytes inside an operator, which has all others alive."""
        self._bytes.restart()
        yield
        self._bytes.at_most[TEMPORARY] += unseen
        self.phases[phase] = self._bytes.at_most.total()
        if self.phases[phase] > self.at_most.total():
            self.at_most = self._bytes.at_most


_OPTIMIZERS: dict[str, Any] = {
    # Fake gradients are neither finite nor infinite; the check holds one number per tensor.
    "adamw": lambda params: SparseAdamW(params, check_finite=False),
    "torch-adamw": torch.optim.AdamW,
    "sgd-momentum": lambda params: torch.optim.SGD(params, momentum=0.9),
    "sgd": torch.optim.SGD,
}


def _make_state(optimizer: torch.optim.Optimizer, run: DryRun) -> None:
    """A first step, after which moments exist."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p in params:
        p.grad = torch.zeros_like(p)
    with run.explained("optimizer step"):
        optimizer.step()
    for p in params:
        p.grad = None


def working_copies(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the float32 copies through which our update on a CPU takes parameters of lower
    precision, a piece at a time."""
    most = 0
    kinds: dict[Any, int] = {}  # elements that wait for the next update, by list of the step
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        if p.device.type != "cpu" or p.dtype not in (torch.bfloat16, torch.float16):
            continue
        unit = p[0].numel() if p.ndim == 3 else 1
        size = max(PIECE // unit, 1) * unit
        for start in range(0, p.numel(), size):
            waiting = kinds.get(p.dtype, 0) + min(size, p.numel() - start)
            most = max(most, waiting)
            kinds[p.dtype] = 0 if waiting >= PIECE else waiting
    return 2 * torch.float32.itemsize * most  # of the parameter and of its gradient


def selection_key(selection: Selection) -> Any:
    """Hashable: what is selected, whatever it is called or was made from."""
    return (
        selection.spec,
        tuple(sorted(selection.specs.items())),
        tuple((name, ids.tobytes()) for name, ids in selection.blocks.items()),
    )


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
