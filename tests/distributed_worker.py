"""Two processes against one:

    torchrun --standalone --nproc-per-node 2 -m tests.distributed_worker

Every scenario trains a tiny model in all processes under a probe, gathers the statistics, and
compares them with a definition that knows nothing of fastgrad or of processes: in float64, one
example alone, its own mean loss, weighted as the processes' loss weights it.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.join import Join
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fastgrad as fg
from fastgrad.errors import FastgradError
from tests import processes
from tests.models import batch_of, gemma, llama, randomised

Batch = dict[str, Tensor]
SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {}


def scenario(function: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    SCENARIOS[function.__name__] = function
    return function


def model_of(tied: bool = False) -> nn.Module:
    return randomised(lambda: llama(tied=tied))


def rows(batch: Batch, span: slice) -> Batch:
    return {k: v[span] for k, v in batch.items()}


def mine(parts: list[Batch]) -> Batch:
    return parts[dist.get_rank()]


def even(each: int, seed: int, **kwargs: Any) -> list[Batch]:
    """One batch with ``each`` examples for every process."""
    world = dist.get_world_size()
    whole = batch_of(each * world, seed=seed, **kwargs)
    return [rows(whole, slice(r * each, (r + 1) * each)) for r in range(world)]


# -- the definition ----------------------------------------------------------------------


def definition(
    model: nn.Module, steps: list[list[list[Batch]]]
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """``steps[step][micro][process]``. Gradients of each example's own mean loss, with the weight
    ``"weight"`` that it has in the step's gradient; and each step's gradient."""
    model, world = copy.deepcopy(model).double(), dist.get_world_size()
    examples, totals = [], []
    for micros in steps:
        total: dict[str, Tensor] = {}
        for process in range(world):
            for parts in micros:
                part = parts[process]
                counts = (part["labels"][:, 1:] != -100).sum(1)
                for j in range(len(counts)):
                    model.zero_grad()
                    model(**rows(part, slice(j, j + 1))).loss.backward()
                    grads = {n: p.grad.clone() for n, p in model.named_parameters()
                             if p.grad is not None}  # fmt: skip
                    weight = counts[j] / counts.sum() / world / len(micros)
                    for n, g in grads.items():
                        total[n] = total.get(n, 0) + weight * g
                    examples.append({**grads, "weight": weight})
        totals.append(total)
    return examples, totals


def cut(matrix: Tensor, grid: Any) -> list[Tensor]:
    """The blocks of one gradient, cut out one by one."""
    matrix = matrix.reshape(grid.rows, grid.cols)
    return [c for r in matrix.split(grid.block_rows) for c in r.split(grid.block_cols, 1)]


def blocks_of(matrix: Tensor, grid: Any) -> Tensor:
    """Norms of the blocks of one gradient."""
    return torch.stack([c.norm() for c in cut(matrix, grid)])


def worst(got: Any, want: Any) -> float:
    got, want = np.asarray(got, dtype=float), np.asarray(want, dtype=float)
    assert got.shape == want.shape, (got.shape, want.shape)
    return float((np.abs(got - want) / (np.abs(want) + 1e-4 * np.abs(want).max())).max())


def errors(
    stats: fg.GradientStats,
    model: nn.Module,
    steps: list[list[list[Batch]]],
    order: list[int] | None = None,
    targets: dict[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Largest relative errors of everything that was gathered."""
    examples, totals = definition(model, steps)
    if order is not None:
        examples = [examples[k] for k in order]
    weights, weights_of = np.array([float(e["weight"]) for e in examples]), dict(
        model.named_parameters()
    )
    norms = np.array([[float(e[n].norm()) for e in examples] for n in stats.names])
    found = {
        "T": worst(stats.T, norms * weights),
        "example_mean": worst(stats.influence("example_mean"), norms),
        "batch": worst(
            np.sqrt(stats.batch_sq), [[float(t[n].norm()) for t in totals] for n in stats.names]
        ),
        "weights": worst(
            stats.weight_norm, [float(weights_of[n].detach().double().norm()) for n in stats.names]
        ),
        "same hash": stats.meta["weights_hash"] in (None, fg.weights_hash(model)),
        "coverage": sorted({c.status for c in stats.coverage.values()}),
        "ids": stats.example_ids.tolist(),
        "tokens": stats.label_tokens.tolist(),
        "passes": stats.batch.tolist(),
        "class": stats.meta["model_class"],
    }
    detailed = [n for n in stats.names if not stats.grid(n).is_whole]
    if detailed:
        pairs, batches = [], []
        for n in detailed:
            grid = stats.grid(n)
            want = torch.stack([e["weight"] * blocks_of(e[n], grid) for e in examples], 1)
            pairs.append(worst(stats.blocks(n), want))
            mean = torch.stack([blocks_of(t[n], grid).square() for t in totals]).mean(0)
            batches.append(worst(stats.block_grad_norm(n), mean.sqrt()))
        found["blocks"], found["block batch"] = max(pairs), max(batches)
    if targets is not None:
        want = [
            [float((e[n] * targets[n].double()).sum() * e["weight"]) for e in examples]
            if n in targets else [0.0] * len(examples)
            for n in stats.names
        ]  # fmt: skip
        got = stats.alignment
        found["alignment"] = float(np.abs(got - want).max() / np.abs(want).max())
        for n in stats.block_alignment:
            grid = stats.grid(n)
            want = torch.stack([e["weight"] * torch.stack([
                c.sum() for c in cut(e[n] * targets[n].double(), grid)]) for e in examples]).sum(0)
            off = (torch.from_numpy(stats.block_alignment[n][0]) - want).abs().max()
            worst_yet = found.get("block alignment", 0.0)
            found["block alignment"] = max(worst_yet, float(off / want.abs().max()))
    if stats.block_batch_abs:
        found["l1"] = max(
            worst(stats.mean_abs(n), torch.stack([
                torch.stack([c.abs().mean() for c in cut(t[n], stats.grid(n))]) for t in totals
            ]).mean(0))
            for n in stats.names
        )  # fmt: skip
    return found


