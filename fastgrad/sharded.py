"""Packed blocks under ``fully_shard`` (FSDP2): what is cut up, and how it stays one thing.

``fully_shard`` replaces a module's parameters by distributed tensors, each process holding some
rows, and puts whole tensors in their place while the module computes. Packed parameters are
parameters, so they, their gradients and their moments are sharded as any other. The full weights'
shards hold the trained values too: after each optimizer step every process collects the packed
values and writes those that lie in its own rows. So whatever gathers the full weight, the forward
pass, the backward pass that gathers it again, a state dict, reads trained values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastgrad.blocks import BlockGrid
from fastgrad.errors import PartialError
from fastgrad.identity import model_parameters, reshard, sharded_modules, whole
from fastgrad.packed import PackedBlocks, PartialModule, packed_attribute
from fastgrad_kernels.layout import write_blocks_

#: What an optimizer that holds a former parameter is told at its step.
REPLACED = (
    "was replaced by fully_shard after this optimizer was built: a step would change nothing. "
    "Remedy: make_partial, then fully_shard, then the optimizer with partial.parameters()"
)

_PLAIN = (Tensor, nn.Parameter)  # asked for every parameter of every step


def is_sharded(tensor: Any) -> bool:
    """A distributed tensor, of which this process holds a part."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "device_mesh")


def is_wrapper(tensor: Tensor) -> bool:
    """A tensor subclass that keeps its numbers in tensors of another form (quantised weights);
    shards are none."""
    data = tensor.data
    return is_traceable_wrapper_subclass(data) and not is_sharded(data)


def local(tensor: Any) -> Tensor:
    """This process' part of a distributed tensor, sharing its memory; any other as it is."""
    found: Tensor = tensor.detach().to_local() if is_sharded(tensor) else tensor
    return found


