"""What the gate times: our operators beside named peers, on the same inputs, interleaved."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import fastgrad as fg
from fastgrad_kernels import ops
from fastgrad_kernels.layout import gather_blocks
from timing import DeviceClock, Timing, interleaved, wall_clock


@dataclass(frozen=True)
class Row:
    """``ratio`` = ours / theirs in time unless the row says otherwise; seconds per call."""

    measured: str
    against: str
    ratio: float
    low: float
    high: float
    ours: float
    theirs: float
    aim: float | None = None
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        """None where there is no aim."""
        if self.aim is None:
            return None
        return self.ratio >= self.aim if self.at_least else self.ratio <= self.aim


Contenders = Mapping[str, Callable[[], object]]


def timed(device: torch.device, rounds: int, contenders: Contenders) -> dict[str, Timing]:
    """Ratios to the first contender, the peer."""
    clock = DeviceClock() if device.type == "cuda" else wall_clock
    warm = 2 if device.type == "cuda" else 1
    return interleaved(contenders, max(rounds, 2), warm, clock=clock)


def row(
    measured: str, against: str, ours: Timing, theirs: Timing, aim: float | None = None
) -> Row:  # fmt: skip
    return Row(
        measured, against, ours.ratio, ours.low, ours.high, ours.seconds, theirs.seconds, aim
    )


def offsets_of(examples: int, tokens: int) -> Tensor:
    return torch.arange(examples + 1) * tokens


def influence(device: torch.device, rounds: int) -> Iterator[Row]:
    """Weight gradient and T of one linear layer, in bfloat16 with a bfloat16 gradient."""
    big = device.type == "cuda"
    shapes = ((4096, 4096), (14336, 4096)) if big else ((192, 160),)
    batches = ((8, 2048), (8, 512), (64, 128)) if big else ((4, 64), (16, 8))
    for rows, cols in shapes:
        for examples, tokens in batches:
            n = examples * tokens
            left = torch.randn(n, rows, device=device).bfloat16()
            right = torch.randn(n, cols, device=device).bfloat16()
            offsets = offsets_of(examples, tokens)
            long = tokens >= 2048 or not big

            def library(left: Tensor = left, right: Tensor = right) -> Tensor:
                return left.T @ right

            def ours(
                blocks: tuple[int, int],
                grad: bool = True,
                left: Tensor = left,
                right: Tensor = right,
                offsets: Tensor = offsets,
            ) -> Callable[[], object]:
                return lambda: ops.cross_influence(
                    left, right, offsets, *blocks, None, grad, torch.bfloat16
                )

            contenders: dict[str, Callable[[], object]] = {
                "weight gradient alone": library,
                "T": ours((rows, cols)),
                "T, 128x128 tiles": ours((128, 128)),
                "T without the gradient": ours((rows, cols), False),
            }
            if not long or not big:
                a = left.view(examples, tokens, rows).transpose(1, 2)
                b = right.view(examples, tokens, cols)

                def unfused(a: Tensor = a, b: Tensor = b) -> object:
                    parts = torch.bmm(a, b)
                    return parts.sum(0), parts.float().square().sum((1, 2))

                def gram(
                    left: Tensor = left, right: Tensor = right, a: Tensor = a, b: Tensor = b
                ) -> object:
                    pairs = torch.bmm(a.transpose(1, 2), a).float()
                    return left.T @ right, (pairs * torch.bmm(b, b.transpose(1, 2))).sum((1, 2))

                # B x rows x cols in bfloat16 and again in float32: only where the card holds it
                if 6 * examples * rows * cols < 30 << 30:
                    contenders["unfused"] = unfused
                contenders["Gram by torch"] = gram
            t = timed(device, rounds, contenders)
            where = f"{rows}x{cols}, {examples} x {tokens}"
            peer, aim = t["weight gradient alone"], 1.10 if long else 1.25
            yield row(f"dW + T, {where}", "weight gradient alone", t["T"], peer, aim)
            for form in ("T, 128x128 tiles", "T without the gradient"):
                yield row(f"{form}, {where}", "weight gradient alone", t[form], peer)
            for other, label in (("unfused", "bmm, square, sum"), ("Gram by torch",) * 2):
                if other in t:
                    ratio = t["T"].seconds / t[other].seconds
                    yield Row(f"dW + T, {where}", label, ratio, ratio, ratio, t["T"].seconds,
                              t[other].seconds, 1.0)  # fmt: skip
            release(device)


def stats(device: torch.device, rounds: int) -> Iterator[Row]:
    """Statistics of 500 gradients, 2e9 elements: bytes per second, and PyTorch's total norm."""
    total, count = (2_000_000_000, 500) if device.type == "cuda" else (200_000, 20)
    each = total // count
    cols = 4096 if device.type == "cuda" else 64
    grads = [
        torch.randn(max(1, (each + (i % 7) * cols) // cols), cols, device=device).bfloat16()
        for i in range(count)
    ]
    whole = [g.shape[0] for g in grads], [g.shape[1] for g in grads]
    source = torch.cat([g.view(-1) for g in grads])
    target = torch.empty_like(source)
    t = timed(
        device,
        rounds,
        {
            "get_total_norm": lambda: torch.nn.utils.get_total_norm(grads),
            "copy": lambda: target.copy_(source),
            "grad_stats": lambda: ops.grad_stats(grads, *whole),
            "grad_stats, 128x128": lambda: ops.grad_stats(grads, [128] * count, [128] * count),
        },
    )
    size = f"{count} tensors, {source.numel() / 1e9:.2g}e9 bf16"
    ours, norm, copy = t["grad_stats"], t["get_total_norm"], t["copy"]
    share = (1 / ours.seconds) / (2 / copy.seconds)  # a copy moves each byte twice
    yield Row(f"grad_stats, {size}: bytes/s", "device copy, read + write", share, share, share,
              ours.seconds, copy.seconds, 0.90, True)  # fmt: skip
    yield row(f"grad_stats, {size}", "get_total_norm", ours, norm, 0.50)
    yield row(f"grad_stats by 128x128, {size}", "get_total_norm", t["grad_stats, 128x128"], norm)


def llama_shapes(elements: int, width: int) -> list[tuple[int, int]]:
    """Weights of Llama layers of a width, as many as fit."""
    layer = [(width, width)] * 2 + [(width // 4, width)] * 2
    layer += [(width * 7 // 2, width)] * 2 + [(width, width * 7 // 2)]
    shapes: list[tuple[int, int]] = []
    while sum(r * c for r, c in shapes) < elements:
        shapes += layer
    return shapes


def adam(device: torch.device, rounds: int) -> Iterator[Row]:
    """SparseAdamW with float32 masters of bfloat16 weights, written through, at 100, 20 and 1 %
    of the blocks; the peer updates float32 parameters and leaves the bfloat16 copy to somebody
    else."""
    elements, width, tile = (700_000_000, 4096, 128) if device.type == "cuda" else (40_000, 64, 16)
    shapes = llama_shapes(elements, width)
    peer_params = [torch.nn.Parameter(torch.randn(s, device=device)) for s in shapes]
    for p in peer_params:
        p.grad = torch.randn_like(p)
    peer = torch.optim.AdamW(peer_params, lr=1e-4, fused=True)
    rate = torch.tensor(1e-4, dtype=torch.float64, device=device)

    def prepared(k: float) -> Callable[[], object]:
        lists: tuple[list[Tensor], ...] = tuple([] for _ in range(7))
        for p in peer_params:
            full = p.detach().bfloat16()
            blocks = -(-p.shape[0] // tile) * -(-p.shape[1] // tile)
            ids = torch.randperm(blocks, device=device)[: max(1, round(k * blocks))].sort().values
            assert p.grad is not None
            packed = gather_blocks(full, ids, tile, tile).float()
            grad = gather_blocks(p.grad, ids, tile, tile).bfloat16()
            row = (packed, grad, torch.zeros_like(packed), torch.zeros_like(packed),
                   torch.zeros((), device=device), full, ids)  # fmt: skip
            for target, tensor in zip(lists, row, strict=True):
                target.append(tensor)
        return lambda: ops.adamw_(*lists, rate, 0.9, 0.999, 1e-8, 0.01)

    size = f"{sum(p.numel() for p in peer_params) / 1e9:.2g}e9 weights"
    same = [torch.nn.Parameter(p.detach().clone()) for p in peer_params]
    for p, q in zip(same, peer_params, strict=True):
        p.grad = q.grad
    direct = fg.SparseAdamW(same, lr=1e-4, check_finite=False)
    aims = {1.0: 1.0, 0.2: 0.22, 0.01: 0.02}
    t = timed(
        device,
        rounds,
        {
            "AdamW": peer.step,
            "SparseAdamW": direct.step,
            **{f"{k:.0%}": prepared(k) for k in (1.0, 0.2, 0.01)},
        },
    )
    name = "torch AdamW(fused=True), all"
    yield row(f"SparseAdamW on all, float32, {size}", name, t["SparseAdamW"], t["AdamW"], 1.0)
    for k, aim in aims.items():
        label = f"adamw_, {k:.0%} in {tile}x{tile}, master + bf16"
        yield row(label, name, t[f"{k:.0%}"], t["AdamW"], aim)


def wgrad(device: torch.device, rounds: int) -> Iterator[Row]:
    """Weight gradient of 20 % of the tiles against the dense one."""
    big = device.type == "cuda"
    n, tile = (16384, 128) if big else (256, 32)
    for rows, cols in ((4096, 4096), (14336, 4096)) if big else ((192, 160),):
        left = torch.randn(n, rows, device=device).bfloat16()
        right = torch.randn(n, cols, device=device).bfloat16()
        count = (rows // tile) * (cols // tile)
        ids = torch.randperm(count, device=device)[: round(0.2 * count)].sort().values
        row_ids = torch.randperm(rows, device=device)[: round(0.2 * rows)].sort().values
        args = (left, right)
        t = timed(
            device,
            rounds,
            {
                "dense": lambda a=args: a[0].T @ a[1],
                "tiles": lambda a=args, i=ids: ops.sparse_wgrad(*a, i, tile, tile),
                "rows": lambda a=args, i=row_ids, c=cols: ops.sparse_wgrad(*a, i, 1, c),
            },
        )
        where = f"{rows}x{cols}, {n} tokens"
        name = f"sparse_wgrad, 20% of {tile}x{tile}, {where}"
        yield row(name, "dense weight gradient", t["tiles"], t["dense"], 0.30)
        name = f"sparse_wgrad, 20% of rows, {where}"
        yield row(name, "dense weight gradient", t["rows"], t["dense"])
        release(device)


def step(device: torch.device, rounds: int) -> Iterator[Row]:
    """Forward and backward of a Llama of 1.1e9 weights in bfloat16, T at module level."""
    from transformers import LlamaConfig, LlamaForCausalLM

    big = device.type == "cuda"
    config = LlamaConfig(
        vocab_size=32000 if big else 128,
        hidden_size=2048 if big else 64,
        intermediate_size=8192 if big else 160,
        num_hidden_layers=16 if big else 2,
        num_attention_heads=32 if big else 4,
        num_key_value_heads=8 if big else 2,
        tie_word_embeddings=False,
        use_cache=False,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).bfloat16()
    model.train()
    n, tokens = (4, 2048) if big else (2, 32)
    ids = torch.randint(3, config.vocab_size, (n, tokens), device=device)

    def plain() -> None:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()

    def probed(blocks: str, per_example: bool) -> Callable[[], object]:
        probe = fg.Probe(model, blocks, per_example=per_example, hash_weights=False)

        def run() -> None:
            with probe:
                plain()

        return run

    contenders: dict[str, Callable[[], object]] = {
        "plain": plain,
        "T": probed("module", True),
        "T, 128x128": probed("128x128", True),
        "norms": probed("module", False),
    }
    contenders |= opacus(model, ids)
    t = timed(device, max(3, rounds // 2), contenders)
    size = f"{sum(p.numel() for p in model.parameters()) / 1e9:.2g}e9 weights, {n} x {tokens}"
    yield row(f"step with T, {size}", "plain step", t["T"], t["plain"], 1.05)
    yield row(f"step with T by 128x128, {size}", "plain step", t["T, 128x128"], t["plain"])
    yield row(f"step with norms alone, {size}", "plain step", t["norms"], t["plain"])
    if "Opacus" in t:
        ratio = t["T"].seconds / t["Opacus"].seconds
        yield Row(f"step with T, {size}", "Opacus ghost norms", ratio, ratio, ratio,
                  t["T"].seconds, t["Opacus"].seconds, 1.0)  # fmt: skip
    if big:
        peaks = {}
        for name in ("plain", "T", "T, 128x128"):
            torch.cuda.reset_peak_memory_stats(device)
            contenders[name]()
            peaks[name] = torch.cuda.max_memory_allocated(device)
        for name in ("T", "T, 128x128"):
            ratio = peaks[name] / peaks["plain"]
            label = f"peak memory, {name}, {size} (GB, not ms)"
            yield Row(label, "plain step", ratio, ratio, ratio, peaks[name] / 1e12,
                      peaks["plain"] / 1e12, 1.10)  # fmt: skip
    release(device)


def opacus(model: torch.nn.Module, ids: Tensor) -> Contenders:
    """Opacus' ghost norms if they run here; otherwise says why not."""
    try:
        from overhead_peers import opacus_step
    except ImportError as error:
        print(f"Opacus is left out: {error}")
        return {}
    made = opacus_step(copy.deepcopy(model), {"input_ids": ids, "labels": ids})
    if isinstance(made, str):
        print(f"Opacus is left out: {made}")
        return {}
    return {"Opacus": made}


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


ALL: dict[str, Callable[[torch.device, int], Iterator[Row]]] = {
    "influence": influence,
    "stats": stats,
    "adam": adam,
    "wgrad": wgrad,
    "step": step,
}