# -- loops -------------------------------------------------------------------------------


def ddp_sync(model: Any, last: bool) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if last else model.no_sync()


def fsdp_sync(model: Any, last: bool) -> contextlib.AbstractContextManager[None]:
    model.set_requires_gradient_sync(last)
    return contextlib.nullcontext()


def train(
    model: nn.Module,
    steps: list[list[list[Batch]]],
    sync: Callable[[Any, bool], contextlib.AbstractContextManager[None]],
    *,
    keep: bool = False,
    ids: Iterator[list[int]] | None = None,
    probed: nn.Module | None = None,
    **kwargs: Any,
) -> fg.GradientStats:
    """A user's loop; with ``keep``, gradients are never set to zero."""
    scale = 1 / len(steps[0])
    with fg.Probe(probed or model, loss_scale=scale, **kwargs) as probe:
        for micros in steps:
            for k, parts in enumerate(micros):
                with sync(model, k == len(micros) - 1):
                    if ids is not None:
                        probe.next_ids(next(ids))
                    (model(**mine(parts)).loss * scale).backward()
            if not keep:
                model.zero_grad()
    return fg.gather(probe.stats())


def ddp(model: nn.Module, **kwargs: Any) -> DistributedDataParallel:
    return DistributedDataParallel(copy.deepcopy(model), **kwargs)


def fsdp(model: nn.Module, **kwargs: Any) -> nn.Module:
    model = copy.deepcopy(model)
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer, **kwargs)
    return fully_shard(model, **kwargs)


def direction(model: nn.Module) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(5)
    return {n: torch.randn(p.shape, generator=g) for n, p in model.named_parameters()}


@scenario
def ddp_plain() -> dict[str, Any]:
    """Also against the probe in one process, on the whole batches."""
    model, steps = model_of(), [[even(2, seed)] for seed in (1, 2)]
    stats = train(ddp(model), steps, ddp_sync)
    with fg.Probe(model) as probe:
        for (parts,) in steps:
            model(**{k: torch.cat([p[k] for p in parts]) for k in parts[0]}).loss.backward()
    alone = probe.stats()
    return {
        **errors(stats, model, steps),
        "one process T": worst(stats.T, alone.T),
        "one process batch": worst(stats.batch_sq, alone.batch_sq),
        "signal": worst(stats.signal_sq, alone.signal_sq),
    }


