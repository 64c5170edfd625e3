"""Two processes train what one would have trained:

    torchrun --standalone --nproc-per-node 2 -m tests.partial_worker

Every scenario trains a tiny partial model in all processes, each on its part of every batch, and
compares the weights with those of one process that was given the same parts one after the other,
or the whole batches. Errors are the largest difference in a parameter divided by its largest
element, and by its largest change.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

import fastgrad as fg
from fastgrad.blocks import BlockGrid
from fastgrad.errors import NonFiniteGradientError
from fastgrad.identity import model_parameters, unwrapped, whole
from fastgrad.selection import Selection
from fastgrad.sharded import local
from fastgrad_kernels.layout import gather_blocks, scatter_blocks_
from tests import processes
from tests.distributed_worker import Batch, even, message, mine, model_of
from tests.models import batch_of, gpt2, llama, randomised

SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {}
FOLDER = Path(tempfile.gettempdir())
Steps = list[list[list[Batch]]]  # [step][accumulated][process]
Maker = Callable[[Any], torch.optim.Optimizer]


def scenario(function: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    SCENARIOS[function.__name__] = function
    return function


def selection_of(
    model: nn.Module, spec: str = "8x8", share: float = 0.3, names: str = "", **specs: str
) -> Selection:
    """Random blocks of each parameter whose name contains ``names``."""
    rng = np.random.default_rng(0)
    shapes = {n: tuple(p.shape) for n, p in model_parameters(model).items()}
    own = {n: s for n in shapes for k, s in specs.items() if k in n}
    blocks = {}
    for name in (n for n in shapes if names in n):
        count = BlockGrid.of(shapes[name], own.get(name, spec)).n_blocks
        picked = rng.choice(count, max(1, int(share * count)), replace=False)
        blocks[name] = np.sort(picked)
    return Selection(shapes, spec, blocks, specs={n: s for n, s in own.items() if n in blocks})


def sparse_adamw(params: Any) -> torch.optim.Optimizer:
    return fg.SparseAdamW(params, lr=1e-2, weight_decay=0.1)


def torch_adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)


def steps_of(count: int, accumulated: int = 1) -> Steps:
    return [[even(2, 100 * s + m) for m in range(accumulated)] for s in range(count)]


def together(parts: list[Batch]) -> Batch:
    return {n: torch.cat([p[n] for p in parts]) for n in parts[0]}


# -- two loops: of one process, and of each of several ---------------------------------------


def train(
    model: Any,
    partial: Any,
    optimizer: torch.optim.Optimizer,
    steps: Steps,
    *,
    alone: str = "",
    clip: float = 0.5,
    each: Callable[[int], None] | None = None,
) -> None:
    """A user's loop, in each of several processes; or in one, ``alone``: with ``"whole"`` batches,
    or with ``"parts"`` one after the other, each computed as its process would have."""
    for number, micros in enumerate(steps):
        if alone == "parts":
            micros = [[part] for parts in micros for part in parts]
        for k, parts in enumerate(micros):
            batch = together(parts) if alone else mine(parts)
            last = k == len(micros) - 1
            with contextlib.ExitStack() as stack:
                if isinstance(model, DistributedDataParallel) and not last:
                    stack.enter_context(model.no_sync())
                elif isinstance(model, FSDPModule):
                    model.set_requires_gradient_sync(last)
                (model(**batch).loss / len(micros)).backward()
        clip_grad_norm_(partial.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        if each is not None:
            each(number)


def one_process(
    model: nn.Module,
    selection: Selection,
    steps: Steps,
    make: Maker = sparse_adamw,
    *,
    master_dtype: torch.dtype | None = None,
    batches: str = "parts",
) -> dict[str, Tensor]:
    """Weights after training in this process alone, with masters also these."""
    model = copy.deepcopy(model)
    partial = fg.make_partial(model, selection, master_dtype)
    train(model, partial, make(partial.parameters()), steps, alone=batches)
    return weights_of(model, None if master_dtype is None else partial)


def weights_of(model: nn.Module, partial: Any = None) -> dict[str, Tensor]:
    """A normal model's state dict, put together from shards; and the masters of ``partial``."""
    inner = unwrapped(model)
    found = {n: whole(t).detach().clone() for n, t in inner.state_dict().items()}
    if partial is not None and partial.packed:
        own = model_parameters(model)
        for name, p in partial.named_parameters():
            assert torch.equal(*_both(name, p, whole(own[name]), partial)), name
            found[f"packed {name}"] = whole(p).detach().clone()
    return found


def _both(name: str, p: Tensor, full: Tensor, partial: Any) -> tuple[Tensor, Tensor]:
    """The full weight's selected values, from its bits, and what its packed parameter rounds to."""
    blocks = {b.name: b for b in partial.packed}.get(name)
    part = full.detach() if blocks is None else blocks.gather(full.detach())
    return part, whole(p).detach().to(full.dtype)


