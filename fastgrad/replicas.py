"""Models whose gradients are reduced over processes: DistributedDataParallel and fully_shard.

Each process runs its own examples; what lies in ``.grad`` afterwards is the sum over processes
divided by a number, usually theirs. So an example's contribution to that gradient is its
contribution on its own process divided by that number, and the gradient's norm is known only when
the reduction is over, at the very end of the backward pass.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fastgrad.blocks import BlockGrid
from fastgrad.errors import ProbeError
from fastgrad.identity import sharded_modules, unwrapped
from fastgrad.measurement import Reduced, absolute_blocks, squared_blocks
from fastgrad.records import Target
from fastgrad_kernels.layout import matrix_view

Blockwise = Callable[[Tensor, BlockGrid], Tensor]  # of a gradient, sums of each block

# PyTorch's own communication hooks that leave the mean over processes.
_HOOKS = "torch.distributed.algorithms.ddp_comm_hooks.default_hooks"
_AVERAGING = {"allreduce_hook", "fp16_compress_hook", "bf16_compress_hook"}


def at_the_end(callback: Callable[[], None], rounds: int = 3) -> None:
    """Run ``callback`` behind everything that the backward pass under way has queued, and behind
    what that queues: the wrappers finish there, and may do so in two steps."""
    if rounds == 0:
        callback()
    else:
        torch.autograd.Variable._execution_engine.queue_callback(
            lambda: at_the_end(callback, rounds - 1)
        )


class Replicas(ABC):
    """What a wrapper does to the gradients of a model that runs in several processes.

    Attributes:
        processes: how many there are.
        rank: number of this one among them.
        l1: whether sums of absolute gradients are wanted.
    """

    processes: int
    rank: int
    l1: bool = False

    def __init__(self, targets: Sequence[Target]) -> None:
        self.targets = targets
        # what lay in .grad before the passes that the next reduction will take in
        self._before: dict[str, Tensor] | None = None
        self._first = False  # the pass under way is the first of them

    def forward(self) -> None:  # noqa: B027 (not every kind has something to do)
        """A forward pass with gradients begins."""

    @abstractmethod
    def divisor(self) -> float:
        """What the sum over processes is divided by."""

    @abstractmethod
    def _was_reduced(self) -> bool:
        """Whether the backward pass that is at its end reduced the gradients."""

    def _was_dropped(self) -> bool:
        """Whether what had accumulated without a reduction is gone."""
        return False

    @abstractmethod
    def _sums(
        self, found: Iterable[tuple[Target, Tensor | None]], blockwise: Blockwise
    ) -> dict[str, Tensor]:
        """``[n_blocks]`` sums (of squares, of absolute values) of each parameter's whole
        gradient, from what this process holds of it."""

    # -- one backward pass ---------------------------------------------------------------

    def begin(self) -> bool:
        """The first gradient of a backward pass arrives. True if it begins a new batch, although
        the last one was never reduced.

        What lies in ``.grad`` already is kept, unless it is nothing or zero: a copy of it.
        """
        dropped = self._before is not None and self._was_dropped()
        self._first = self._before is None or dropped
        if self._first:
            lying = {t.name: _local(t.parameter.grad) for t in self.targets
                     if t.parameter.grad is not None}  # fmt: skip
            used = _any_nonzero(lying.values())
            self._before = {n: g.detach().clone() for n, g in lying.items()} if used else {}
        return dropped

    def end(self, arrived: Iterable[str]) -> Reduced:
        """All is done at the end of a backward pass in which the gradients of ``arrived`` came.

        Raises:
            ProbeError: if a gradient is gone already.
        """
        divisor = self.divisor()
        if not self._was_reduced():
            return Reduced(None, divisor)
        came, before, self._before = set(arrived), self._before or {}, None
        norms = self._sums(self._grown(came, before), squared_blocks)
        absolute = self._sums(self._grown(came, before), absolute_blocks) if self.l1 else None
        return Reduced(norms, divisor, absolute)

    def _grown(
        self, came: set[str], before: dict[str, Tensor]
    ) -> Iterator[tuple[Target, Tensor | None]]:
        for target in self.targets:
            grad = target.parameter.grad
            if grad is None:
                if target.name in came:
                    raise ProbeError(
                        f"{target.name} has no .grad at the end of the backward pass, so the norm "
                        "of its gradient over all processes is not known. Remedy: step the "
                        "optimizer after backward(), not inside it"
                    )
                yield target, None
                continue
            local, earlier = _local(grad).detach(), before.get(target.name)
            if earlier is not None:
                wide = torch.promote_types(local.dtype, torch.float32)
                local = local.to(wide) - earlier.to(wide)
            yield target, local

    def nothing_came(self) -> None:
        """The pass brought gradients of no probed parameter, as one to the inputs alone."""
        if self._first:
            self._before = None

    def forget(self) -> None:
        """The backward pass broke off."""
        self._before = None


def _local(tensor: Any) -> Tensor:
    """This process' part of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _any_nonzero(tensors: Iterable[Tensor]) -> bool:
    """On the host the first one that is not zero decides; a device is waited for once."""
    waiting = []
    for tensor in tensors:
        found = tensor.any()
        if tensor.device.type != "cpu":
            waiting.append(found)
        elif bool(found):
            return True
    return bool(waiting) and bool(torch.stack(waiting).any())