@scenario
def ddp_blocks_and_direction() -> dict[str, Any]:
    model, steps = model_of(tied=True), [[even(2, seed)] for seed in (1, 2)]
    targets = direction(model)
    stats = train(ddp(model), steps, ddp_sync, blocks="8x8", targets=targets, l1=True)
    return errors(stats, model, steps, targets=targets)


@scenario
def ddp_no_sync() -> dict[str, Any]:
    """Gradients of two steps pile up in ``.grad``: each batch is still one step."""
    model = model_of()
    steps = [[even(2, seed), even(2, seed + 10)] for seed in (1, 2)]
    stats = train(ddp(model), steps, ddp_sync, keep=True, l1=True)
    found = errors(stats, model, steps)
    cleared = train(ddp(model), steps, ddp_sync)
    return {**found, "cleared": worst(cleared.batch_sq, stats.batch_sq)}


@scenario
def ddp_static_graph_bucket_views() -> dict[str, Any]:
    model, steps = model_of(), [[even(2, seed)] for seed in (1, 2)]
    wrapped = ddp(model, static_graph=True, gradient_as_bucket_view=True)
    return errors(train(wrapped, steps, ddp_sync), model, steps)


@scenario
def ddp_probe_made_first() -> dict[str, Any]:
    """The probe was given the model, which was wrapped later."""
    model, steps = model_of(), [[even(2, 1)]]
    inner = copy.deepcopy(model)
    probe = fg.Probe(inner)
    wrapped = DistributedDataParallel(inner)
    with probe:
        wrapped(**mine(steps[0][0])).loss.backward()
    return errors(fg.gather(probe.stats()), model, steps)


@scenario
def ddp_uneven() -> dict[str, Any]:
    """A last batch of three and one examples, padded and masked: other numbers of tokens."""
    model = model_of()
    last = batch_of(4, 11, padding="right", masked=True, seed=3)
    others = [rows(last, slice(3, 4))] * (dist.get_world_size() - 1)
    steps = [[even(2, 1, masked=True)], [[rows(last, slice(0, 3)), *others]]]
    return errors(train(ddp(model), steps, ddp_sync), model, steps)


@scenario
def ddp_ids() -> dict[str, Any]:
    """As a DistributedSampler deals examples out: in turns."""
    model, rank, world = model_of(), dist.get_rank(), dist.get_world_size()
    steps = [[even(2, seed)] for seed in (1, 2)]
    dealt = [[[2 * k * world + r, (2 * k + 1) * world + r] for r in range(world)] for k in (0, 1)]
    ids = iter([of_pass[rank] for of_pass in dealt])
    stats = train(ddp(model), steps, ddp_sync, ids=ids)
    return errors(stats, model, steps, order=np.argsort(np.array(dealt).ravel()).tolist())


def sharded(tied: bool, steps: list[list[list[Batch]]] | None = None, **kwargs: Any) -> Any:
    model = model_of(tied)
    steps = steps or [[even(2, seed)] for seed in (1, 2)]
    targets = direction(model)
    options = {k: kwargs.pop(k) for k in ("reshard_after_forward",) if k in kwargs}
    stats = train(fsdp(model, **options), steps, fsdp_sync, targets=targets, l1=True, **kwargs)
    return errors(stats, model, steps, targets=targets)


@scenario
def fsdp_plain() -> dict[str, Any]:
    return sharded(False)


@scenario
def fsdp_tied_tiles() -> dict[str, Any]:
    return sharded(True, blocks="6x10")


@scenario
def fsdp_columns_no_reshard() -> dict[str, Any]:
    return sharded(False, blocks="column", reshard_after_forward=False)


@scenario
def fsdp_accumulation() -> dict[str, Any]:
    steps = [[even(2, seed), even(2, seed + 10)] for seed in (1, 2)]
    return sharded(False, steps, keep=True, blocks="row")


