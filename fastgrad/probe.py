"""Probe: gradient norms and cross-influence out of the ordinary backward pass.

with fg.Probe(model) as probe:
    for batch in loader:
        model(**batch).loss.backward()
stats = probe.stats()
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import _get_current_function_mode_stack

from fastgrad.batches import (
    Reduction,
    input_tensors,
    label_tokens,
    output_tensors,
    packed_owner,
    shifts_labels,
)
from fastgrad.blocks import BlockGrid
from fastgrad.errors import CoverageError, ProbeError
from fastgrad.granularity import Blocks, check_blocks, resolve
from fastgrad.identity import (
    PACKED_SUFFIX,
    model_class,
    model_parameters,
    reshard,
    unwrapped,
    weights_hash,
    whole,
)
from fastgrad.measurement import (
    Arrival,
    Measurement,
    Settings,
    absolute_blocks,
    aligned_blocks,
    squared_blocks,
)
from fastgrad.ownership import NOBODY, Mark, mark
from fastgrad.probe_arguments import (
    Direction,
    check_patterns,
    chosen_names,
    matches,
    named_directions,
    refuse_compiled,
    stacked,
)
from fastgrad.records import Batch, ParamRecord, Target
from fastgrad.replicas import (
    Replicas,
    Replicated,
    Sharded,
    at_the_end,
    refuse_wrappers,
    replicas_of,
    running_around,
)
from fastgrad.stats import GradientStats
from fastgrad.stats_shards import ShardWriter
from fastgrad.taps import TapMode
from fastgrad.unannounced import refuse_unannounced
from fastgrad.under_way import UnderWay, is_transformed
from fastgrad_kernels.layout import bare, sum_of_squares

# Per-example gradients of parameters without a cheaper form are kept until the end of the backward
# pass, [n_examples, *shape]: 64 MiB in float32. Above that it is no longer "almost free".
DENSE_LIMIT = 1 << 24


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


class Probe:
    """Context manager that measures a model's gradients while your own loop runs.

    Args:
        model: any ``nn.Module``. A new batch begins at each of its forward passes; tensors that
            enter have the examples in their leading dimension. Under DistributedDataParallel or
            ``fully_shard`` every process makes the probe; see :func:`fastgrad.gather`.
        blocks: granularity: ``module`` (one block per parameter), ``row``, ``column``,
            ``expert``, ``head`` (attention heads), a tile such as ``128x128``, a stripe such as
            ``64x*``, or a mapping of name patterns to these.
        per_example: True for the cross-influence ``T``; False for gradient norms only.
        params: name patterns (``fnmatch``) of the parameters to probe; all that require a
            gradient by default.
        frozen: name patterns of parameters to probe although they do not require a gradient, as
            the base under an adapter. Inside the ``with`` block they do, so the backward pass
            computes their gradients; each is dropped as soon as it is there, ``.grad`` stays
            None.
        detail: name patterns of the parameters whose per-example *block* influence is kept
            (memory: 4 bytes x blocks x examples); all by default.
        targets: target directions for signed influence, as ``{parameter name: tensor}`` or
            ``{direction name: {parameter name: tensor}}``.
        loss_reduction: how the loss combines examples: ``token_mean`` (mean over all label
            tokens of the batch; transformers' losses), ``row_mean`` (mean over examples of each
            example's mean), ``sum``. Contributions never depend on it; the scales
            ``example_mean`` and ``example_sum`` and the noise estimates do.
        loss_scale: what you multiply the loss by before ``backward()``: 1/8 under accumulation
            over 8 batches, or a function that gives it, as a GradScaler's ``get_scale``.
            Contributions contain it; the scales ``example_mean`` and ``example_sum`` divide it out.
        shift_labels: True if the loss predicts the next token, so that the first label of each
            row does not count; by default read from a transformers model.
        ignore_index: label value that does not count.
        self_check: compare what the taps summed up with autograd's gradient after each pass.
        strict: raise :class:`CoverageError` instead of reporting a missing parameter.
        on_nonfinite: ``raise`` on NaN or infinity in a gradient, or ``skip`` that batch (it is
            counted in ``stats.meta["skipped_batches"]``).
        hash_weights: keep the content hash of the weights in the statistics, so that they can
            be matched with a model later. Reads all weights once.
        dense_limit: elements that the gradients of all examples of a batch may take for a
            parameter whose influence has no cheaper form: one that is added or multiplied
            elementwise, prepared by other functions, or enters a function without a tap. Above
            it such a parameter is reported as missing.
        shards: folder to write the measurement to piece by piece, so that memory does not grow
            with the number of examples (:class:`fastgrad.stats_shards.ShardWriter`);
            :meth:`stats` then leaves block detail on disk.
        shard_examples: examples in a file of that folder.
        l1: record the sums of absolute gradients too, for ``select(..., ranking="l1")``. Reads
            each gradient once more.

    Raises:
        ProbeError: if nothing is to be probed, or the model is compiled.
        BlockSpecError: for an unknown granularity.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks = "module",
        *,
        per_example: bool = True,
        params: Sequence[str] | None = None,
        frozen: Sequence[str] | None = None,
        detail: Sequence[str] | None = None,
        targets: Direction | Mapping[str, Direction] | None = None,
        loss_reduction: Reduction = "token_mean",
        loss_scale: float | Callable[[], float] = 1.0,
        shift_labels: bool | None = None,
        ignore_index: int = -100,
        self_check: bool = True,
        strict: bool = False,
        on_nonfinite: Literal["raise", "skip"] = "raise",
        hash_weights: bool = True,
        dense_limit: int = DENSE_LIMIT,
        shards: str | os.PathLike[str] | None = None,
        shard_examples: int = 1000,
        l1: bool = False,
    ) -> None:
        check_blocks(blocks)
        if not isinstance(model, nn.Module):
            raise ProbeError(
                f"a probe needs a model, not {type(model).__name__} {str(model)[:60]!r}. Remedy: "
                "load it first, for instance with AutoModelForCausalLM.from_pretrained"
            )
        refuse_compiled(model)
        refuse_wrappers(model)
        reshard(model)
        if any(name.endswith(PACKED_SUFFIX) for name, _ in model.named_parameters()):
            raise ProbeError(
                "this model is partial: its packed blocks are not probed. Remedy: probe inside "
                "'with partial.suspended():', before make_partial or after .remove()"
            )
        if loss_reduction not in ("token_mean", "row_mean", "sum"):
            raise ProbeError(
                f"unknown loss_reduction {loss_reduction!r}; use token_mean, row_mean or sum"
            )
        self.model, self.per_example, self.l1 = model, per_example, bool(l1)
        self.loss_reduction, self.ignore_index = loss_reduction, ignore_index
        if not callable(loss_scale) and not loss_scale > 0:
            raise ProbeError(f"loss_scale must be positive, got {loss_scale}")
        self.shift_labels = (
            shifts_labels(unwrapped(model)) if shift_labels is None else shift_labels
        )
        self._told, self._labelled = shift_labels is not None, False
        self._autocast: set[torch.dtype] = set()
        everything = model_parameters(model)
        specs = resolve(model, blocks)
        names = chosen_names(everything, params, frozen)
        check_patterns(detail, everything, "detail")
        self._directions = {
            label: {n: whole(t) for n, t in direction.items()}
            for label, direction in named_directions(targets, everything, names).items()
        }
        self._thawed = [everything[n] for n in names if not everything[n].requires_grad]
        grids = {n: BlockGrid.of(everything[n].shape, specs[n]) for n in names}
        probed = [
            Target(
                n,
                everything[n],
                grids[n],
                stacked(self._directions, n, everything[n], grids[n]),
                self._refuse,
                self_check,
                dense_limit,
            )
            for n in names
        ]
        self._probed = probed
        self._targets = {id(t.parameter): t for t in probed}
        self._measured = Measurement(
            probed,
            [n for n in everything if n not in grids],
            {n for n in names if matches(n, detail)},
            list(self._directions),
            np.array([float(sum_of_squares(whole(everything[n]))) for n in names]),
            Settings(per_example, loss_reduction, loss_scale, strict, on_nonfinite, self.l1),
            None if shards is None else ShardWriter(shards, shard_examples),
        )
        self._next_ids: list[int] | None = None
        self._hash = weights_hash(model) if hash_weights else None
        self._under_way = UnderWay(model, lambda: [*self._pending, *self._firing])
        self._handles: list[Any] = []
        # Batches live as long as their autograd graph: a forward pass that is never followed by
        # a backward pass (an evaluation with gradients on) leaves nothing behind.
        self._pending: weakref.WeakSet[Batch] = weakref.WeakSet()
        self._firing: list[Batch] = []
        self._samples: dict[str, Tensor] = {}
        self._running = False
        self._forwards = 0
        self._pass: dict[str, Arrival] | None = None
        self._unsharded: dict[int, Tensor] = {}  # what stands for sharded parameters
        self._replicas = self._find_replicas()

    # -- context -------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self._running:
            raise ProbeError("this probe is already running")
        for mode in _get_current_function_mode_stack():
            if isinstance(mode, TapMode) and self.per_example:
                raise ProbeError(
                    "another probe is running; the outer one would not see what the inner one "
                    "takes. Remedy: leave it first, or give one probe all that you want to know"
                )
        reshard(self.model)
        current = model_parameters(self.model)
        for target in self._probed:
            if current.get(target.name) is not target.parameter:
                raise ProbeError(
                    f"{target.name} was replaced after the probe was made. Remedy: "
                    "make the probe when the model is complete"
                )
            thawed = any(target.parameter is p for p in self._thawed)
            if not target.parameter.requires_grad and not thawed:
                raise ProbeError(
                    f"{target.name} was frozen after the probe was made. Remedy: make a new probe"
                )
        self._replicas = self._find_replicas() or self._replicas
        self._running = True
        self._handles = [
            self.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.model.register_forward_hook(self._end_forward),
        ]
        for parameter in self._thawed:
            parameter.requires_grad_(True)
            self._handles.append(parameter.register_post_accumulate_grad_hook(_drop))
        if isinstance(self._replicas, Sharded):
            self._handles += self._replicas.watch(self._stands_for)
        else:
            for target in self._probed:
                self._handles.append(target.parameter.register_hook(self._grad_hook(target)))
        if self.per_example:
            self._under_way.mode.__enter__()
            self._handles += [
                register_module_forward_pre_hook(self._under_way.begin_module),
                register_module_forward_hook(self._under_way.end_module, always_call=True),
            ]
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # a deep copy of the model copies its hooks; there is one probe all the same

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.per_example:
            self._under_way.mode.__exit__(kind, error, trace)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for parameter in self._thawed:
            parameter.requires_grad_(False)
        for key in self._unsharded:
            del self._targets[key]
        self._unsharded.clear()
        self._under_way.batch, self._pass, self._running = None, None, False
        self._pending.clear()
        self._firing.clear()

    # -- several processes ---------------------------------------------------------------

    def _find_replicas(self, wrapper: nn.Module | None = None) -> Replicas | None:
        found = replicas_of(wrapper or self.model, self._probed)
        if found is not None:
            found.l1 = self.l1
        if found is not None and self._thawed:
            raise ProbeError(
                "frozen=[...] does not work with a model that runs in several processes: the "
                "wrapper decided when it was made whose gradients are reduced. Remedy: "
                "requires_grad_(True) before wrapping the model, or probe it in one process"
            )
        return found

    def _stands_for(self, tensor: Tensor, target: Target) -> None:
        """While fully_shard has a parameter put together, another tensor takes its place."""
        if id(tensor) not in self._targets:
            self._targets[id(tensor)] = target
            self._unsharded[id(tensor)] = tensor
            if tensor.requires_grad:
                self._handles.append(tensor.register_hook(self._grad_hook(target)))

    def _in_replicas(self) -> None:
        """A forward pass begins in one of several processes, perhaps inside a wrapper that was
        put around the model after the probe was made."""
        alone, wrapper = self._replicas is None, running_around(self.model)
        if alone and wrapper is not None:
            self._replicas = self._find_replicas(wrapper)
        outside = isinstance(self._replicas, Replicated) and wrapper is None
        if (alone != (self._replicas is None) and self._measured.recorder.n_passes) or (
            outside and not isinstance(self.model, DistributedDataParallel)
        ):
            raise ProbeError(
                "the model was called inside its DistributedDataParallel wrapper and outside of "
                "it: gradients are reduced over processes in one case alone. Remedy: one probe "
                "for each"
            )
        if self._replicas is not None:
            self._replicas.forward()

    # -- forward -------------------------------------------------------------------------

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is not self.model or is_transformed():
            return  # a copy of the model carries copies of the hooks
        batch = self._under_way.batch
        if batch is not None and not batch.counting:
            return  # all of this batch is computed again
        if self._pass is not None and torch._C._current_graph_task_id() == -1:
            self._pass = None  # the last backward pass broke off with an error
            self._firing.clear()
            self._measured.forget_waiting()
            if self._replicas is not None:
                self._replicas.forget()
        if not torch.is_grad_enabled():
            self._under_way.batch = None
            return
        self._in_replicas()
        inputs = input_tensors(args, kwargs)
        if not inputs:
            raise ProbeError(
                f"{type(module).__name__} was called without a tensor argument, so the examples "
                "of the batch cannot be counted. Remedy: pass inputs as tensors"
            )
        owner = packed_owner(kwargs, inputs[0].shape)
        n = inputs[0].shape[0]
        if owner is not None:
            n = int(owner.max()) + 1 if owner.numel() else 0
        labels = kwargs.get("labels")
        self._labelled = self._labelled or labels is not None
        kind = inputs[0].device.type
        if torch.is_autocast_enabled(kind):
            self._autocast.add(torch.get_autocast_dtype(kind))
        tokens = label_tokens(labels, n, self.shift_labels, self.ignore_index, owner)
        items = kwargs.get("num_items_in_batch")
        self._forwards += 1
        others = frozenset(d for t in inputs for d in t.shape[1:])
        batch = self._under_way.batch = Batch(
            self._forwards,
            n,
            others,
            tokens,
            None if items is None else float(items),
            self._targets,
            self._arrived,
            self._samples,
            owner,
            self._take_ids(n),
            again=self._under_way.computing_again,
            earlier={b.index: weakref.ref(b) for b in self._pending},
            autocast=self._autocast,
        )
        for tensor in inputs:
            if owner is None:
                found = Mark(0) if tensor.shape[0] == n else NOBODY
            elif tensor.shape[:2] == owner.shape:
                found = Mark(NOBODY.dim, owner.view(*owner.shape, *[1] * (tensor.ndim - 2)))
            else:
                found = NOBODY
            mark(tensor, self._forwards, found)
            batch.inputs.append((weakref.ref(tensor), found))
        self._pending.add(batch)
        in_backward_pass = torch._C._current_graph_task_id() != -1
        if in_backward_pass and not self._under_way.again:  # it ran without gradients before
            self._under_way.begin_again(module, batch, count=True)

    def next_ids(self, ids: Sequence[int] | Tensor) -> None:
        """Ids of the examples of the next forward pass, instead of running numbers: for data that
        are shuffled, or spread over processes."""
        self._next_ids = [int(i) for i in ids]

    def _take_ids(self, n: int) -> list[int] | None:
        ids, self._next_ids = self._next_ids, None
        if ids is not None and len(ids) != n:
            raise ProbeError(
                f"{len(ids)} example ids were given for a batch of {n} examples. Remedy: call "
                "next_ids right before the forward pass that they are for"
            )
        return ids

    def _refuse(self, name: str, reason: str) -> None:
        self._measured.refuse(name, reason)

    def _end_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        # The first gradient to flow into an output marks the begin of the backward pass; taken
        # here, because an activation checkpoint runs smaller backward passes inside.
        if not torch.is_grad_enabled():
            return
        batch = self._under_way.batch

        def arrived(grad: Tensor) -> None:
            self._arrival()
            if batch is not None and not batch.n_examples:
                self._arrived(batch)  # no tap will tell of it

        outputs = output_tensors(output)
        if batch is not None and self.per_example:
            refuse_unannounced(outputs, batch)  # the loss may be computed in one of them
        for tensor in outputs:
            if tensor.requires_grad and tensor.grad_fn is not None:
                tensor.register_hook(arrived)

    # -- backward ------------------------------------------------------------------------

    def _arrived(self, batch: Batch) -> None:
        if not self._running:
            return
        self._arrival()
        if batch not in self._firing and batch in self._pending:
            self._pending.remove(batch)
            self._firing.append(batch)

    def _arrival(self) -> None:
        if self._running and self._pass is None:
            self._pass = {}
            if self._replicas is None:
                torch.autograd.Variable._execution_engine.queue_callback(self._finish)
                return
            if self._replicas.begin():
                self._measured.forget_waiting()
            at_the_end(self._finish)

    def _grad_hook(self, target: Target) -> Any:
        grid = target.grid

        def hook(grad: Tensor) -> None:
            if any(b.nested for b in self._firing):
                return
            self._arrival()
            assert self._pass is not None
            if grad.is_sparse:  # of an embedding: for a moment as large as its table
                grad = grad.to_dense()
            earlier = self._pass.get(target.name)
            sq = squared_blocks(grad, grid)
            record = self._record(target.name)
            checked = record is not None and target.self_check
            picked = (
                bare(grad).take(record.sample())
                if record is not None and checked
                else sq[:0]
            )
            narrow = grad.dtype in (torch.bfloat16, torch.float16)
            dots = None
            if target.directions is not None and self._one_example():
                dots = target.directions.flatten(1) @ bare(grad).reshape(-1).float()
            aligned = None
            if self.per_example and target.directions is not None and not grid.is_whole:
                aligned = aligned_blocks(grad, target.directions, grid)
            self._pass[target.name] = Arrival(
                sq, picked, narrow, grid.numel, 1 if earlier is None else 2, dots,
                absolute_blocks(grad, grid) if self.l1 and self._replicas is None else None,
                aligned,
            )  # fmt: skip

        return hook

    def _one_example(self) -> bool:
        return sum(b.n_examples for b in (*self._firing, *self._pending)) == 1

    def _record(self, name: str) -> ParamRecord | None:
        for batch in self._firing:
            record = batch.records.get(name)
            if record is not None and record.uses:
                return record
        return None

    def _finish(self) -> None:
        """End of a backward pass: what the records hold becomes columns of the statistics."""
        arrived, self._pass = self._pass or {}, None
        batches, self._firing = sorted(self._firing, key=lambda b: b.index), []
        self._samples.clear()
        came = list(arrived)
        if any(b.n_examples == 0 for b in batches):
            # Their gradient is zero: that no tap saw it is nothing that is missing.
            batches = [b for b in batches if b.n_examples]
            seen = set().union(*(b.arrived for b in batches))
            arrived = {n: a for n, a in arrived.items() if n in seen or bool(a.sq.any())}
        # Several processes record the same passes, also one that had no examples.
        if not arrived and (self._replicas is None or not came):
            # A gradient of the inputs alone: the batches may still be trained on.
            for batch in batches:
                batch.forget()
                self._pending.add(batch)
            if self._replicas is not None:
                self._replicas.nothing_came()
            return
        try:
            reduced = None if self._replicas is None else self._replicas.end(came)
            if self._measured.take(batches, arrived, reduced) and self._measured.recorder.is_due:
                self._measured.recorder.write(self._measured.coverage(), self._meta())
        finally:
            for batch in batches:
                batch.forget()

    # -- result --------------------------------------------------------------------------

    def stats(self) -> GradientStats:
        """Everything measured so far; may be called inside or after the ``with`` block.

        Raises:
            ProbeError: if no backward pass has been seen.
            CoverageError: if not one parameter's influence could be attributed to examples.
        """
        measured = self._measured
        if not measured.recorder.n_passes:
            raise ProbeError(
                "no backward pass of a batch with examples was seen. Remedy: call the probed model "
                "and loss.backward() inside the with block, with gradients enabled"
                + (
                    f"; {measured.skipped} batches were skipped for NaN or infinity"
                    if measured.skipped
                    else ""
                )
            )
        if not measured.covers_something():
            name, reason = next(iter(measured.missing.items()))
            raise CoverageError(
                f"no layer of {type(self.model).__name__} is supported: the influence of all "
                f"{len(measured.used)} parameters is missing, first {name}: {reason}. Remedy: "
                "per_example=False still measures gradient norms"
            )
        return measured.recorder.stats(measured.coverage(), self._meta())

    def _meta(self) -> dict[str, Any]:
        config = getattr(unwrapped(self.model), "config", None)
        # A gradient is as exact as the arithmetic behind it, also where autocast changed that.
        dtypes = sorted({str(d) for d in [*(t.parameter.dtype for t in self._probed),
                                          *self._autocast]})  # fmt: skip
        across = {}
        if self._replicas is not None:
            across = {"processes": self._replicas.processes, "rank": self._replicas.rank}
        return {
            "weights_hash": self._hash,
            "model_class": model_class(self.model),
            "name_or_path": str(getattr(config, "_name_or_path", "") or ""),
            "model_revision": str(getattr(config, "_commit_hash", "") or ""),
            "attention": str(getattr(config, "_attn_implementation", "") or ""),
            "dtypes": dtypes,
            "loss_reduction": self.loss_reduction,
            # Where the model saw no labels its own loss was not computed: nothing was shifted.
            "shift_labels": self.shift_labels if self._labelled or self._told else None,
            "skipped_batches": self._measured.skipped,
            "mixes_examples": sorted(self._measured.mixing),
            "n_model_parameters": sum(p.numel() for p in model_parameters(self.model).values()),
            "torch": str(torch.__version__),
            **across,
        }