class Replicated(Replicas):
    """DistributedDataParallel: every process holds all parameters, and after the reduction the
    same gradients."""

    def __init__(self, wrapper: DistributedDataParallel, targets: Sequence[Target]) -> None:
        super().__init__(targets)
        self.wrapper = wrapper
        self.processes = dist.get_world_size(wrapper.process_group)
        self.rank = dist.get_rank(wrapper.process_group)
        self._armed = False
        if getattr(wrapper, "mixed_precision", None) is not None:
            raise ProbeError(
                "DistributedDataParallel(mixed_precision=...) is not supported: it replaces the "
                "parameters' data in the forward pass. Remedy: torch.autocast"
            )
        own = {id(p) for n, p in wrapper.module.named_parameters()
               if n not in wrapper.parameters_to_ignore}  # fmt: skip
        if left := [t.name for t in targets if id(t.parameter) not in own]:
            raise ProbeError(
                f"DistributedDataParallel does not reduce the gradient of {_listed(left)}. "
                "Remedy: leave it out with params=[...]"
            )

    def forward(self) -> None:
        for hook, _ in getattr(self.wrapper, "_comm_hooks", ()):
            name = getattr(hook, "__qualname__", str(hook))
            if getattr(hook, "__module__", "") != _HOOKS or name not in _AVERAGING:
                raise ProbeError(
                    f"the communication hook {name!r} of "
                    "DistributedDataParallel may leave anything but the mean over processes. "
                    "Remedy: probe without it"
                )
        if getattr(getattr(self.wrapper, "_join_config", None), "enable", False):
            raise ProbeError(
                "the probe does not work under DistributedDataParallel.join(): processes that ran "
                "out of batches have no passes to record. Remedy: as many batches on every process"
            )
        # Like the wrapper: what counts is the last forward pass outside no_sync.
        self._armed = self._armed or bool(self.wrapper.require_backward_grad_sync)

    def divisor(self) -> float:
        return float(self.processes)

    def _was_reduced(self) -> bool:
        armed, self._armed = self._armed, False
        return armed

    def _was_dropped(self) -> bool:
        return not _any_nonzero(
            t.parameter.grad for t in self.targets if t.parameter.grad is not None
        )

    def _sums(
        self, found: Iterable[tuple[Target, Tensor | None]], blockwise: Blockwise
    ) -> dict[str, Tensor]:
        return {t.name: blockwise(g, t.grid) for t, g in found if g is not None}

    def forget(self) -> None:
        super().forget()
        self._armed = False


