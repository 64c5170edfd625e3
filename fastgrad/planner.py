"""How much memory will training take: each term by itself, before anything is allocated.

Works on a model of any device; on the meta device nothing at all is allocated, so a
configuration file is enough. With a batch shape a whole training step is run on fake tensors
(:mod:`fastgrad.dry_run`), so the plan says what the code does: the most bytes of tensors that are
alive at once, in a step of a loop that has run before (moments exist), keeps nothing of the
forward pass but the loss, and sets gradients to None after the step.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad.blocks import BlockGrid
from fastgrad.dry_run import DryRun, check_batch_shape, simpler, whole_model
from fastgrad.errors import ResourceError
from fastgrad.folding import Irregular, find_repeats
from fastgrad.identity import model_parameters
from fastgrad.live_bytes import TEMPORARY, LiveBytes
from fastgrad.optim import SparseAdamW
from fastgrad.partial import as_it_stands
from fastgrad.plans import Plan, with_unit
from fastgrad.selection import Selection
from fastgrad.train_step import FoldedPasses, Passes, mark_standing, run_passes
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
class MemoryPlan(Plan):
    """Bytes of each term of a training step.

    Attributes:
        terms: ``weights``, ``buffers``, ``packed`` (trained copies of selected blocks, masters
            included, and their block numbers), ``gradients``, ``optimizer`` (moments and counts).
            If a batch shape was given also ``activations`` (what the forward pass saves for the
            backward pass), ``temporary`` (all else that is alive at the peak: gradients of
            activations, logits, dense gradients that are cut, working copies) and
            ``not_at_once`` (negative: the part of the terms that is not alive at the peak). They
            add up to ``total``, which is then the peak of the step.
        full_terms: the same for training every weight with the same optimizer.
        n_trained, n_total: number of weights.
        notes: what the figures leave out.
        phases: with a batch shape, the most bytes alive at once in the ``forward`` pass, the
            ``backward`` pass and the ``optimizer`` step; the largest of them is ``total``.
        full_phases: the same for training every weight.
    """

    phases: dict[str, int] = field(default_factory=dict)
    full_phases: dict[str, int] = field(default_factory=dict)

    _unit = "bytes"

    @staticmethod
    def _human(amount: float) -> str:
        return human(amount)

    def _last_rows(self) -> list[tuple[str, int, int]]:
        return [
            ("peak" if self.phases else "total", self.total, self.full_total),
            *((f"  in {name}", size, self.full_phases[name]) for name, size in self.phases.items()),
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return super().to_dict() | {
            "phases_bytes": self.phases,
            "full_phases_bytes": self.full_phases,
        }


def human(size: float) -> str:
    """Bytes with a decimal unit (1 GB = 1e9 bytes, as DESIGN's figures and memory makers do)."""
    return with_unit(size, ("B", "kB", "MB", "GB", "TB"))


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
    selection; the same selection is not run twice. Of layers that repeat, those are run of which
    the like has not been run before (:mod:`fastgrad.train_step`).

    Args:
        model, optimizer, batch_shape, master_dtype: as for :func:`plan_memory`.

    Attributes:
        not_folded: why all layers are run although they look alike, once that was found out; empty
            if they are not.

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
        self.not_folded = ""
        repeats = None if batch_shape is None else find_repeats(model)
        self._folded: FoldedPasses | None = None
        if repeats is not None and batch_shape is not None:
            self._folded = FoldedPasses(model, batch_shape, master_dtype, repeats)

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
            if any(p.is_meta for p in self._own.values()):
                notes.append("the model is on the meta device: planned as on a CPU, with its "
                             "attention kernels")
        total = sum(p.numel() for p in self._own.values())
        trained = total if selection is None else selection.n_parameters
        return MemoryPlan(
            dict(terms), dict(full), trained, total, tuple(notes), dict(phases), dict(full_phases)
        )

    def _terms(self, selection: Selection | None) -> tuple[dict[str, int], dict[str, int]]:
        if selection is not None and self._is_everything(selection):
            selection = None
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

    def _is_everything(self, selection: Selection) -> bool:
        """All weights are trained, whatever blocks they are cut into."""
        return selection.n_parameters == sum(p.numel() for p in self._own.values()) and all(
            selection.is_whole(name) for name in selection.blocks
        )

    def _step(
        self, selection: Selection | None, batch_shape: tuple[int, int], terms: dict[str, int]
    ) -> dict[str, int]:
        """Run a step on fake tensors: the peak of each phase. Completes ``terms``."""
        if selection is None:
            selection = whole_model(self._own)
        else:
            selection = simpler(selection, self._model)
        passes, step = self._put_together(selection, terms) or self._run(selection, batch_shape)
        phases = {"forward": passes.forward, "backward": passes.backward, "optimizer": step}
        peak = max(phases.values(), key=Counter.total)
        terms["activations"], terms[TEMPORARY] = passes.saved, peak[TEMPORARY]
        terms["not_at_once"] = sum(
            peak[term] - size for term, size in terms.items() if term != TEMPORARY
        )
        return {name: at_most.total() for name, at_most in phases.items()}

    def _run(
        self, selection: Selection, batch_shape: tuple[int, int]
    ) -> tuple[Passes, Counter[str]]:
        """The passes of the whole model, and the bytes by kind at the peak of the optimizer's
        step."""
        run = DryRun(self._model, batch_shape)
        partial = run.select(selection, self._master_dtype)
        bytes_ = LiveBytes()
        with run.active():
            optimizer = _OPTIMIZERS[self._optimizer](list(partial.parameters()))
            _make_state(optimizer, run)
            mark_standing(run, bytes_)
            _mark_state(optimizer, bytes_)
            passes = run_passes(run, bytes_).passes
            bytes_.restart()
            with bytes_, run.explained("optimizer step"):
                optimizer.step()
            if self._optimizer == "adamw" and run.device.type == "cpu":
                trained = [(tuple(p.shape), p.dtype) for p in partial.parameters()]
                bytes_.at_most[TEMPORARY] += working_copies(trained)
        return passes, bytes_.at_most

    def _put_together(
        self, selection: Selection, terms: dict[str, int]
    ) -> tuple[Passes, Counter[str]] | None:
        """What :meth:`_run` finds, from the runs of a few layers; None where that cannot be done:
        where layers do not repeat, or another optimizer than ours writes blocks through."""
        if self._folded is None:
            return None
        dtype = self._master_dtype
        as_they_stand = all(
            as_it_stands(selection, n, self._own[n], dtype) for n in selection.blocks
        )
        if self._optimizer != "adamw" and not as_they_stand:
            return None
        standing = {t: terms[t] for t in ("weights", "buffers", "packed", "optimizer")}
        try:
            passes = self._folded.of(selection, Counter(standing))
        except Irregular as error:
            self._folded, self.not_folded = None, str(error)
            return None
        run, bytes_ = self._folded.run, LiveBytes()
        with run.active():
            trained = [
                (packed_shape(selection, n, self._own[n]), dtype or self._own[n].dtype)
                for n in selection.blocks
            ]
            some = trained
            if self._optimizer == "adamw":  # allocates for lists of tensors, not for each
                some = list({kind: (shape, kind) for shape, kind in trained}.values())
            stepped = [torch.empty(s, dtype=kind, device=run.device) for s, kind in some]
            optimizer = _OPTIMIZERS[self._optimizer](stepped)
            _make_state(optimizer, run)
            for p in stepped:
                p.grad = torch.zeros_like(p)
                bytes_.mark([p, p.grad], "standing")
            _mark_state(optimizer, bytes_)
            bytes_.restart()
            with bytes_, run.explained("optimizer step"):
                optimizer.step()
            if self._optimizer == "adamw" and run.device.type == "cpu":
                bytes_.at_most[TEMPORARY] += working_copies(trained)
        at_most = Counter(passes.left)
        at_most[TEMPORARY] += bytes_.at_most[TEMPORARY]
        return passes, at_most


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


def _mark_state(optimizer: torch.optim.Optimizer, bytes_: LiveBytes) -> None:
    for state in optimizer.state.values():
        bytes_.mark((t for t in state.values() if isinstance(t, Tensor)), "optimizer")


def packed_shape(selection: Selection, name: str, p: Tensor) -> tuple[int, ...]:
    """Of the tensor that is trained for a parameter."""
    if selection.is_whole(name):
        return tuple(p.shape)
    grid: BlockGrid = selection.grid(name)
    return len(selection.blocks[name]), grid.block_rows, grid.block_cols


def working_copies(trained: Iterable[tuple[tuple[int, ...], torch.dtype]]) -> int:
    """Bytes of the float32 copies through which our update on a CPU takes parameters of lower
    precision, of these shapes and dtypes, a piece at a time."""
    most = 0
    kinds: dict[Any, int] = {}  # elements that wait for the next update, by list of the step
    for shape, dtype in trained:
        if dtype not in (torch.bfloat16, torch.float16):
            continue
        unit = shape[1] * shape[2] if len(shape) == 3 else 1
        size, left = max(PIECE // unit, 1) * unit, math.prod(shape)
        waiting = kinds.get(dtype, 0)
        turn = -(-PIECE // size) * size  # elements of an update before which none wait
        while left > 0:
            if not waiting and left >= turn:
                most, left = max(most, turn), left % turn
                continue
            piece = min(size, left)
            left -= piece
            waiting += piece
            most = max(most, waiting)
            waiting = 0 if waiting >= PIECE else waiting
        kinds[dtype] = waiting
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
