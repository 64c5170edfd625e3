"""The peers: other ways to train with little memory, each as its own package runs it.

Every one gets the model, and says what it trains, what it keeps and what it copies. What GaLore,
BAdam, LISA and LoRA leave to the user (rank, period, layers at a time) is set so that their memory
comes close to that of SparseAdamW, for GaLore that of the optimizer's state, since it needs the
gradient of every weight; each setting stands in the arm's note.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from arms_lisa import LisaAdamW
from fastgrad.errors import FastgradError
from fastgrad.quickstart.arms import WEIGHT_DECAY, Prepared, lora_rank, lora_targets
from fastgrad.quickstart.settings import Spec

EMBEDDING = "model.embed_tokens.weight"
LAYERS = "model.layers."
# Of an adapter weight, memory holds the value, the gradient and two moments; of a selected weight
# the last three. So many adapter weights take the bytes of one selected weight:
PER_SELECTED = 3 / 4
GALORE_SCALE = 0.25  # the package's default, and the paper's choice
LISA_PERIOD, LISA_ACTIVE = 5, 1
# kind -> package that it needs
PACKAGES = {
    "lora": "peft", "lora-embedding": "peft", "dora": "peft", "galore": "galore_torch",
    "badam": "badam", "adamw-8bit": "bitsandbytes",
}  # fmt: skip


def missing(kind: str) -> str | None:
    """Why an arm of this kind cannot run here, or None."""
    package = PACKAGES.get(kind)
    if package is None or importlib.util.find_spec(package) is not None:
        return None
    return f"{package} is not installed"


# -- adapters ----------------------------------------------------------------------------


def lora(spec: Spec, model: nn.Module) -> Prepared:
    """LoRA (arXiv 2106.09685) on the linear layers. The quickstart's has as many weights as the
    sparse arms; this one takes as many bytes."""
    return _adapters(spec, model)


def lora_embedding(spec: Spec, model: nn.Module) -> Prepared:
    """LoRA on the linear layers; the embedding, and with it the head, is trained whole."""
    return _adapters(spec, model, modules_to_save=["embed_tokens"], ensure_weight_tying=True)


def dora(spec: Spec, model: nn.Module) -> Prepared:
    """DoRA (arXiv 2402.09353): LoRA for the direction, a trained length for each output."""
    return _adapters(spec, model, use_dora=True)


def _adapters(spec: Spec, model: nn.Module, **options: Any) -> Prepared:
    from peft import LoraConfig, get_peft_model

    own = dict(model.named_parameters())
    budget = PER_SELECTED * spec.fraction * sum(p.numel() for p in own.values())
    if "modules_to_save" in options:
        budget -= own[EMBEDDING].numel()
    if options.get("use_dora"):  # a length for each output
        budget -= sum(module.out_features for module in lora_targets(model).values())
    rank, targets = lora_rank(model, budget), sorted(lora_targets(model))
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
        target_modules=targets, **options,
    )  # fmt: skip
    adapted: Any = get_peft_model(model, config)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    return Prepared(
        adapted,
        trained,
        sum(p.numel() for p in trained),
        lambda rate: torch.optim.AdamW(trained, lr=rate, weight_decay=WEIGHT_DECAY, fused=True),
        note=f"rank {rank}, alpha {2 * rank}, {len(targets)} linear layers"
        + (", embedding whole" if "modules_to_save" in options else ""),
        copies=lambda: trained,
    )


# -- every weight, smaller state ---------------------------------------------------------


def adamw_8bit(spec: Spec, model: nn.Module) -> Prepared:
    """bitsandbytes' block-wise quantised moments (arXiv 2110.02861); its CPU build has them."""
    from bitsandbytes.optim import AdamW8bit

    trained = list(model.parameters())
    return Prepared(
        model, trained, sum(p.numel() for p in trained),
        lambda rate: AdamW8bit(trained, lr=rate, weight_decay=WEIGHT_DECAY),
        note="every weight; moments of tensors under 4096 weights stay float32",
        state=lambda optimizer: unique(
            t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)
        ),
    )  # fmt: skip


def unique(tensors: Any) -> list[Tensor]:
    """Each tensor once: the tables of a quantised optimizer are shared by all states."""
    return list({t.data_ptr(): t for t in tensors}.values())


def galore_rank(model: nn.Module, state_bytes: float) -> int:
    """The rank at which GaLore's state comes closest to so many bytes.

    A matrix ``[m, n]`` keeps two moments ``[larger, rank]`` and a projector ``[smaller, rank]``;
    what is not projected keeps two moments of its own size.
    """
    low = [p for p, projected in _galore_parts(model) if projected]
    rest = sum(p.numel() for p, projected in _galore_parts(model) if not projected)
    per_rank = sum(2 * max(p.shape) + min(p.shape) for p in low)
    rank = round((state_bytes / 4 - 2 * rest) / per_rank)
    return max(1, min(rank, *(min(p.shape) for p in low)))