class TokensFirst(nn.Module):
    """Activations ``[tokens, examples, features]`` enter a module that is sharded by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(11, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.layer(self.embed(ids).transpose(0, 1))).transpose(0, 1)
        return self.head(x)


@scenario
def fsdp_as_many_tokens_as_examples() -> dict[str, Any]:
    """Sizes say nothing about whose rows are whose: what is known must survive the wrapper, which
    hands a module's inputs on as other tensors."""
    torch.manual_seed(0)
    model, each = TokensFirst(), 6
    wrapped = copy.deepcopy(model)
    fully_shard(wrapped.layer)
    fully_shard(wrapped)
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 11, (each * dist.get_world_size(), each), generator=g)
    start = each * dist.get_rank()
    with fg.Probe(wrapped, loss_reduction="row_mean") as probe:
        wrapped(ids[start : start + each]).square().mean().backward()
    stats = fg.gather(probe.stats())
    wide, norms = copy.deepcopy(model).double(), []
    for row in ids:
        wide.zero_grad()
        wide(row[None]).square().mean().backward()
        norms.append([float(p.grad.norm()) for p in wide.parameters()])
    return {"example_mean": worst(stats.influence("example_mean"), np.array(norms).T)}


@scenario
def fsdp_checkpointed() -> dict[str, Any]:
    model, steps = model_of(), [[even(2, 1)]]
    model.train()
    wrapped = fsdp(model)
    wrapped.gradient_checkpointing_enable({"use_reentrant": False})
    return errors(train(wrapped, steps, fsdp_sync), model, steps)


@scenario
def fsdp_bf16() -> dict[str, Any]:
    model, steps = model_of(), [[even(2, 1)]]
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return errors(train(fsdp(model, mp_policy=policy), steps, fsdp_sync), model, steps)


@scenario
def fsdp_divide_factor() -> dict[str, Any]:
    """Sums over processes instead of means: contributions are larger, example means the same."""
    model, steps = model_of(), [[even(2, 1)]]
    wrapped = fsdp(model)
    for module in [wrapped, *wrapped.model.layers]:
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # all that gloo can do
    stats = train(wrapped, steps, fsdp_sync)
    world = dist.get_world_size()
    stats.sq, stats.batch_sq = stats.sq / world**2, stats.batch_sq / world**2
    stats.mean_factor = stats.mean_factor * world
    return errors(stats, model, steps)


@scenario
def fsdp_evaluated_before() -> dict[str, Any]:
    """An evaluation leaves the root's parameters put together."""
    model, steps = model_of(), [[even(2, 1)]]
    wrapped = fsdp(model)
    with torch.no_grad():
        wrapped(**mine(steps[0][0]))
    return errors(train(wrapped, steps, fsdp_sync), model, steps)


@scenario
def accelerate_accumulate() -> dict[str, Any]:
    from accelerate import Accelerator

    model = model_of()
    steps = [[even(2, seed), even(2, seed + 10)] for seed in (1, 2)]
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    wrapped, optimizer = accelerator.prepare(copy.deepcopy(model), optimizer)
    with fg.Probe(wrapped, loss_scale=1 / accelerator.gradient_accumulation_steps) as probe:
        for micros in steps:
            for parts in micros:
                with accelerator.accumulate(wrapped):
                    accelerator.backward(wrapped(**mine(parts)).loss)
                    optimizer.step()
                    optimizer.zero_grad()
    return errors(fg.gather(probe.stats()), model, steps)


@scenario
def ddp_token_mean_over_all_processes() -> dict[str, Any]:
    """As transformers' Trainer does it: each process divides by the tokens of all of them, and the
    loss times their number makes up for the mean. Then one process on all of it is the same."""
    model, world = model_of(), dist.get_world_size()
    whole = batch_of(2 * world, 11 + 4 * (world - 2), padding="right", seed=3)
    items = (whole["labels"][:, 1:] != -100).sum()
    wrapped = ddp(model)
    with fg.Probe(wrapped, loss_scale=world) as probe:
        part = rows(whole, slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2))
        (wrapped(**part, num_items_in_batch=items).loss * world).backward()
    stats = fg.gather(probe.stats())
    with fg.Probe(model) as probe:
        model(**whole).loss.backward()
    alone = probe.stats()
    return {
        "T": worst(stats.T, alone.T),
        "batch": worst(stats.batch_sq, alone.batch_sq),
        "example_mean": worst(stats.influence("example_mean"), alone.influence("example_mean")),
        "example_sum": worst(stats.influence("example_sum"), alone.influence("example_sum")),
    }


@scenario
def two_forwards_one_backward() -> dict[str, Any]:
    model, steps = model_of(), [[even(2, 1), even(2, 11)]]
    found = {}
    for kind in (ddp, fsdp):
        with fg.Probe(kind(model), loss_scale=0.5) as probe:
            losses = [probe.model(**mine(parts)).loss for parts in steps[0]]
            (sum(losses) * 0.5).backward()
        got = errors(fg.gather(probe.stats()), model, steps)
        found |= {f"{kind.__name__} {k}": got[k] for k in ("T", "example_mean", "batch")}
    return found


