"""Correctness on the device, before anything is timed: every operator against float64.

Fresh random inputs at each run. A gradient may be off by no more than twice what the device's own
matrix library is, against the float64 product of the same inputs; sums of squares by float32
rounding. Each check returns its error and its bound; all are reported.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import fastgrad as fg
from fastgrad_kernels import ops
from fastgrad_kernels.layout import gather_blocks, scatter_blocks_

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Check:
    name: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound  # false for NaN


def distance(got: Tensor, want: Tensor) -> float:
    """``‖got - want‖ / ‖want‖`` in float64."""
    want = want.double()
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-300))


def poisoned(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random matrix inside a larger one that is NaN everywhere else: a read outside shows."""
    room = torch.full((rows + 8, cols + 16), torch.nan, dtype=dtype, device=device)
    view = room[4 : rows + 4, 8 : cols + 8]
    return view.copy_(torch.randn(rows, cols, device=device).to(dtype))


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def influence(device: torch.device) -> Iterator[Check]:
    """Weight gradient, T and signed influence: ragged and empty examples, odd shapes, blocks."""
    cases = [
        (256, 384, [128] * 4, 256, 384),  # the fused form, whole weights
        (256, 384, [16] * 24, 256, 384),  # short examples: the Gram form may be chosen
        (200, 264, [37, 0, 1, 300, 64], 200, 264),
        (256, 384, [96, 0, 33], 128, 128),
        (130, 250, [65, 40], 1, 250),
        (130, 250, [65, 40], 130, 1),
    ]
    for rows, cols, lengths, br, bc in cases:
        for dtype in DTYPES:
            tokens, offsets = sum(lengths), offsets_of(lengths)
            left = poisoned(tokens, rows, dtype, device)
            right = poisoned(tokens, cols, dtype, device)
            directions = torch.randn(2, rows, cols, device=device)
            grad, sq, dots = ops.cross_influence(left, right, offsets, br, bc, directions)
            again, sq2, _ = ops.cross_influence(left, right, offsets, br, bc)
            parts = [
                a.double().T @ b.double()
                for a, b in zip(left.split(lengths), right.split(lengths), strict=True)
            ]
            want = sum(parts, torch.zeros(rows, cols, dtype=torch.float64, device=device))
            squares = torch.stack(
                [
                    torch.stack([c.square().sum() for b in p.split(br) for c in b.split(bc, 1)])
                    for p in parts
                ],
                1,
            )
            products = torch.stack([(directions * p).sum((1, 2)) for p in parts], 1)
            library = distance(left.float().T @ right.float(), want)
            name = f"cross_influence {dtype} {rows}x{cols} {len(lengths)} examples {br}x{bc}"
            yield Check(f"{name}: gradient", distance(grad, want), max(2 * library, 1e-6))
            yield Check(f"{name}: gradient alone", distance(again, want), max(2 * library, 1e-6))
            yield Check(f"{name}: T", distance(sq, squares), 2e-6)
            yield Check(f"{name}: T, other form", distance(sq2, squares), 2e-5)
            yield Check(f"{name}: signed", distance(dots, products), 1e-5)
            twice = ops.cross_influence(left, right, offsets, br, bc, directions)
            same = all(torch.equal(a, b) for a, b in zip((grad, sq, dots), twice, strict=True))
            yield Check(f"{name}: same bits twice", 0.0 if same else 1.0, 0.0)
            total = torch.ones_like(want, dtype=torch.float32)
            ops.cross_influence_add_(total, left, right, offsets, br, bc)
            yield Check(f"{name}: added", distance(total, want + 1), max(2 * library, 1e-6))