class ShardedBlocks(PackedBlocks):
    """Packed blocks whose tensors ``fully_shard`` has cut up; made by :func:`swapped`.

    ``full`` and ``packed`` are what the module holds at the time: distributed tensors, or whole
    ones while it computes.
    """

    _shards: dict[str, Any]  # "full" and "packed": the distributed tensors
    _seen: dict[str, int]  # their versions when both sides were equal

    def swap(self, side: str, tensor: Tensor) -> None:
        """The module has ``tensor`` for its full weight or its packed parameter now.

        Raises:
            PartialError: if it is cut in another way than by rows.
        """
        before = getattr(self, side)
        setattr(self, side, tensor)
        if not is_sharded(tensor) or tensor is self._shards.get(side):
            return
        first_row(tensor, self.name)
        self._shards[side], self._seen[side] = tensor, tensor._version
        if side == "packed":
            before.__dict__["_fastgrad_ended"] = REPLACED
            tensor._fastgrad_blocks = self  # type: ignore[attr-defined]
            tensor._fastgrad_name = self.name  # type: ignore[attr-defined]

    def lasting(self, side: str) -> Any:
        """The tensor that is there between two passes."""
        return self._shards.get(side, getattr(self, side))

    @property
    def in_sync(self) -> bool:
        return bool(self.lasting("packed")._version == self._seen["packed"])

    def written(self) -> None:
        self._seen = {side: self.lasting(side)._version for side in ("full", "packed")}

    def check_untouched(self) -> None:
        if self.lasting("full")._version != self._seen["full"]:
            raise PartialError(
                f"{self.name} was changed from outside while its selected blocks are trained; the "
                "change would be overwritten. Remedy: call refresh() on the Partial, on every "
                "process, after changing weights and before the next optimizer step or forward "
                "pass"
            )

    def sync_if_stale(self) -> None:
        """Refuses where one process would mend it: all have to do that together.

        Raises:
            PartialError: if either side was changed since it was last written.
        """
        self.check_untouched()
        if not self.in_sync:
            raise PartialError(
                f"the packed parameter of {self.name} was changed outside of an optimizer step. "
                "Remedy: call sync() on the Partial, on every process, before the next forward "
                "pass"
            )

    @torch.no_grad()
    def sync(self) -> None:
        """Write the packed values into this process' rows of the full weight. Collective.

        Raises:
            PartialError: if somebody else has written to the full weight in the meantime.
        """
        self.check_untouched()
        full, packed = self.lasting("full"), self.lasting("packed")
        part = local(full.detach())
        if full.shape == packed.shape and _same_cut(full, packed):
            part.copy_(local(packed.detach()))
        else:
            first = first_row(full, self.name)
            values = whole(packed.detach())
            if self.grid.is_whole or self.whole:
                values = values.reshape(full.shape)
                part.copy_(values[first : first + len(part)] if full.ndim else values)
            else:
                write_rows_(part, first, self.grid, self.ids, values)
        self.written()

    def write_again(self) -> None:
        self.sync()

    def target(self) -> None:
        """No kernel can write through: the packed values of one process lie in rows of others."""
        return None

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the full weight's values, after they were loaded from elsewhere. Collective.

        See :meth:`PackedBlocks.refresh`; the full weight is put together for a moment.
        """
        full, packed = self.lasting("full"), self.lasting("packed")
        values, part = self.gather(whole(full.detach())), local(packed.detach())
        first = first_row(packed, self.name)
        new = values.reshape(packed.shape)
        new = new[first : first + len(part)] if packed.ndim else new
        same = part.to(new.dtype) == new
        part.copy_(torch.where(same, part, new.to(part.dtype)))
        self.written()


def swapped(module: PartialModule, name: str, tensor: Any) -> None:
    """``module`` has been given another tensor as its parameter ``name``: ``fully_shard`` does so
    when it is applied, and around every pass."""
    for attribute, blocks in module._fastgrad_packed.items():
        if name not in (attribute, packed_attribute(attribute)):
            continue
        if is_sharded(tensor) and not isinstance(blocks, ShardedBlocks):
            known: Any = blocks
            known.__class__ = ShardedBlocks
            known._shards, known._seen = {}, {}
            known.written()
        if isinstance(blocks, ShardedBlocks):
            blocks.swap("full" if name == attribute else "packed", tensor)


def write_rows_(part: Tensor, first: int, grid: BlockGrid, ids: Tensor, packed: Tensor) -> None:
    """Write packed blocks into rows ``first, first + 1, ...`` of a weight, in place.

    Args:
        part: these rows, ``[n, ...]``.
        first: number of the first row.
        grid: of the whole weight.
        ids: int64 ``[k]`` block numbers.
        packed: ``[k, block_rows, block_cols]``; blocks outside of the rows are left out.
    """
    height, line = grid.block_rows, ids // grid.grid_cols
    end = first + len(part)
    # Where the cut goes through blocks, their parts above and below it are regular blocks again.
    inner = min(-(-first // height) * height, end)
    outer = max(end // height * height, inner) if end < grid.rows else end
    for start, stop in ((first, inner), (inner, outer), (outer, end)):
        if start == stop:
            continue
        top = start // height
        inside = ((line >= top) & (line <= (stop - 1) // height)).nonzero().squeeze(1)
        skipped = start - top * height  # rows of the block that lie before the cut
        tall = min(height - skipped, stop - start)
        write_blocks_(
            part[start - first : stop - first],
            ids[inside] - top * grid.grid_cols,
            packed[inside, skipped : skipped + tall],
            tall,
            grid.block_cols,
        )


def first_row(tensor: Any, name: str) -> int:
    """Number of the first row of this process' part.

    Raises:
        PartialError: if the tensor is cut in another way than by rows.
    """
    if not is_sharded(tensor):
        return 0
    first = 0
    cuts = 0
    for dim, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            continue
        plain = type(placement).__name__ == "Shard" and placement.dim == 0
        cuts += 1
        if not plain or cuts > 1:
            raise PartialError(
                f"{name} is cut up as {tuple(tensor.placements)}; its blocks can be trained only "
                "where fully_shard cuts along dimension 0. Remedy: leave out shard_placement_fn "
                "and tensor parallelism for this module, or do not select its weight"
            )
        rows, parts = tensor.shape[0], tensor.device_mesh.size(dim)
        first = min(tensor.device_mesh.get_local_rank(dim) * -(-rows // parts), rows)
    return first


def _same_cut(one: Any, other: Any) -> bool:
    if not (is_sharded(one) and is_sharded(other)):
        return not is_sharded(one) and not is_sharded(other)
    return bool(one.device_mesh == other.device_mesh and one.placements == other.placements)


# -- what a Partial asks ---------------------------------------------------------------------


def current(model: nn.Module, trained: dict[str, Any]) -> Iterator[tuple[str, nn.Parameter]]:
    """The trained tensors that the model has now; ``fully_shard`` has replaced those it had."""
    if next(sharded_modules(model), None) is None:
        yield from trained.items()
        return
    reshard(model)
    own = model_parameters(model)
    for name, p in trained.items():
        blocks = getattr(p, "_fastgrad_blocks", None)
        tensor: Any = own[name] if blocks is None else blocks.packed
        if tensor is not p:
            p.__dict__["_fastgrad_ended"] = REPLACED
        tensor._fastgrad_name = name
        yield name, tensor


def check_not_wrapped(model: nn.Module) -> None:
    """Refuse a model whose wrapper has already noted which parameters there are.

    Raises:
        PartialError: under DistributedDataParallel, fully_shard or another sharding.
    """
    kind = type(model).__name__ if isinstance(model, nn.parallel.DistributedDataParallel) else None
    if next(sharded_modules(model), None) is not None:
        kind = "fully_shard"
    elif any(is_sharded(p) for p in model.parameters()):
        kind = "distributed tensors"
    if type(model).__name__ == "FullyShardedDataParallel":
        kind = "FullyShardedDataParallel (FSDP1)"
    if kind is not None:
        raise PartialError(
            f"the model is under {kind} already, which would not know of the packed parameters: "
            "their gradients would differ between processes. Remedy: make_partial first, then wrap "
            "or shard the model, then build the optimizer"
        )


def check_not_sharded(model: nn.Module, what: str) -> None:
    """Raises PartialError: ``what`` would change the parameters that ``fully_shard`` manages."""
    if next(sharded_modules(model), None) is not None:
        raise PartialError(
            f"{what} is not possible under fully_shard, which has noted the model's parameters. "
            "Remedy: state_dict() and save_delta already show trained weights; load them into a "
            "model that is not sharded, and go on from there"
        )


def check_reducer(blocks: PackedBlocks) -> None:
    """Refuse a forward pass of a DistributedDataParallel that does not reduce this gradient.

    Raises:
        PartialError: if the wrapper was made before the model became partial, or changes the
            precision of the parameters.
    """
    wrapper: Any = nn.parallel.DistributedDataParallel._active_ddp_module
    if wrapper is None or not blocks.packed.requires_grad:
        return
    if wrapper.mixed_precision is not None:
        raise PartialError(
            "DistributedDataParallel(mixed_precision=...) puts other tensors in the place of the "
            f"weights, also of {blocks.name}. Remedy: use torch.autocast"
        )
    known = wrapper.__dict__.get("_fastgrad_known")
    if known is None:
        known = {id(p) for p in wrapper._module_parameters}
        wrapper.__dict__["_fastgrad_known"] = known
    if id(blocks.packed) not in known:
        raise PartialError(
            f"DistributedDataParallel was made before the blocks of {blocks.name} became a "
            "parameter, and would not reduce their gradient. Remedy: wrap the model in "
            "DistributedDataParallel again, after make_partial and after each re-selection"
        )


def once(model: nn.Module, write: Callable[[], int]) -> int:
    """Under ``fully_shard`` the result of ``write`` in the first process, for all, which have to
    call this together and fail together; else that of ``write`` here.

    Raises:
        PartialError: on the other processes, if ``write`` failed on the first.
    """
    module = next(sharded_modules(model), None)
    cut = [] if module is None else [p for p in module.parameters() if is_sharded(p)]
    if not cut:
        return write()
    mesh: Any = cut[0].device_mesh
    result: list[Any] = [None]
    failed: BaseException | None = None
    if not any(mesh.get_coordinate()):
        try:
            result = [write()]
        except BaseException as error:  # the others wait for this process
            failed, result = error, [f"{type(error).__name__}: {error}"]
    for dim in reversed(range(mesh.ndim)):
        group = mesh.get_group(dim)
        dist.broadcast_object_list(result, group=group, group_src=0)
    if failed is not None:
        raise failed
    if isinstance(result[0], str):
        raise PartialError(f"the process that writes for all failed: {result[0]}")
    return int(result[0])


# -- what an optimizer asks ------------------------------------------------------------------


def agreed(found: list[str], params: Sequence[Any], names: Callable[[], list[str]]) -> list[str]:
    """Names that some process has found, if ``params`` are sharded over processes, which all have
    to call this together; else those found here.

    Args:
        found: some of the names.
        params: all parameters.
        names: says all names, in an order that all processes share.

    Sent: four bytes for each name.
    """
    meshes: list[Any] = []
    for p in params:
        if is_sharded(p) and p.device_mesh not in meshes:
            meshes.append(p.device_mesh)
    if not meshes:
        return found
    known = names()
    flags = torch.tensor([name in found for name in known], dtype=torch.int32)
    for mesh in meshes:
        flags = flags.to(mesh.device_type)
        for dim in range(mesh.ndim):
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=mesh.get_group(dim))
    return [name for name, flag in zip(known, flags.tolist(), strict=True) if flag]


# -- checkpoints -----------------------------------------------------------------------------


class TrainingState:
    """A partial training run as ``torch.distributed.checkpoint`` saves and loads it, at any number
    of processes::

        state = {"training": fg.TrainingState(partial, optimizer)}
        torch.distributed.checkpoint.save(state, checkpoint_id=folder)
        torch.distributed.checkpoint.load(state, checkpoint_id=folder)

    It holds the model's state dict (full weights with trained values), the optimizer's state by
    names, the packed parameters (master copies have digits that the weights lack) and their block
    numbers. All processes have to save, and to load.

    Args:
        partial: what ``make_partial`` returned, its model wrapped or sharded or not.
        optimizer: built on ``partial.parameters()``.
    """

    def __init__(self, partial: Any, optimizer: torch.optim.Optimizer) -> None:
        self.partial, self.optimizer = partial, optimizer

    def state_dict(self) -> dict[str, Any]:
        """Distributed tensors where the model is sharded; they share memory with the model."""
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self.partial.model, self.optimizer)
        packed = {b.name: _lasting_packed(b).detach() for b in self.partial.packed}
        blocks = {b.name: b.ids.cpu().clone() for b in self.partial.packed}
        return {"model": model, "optimizer": optimizer, "packed": packed, "blocks": blocks}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the saved run was.

        Raises:
            PartialError: if other blocks were trained there.
        """
        from torch.distributed.checkpoint.state_dict import set_state_dict

        own = {b.name: b.ids.cpu() for b in self.partial.packed}
        other = [
            name
            for name in sorted(own.keys() | state["blocks"].keys())
            if name not in own
            or name not in state["blocks"]
            or not torch.equal(own[name], state["blocks"][name].cpu())
        ]
        if other:
            raise PartialError(
                f"the checkpoint was made for other blocks of {', '.join(other[:5])}. Remedy: "
                "make_partial with the selection of the saved run, then load"
            )
        set_state_dict(
            self.partial.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        for blocks in self.partial.packed:
            _lasting_packed(blocks).copy_(state["packed"][blocks.name])
            blocks.sync()


def _lasting_packed(blocks: PackedBlocks) -> Any:
    return blocks.lasting("packed") if isinstance(blocks, ShardedBlocks) else blocks.packed