@scenario
def frozen_base() -> dict[str, Any]:
    """Parameters that do not train, as under an adapter, in the same shards as some that do."""
    model, steps = model_of(), [[even(2, 1)]]
    for n, p in model.named_parameters():
        p.requires_grad_("mlp" in n or "head" in n)
    found = {}
    for kind, sync in ((ddp, ddp_sync), (fsdp, fsdp_sync)):
        got = errors(train(kind(model), steps, sync), model, steps)
        assert got["coverage"] == ["exact", "frozen"]
        found |= {f"{kind.__name__} {k}": v for k, v in got.items() if isinstance(v, float)}
    return found


class Hidden(torch.autograd.Function):
    """A product that no tap sees."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w.T, x.T @ g


class Smuggled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.open, self.lin = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return Hidden.apply(self.lin(torch.tanh(self.open(x))), self.lin.weight)


@scenario
def self_check() -> dict[str, Any]:
    """What the taps miss is named, from what each process sees by itself; also where no look into
    the autograd graph finds the function."""
    torch.manual_seed(0)
    model, found = Smuggled(), {}
    for kind, wrapped in (("ddp", ddp(model)), ("fsdp", fully_shard(copy.deepcopy(model)))):
        for looked in (True, False):
            with contextlib.ExitStack() as stack:
                for place in () if looked else ("taps", "probe"):
                    stack.enter_context(
                        mock.patch(f"fastgrad.{place}.refuse_unannounced", return_value=None)
                    )
                with fg.Probe(wrapped) as probe:
                    wrapped(torch.randn(3, 6)).square().mean().backward()
            stats = fg.gather(probe.stats())
            missing = {n: c.reason for n, c in stats.coverage.items() if c.status == "missing"}
            found[kind if looked else f"{kind} unseen"] = missing
            norm = stats.grad_norm[stats.index("lin.weight")]
            found[f"{kind} norm {looked}"] = 0.0 if norm > 0 else 1.0
    return found


def packed(lengths: list[int], seed: int) -> Batch:
    """One row of several examples."""
    parts = [batch_of(1, k, seed=seed + i) for i, k in enumerate(lengths)]
    for part in parts:
        part["labels"][:, 0] = -100
    whole = {k: torch.cat([p[k] for p in parts], 1) for k in ("input_ids", "labels")}
    return {**whole, "position_ids": torch.cat([torch.arange(k) for k in lengths])[None]}


@scenario
def ddp_packed() -> dict[str, Any]:
    """Packed rows: three examples on the first process, two on each other."""
    model, world = model_of(), dist.get_world_size()
    model.config.use_cache = False  # with a cache, transformers lets packed examples see each other
    lengths = [[5, 8, 6], *[[9, 7]] * (world - 1)]
    parts = [packed(k, 20 * r) for r, k in enumerate(lengths)]
    with fg.Probe(ddp(model)) as probe:
        probe.model(**mine(parts)).loss.backward()
    stats = fg.gather(probe.stats())
    wide, norms = copy.deepcopy(model).double(), []
    for part, own in zip(parts, lengths, strict=True):
        for ids, labels in zip(
            part["input_ids"].split(own, 1), part["labels"].split(own, 1), strict=True
        ):
            wide.zero_grad()
            wide(input_ids=ids, labels=labels).loss.backward()
            norms.append([float(p.grad.norm()) for p in wide.parameters()])
    return {
        "example_mean": worst(stats.influence("example_mean"), np.array(norms).T),
        "tokens": stats.label_tokens.tolist(),
        "coverage": sorted({c.status for c in stats.coverage.values()}),
    }


class Branches(nn.Module):
    """A layer that only the first process uses, as an expert without tokens elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.common, self.rare = nn.Linear(5, 5), nn.Linear(5, 5)
        self.never = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.common(x))
        return self.rare(x) if dist.get_rank() == 0 else x