def _galore_parts(model: nn.Module) -> list[tuple[nn.Parameter, bool]]:
    """Parameters, and whether GaLore projects them: attention and MLP matrices, as its authors
    do it."""
    low = {id(module.weight) for module in lora_targets(model).values()}
    return [(p, id(p) in low) for p in model.parameters()]


def galore(spec: Spec, model: nn.Module) -> Prepared:
    """GaLore (arXiv 2403.03507): AdamW in a low-rank projection of each matrix's gradient."""
    from galore_torch import GaLoreAdamW

    parts = _galore_parts(model)
    trained = [p for p, _ in parts]
    total = sum(p.numel() for p in trained)
    rank = galore_rank(model, 8 * spec.fraction * total)
    gap = max(1, spec.settings.steps // 4)

    def optimizer(rate: float) -> torch.optim.Optimizer:
        return GaLoreAdamW(
            [
                {"params": [p for p, projected in parts if not projected]},
                {"params": [p for p, projected in parts if projected], "rank": rank,
                 "update_proj_gap": gap, "scale": GALORE_SCALE, "proj_type": "std"},
            ],
            lr=rate, weight_decay=WEIGHT_DECAY, eps=1e-8, no_deprecation_warning=True,
        )  # fmt: skip

    return Prepared(
        model, trained, total, optimizer,
        note=f"rank {rank}, new projection every {gap} steps, scale {GALORE_SCALE}; its "
        "layer-wise mode frees each gradient in the backward pass, but cannot clip by the norm",
        state=galore_state,
    )  # fmt: skip


def galore_state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Moments and projectors."""
    found = []
    for state in optimizer.state.values():
        found += [state[key] for key in ("exp_avg", "exp_avg_sq") if key in state]
        if "projector" in state:
            found.append(state["projector"].ortho_matrix)
    return found


# -- parts that take turns ---------------------------------------------------------------


def badam(spec: Spec, model: nn.Module) -> Prepared:
    """BAdam (arXiv 2404.02827): one block at a time, moments and a float32 copy of it alone.

    Blocks are the embedding and each layer; the final norm is a few weights and gets no turn.
    The period is the one that lets every block have as many turns, two of them.
    """
    import badam as package

    n_blocks = 1 + len({n.split(".")[2] for n, _ in model.named_parameters() if LAYERS in n})
    period = max(2, spec.settings.steps // (2 * n_blocks))
    named = list(model.named_parameters())
    turns = [p for n, p in named if n == EMBEDDING or n.startswith(LAYERS)]

    def optimizer(rate: float) -> torch.optim.Optimizer:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.filterwarnings("ignore", message="BAdam expect")  # ours are float32
            return package.BlockOptimizer(
                torch.optim.AdamW(turns, lr=rate, weight_decay=WEIGHT_DECAY),
                named_parameters_list=named, switch_block_every=period, switch_mode="descending",
                include_embedding=True, verbose=0,
            )  # fmt: skip

    newest: list[Any] = []

    def remembered(rate: float) -> torch.optim.Optimizer:
        newest[:] = [optimizer(rate)]
        return newest[0]

    return Prepared(
        model, turns, sum(p.numel() for p in turns), remembered,
        note=f"blocks: embedding and {n_blocks - 1} layers, {period} steps each in turn",
        state=lambda o: [
            t for s in o.base_optimizer.state.values() for t in s.values() if isinstance(t, Tensor)
        ],
        copies=lambda: [t for o in newest for t in o.param_idx2hp.values()],
    )  # fmt: skip


def lisa(spec: Spec, model: nn.Module) -> Prepared:
    """LISA, see arms_lisa.py."""
    layers: dict[str, list[nn.Parameter]] = {}
    always = []
    for name, p in model.named_parameters():
        if name.startswith(LAYERS):
            layers.setdefault(name.split(".")[2], []).append(p)
        else:
            always.append(p)
    trained = [*always, *(p for layer in layers.values() for p in layer)]
    return Prepared(
        model, trained, sum(p.numel() for p in trained),
        lambda rate: LisaAdamW(
            always, list(layers.values()), active=LISA_ACTIVE, period=LISA_PERIOD, seed=spec.seed,
            lr=rate, weight_decay=WEIGHT_DECAY, fused=True,
        ),
        note=f"{LISA_ACTIVE} of {len(layers)} layers at a time, drawn every {LISA_PERIOD} steps",
    )  # fmt: skip


KINDS: dict[str, Callable[[Spec, nn.Module], Prepared]] = {
    "lora": lora, "lora-embedding": lora_embedding, "dora": dora, "adamw-8bit": adamw_8bit,
    "galore": galore, "badam": badam, "lisa": lisa,
}  # fmt: skip


def prepare(spec: Spec, model: nn.Module) -> Prepared:
    """Set up ``model`` for a peer.

    Raises:
        FastgradError: if its package is not installed.
    """
    reason = missing(spec.arm.kind)
    if reason is not None:
        raise FastgradError(f"{spec.arm.label}: {reason}. Remedy: install it, or leave it out")
    return KINDS[spec.arm.kind](spec, model)