def digest(tensors: list[Tensor]) -> str:
    found = hashlib.sha256()
    for t in tensors:
        found.update(t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def everywhere(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def unselected(weights: dict[str, Tensor], selection: Selection) -> list[Tensor]:
    """What training must not touch, parameter by parameter."""
    found = []
    for name in sorted(selection.shapes):
        if name not in weights:  # tied
            continue
        weight = weights[name]
        chosen = torch.zeros(weight.shape, dtype=torch.bool)
        matrix = chosen.view(weight.shape[0], -1) if weight.ndim > 1 else chosen.view(1, -1)
        for block in selection.blocks.get(name, ()):
            r0, r1, c0, c1 = selection.grid(name).bounds(int(block))
            matrix[r0:r1, c0:c1] = True
        found.append(weight[~chosen])
    return found


def difference(
    base: nn.Module, got: dict[str, Tensor], want: dict[str, Tensor], selection: Selection
) -> dict[str, float]:
    """Masters say how far apart two runs are; weights of few digits only if they have none."""
    before = weights_of(base)
    for name in [n.removeprefix("packed ") for n in want if n.startswith("packed ")]:
        own, grid = before[name], selection.grid(name)
        ids = torch.from_numpy(selection.blocks[name])
        cut = gather_blocks(own.view(grid.rows, grid.cols), ids, grid.block_rows, grid.block_cols)
        packed = f"packed {name}"
        before[packed] = own if want[packed].shape == own.shape else cut
    assert got.keys() == want.keys() == before.keys(), got.keys() ^ before.keys()
    moved = {n: float((want[n].double() - before[n].double()).abs().max()) for n in want}
    worst = relative = 0.0
    for n in want:
        if f"packed {n}" in want:
            continue
        off = float((got[n].double() - want[n].double()).abs().max())
        if off:
            worst = max(worst, off / max(moved[n], 1e-9))
            relative = max(relative, off / float(want[n].double().abs().max()))
    smallest = min(moved[n] for n in selection.blocks if n in moved)
    return {"weights": relative, "changes": worst, "smallest change": smallest}


def compare(
    base: nn.Module, got: dict[str, Tensor], want: dict[str, Tensor], selection: Selection
) -> dict[str, Any]:
    """Also between processes, and of what must not change."""
    hashes = everywhere(digest(unselected(got, selection)))
    return {
        **difference(base, got, want, selection),
        "frozen": set(hashes) == {digest(unselected(weights_of(base), selection))},
        "all alike": len(set(everywhere(digest([got[n] for n in sorted(got)])))) == 1,
    }


def ddp_run(
    base: nn.Module,
    selection: Selection,
    steps: Steps,
    make: Maker = sparse_adamw,
    *,
    hook: Any = None,
    masters: torch.dtype | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    model = copy.deepcopy(base)
    partial = fg.make_partial(model, selection, masters)
    wrapped = DistributedDataParallel(model, **kwargs)
    if hook is not None:
        wrapped.register_comm_hook(None, hook)
    train(wrapped, partial, make(partial.parameters()), steps)
    want = one_process(base, selection, steps, make, master_dtype=masters)
    got = weights_of(model, None if masters is None else partial)
    found = compare(base, got, want, selection)
    if masters is None:
        want = one_process(base, selection, steps, make, batches="whole")
        found["whole batches"] = difference(base, got, want, selection)["weights"]
    return found


# -- DistributedDataParallel -----------------------------------------------------------------


@scenario
def ddp_sparse_adamw() -> dict[str, Any]:
    model = model_of()
    return ddp_run(model, selection_of(model), steps_of(20))


@scenario
def ddp_torch_adamw() -> dict[str, Any]:
    model = model_of()
    return ddp_run(model, selection_of(model, "row"), steps_of(20), torch_adamw)


@scenario
def ddp_whole_parameters() -> dict[str, Any]:
    model = model_of()
    return ddp_run(model, selection_of(model, "module", names="mlp"), steps_of(5))


@scenario
def ddp_no_sync() -> dict[str, Any]:
    model = model_of(tied=True)
    return ddp_run(model, selection_of(model), steps_of(20, accumulated=2))


@scenario
def ddp_masters() -> dict[str, Any]:
    """bfloat16 weights, packed masters in float32."""
    model = model_of().bfloat16()
    return ddp_run(model, selection_of(model), steps_of(5), masters=torch.float32)


@scenario
def ddp_thousand_steps() -> dict[str, Any]:
    """With weight decay, clipping, autocast and accumulation: what is not selected keeps its
    bits."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(17, 24), nn.LayerNorm(24), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 17)
    ).bfloat16()
    selection, before = selection_of(model, "5x7"), weights_of(model)
    partial = fg.make_partial(model, selection, torch.float32)
    wrapped = DistributedDataParallel(model)
    optimizer = fg.SparseAdamW(partial.parameters(), lr=1e-3, weight_decay=0.5)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(1000):
        for last in (False, True):
            ids = torch.randint(0, 17, (2, 6), generator=generator)
            with contextlib.nullcontext() if last else wrapped.no_sync():
                with torch.autocast("cpu", torch.bfloat16):
                    scores = wrapped(ids).flatten(0, 1).float()
                (nn.functional.cross_entropy(scores, ids.flatten()) / 2).backward()
        clip_grad_norm_(partial.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    after = weights_of(model)
    hashes = everywhere(digest(unselected(after, selection)))
    return {
        "unselected": sum(t.numel() for t in unselected(before, selection)),
        "frozen": set(hashes) == {digest(unselected(before, selection))},
        "all alike": len(set(everywhere(digest([after[n] for n in sorted(after)])))) == 1,
        "moved": all(not torch.equal(after[n], before[n]) for n in selection.blocks),
        "counts": sorted({float(s["step"].max()) for s in optimizer.state.values()}),
    }


@scenario
def ddp_static_graph() -> dict[str, Any]:
    model = model_of()
    options = {"static_graph": True, "gradient_as_bucket_view": True}
    return ddp_run(model, selection_of(model, "row"), steps_of(5), **options)


@scenario
def ddp_bytes() -> dict[str, Any]:
    """What is sent: the packed gradients, and nothing else."""
    sent = []

    def hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        buffer = bucket.buffer()
        sent.append(buffer.numel() * buffer.element_size())
        work = dist.all_reduce(buffer.div_(dist.get_world_size()), async_op=True)
        return work.get_future().then(lambda f: f.value()[0])

    hook.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]}
    model, count = model_of(), 3
    selection = selection_of(model)
    found = ddp_run(model, selection, steps_of(count), hook=hook)
    partial = fg.make_partial(copy.deepcopy(model), selection)
    packed = sum(p.numel() * p.element_size() for p in partial.parameters())
    full = sum(p.numel() * p.element_size() for p in model.parameters())
    return {**found, "sent": sum(sent) / count, "packed": float(packed), "full": float(full)}


class Branches(nn.Module):
    """Layers that not every step uses."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, use: str) -> Tensor:
        return self.head(torch.tanh({"a": self.a, "b": self.b}[use](x)))


@scenario
def ddp_unused() -> dict[str, Any]:
    """A branch in turns, and in the end another one on each process."""
    torch.manual_seed(0)
    base, world, rank = Branches(), dist.get_world_size(), dist.get_rank()
    selection = selection_of(base, "2x3", 0.5)
    g = torch.Generator().manual_seed(1)
    uses = [["a"] * world, ["b"] * world, ["b"] * world, ["a", "b"] * world]
    data = [(torch.randn(world, 4, 6, generator=g), use) for use in uses]
    found = {}
    for make in (sparse_adamw, torch_adamw):
        weights = []
        for alone in (False, True):
            model = copy.deepcopy(base)
            partial = fg.make_partial(model, selection)
            optimizer = make(partial.parameters())
            run: nn.Module = model
            if not alone:
                run = DistributedDataParallel(model, find_unused_parameters=True)
            for x, use in data:
                for r in range(world) if alone else [rank]:
                    loss = run(x[r], use[r]).square().mean()
                    (loss / world if alone else loss).backward()
                optimizer.step()
                optimizer.zero_grad()
            weights.append(weights_of(model))
        found[make.__name__] = compare(base, *weights, selection)
    return {**found["sparse_adamw"], "torch AdamW": found["torch_adamw"]["weights"]}


@scenario
def ddp_first_process_decides() -> dict[str, Any]:
    """Weights and buffers of process 0 are broadcast: packed parameters go with them."""
    torch.manual_seed(dist.get_rank())
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    with torch.no_grad():
        model[1].running_mean += dist.get_rank()
    selection = selection_of(model, "2x2", 0.5)
    partial = fg.make_partial(model, selection)
    wrapped = DistributedDataParallel(model)
    optimizer = sparse_adamw(partial.parameters())
    start = weights_of(model)
    x = torch.randn(5, 4, 6)  # another one on each process
    for k in range(5):
        wrapped(x[k]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for b in partial.packed:
        assert torch.equal(b.gather(b.full), b.packed), b.name
    weights = weights_of(model)
    batch_norm = [weights.pop(n) for n in list(weights) if "running" in n or "tracked" in n]
    wrapped.eval()
    with torch.no_grad():
        out = wrapped(torch.ones(2, 6))
    return {
        "frozen": digest(unselected(weights, selection)) == digest(unselected(start, selection)),
        "all alike": len(set(everywhere(digest([weights[n] for n in sorted(weights)])))) == 1,
        "buffers": float(len(batch_norm)),
        "finite": bool(out.isfinite().all()),
    }


@scenario
def ddp_accelerate() -> dict[str, Any]:
    from accelerate import Accelerator

    base, count = model_of(), 4
    selection = selection_of(base)
    data = [{k: v[0] for k, v in batch_of(1, seed=s).items()} for s in range(8 * count)]
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = copy.deepcopy(base)
    partial = fg.make_partial(model, selection)
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    wrapped, optimizer, loader = accelerator.prepare(
        model, sparse_adamw(partial.parameters()), loader
    )
    for batch in loader:
        with accelerator.accumulate(wrapped):
            accelerator.backward(wrapped(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(partial.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    batches = [
        {k: torch.stack([d[k] for d in data[i : i + 2]]) for k in data[0]}
        for i in range(0, len(data), 2)
    ]
    world = dist.get_world_size()
    micros = [batches[i : i + world] for i in range(0, len(batches), world)]
    steps = [micros[i : i + 2] for i in range(0, len(micros), 2)]
    want = one_process(base, selection, steps, sparse_adamw)
    assert len(steps) * world == 8 * count // 4
    return compare(base, weights_of(accelerator.unwrap_model(wrapped)), want, selection)


@scenario
def ddp_reselect() -> dict[str, Any]:
    """Other blocks in the middle of a run: the model is wrapped anew."""
    base, steps = model_of(), steps_of(3)
    first, later = selection_of(base), selection_of(base, share=0.5)
    weights = []
    for alone in ("", "parts"):
        model = copy.deepcopy(base)
        partial = fg.make_partial(model, first)
        optimizer = sparse_adamw(partial.parameters())
        for selection in (first, later):
            if selection is later:
                partial.reselect(later, optimizer)
            run = model if alone else DistributedDataParallel(model)
            train(run, partial, optimizer, steps, alone=alone)
        weights.append(weights_of(model))
    return compare(base, *weights, partial.touched)


# -- fully_shard -----------------------------------------------------------------------------


def shard(model: Any, **kwargs: Any) -> Any:
    for layer in model.model.layers:
        fully_shard(layer, **kwargs)
    return fully_shard(model, **kwargs)


def fsdp_run(
    base: nn.Module,
    selection: Selection,
    steps: Steps,
    make: Maker = sparse_adamw,
    *,
    masters: torch.dtype | None = None,
    each: Callable[[int, nn.Module], None] | None = None,
    prepare: Callable[[nn.Module], None] | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    model = copy.deepcopy(base)
    partial = fg.make_partial(model, selection, masters)
    if prepare is not None:
        prepare(model)
    shard(model, **kwargs)
    optimizer = make(partial.parameters())
    after = None if each is None else (lambda number: each(number, model))
    train(model, partial, optimizer, steps, each=after)
    want = one_process(base, selection, steps, make, master_dtype=masters)
    got = weights_of(model, None if masters is None else partial)
    found = compare(base, got, want, selection)
    if masters is None:
        want = one_process(base, selection, steps, make, batches="whole")
        found["whole batches"] = difference(base, got, want, selection)["weights"]
    held = [p for b in partial.packed for p in (b.lasting("full"), b.lasting("packed"))]
    moments = sum(
        local(t).numel() * t.element_size()
        for s in optimizer.state.values()
        for k, t in s.items()
        if k != "step"
    )
    selected = sum(p.numel() for p in partial.parameters())
    return {
        **found,
        "moment bytes per element": sum(everywhere(moments)) / selected,
        "shares": max(everywhere(sum(local(p).numel() for p in held)))
        / max(sum(p.numel() for p in held), 1),
        "gradients": sorted(n for n, p in model.named_parameters() if p.requires_grad)
        == sorted(n for n, p in model.named_parameters() if p in set(partial.parameters())),
    }


@scenario
def fsdp_tiles() -> dict[str, Any]:
    model = model_of()
    return fsdp_run(model, selection_of(model, "7x5"), steps_of(6))


@scenario
def fsdp_rows_torch_adamw() -> dict[str, Any]:
    model = model_of(tied=True)
    return fsdp_run(model, selection_of(model, "row"), steps_of(6), torch_adamw)


@scenario
def fsdp_columns() -> dict[str, Any]:
    model = model_of()
    return fsdp_run(model, selection_of(model, "column"), steps_of(6))


@scenario
def fsdp_whole_parameters() -> dict[str, Any]:
    model = model_of()
    return fsdp_run(model, selection_of(model, "module", names="mlp"), steps_of(6))


@scenario
def fsdp_whole_parameters_with_masters() -> dict[str, Any]:
    model = model_of().bfloat16()
    return fsdp_run(model, selection_of(model, "module"), steps_of(5), masters=torch.float32)


@scenario
def fsdp_masters() -> dict[str, Any]:
    """bfloat16 weights, packed masters in float32."""
    model = model_of().bfloat16()
    return fsdp_run(model, selection_of(model), steps_of(5), masters=torch.float32)


@scenario
def fsdp_conversion() -> dict[str, Any]:
    """``model.double()`` after fully_shard exchanges what is inside of each shard; a conversion
    that would round masters is refused."""
    base, steps = model_of(), steps_of(3)
    selection = selection_of(base)
    model = copy.deepcopy(base)
    partial = fg.make_partial(model, selection)
    shard(model)
    model.double()
    train(model, partial, sparse_adamw(partial.parameters()), steps)
    wide = copy.deepcopy(base).double()
    want = one_process(wide, selection, steps)
    with_masters = copy.deepcopy(base).bfloat16()
    fg.make_partial(with_masters, selection, torch.float32)
    shard(with_masters)
    refused = message(lambda: with_masters.half())
    return {**compare(wide, weights_of(model), want, selection), "refused": refused}


@scenario
def fsdp_mixed_precision() -> dict[str, Any]:
    """float32 weights that are gathered as bfloat16: what one process does with bfloat16 weights
    and masters, but that fully_shard rounds each gradient to bfloat16. By SGD: Adam would turn a
    rounding error of a gradient near zero into a whole step."""

    def sgd(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.3, momentum=0.9)

    model = model_of().bfloat16()
    selection, steps = selection_of(model), steps_of(5)
    want = one_process(model, selection, steps, sgd, master_dtype=torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    wide = copy.deepcopy(model).float()
    for name in [n for n in want if n.startswith("packed ")]:
        # what the weights would be if they had as many digits as the masters
        plain = name.removeprefix("packed ")
        grid, ids = selection.grid(plain), torch.from_numpy(selection.blocks[plain])
        full = want[plain].float()
        matrix = full.view(grid.rows, grid.cols)
        if want[name].shape == full.shape:
            full.copy_(want[name])
        else:
            scatter_blocks_(matrix, ids, want[name], grid.block_rows, grid.block_cols)
        want[plain] = full
        del want[name]
    model = copy.deepcopy(wide)
    partial = fg.make_partial(model, selection)
    shard(model, mp_policy=policy)
    train(model, partial, sgd(partial.parameters()), steps)
    return compare(wide, weights_of(model), want, selection)


@scenario
def fsdp_no_reshard() -> dict[str, Any]:
    model = model_of()
    return fsdp_run(model, selection_of(model), steps_of(6), reshard_after_forward=False)


@scenario
def fsdp_accumulation() -> dict[str, Any]:
    model = model_of()
    return fsdp_run(model, selection_of(model), steps_of(6, accumulated=2))


@scenario
def fsdp_checkpointed() -> dict[str, Any]:
    """Activations are computed again in the backward pass, from gathered weights."""
    model = model_of()

    def prepare(model: Any) -> None:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()

    return fsdp_run(model, selection_of(model), steps_of(6), prepare=prepare)


@scenario
def fsdp_hybrid() -> dict[str, Any]:
    """Copies in one dimension of the mesh, shards in the other."""
    model = model_of()
    shape = (2, dist.get_world_size() // 2)
    mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards"))
    return fsdp_run(model, selection_of(model), steps_of(6), mesh=mesh)


@scenario
def fsdp_transposed() -> dict[str, Any]:
    """GPT-2's Conv1D. Without biases: that of the keys has a gradient of zero, and Adam makes steps
    of its rounding errors."""
    base: Any = randomised(gpt2)
    selection, steps = selection_of(base, "row", names="weight"), steps_of(5)
    model = copy.deepcopy(base)
    partial = fg.make_partial(model, selection)
    for layer in model.transformer.h:
        fully_shard(layer)
    fully_shard(model)
    train(model, partial, sparse_adamw(partial.parameters()), steps)
    return compare(base, weights_of(model), one_process(base, selection, steps), selection)


@scenario
def fsdp_scaler() -> dict[str, Any]:
    """GradScaler: an infinity on one process makes all of them skip the step."""
    base, steps = model_of(), steps_of(4)
    selection = selection_of(base)
    found = {}
    for make in (sparse_adamw, torch_adamw):
        model = copy.deepcopy(base)
        partial = fg.make_partial(model, selection)
        shard(model)
        optimizer = make(partial.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for k, micros in enumerate(steps):
            bad = float("inf") if k == 1 and dist.get_rank() == 1 else 1.0
            scaler.scale(model(**mine(micros[0])).loss * bad).backward()
            scaler.unscale_(optimizer)
            if k != 1:
                clip_grad_norm_(partial.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        want = one_process(base, selection, [steps[0], *steps[2:]], make)
        assert scaler.get_scale() == 512.0
        found[make.__name__] = compare(base, weights_of(model), want, selection)
    return {**found["sparse_adamw"], "torch AdamW": found["torch_adamw"]["weights"]}


@scenario
def fsdp_partial_file() -> dict[str, Any]:
    """Partial.save of a sharded run is that of one process with the same weights."""
    base, steps = model_of().bfloat16(), steps_of(2)
    selection = selection_of(base, "7x5")
    model = copy.deepcopy(base)
    partial = fg.make_partial(model, selection, torch.float32)
    shard(model)
    train(model, partial, sparse_adamw(partial.parameters()), steps)
    path = FOLDER / "partial.safetensors"
    sizes = everywhere(partial.save(path))
    alone = copy.deepcopy(base)
    alone.load_state_dict(weights_of(model))
    loaded = fg.load_partial(alone, path)
    return {
        **compare(base, weights_of(model, partial), weights_of(alone, loaded), selection),
        "one size": len(set(sizes)) == 1,
    }


@scenario
def fsdp_unused() -> dict[str, Any]:
    """A branch in turns: packed parameters without a gradient."""
    torch.manual_seed(0)
    base, world = Branches(), dist.get_world_size()
    selection = selection_of(base, "2x3", 0.5)
    g = torch.Generator().manual_seed(1)
    data = [(torch.randn(world, 4, 6, generator=g), use) for use in "abba"]
    weights = []
    for alone in (False, True):
        model = copy.deepcopy(base)
        partial = fg.make_partial(model, selection)
        if not alone:
            for part in (model.a, model.b, model):
                fully_shard(part)
        optimizer = sparse_adamw(partial.parameters())
        for x, use in data:
            for part in x if alone else x[dist.get_rank()].unsqueeze(0):
                loss = model(part, use).square().mean()
                (loss / world if alone else loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(weights_of(model))
    return compare(base, *weights, selection)


@scenario
def fsdp_evaluated_between_steps() -> dict[str, Any]:
    """Evaluation, generation and state dicts in the middle see trained weights."""
    base, steps = model_of(), steps_of(6)
    selection = selection_of(base)
    seen: list[Any] = []

    def each(number: int, model: Any) -> None:
        if number % 2 == 0:
            model.eval()
            with torch.no_grad():
                loss = model(**batch_of(2, seed=7)).loss.item()
            model.train()
            full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
            seen.append((loss, {k: v.clone() for k, v in full.items()}))

    found = fsdp_run(base, selection, steps, each=each)
    worst = 0.0
    for k, (loss, state) in enumerate(seen):
        want = one_process(base, selection, steps[: 2 * k + 1], sparse_adamw)
        alone = copy.deepcopy(base)
        alone.load_state_dict(want)
        worst = max(worst, abs(alone(**batch_of(2, seed=7)).loss.item() - loss))
        if dist.get_rank() == 0:
            worst = max(worst, *(float((state[n] - want[n]).abs().max()) for n in want))
    return {**found, "evaluation": worst}


@scenario
def fsdp_loaded_into() -> dict[str, Any]:
    """load_state_dict between steps: packed parameters follow."""
    base, steps = model_of(), steps_of(4)
    selection = selection_of(base, "7x5")
    model = copy.deepcopy(base)
    partial = fg.make_partial(model, selection)
    shard(model)
    optimizer = sparse_adamw(partial.parameters())
    state = {n: t.clone() for n, t in model.state_dict().items()}
    train(model, partial, optimizer, steps)
    model.load_state_dict(state)
    train(model, partial, sparse_adamw(partial.parameters()), steps)
    want = one_process(base, selection, steps, sparse_adamw)
    return compare(base, weights_of(model), want, selection)


@scenario
def fsdp_delta() -> dict[str, Any]:
    """A delta of the sharded run, applied to the base model, is the trained model."""
    base, steps = model_of(), steps_of(3)
    selection = selection_of(base, "7x5")
    model = copy.deepcopy(base)
    partial = fg.make_partial(model, selection)
    shard(model)
    train(model, partial, sparse_adamw(partial.parameters()), steps)
    sizes = everywhere(fg.save_delta(partial, FOLDER / "fsdp.safetensors"))
    loaded = copy.deepcopy(base)
    fg.load_delta(loaded, FOLDER / "fsdp.safetensors")
    return {
        **compare(base, weights_of(model), weights_of(loaded), selection),
        "hash": fg.weights_hash(model) == fg.weights_hash(loaded),
        "one size": len(set(sizes)) == 1,
    }


@scenario
def ddp_delta() -> dict[str, Any]:
    base, steps = model_of(), steps_of(3)
    selection = selection_of(base)
    model = copy.deepcopy(base)
    partial = fg.make_partial(model, selection)
    wrapped = DistributedDataParallel(model)
    train(wrapped, partial, sparse_adamw(partial.parameters()), steps)
    if dist.get_rank() == 0:
        fg.save_delta(partial, FOLDER / "ddp.safetensors")
    dist.barrier()
    loaded = copy.deepcopy(base)
    fg.load_delta(loaded, FOLDER / "ddp.safetensors")
    return {
        **compare(base, weights_of(model), weights_of(loaded), selection),
        "hash": fg.weights_hash(wrapped) == fg.weights_hash(loaded),
    }


# -- checkpoints at another number of processes ----------------------------------------------

HALF, ALL = 3, 6


def checkpoint_parts(masters: bool) -> tuple[nn.Module, Selection, Steps, torch.dtype | None]:
    base = randomised(llama)
    base = base.bfloat16() if masters else base
    world = dist.get_world_size() if dist.is_initialized() else 2
    whole_batches = [batch_of(2 * world, seed=100 * s) for s in range(ALL)]
    steps = [[[{k: v[2 * r : 2 * r + 2] for k, v in b.items()} for r in range(world)]]
             for b in whole_batches]  # fmt: skip
    return base, selection_of(base, "7x5"), steps, torch.float32 if masters else None


def checkpoint_of_one(folder: Path, masters: bool) -> None:
    """Half of a run in a process of its own."""
    base, selection, steps, dtype = checkpoint_parts(masters)
    partial = fg.make_partial(base, selection, dtype)
    optimizer = sparse_adamw(partial.parameters())
    train(base, partial, optimizer, steps[:HALF], alone="parts")
    state = {"training": fg.TrainingState(partial, optimizer)}
    dcp.save(state, checkpoint_id=folder, no_dist=True)


def resumed_by_one(folder: Path, masters: bool) -> float:
    """The other half, after a checkpoint that several processes made; against a whole run."""
    base, selection, steps, dtype = checkpoint_parts(masters)
    model = copy.deepcopy(base)
    partial = fg.make_partial(model, selection, dtype)
    optimizer = sparse_adamw(partial.parameters())
    state = {"training": fg.TrainingState(partial, optimizer)}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    train(model, partial, optimizer, steps[HALF:], alone="parts")
    want = one_process(base, selection, steps, master_dtype=dtype)
    got = weights_of(model, partial if masters else None)
    return difference(base, got, want, selection)["weights"]


def sharded_half(kind: str, masters: bool) -> tuple[Any, Any, Any, Steps]:
    base, selection, steps, dtype = checkpoint_parts(masters)
    partial = fg.make_partial(base, selection, dtype)
    model = shard(base) if kind == "fsdp" else DistributedDataParallel(base)
    return model, partial, sparse_adamw(partial.parameters()), steps


def checkpoints(kind: str, masters: bool) -> dict[str, Any]:
    """Saved by several processes, resumed by them and (in the test) by one; saved by one, resumed
    by several."""
    several = FOLDER / f"{kind}-{masters}"
    model, partial, optimizer, steps = sharded_half(kind, masters)
    train(model, partial, optimizer, steps[:HALF])
    state = fg.TrainingState(partial, optimizer)
    dcp.save({"training": state}, checkpoint_id=several)
    base, selection, _, dtype = checkpoint_parts(masters)
    want = one_process(base, selection, steps, master_dtype=dtype)
    one = FOLDER / f"{kind}-{masters}-one"
    if dist.get_rank() == 0:
        checkpoint_of_one(one, masters)
    dist.barrier()
    names = {n.removeprefix("module.") for n in state.state_dict()["model"]}
    found: dict[str, Any] = {"a normal model": names == set(base.state_dict())}
    for label, folder in (("resumed", several), ("from one", one)):
        model, partial, optimizer, _ = sharded_half(kind, masters)
        dcp.load({"training": fg.TrainingState(partial, optimizer)}, checkpoint_id=folder)
        train(model, partial, optimizer, steps[HALF:])
        got = weights_of(model, partial if masters else None)
        found[label] = difference(base, got, want, selection)["weights"]
    return found


@scenario
def fsdp_checkpoints() -> dict[str, Any]:
    return checkpoints("fsdp", masters=False)


@scenario
def fsdp_checkpoints_with_masters() -> dict[str, Any]:
    return checkpoints("fsdp", masters=True)


@scenario
def ddp_checkpoints() -> dict[str, Any]:
    return checkpoints("ddp", masters=False)


# -- what goes wrong -------------------------------------------------------------------------


@scenario
def nan_on_one_process() -> dict[str, Any]:
    """All processes refuse the step, name the same parameters, and go on together."""
    base, steps = model_of(), steps_of(3)
    selection = selection_of(base)
    found: dict[str, Any] = {}
    for kind in ("ddp", "fsdp"):
        model = copy.deepcopy(base)
        partial = fg.make_partial(model, selection)
        wrapped = shard(model) if kind == "fsdp" else DistributedDataParallel(model)
        optimizer = sparse_adamw(partial.parameters())
        train(wrapped, partial, optimizer, steps[:1])
        before, names = digest(list(weights_of(model).values())), None
        wrapped(**mine(steps[1][0])).loss.backward()
        name, p = list(partial.named_parameters())[3]
        if kind == "ddp" or dist.get_rank() == 1:
            local(p.grad).view(-1)[0] = float("nan")  # in the rows of one process alone
        try:
            optimizer.step()
        except NonFiniteGradientError as error:
            names = error.names
        optimizer.zero_grad()
        found[f"{kind} named"] = everywhere(names) == [[name]] * dist.get_world_size()
        found[f"{kind} unchanged"] = digest(list(weights_of(model).values())) == before
        train(wrapped, partial, optimizer, steps[1:])
        want = one_process(base, selection, steps, sparse_adamw)
        found[f"{kind} weights"] = compare(base, weights_of(model), want, selection)["weights"]
    return found


@scenario
def refusals() -> dict[str, Any]:
    base, batch = model_of(), mine(even(2, 1))
    selection = selection_of(base)

    def after_ddp() -> None:
        fg.make_partial(DistributedDataParallel(copy.deepcopy(base)), selection)

    def inside_ddp() -> None:
        wrapped = DistributedDataParallel(copy.deepcopy(base), find_unused_parameters=True)
        fg.make_partial(wrapped.module, selection)
        wrapped(**batch).loss.backward()

    def after_fsdp() -> None:
        fg.make_partial(shard(copy.deepcopy(base)), selection)

    def optimizer_first() -> None:
        model = copy.deepcopy(base)
        partial = fg.make_partial(model, selection)
        optimizer = sparse_adamw(partial.parameters())
        shard(model)
        model(**batch).loss.backward()
        optimizer.step()

    def removed() -> None:
        model = copy.deepcopy(base)
        partial = fg.make_partial(model, selection)
        shard(model)
        partial.remove()

    def changed_packed() -> None:
        model = copy.deepcopy(base)
        partial = fg.make_partial(model, selection)
        shard(model)
        with torch.no_grad():
            next(partial.parameters()).mul_(2)
        model(**batch)

    def changed_full() -> None:
        model = copy.deepcopy(base)
        fg.make_partial(model, selection)
        shard(model)
        with torch.no_grad():
            dict(model.named_parameters())["lm_head.weight"].mul_(2)
        model(**batch)

    def other_dimension() -> None:
        from torch.distributed.tensor import Shard

        model = copy.deepcopy(base)
        partial = fg.make_partial(model, selection)

        def place(p: Any) -> Any:
            return Shard(1) if p.ndim == 2 and p.shape[1] % dist.get_world_size() == 0 else None

        shard(model, shard_placement_fn=place)
        optimizer = sparse_adamw(partial.parameters())
        model(**batch).loss.backward()
        optimizer.step()

    def mixed_ddp() -> None:
        from torch.nn.parallel.distributed import _MixedPrecision

        model = copy.deepcopy(base)
        fg.make_partial(model, selection)
        wrapped = DistributedDataParallel(model)
        wrapped.mixed_precision = _MixedPrecision(param_dtype=torch.bfloat16)  # needs a GPU
        wrapped(**batch)

    def other_blocks() -> None:
        state = []
        for seed in (0.3, 0.4):
            model = copy.deepcopy(base)
            partial = fg.make_partial(model, selection_of(base, share=seed))
            wrapped = shard(model)
            optimizer = sparse_adamw(partial.parameters())
            train(wrapped, partial, optimizer, steps_of(1))
            state.append(fg.TrainingState(partial, optimizer))
        state[1].load_state_dict(state[0].state_dict())

    cases = {k: v for k, v in locals().items() if isinstance(v, FunctionType)}
    return {name: message(call) for name, call in cases.items()}


def main() -> None:
    global FOLDER
    given = processes.arguments(__doc__, folder="for checkpoints; a temporary one by default")
    with processes.group(), processes.common_folder(given.folder) as FOLDER:
        processes.run_scenarios(SCENARIOS, given)


if __name__ == "__main__":
    main()