@scenario
def ddp_unused_on_one_process() -> dict[str, Any]:
    torch.manual_seed(0)
    model = Branches()
    wrapped = ddp(model, find_unused_parameters=True)
    g = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(3, 5, generator=g)
    with fg.Probe(wrapped, loss_reduction="row_mean") as probe:
        wrapped(x).square().mean().backward()
    stats = fg.gather(probe.stats())
    row = stats.index("rare.weight")
    grad = dict(wrapped.module.named_parameters())["rare.weight"].grad
    return {
        "batch": worst(stats.batch_sq[row], [float(grad.norm() ** 2)]),
        "rare": [bool(t > 0) for t in stats.T[row]],
        "status": {n: c.status for n, c in stats.coverage.items()},
    }


@scenario
def norms_only_of_some_parameters() -> dict[str, Any]:
    """Without examples, and with parameters that are not probed."""
    model, steps = model_of(), [[even(2, 1)]]
    _, totals = definition(model, steps)
    found = {}
    for kind, wrapped, sync in (("ddp", ddp(model), ddp_sync), ("fsdp", fsdp(model), fsdp_sync)):
        for per_example in (False, True):
            stats = train(wrapped, steps, sync, per_example=per_example, params=["*proj*"])
            want = [float(totals[0][n].norm()) for n in stats.names]
            found[f"{kind} {per_example}"] = worst(stats.grad_norm, want)
    return found


@scenario
def fsdp_gemma() -> dict[str, Any]:
    """Norms that scale by ``1 + weight``: made of a parameter that exists for a while."""
    model, steps = randomised(gemma), [[even(2, 1)]]
    return errors(train(fsdp(model), steps, fsdp_sync, blocks="8x8"), model, steps)