class Sharded(Replicas):
    """``fully_shard``: every process holds a part of each parameter and of its gradient, and for
    the time of a forward or backward pass all of it, as another tensor."""

    def __init__(self, model: nn.Module, targets: Sequence[Target]) -> None:
        super().__init__(targets)
        self.modules = list(sharded_modules(model))
        self._groups: list[Any] = []
        self._managed: dict[int, list[Target]] = {}  # by module
        by_parameter = {id(t.parameter): t for t in targets}
        places: dict[int, tuple[nn.Module, str]] = {}
        for module in model.modules():
            for attribute, parameter in module._parameters.items():
                places.setdefault(id(parameter), (module, attribute))
        self._places = {t.name: places[id(t.parameter)] for t in targets}
        managed: set[str] = set()
        for module in self.modules:
            mine = self._managed[id(module)] = []
            for group in _groups(module):
                if not any(group is g for g in self._groups):
                    self._groups.append(group)
                for sharded in group.fsdp_params:
                    target = by_parameter.get(id(sharded.sharded_param))
                    if target is None:
                        continue
                    if getattr(sharded, "is_dtensor", False):
                        raise _tensor_parallel(target.name)
                    mine.append(target)
                    managed.add(target.name)
        for target in targets:
            sharded = hasattr(target.parameter, "placements")
            if target.name not in managed and sharded:
                raise _tensor_parallel(target.name)
            if target.name not in managed:
                raise ProbeError(
                    f"{target.name} is not sharded, but others are: its gradient is not reduced "
                    "over processes. Remedy: fully_shard the whole model at last, or leave the "
                    "parameter out with params=[...]"
                )
        mesh = self._groups[0].mesh_info.mesh
        ranks = mesh.mesh.flatten().tolist()
        self.processes, self.rank = len(ranks), ranks.index(dist.get_rank())
        self.device = torch.device(mesh.device_type)

    def begin(self) -> bool:
        self._before = None  # what was not reduced yet lies elsewhere than in .grad
        return super().begin()

    def watch(self, meet: Callable[[Tensor, Target], None]) -> list[Any]:
        """Hooks behind fully_shard's own at the begin of each module's forward pass, which puts
        the parameters together: ``meet`` is told what stands for them. It hands the inputs on as
        other tensors too, views that PyTorch announces like any other function's."""

        def behind(module: nn.Module, args: Any) -> None:
            for target in self._managed[id(module)]:
                owner, attribute = self._places[target.name]
                meet(owner._parameters[attribute], target)  # type: ignore[arg-type]

        return [module.register_forward_pre_hook(behind) for module in self.modules]

    def divisor(self) -> float:
        factors = {float(g.gradient_divide_factor or self.processes) for g in self._groups}
        if len(factors) > 1:
            raise ProbeError(
                f"the modules' gradients are divided by different numbers {sorted(factors)} "
                "(set_gradient_divide_factor), so no factor leads from a contribution to the "
                "example's own gradient. Remedy: the same factor for all"
            )
        if any(getattr(g, "_all_reduce_hook", None) is not None for g in self._groups):
            raise ProbeError(
                "an all-reduce hook of the user's (set_all_reduce_hook) may leave anything in the "
                "gradients. Remedy: probe without it"
            )
        return factors.pop()

    def _was_reduced(self) -> bool:
        reducing = {g.reduce_grads and g.all_reduce_grads for g in self._groups}
        if len(reducing) > 1:
            raise ProbeError(
                "some modules reduced their gradients in this backward pass and some did not. "
                "Remedy: set_requires_gradient_sync on the whole model"
            )
        for module in self.modules:
            if not module._get_fsdp_state()._state_ctx.is_last_backward:
                raise ProbeError(
                    "the probe does not work under set_is_last_backward(False): gradients are "
                    "not complete at the end of such a pass. Remedy: set_requires_gradient_sync"
                )
        return reducing.pop()

    def _sums(
        self, found: Iterable[tuple[Target, Tensor | None]], blockwise: Blockwise
    ) -> dict[str, Tensor]:
        own: dict[Any, list[tuple[str, Tensor]]] = {}
        for target, local in found:
            mesh, placements = target.parameter.device_mesh, target.parameter.placements  # type: ignore[attr-defined]
            axis = next((i for i, p in enumerate(placements) if p.is_shard()), None)
            total = torch.zeros(target.grid.n_blocks, dtype=torch.float64, device=self.device)
            if local is not None and local.numel():
                total += self._of_shard(target, local, axis, blockwise)
            group = None if axis is None else mesh.get_group(axis)
            own.setdefault(group, []).append((target.name, total))
        whole: dict[str, Tensor] = {}
        for group, parts in own.items():
            flat = torch.cat([p for _, p in parts])
            if group is not None:
                dist.all_reduce(flat, group=group)
            sizes = [len(p) for _, p in parts]
            whole |= {n: s for (n, _), s in zip(parts, flat.split(sizes), strict=True)}
        return whole

    def _of_shard(
        self, target: Target, local: Tensor, axis: int | None, blockwise: Blockwise
    ) -> Tensor:
        """Sums of all blocks, of which this process may hold some, or parts of some."""
        grid, whole = target.grid, target.parameter
        if grid.is_whole or axis is None:
            return blockwise(local, grid).to(self.device)
        mesh, placement = whole.device_mesh, whole.placements[axis]  # type: ignore[attr-defined]
        dim = placement.dim
        start = mesh.get_local_rank(axis) * -(-whole.shape[dim] // mesh.size(axis))
        sums = torch.zeros(grid.n_blocks, device=self.device)
        if dim == 0 and whole.ndim > 1:
            matrix, lead = matrix_view(local), start % grid.block_rows
            if lead:  # the block's first rows lie elsewhere
                matrix = torch.cat([matrix.new_zeros(lead, matrix.shape[1]), matrix])
            found = blockwise(matrix, grid).to(self.device)
            first = (start - lead) // grid.block_rows * grid.grid_cols
            sums[first : first + len(found)] = found.to(sums.dtype)
            return sums
        filled = torch.zeros(whole.shape, dtype=local.dtype, device=local.device)
        filled.narrow(dim, start, local.shape[dim]).copy_(local)
        return blockwise(filled, grid).to(self.device)


def _groups(module: nn.Module) -> list[Any]:
    state = module._get_fsdp_state()  # type: ignore[operator]
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    group = state._fsdp_param_group
    return [] if group is None else [group]


def _tensor_parallel(name: str) -> ProbeError:
    return ProbeError(
        f"{name} is a distributed tensor of another kind than fully_shard's (tensor or expert "
        "parallelism, replicate), which the probe does not support. Remedy: probe under "
        "fully_shard or DistributedDataParallel alone"
    )


# -- which of them -----------------------------------------------------------------------


def refuse_wrappers(model: nn.Module) -> None:
    """Raise ProbeError, by name, for wrappers whose gradients the probe cannot follow."""
    old: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    for name, module in model.named_modules():
        where, kind = name or "the model", type(module)
        if isinstance(module, old):
            raise ProbeError(
                f"{where} is wrapped in FullyShardedDataParallel (FSDP1), whose flat parameters "
                "the probe cannot tell apart. Remedy: fully_shard (FSDP2)"
            )
        if isinstance(module, DataParallel):
            raise ProbeError(
                f"{where} is wrapped in DataParallel, which runs copies of it in threads. Remedy: "
                "DistributedDataParallel, or probe model.module"
            )
        if kind.__module__.partition(".")[0] in ("deepspeed", "megatron"):
            raise ProbeError(
                f"{where} is a {kind.__name__} of {kind.__module__.partition('.')[0]}, which "
                "keeps gradients elsewhere than in .grad. Remedy: DistributedDataParallel or "
                "fully_shard"
            )
        if isinstance(module, DistributedDataParallel) and module is not model:
            raise ProbeError(
                f"only a part of the model, {where}, is wrapped in DistributedDataParallel. "
                "Remedy: wrap all of it, or probe that part"
            )
    for name, parameter in unwrapped(model).named_parameters():
        if hasattr(parameter, "ds_id"):
            raise ProbeError(
                f"{name} is a parameter of DeepSpeed's ZeRO stage 3, which keeps its gradient "
                "elsewhere than in .grad. Remedy: DistributedDataParallel or fully_shard"
            )


def replicas_of(model: nn.Module, targets: Sequence[Target]) -> Replicas | None:
    """How gradients of the model are reduced over processes; None if they are not.

    Raises:
        ProbeError: if that is done in a way that the probe cannot follow.
    """
    wrapped = isinstance(model, DistributedDataParallel)
    if wrapped or next(sharded_modules(model), None) is not None:
        for name, module in model.named_modules():
            if isinstance(module, nn.SyncBatchNorm) and module.training:
                raise ProbeError(
                    f"{name} is a SyncBatchNorm in training mode: examples of one process enter "
                    "the gradients of another. Remedy: .eval() on it"
                )
    if isinstance(model, DistributedDataParallel):
        if next(sharded_modules(model), None) is not None:
            raise ProbeError(
                "fully_shard inside DistributedDataParallel is not supported. Remedy: fully_shard "
                "with a mesh of two dimensions"
            )
        return Replicated(model, targets)
    if next(sharded_modules(model), None) is not None:
        return Sharded(model, targets)
    for target in targets:
        if hasattr(target.parameter, "placements"):
            raise _tensor_parallel(target.name)
    return None


def running_around(model: nn.Module) -> DistributedDataParallel | None:
    """The wrapper whose forward pass is under way around a model that does not know of it."""
    wrapper = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if wrapper is None or not any(m is model for m in wrapper.modules()):
        return None
    return wrapper


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
