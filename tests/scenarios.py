"""The columns of the coverage matrix: what may be peculiar about a batch or about training.

A scenario turns a case of the zoo into a :class:`Setting`: a model, the forward passes that one
backward pass belongs to, and each of their examples alone. It gives None where it makes no sense.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from tests.models import one_example
from tests.zoo import Case

Inputs = dict[str, Tensor]

# Relative, as in test_probe_exact. A gradient that is itself bfloat16 has 8 bits.
FP32, BF16, FP16 = 1e-4, 2.0**-8, 2.0**-11

NO_HEADS = {"convnext"}
BALANCED = (
    "output_router_logits=True: experts are to be used alike. Each contribution is compared with "
    "the example's part of the batch's loss, where the share of tokens of each expert is held at "
    "what all examples decided; the probe has to name that, and to refuse example_mean"
)


@dataclass
class Setting:
    """What is measured.

    ``passes`` are forward passes whose losses are added up, each with its examples, ``alone``,
    in the order of the statistics' columns. ``unrounded`` is the same in float32, where this is
    in bfloat16: the distance between the two is the size of the rounding errors that any way to
    compute these gradients makes.
    """

    model: nn.Module
    passes: list[Inputs]
    alone: list[list[Inputs]]
    blocks: str = "module"
    tolerance: float = FP32
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    unrounded: Setting | None = None
    accumulated: bool = False  # a backward pass for each forward pass
    scale: float = 1.0  # what each loss is multiplied by before its backward pass
    # Examples meet in the loss, so that of one alone is another. From an example's output: what
    # its share of the loss of the batch lacks, if what all decided together is held fixed.
    lacks: Callable[[Any, float], Tensor] | None = None


Prepare = Callable[[Case], Setting | None]


@dataclass(frozen=True)
class Scenario:
    group: str  # what is peculiar: the "data" or the "training"
    meaning: str
    prepare: Prepare


SCENARIOS: dict[str, Scenario] = {}


def scenario(group: str, name: str, meaning: str) -> Callable[[Prepare], Prepare]:
    def register(prepare: Prepare) -> Prepare:
        SCENARIOS[name] = Scenario(group, meaning, prepare)
        return prepare

    return register


def rows(model: nn.Module, *batches: Inputs, **options: object) -> Setting:
    """One example per row of each batch."""
    alone = [
        [one_example(batch, j) for j in range(batch["labels"].shape[0])] for batch in batches
    ]
    return Setting(model, list(batches), alone, **options)


def accepts(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters


# -- data ------------------------------------------------------------------------------------


@scenario("data", "plain", "three examples of one length")
def plain(case: Case) -> Setting:
    return rows(case.make(), case.batch(3, 1))


@scenario("data", "row blocks", "the same, with the norm of each row of each parameter")
def row_blocks(case: Case) -> Setting:
    return rows(case.make(), case.batch(3, 1), blocks="row")


@scenario("data", "column blocks", "the same, of each column")
def column_blocks(case: Case) -> Setting:
    return rows(case.make(), case.batch(3, 1), blocks="column")


@scenario("data", "head blocks", "the same, of each attention head")
def head_blocks(case: Case) -> Setting | None:
    model = case.make()
    if case.family == "ssm" or case.name in NO_HEADS:
        return None
    return rows(model, case.batch(3, 1), blocks="head")


@scenario("data", "expert blocks", "the same, of each expert")
def expert_blocks(case: Case) -> Setting | None:
    return rows(case.make(), case.batch(3, 1), blocks="expert") if case.family == "moe" else None


@scenario("data", "one example", "a batch of one")
def one(case: Case) -> Setting:
    return rows(case.make(), case.batch(1, 1))


@scenario("data", "square", "as many examples as tokens (or patches): no size tells them apart")
def square(case: Case) -> Setting:
    probe = case.batch(1, 1)
    tokens = probe.get("input_ids", probe["labels"])
    return rows(case.make(), case.batch(tokens.shape[1] if tokens.ndim > 1 else 16, 1))


def _padded(case: Case, side: str) -> Setting | None:
    """Rows of different lengths; labels too where they have a length of their own."""
    batch = case.batch(3, 1)
    if "attention_mask" not in batch or (case.family == "audio" and side == "left"):
        return None
    for key, values in batch.items():
        for j in range(3):
            short = j * values.shape[1] // 5
            out = slice(values.shape[1] - short, None) if side == "right" else slice(0, short)
            values[j, out] = -100 if key == "labels" else 0
    return rows(case.make(), batch)


@scenario("data", "right padding", "rows of different lengths, padded behind")
def right_padding(case: Case) -> Setting | None:
    return _padded(case, "right")


@scenario("data", "left padding", "the same, padded in front")
def left_padding(case: Case) -> Setting | None:
    return _padded(case, "left")


@scenario("data", "masked labels", "labels of a prompt at -100, of different length in each row")
def masked_labels(case: Case) -> Setting | None:
    batch = case.batch(3, 1)
    if batch["labels"].ndim < 2:
        return None
    for j in range(3):
        batch["labels"][j, : j + 1] = -100
    return rows(case.make(), batch)


@scenario("data", "no labels", "one row has no label at all: it contributes nothing")
def no_labels(case: Case) -> Setting | None:
    batch = case.batch(3, 1)
    if batch["labels"].ndim < 2 or case.reduction != "token_mean":
        return None
    batch["labels"][1] = -100
    return rows(case.make(), batch)


@scenario("data", "two forwards", "two forward passes of different size before one backward pass")
def two_forwards(case: Case) -> Setting:
    return rows(case.make(), case.batch(3, 1), case.batch(2, 2))


def _packed(
    case: Case, lengths: Sequence[Sequence[int]], offsets: bool = False
) -> Setting | None:
    """Several examples in each row, as transformers' DataCollatorWithFlattening lays them out:
    positions start again, the first label of each is -100, and there is no attention mask."""
    model = case.make()
    if case.family not in ("decoder", "moe") or not accepts(model, "position_ids"):
        return None
    model.config.use_cache = False  # with a cache, transformers ignores that positions start again
    alone, packed = [], []
    for r, row in enumerate(lengths):
        examples = []
        for j, length in enumerate(row):
            ids = case.batch(1, 10 * r + j)["input_ids"][:, :length]
            labels = ids.clone()
            labels[:, 0] = -100
            places = torch.arange(length)[None]
            examples.append({"input_ids": ids, "position_ids": places, "labels": labels})
        packed.append({k: torch.cat([e[k] for e in examples], 1) for k in examples[0]})
        alone += examples
    batch: dict[str, Any] = {k: torch.cat([row[k] for row in packed]) for k in packed[0]}
    if offsets:
        ends = torch.tensor([0, *lengths[0]]).cumsum(0, dtype=torch.int32)
        longest = max(lengths[0])
        batch |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        batch |= {"max_length_q": longest, "max_length_k": longest}
    return Setting(model, [batch], [alone])


@scenario("data", "packed", "all examples in one row, told apart by position_ids that start again")
def packed(case: Case) -> Setting | None:
    return _packed(case, [(9, 7, 4)])


@scenario("data", "cu_seq_lens", "the same, with the offsets that flattening collators give")
def offsets(case: Case) -> Setting | None:
    return _packed(case, [(9, 7, 4)], offsets=True)


@scenario("data", "packed rows", "two such rows of the same length")
def packed_rows(case: Case) -> Setting | None:
    return _packed(case, [(9, 3), (5, 4, 3)])


@scenario("data", "inputs_embeds", "the caller looked the embeddings up")
def inputs_embeds(case: Case) -> Setting | None:
    model, batch = case.make(), case.batch(3, 1)
    if "input_ids" not in batch or not accepts(model, "inputs_embeds"):
        return None
    with torch.no_grad():
        embedded = model.get_input_embeddings()(batch.pop("input_ids"))
    return rows(model, {"inputs_embeds": embedded, **batch})


# -- training --------------------------------------------------------------------------------


@scenario("training", "eval", "model.eval()")
def evaluation(case: Case) -> Setting:
    return rows(case.make().eval(), case.batch(3, 1))


def _checkpointed(case: Case, reentrant: bool) -> Setting | None:
    model = case.make()
    if not model.supports_gradient_checkpointing:
        return None
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return rows(model, case.batch(3, 1))


@scenario("training", "checkpoint", "activation checkpointing, not reentrant")
def checkpoint(case: Case) -> Setting | None:
    return _checkpointed(case, reentrant=False)


@scenario("training", "reentrant", "activation checkpointing, reentrant")
def reentrant(case: Case) -> Setting | None:
    return _checkpointed(case, reentrant=True)


@scenario("training", "autocast", "torch.autocast to bfloat16")
def autocast(case: Case) -> Setting:
    def context() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    unrounded = plain(case)
    return rows(
        case.make(), *unrounded.passes, tolerance=BF16, context=context, unrounded=unrounded
    )


@scenario("training", "bfloat16", "weights in bfloat16")
def bfloat16(case: Case) -> Setting:
    model = case.make().bfloat16()
    batch = {
        k: v.bfloat16() if v.is_floating_point() else v for k, v in case.batch(3, 1).items()
    }
    floats = {k: v.float() if v.is_floating_point() else v for k, v in batch.items()}
    unrounded = rows(copy.deepcopy(model).float(), floats)
    return rows(model, batch, tolerance=BF16, unrounded=unrounded)


@scenario("training", "accumulation", "two backward passes, each after its own forward pass")
def accumulation(case: Case) -> Setting:
    return rows(case.make(), case.batch(3, 1), case.batch(2, 2), accumulated=True)


@scenario("training", "GradScaler", "torch.autocast to float16, the loss scaled by 1024")
def grad_scaler(case: Case) -> Setting:
    def context() -> torch.autocast:
        return torch.autocast("cpu", torch.float16)

    unrounded = plain(case)
    unrounded.scale = scale = torch.amp.GradScaler("cpu", init_scale=1024.0).get_scale()
    return rows(
        case.make(), *unrounded.passes, tolerance=FP16, context=context, unrounded=unrounded,
        scale=scale,
    )  # fmt: skip


@scenario("training", "router loss", BALANCED)
def router_loss(case: Case) -> Setting | None:
    if case.family != "moe":
        return None
    model, batch = case.make(), {**case.batch(3, 1), "output_router_logits": True}
    coefficient = model.router_aux_loss_coef = 0.1
    experts, chosen = model.num_experts, model.num_experts_per_tok

    def probabilities(out: Any) -> Tensor:
        return torch.stack([logits.float().softmax(-1) for logits in out.router_logits])

    with torch.no_grad():
        p = probabilities(model(**batch))  # [layers, tokens, experts]
    tokens = p.shape[0] * p.shape[1]
    used = nn.functional.one_hot(p.topk(chosen, -1).indices, experts).sum((0, 1, 2)) / tokens

    def lacks(out: Any, share: float) -> Tensor:
        """Its part of the batch's balancing loss, in the place of the one that it has alone."""
        part = experts * (used * probabilities(out).sum((0, 1)) / tokens).sum()
        return coefficient * (part - share * out.aux_loss)

    alone = [{**one_example(case.batch(3, 1), j), "output_router_logits": True} for j in range(3)]
    return Setting(model, [batch], [alone], lacks=lacks)


@scenario("training", "LoRA", "peft adapters on all linear layers, the rest frozen")
def lora(case: Case) -> Setting:
    return _adapted(case)


@scenario("training", "DoRA", "the same with use_dora=True; of experts, on attention alone")
def dora(case: Case) -> Setting:
    return _adapted(case, use_dora=True)


def _adapted(case: Case, **options: bool) -> Setting:
    layers: str | list[str] = "all-linear"
    if case.family == "ssm":  # peft refuses layers that its fused kernels read directly
        layers = ["in_proj"]
    elif options and case.family == "moe":  # no DoRA on parameters of three dimensions
        layers = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(case.make(), LoraConfig(r=2, target_modules=layers, **options))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # half of the adapters start at zero
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return rows(model, case.batch(3, 1))