@scenario
def fsdp_hybrid() -> dict[str, Any]:
    """Shards in one dimension of the mesh, copies in the other."""
    model, steps = model_of(), [[even(2, 1)]]
    shape = (2, dist.get_world_size() // 2)
    mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards"))
    return errors(train(fsdp(model, mesh=mesh), steps, fsdp_sync, blocks="row"), model, steps)


@scenario
def ddp_to_disk() -> dict[str, Any]:
    """Pieces on disk, one folder for each process; a piece never ends inside an accumulation."""
    model = model_of()
    steps = [[even(2, seed), even(2, seed + 10)] for seed in (1, 2, 3)]
    with tempfile.TemporaryDirectory() as folder:
        own = f"{folder}/{dist.get_rank()}"
        stats = train(ddp(model), steps, ddp_sync, shards=own, shard_examples=3)
        files = len(list(Path(own).glob("*.safetensors")))
    return {**errors(stats, model, steps), "files": files}


# -- what goes wrong ---------------------------------------------------------------------


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except FastgradError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@scenario
def nan_on_one_process() -> dict[str, Any]:
    """All processes skip the batch, and none is out of step."""
    model, steps = model_of(), [[even(2, seed)] for seed in (1, 2)]
    for kind, sync in ((ddp, ddp_sync), (fsdp, fsdp_sync)):
        wrapped = kind(model)
        with fg.Probe(wrapped, on_nonfinite="skip") as probe:
            for k, (parts,) in enumerate([*steps, steps[0]]):
                scale = float("nan") if k == 1 and dist.get_rank() == 1 else 1.0
                with sync(wrapped, True):
                    (wrapped(**mine(parts)).loss * scale).backward()
                wrapped.zero_grad()
        stats = fg.gather(probe.stats())
        assert (stats.meta["skipped_batches"], stats.n_batches) == (1, 2)
        found = errors(stats, model, [steps[0], steps[0]])
    return found


@scenario
def dropped_accumulation() -> dict[str, Any]:
    """What zero_grad() threw away before it was reduced is in no batch."""
    model, steps = model_of(), [[even(2, 1)]]
    wrapped = ddp(model)
    with fg.Probe(wrapped) as probe:
        with wrapped.no_sync():
            wrapped(**mine(even(2, 7))).loss.backward()
        wrapped.zero_grad()
        wrapped(**mine(steps[0][0])).loss.backward()
    return errors(fg.gather(probe.stats()), model, steps)


@scenario
def refusals() -> dict[str, Any]:
    model, batch = model_of(), mine(even(2, 1))
    half = copy.deepcopy(model)
    half.model.embed_tokens.weight.requires_grad_(False)
    part = copy.deepcopy(model)
    part.lm_head = DistributedDataParallel(part.lm_head)
    mixed = copy.deepcopy(model)
    fully_shard(mixed.model.layers[0])
    hooked = ddp(model)
    hooked.register_comm_hook(None, sum_hook)

    compressed = ddp(model)
    compressed.register_comm_hook(None, default_hooks.fp16_compress_hook)
    deep = copy.deepcopy(model)
    deep.lm_head.weight.ds_id = 0
    synced = nn.Sequential(nn.Linear(4, 4), nn.SyncBatchNorm(4))
    last = fsdp(model)
    last.set_is_last_backward(False)
    partly = fsdp(model)
    partly.model.layers[0].set_requires_gradient_sync(False)
    stepping = fsdp(model)
    for p in stepping.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    replaced = copy.deepcopy(model)
    early = fg.Probe(replaced, hash_weights=False)
    fully_shard(replaced)

    def one_call(wrapped: nn.Module, **kwargs: Any) -> None:
        with fg.Probe(wrapped, **kwargs):
            wrapped(**batch)

    def one_pass(wrapped: nn.Module) -> None:
        with fg.Probe(wrapped):
            wrapped(**batch).loss.backward()

    def in_and_out() -> None:
        inner = copy.deepcopy(model)
        wrapped = DistributedDataParallel(inner)
        with fg.Probe(inner):
            wrapped(**batch).loss.backward()
            inner(**batch)

    def joined() -> None:
        wrapped = ddp(model)
        with Join([wrapped]):
            one_call(wrapped)

    def tensor_parallel() -> None:
        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
        split = parallelize_module(copy.deepcopy(model), mesh, {"lm_head": ColwiseParallel()})
        fg.Probe(split)

    plain = fg.Probe(copy.deepcopy(model))
    with plain:
        plain.model(**batch).loss.backward()
    with fg.Probe(ddp(model)) as probe:
        probe.model(**batch).loss.backward()
    stats = probe.stats()
    both: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(both, stats)
    longer = copy.deepcopy(both[1])
    longer.batch_sq = np.repeat(longer.batch_sq, 2, 1)
    elsewhere = copy.deepcopy(both[1])
    elsewhere.meta["weights_hash"] = "sha256:other"
    louder = copy.deepcopy(both[1])
    louder.batch_sq = louder.batch_sq * 2
    combine = fg.distributed.combine
    return {
        "frozen under FSDP2": message(lambda: one_call(fsdp(half), frozen=["*embed*"])),
        "frozen under DDP": message(lambda: one_call(ddp(half), frozen=["*embed*"])),
        "DataParallel": message(lambda: fg.Probe(nn.DataParallel(model))),
        "a part in DDP": message(lambda: fg.Probe(part)),
        "a part sharded": message(lambda: fg.Probe(mixed)),
        "communication hook": message(lambda: one_call(hooked)),
        "a hook that averages": message(lambda: one_pass(compressed)),
        "DeepSpeed": message(lambda: fg.Probe(deep)),
        "SyncBatchNorm": message(lambda: fg.Probe(fully_shard(synced))),
        "not the last backward": message(lambda: one_pass(last)),
        "partly reduced": message(lambda: one_pass(partly)),
        "step in backward": message(lambda: one_pass(stepping)),
        "sharded after": message(lambda: early.__enter__()),
        "inside and outside": message(in_and_out),
        "join": message(joined),
        "tensor parallel": message(tensor_parallel),
        "not wrapped": message(lambda: fg.gather(plain.stats())),
        "one is absent": message(lambda: combine(both[:1])),
        "twice the same": message(lambda: combine([both[0], both[0]])),
        "merged": message(lambda: fg.GradientStats.concat(both)),
        "other passes": message(lambda: combine([both[0], longer])),
        "other weights": message(lambda: combine([both[0], elsewhere])),
        "other gradients": message(lambda: combine([both[0], louder])),
        "fsdp1": message(lambda: fg.Probe(fsdp1(model))),
    }


def sum_hook(state, bucket):
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


sum_hook.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]}


def fsdp1(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    wrapper = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper._fsdp_wrapped_module = copy.deepcopy(model)
    return wrapper


def main() -> None:
    given = processes.arguments(__doc__)
    with processes.group():
        processes.run_scenarios(SCENARIOS, given)


if __name__ == "__main__":
    main()