def sparse_gradient(device: torch.device) -> Iterator[Check]:
    for rows, cols, br, bc in ((300, 260, 128, 128), (300, 260, 1, 260), (300, 260, 300, 1),
                               (129, 65, 16, 32)):  # fmt: skip
        for dtype in DTYPES:
            left = poisoned(333, rows, dtype, device)
            right = poisoned(333, cols, dtype, device)
            count = -(-rows // br) * -(-cols // bc)
            ids = torch.randperm(count, device=device)[: max(1, count // 3)]
            want = gather_blocks(left.double().T @ right.double(), ids, br, bc)
            got = ops.sparse_wgrad(left, right, ids, br, bc)
            library = distance(gather_blocks(left.float().T @ right.float(), ids, br, bc), want)
            name = f"sparse_wgrad {dtype} {rows}x{cols} by {br}x{bc}"
            yield Check(name, distance(got, want), max(2 * library, 1e-6))
            total = torch.ones_like(got)
            ops.sparse_wgrad_add_(total, left, right, ids)
            yield Check(f"{name}: added", distance(total, want + 1), max(2 * library, 1e-6))


def experts(device: torch.device) -> Iterator[Check]:
    lengths = [100, 0, 37, 260]
    for dtype in DTYPES:
        left = poisoned(sum(lengths), 130, dtype, device)
        right = poisoned(sum(lengths), 72, dtype, device)
        ids = torch.tensor([3, 1, 0], device=device)
        parts = list(zip(left.split(lengths), right.split(lengths), strict=True))
        want = torch.stack([a.double().T @ b.double() for a, b in (parts[i] for i in (3, 1, 0))])
        library = torch.stack([a.float().T @ b.float() for a, b in (parts[i] for i in (3, 1, 0))])
        got = ops.expert_wgrad(left, right, offsets_of(lengths), ids)
        bound = max(2 * distance(library, want), 1e-6)
        yield Check(f"expert_wgrad {dtype}", distance(got, want), bound)


def taps(device: torch.device) -> Iterator[Check]:
    lengths = [70, 0, 5, 120]
    tokens, offsets = sum(lengths), offsets_of(lengths)
    for dtype in DTYPES:
        grad = torch.randn(tokens, 96, device=device).to(dtype)
        ids = torch.randint(0, 50, (tokens,), device=device)
        sq, _ = ops.embedding_influence(ids, grad, offsets, 50, 50, 96)
        tables = []
        for i, g in zip(ids.split(lengths), grad.split(lengths), strict=True):
            table = torch.zeros(50, 96, dtype=torch.float64, device=device)
            tables.append(table.index_add_(0, i, g.double()).square().sum())
        yield Check(f"embedding_influence {dtype}", distance(sq[0], torch.stack(tables)), 2e-6)
        x = torch.randn(tokens, 96, device=device).to(dtype)
        mean, rstd = torch.randn(tokens, device=device), torch.rand(tokens, device=device) + 0.5
        weight, bias = ops.norm_gradients(x, grad, rstd, offsets, mean, True)
        hat = (x.double() - mean.double()[:, None]) * rstd.double()[:, None] * grad.double()
        want = torch.stack([h.sum(0) for h in hat.split(lengths)])
        yield Check(f"norm_gradients {dtype}: weight", distance(weight, want), 1e-6)
        want = torch.stack([g.double().sum(0) for g in grad.split(lengths)])
        yield Check(f"norm_gradients {dtype}: bias", distance(bias, want), 1e-6)


def statistics(device: torch.device) -> Iterator[Check]:
    shapes = [(513, 257), (7,), (0, 4), (64, 3, 5), (1,), (200_003,)]
    grads = [torch.randn(s, device=device).to(DTYPES[i % 3]) for i, s in enumerate(shapes)]
    grads[0][5, 7] = torch.nan
    sizes = [(128, 64), (1, 7), (1, 1), (8, 15), (1, 1), (1, 1 << 20)]
    _, tensors = ops.grad_stats(grads, [r for r, _ in sizes], [c for _, c in sizes])
    finite = [torch.where(torch.isfinite(g), g, 0).double() for g in grads]
    rows = (
        torch.stack([g.square().sum() for g in finite]),
        torch.stack([g.abs().sum() for g in finite]),
        torch.stack([g.abs().amax() if g.numel() else g.sum() for g in finite]),
        torch.tensor([float((~torch.isfinite(g)).sum()) for g in grads], device=device),
    )
    for name, got, want in zip(("squares", "magnitudes", "maxima", "non-finite"), tensors, rows,
                               strict=True):  # fmt: skip
        exact = name in ("maxima", "non-finite")
        yield Check(f"grad_stats: {name}", distance(got, want), 0.0 if exact else 2e-6)


def optimizer(device: torch.device) -> Iterator[Check]:
    """Whole tensors against torch.optim.AdamW; packed blocks against the same on the whole."""
    for kind in ("float32", "bfloat16 weight, float32 master"):
        dtype = torch.float32 if kind == "float32" else torch.bfloat16
        full = torch.randn(300, 260, device=device).to(dtype)
        before = full.clone()
        ids = torch.randperm(9, device=device)[:4]
        packed = gather_blocks(full, ids, 128, 128).float()
        dense = torch.nn.Parameter(full.float().clone())
        peer = torch.optim.AdamW([dense], lr=1e-2, weight_decay=0.1)
        m, v = torch.zeros_like(packed), torch.zeros_like(packed)
        steps = torch.zeros(4, device=device)
        rate = torch.tensor(1e-2, dtype=torch.float64, device=device)
        for _ in range(10):
            dense.grad = torch.randn_like(dense)
            grad = gather_blocks(dense.grad, ids, 128, 128)
            ops.adamw_([packed], [grad], [m], [v], [steps], [full], [ids], rate, 0.9, 0.999, 1e-8,
                       0.1)  # fmt: skip
            peer.step()
        want = gather_blocks(dense.detach(), ids, 128, 128)
        yield Check(f"adamw_ {kind}", distance(packed, want), 2e-6)
        expected = scatter_blocks_(before.clone(), ids, packed, 128, 128)
        yield Check(f"adamw_ {kind}: written through, rest untouched",
                    float((full != expected).sum()), 0.0)  # fmt: skip


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(97, 64)
        self.norm = torch.nn.LayerNorm(64)
        self.up, self.down = torch.nn.Linear(64, 256), torch.nn.Linear(256, 64)
        self.head = torch.nn.Linear(64, 97, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.norm(self.embed(input_ids))
        return self.head(x + self.down(torch.nn.functional.silu(self.up(x))))


def training(device: torch.device) -> Iterator[Check]:
    """A probe and five steps of a selection in float32: the device against the CPU; T in bfloat16
    against T in float32, within what bfloat16 inputs allow."""
    torch.manual_seed(torch.seed())
    host = Small()
    ids = torch.randint(0, 97, (6, 33))

    def run(model: torch.nn.Module, ids: Tensor, train: bool) -> tuple[Tensor, dict[str, Tensor]]:
        def loss() -> Tensor:
            logits = model(ids).float()
            return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1),
                                                     ids[:, 1:].flatten())  # fmt: skip

        with fg.Probe(model, "32x32", strict=True) as probe:
            loss().backward()
        stats = probe.stats()
        model.zero_grad()
        if train:
            # both sides train what the CPU's statistics name: a tie would part their ways
            selection = fg.select(host_stats or stats, model=model, fraction=0.3)
            partial = fg.make_partial(model, selection)
            step = fg.SparseAdamW(partial.parameters(), lr=1e-2)
            for _ in range(5):
                loss().backward()
                step.step()
                step.zero_grad()
            partial.remove()
        chosen.append(stats)
        return torch.from_numpy(stats.T), {k: v.cpu() for k, v in model.state_dict().items()}

    chosen: list[fg.GradientStats] = []
    host_stats: fg.GradientStats | None = None
    there, half = copy.deepcopy(host).to(device), copy.deepcopy(host).to(device).bfloat16()
    T, state = run(host, ids, True)
    host_stats = chosen[0]
    T2, state2 = run(there, ids.to(device), True)
    yield Check("training: T as on the CPU", distance(T2, T), 1e-4)
    worst = max(distance(state2[k], v) for k, v in state.items())
    yield Check("training: weights after five steps as on the CPU", worst, 1e-3)
    T3, _ = run(half, ids.to(device), False)
    # bfloat16 keeps 8 bits: activations and gradients are off by 2^-9 at each of a few layers.
    yield Check("training: T in bfloat16", distance(T3, T), 3e-2)


def opchecks(device: torch.device) -> Iterator[Check]:
    """torch.library.opcheck: schemas, fake tensors and autograd registration, on the device."""
    x = torch.randn(40, 16, device=device)
    y = torch.randn(40, 32, device=device)
    offsets, ids = offsets_of([25, 15]), torch.tensor([0, 1], device=device)
    rate = torch.tensor(1e-2, device=device)
    zeros = [torch.zeros(2, 16, 16, device=device) for _ in range(4)]
    calls: dict[str, Callable[[], object]] = {
        "cross_influence": lambda: opcheck(ops.cross_influence, (x, y, offsets, 16, 32)),
        "cross_influence_add_": lambda: opcheck(
            ops.cross_influence_add_, (torch.zeros(16, 32, device=device), x, y, offsets, 16, 32)
        ),
        "sparse_wgrad": lambda: opcheck(ops.sparse_wgrad, (x, y, ids, 16, 16)),
        "sparse_wgrad_add_": lambda: opcheck(ops.sparse_wgrad_add_, (zeros[0], x, y, ids)),
        "grad_stats": lambda: opcheck(ops.grad_stats, ([x, y], [16, 8], [16, 8])),
        "adamw_": lambda: opcheck(
            ops.adamw_,
            ([zeros[0]], [zeros[1]], [zeros[2]], [zeros[3]], [torch.zeros(2, device=device)],
             [torch.zeros(16, 32, device=device)], [ids], rate, 0.9, 0.99, 1e-8, 0.0),
        ),
    }  # fmt: skip
    for name, call in calls.items():
        try:
            call()
            yield Check(f"opcheck {name}", 0.0, 0.0)
        except Exception as error:
            print(f"opcheck {name}: {type(error).__name__}: {error}")
            yield Check(f"opcheck {name}", 1.0, 0.0)


def opcheck(op: object, args: tuple[object, ...]) -> None:
    torch.library.opcheck(op, args)  # type: ignore[arg-type]


def graph(device: torch.device) -> Iterator[Check]:
    """A CUDA graph holds the optimizer's step: replays equal eager steps, rate and all."""
    if device.type != "cuda":
        return
    p = [torch.randn(1000, device=device), torch.randn(64, 64, device=device)]
    q = [x.clone() for x in p]
    grads = [torch.randn_like(x) for x in p]
    rate = torch.tensor(1e-2, dtype=torch.float64, device=device)

    def state() -> tuple[list[Tensor], ...]:
        lists = ([torch.zeros_like(x) for x in p], [torch.zeros_like(x) for x in p])
        return (*lists, [torch.zeros((), device=device) for _ in p])

    a, b = state(), state()

    def step(params: list[Tensor], s: tuple[list[Tensor], ...]) -> None:
        ops.adamw_(params, grads, *s, [], [], rate, 0.9, 0.99, 1e-8, 0.1)

    step(p, a)  # prepares tables; counted below
    step(q, b)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step(p, a)
    for _ in range(3):
        rate.mul_(0.5)
        captured.replay()
        step(q, b)
    torch.cuda.synchronize()
    worst = max(distance(x, y) for x, y in zip(p, q, strict=True))
    yield Check("CUDA graph: replayed steps", worst, 0.0)


ALL = (influence, sparse_gradient, experts, taps, statistics, optimizer, training, opchecks, graph)


def run(device: torch.device) -> Iterator[Check]:
    """All checks; TF32 is off, so that the matrix library's float32 is float32."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        for part in ALL:
            yield from part(device)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
