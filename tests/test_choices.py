"""Counts of choices that examples make: one example's loss then depends on what others chose."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastgrad as fg
from fastgrad.errors import StatsError
from tests.zoo import ZOO


def one_hot(scores, k=1):
    return F.one_hot(scores.topk(k, -1).indices, scores.shape[-1]).sum(-2)


def histogram(scores):
    return torch.histc(scores.argmax(-1).reshape(-1).float(), scores.shape[-1], 0, scores.shape[-1])


def by_writing(write):
    def loss(scores):
        ids = scores.argmax(-1).reshape(-1)
        share = write(ids, scores.shape[-1]).float()
        return (share * scores.softmax(-1).flatten(0, 1).mean(0)).sum()

    return loss


def detached(scores):
    with torch.no_grad():
        share = one_hot(scores.detach()).float().mean((0, 1))
    return (share * scores.softmax(-1).mean((0, 1))).sum()


# each is given scores [examples, tokens, experts] and returns a number
MEETING = {
    "one hot": lambda s: (one_hot(s).float().mean((0, 1)) * s.softmax(-1).mean((0, 1))).sum(),
    "top two": lambda s: (one_hot(s, 2).float().sum((0, 1)) * s.softmax(-1).mean((0, 1))).sum(),
    "flat": lambda s: (one_hot(s.flatten(0, 1)).float().mean(0) * s.flatten(0, 1).mean(0)).sum(),
    "histogram": lambda s: (histogram(s) * s.softmax(-1).sum((0, 1))).sum(),
    "count as factor": lambda s: (one_hot(s).sum((0, 1)) * s.softmax(-1).sum((0, 1))).sum(),
    "product": lambda s: one_hot(s).float().mean((0, 1)) @ s.softmax(-1).mean((0, 1)),
    "bincount": by_writing(lambda ids, n: torch.bincount(ids, minlength=n)),
    "scattered": by_writing(
        lambda ids, n: torch.zeros(n).scatter_add_(0, ids, torch.ones(len(ids)))
    ),
    "scattered constants": by_writing(lambda ids, n: torch.zeros(n).scatter_(0, ids, 1.0)),
    "added up": by_writing(lambda ids, n: torch.zeros(n).index_add_(0, ids, torch.ones(len(ids)))),
    "detached": detached,
    "counts of each": lambda s: (histogram(s)[s.argmax(-1)] * s.amax(-1)).sum(),
    "place in the queue": lambda s: (
        one_hot(s.flatten(0, 1)).cumsum(0).float() * s.flatten(0, 1)
    ).sum(),
    "within the capacity": lambda s: (
        s.flatten(0, 1) * (one_hot(s.flatten(0, 1)).cumsum(0) <= 2)
    ).sum(),
    "number of hits": lambda s: (s.clamp(min=0).sum((1, 2)).sum() / (s > 0).sum()),
    "masked": lambda s: torch.where((s > 0).float().mean((0, 1)) > 0.5, s, 0.0).sum(),
}
APART = {
    "of each example": lambda s: (one_hot(s).float().mean(1) * s.softmax(-1).mean(1)).sum(1).mean(),
    "own choice": lambda s: (one_hot(s) * s.softmax(-1)).sum(-1).mean(),
    "own mask": lambda s: (s * torch.zeros_like(s).scatter_(-1, s.topk(2).indices, 1.0)).sum(),
    "fresh mask": lambda s: (s * torch.zeros(s.shape).scatter_(-1, s.topk(2).indices, 1.0)).sum(),
    "above": lambda s: (s * (s > 0)).sum(),
    "sorted by expert": lambda s: s.flatten(0, 1)[s.argmax(-1).flatten().argsort()].square().sum(),
    "logged": lambda s: (s.square().mean(), histogram(s) / s.detach().sum())[0],
    "looked for": lambda s: torch.where(s.isnan(), 0.0, s).clamp(
        max=torch.where(s.isinf().any(), 1e3, 1e4)
    ).sum(),
    "labels": lambda s: s.square().sum() / (torch.arange(4) > 1).sum(),
    "without weight": lambda s: s.square().mean() + 0.0 * MEETING["histogram"](s),
}  # fmt: skip


def measured(loss, n=4):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    with fg.Probe(model, loss_reduction="row_mean") as probe:
        loss(model(torch.randn(n, 5, 6))).backward()
    return probe.stats()


@pytest.mark.parametrize("loss", MEETING)
def test_counts_of_choices_that_come_back_are_reported(loss):
    stats = measured(MEETING[loss])
    assert stats.meta["mixes_examples"]
    with pytest.raises(StatsError, match="no example has a loss of its own"):
        stats.influence("example_mean")


@pytest.mark.parametrize("loss", APART)
def test_choices_that_stay_with_their_example_are_not(loss):
    assert not measured(APART[loss]).meta["mixes_examples"]


@pytest.mark.parametrize("loss", MEETING)
def test_one_example_meets_nobody(loss):
    assert not measured(MEETING[loss], 1).meta["mixes_examples"]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["mixtral-eager", "qwen3-moe-grouped_mm", "olmoe-batched_mm"])
def test_a_routers_balancing_loss_is_named_and_what_depends_on_it_refused(name, masked):
    case = ZOO[name]
    model, batch = case.make(), case.batch(3, 1)
    model.router_aux_loss_coef = 0.001
    if not masked:  # the model counts in another way then
        batch.pop("attention_mask")

    def stats(**options):
        with fg.Probe(model) as probe:
            model(**batch, **options).loss.backward()
        return probe.stats()

    assert not stats().meta["mixes_examples"]
    found = stats(output_router_logits=True)
    (how,) = found.meta["mixes_examples"]
    assert "router's balancing loss" in how
    for ask in (lambda: found.influence("example_sum"), lambda: found.noise_scale):
        with pytest.raises(StatsError, match=r"router.*output_router_logits=False"):
            ask()
    noise = fg.Blueprint.from_stats(found, model=model).noise
    assert noise.noise_scale is None
    assert "router" in noise.noise_scale_reason
    # what is given still is the batch's gradient, example by example
    assert {c.status for c in found.coverage.values()} == {"exact"}


@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
def test_frozen_experts_are_picked_and_not_counted(how):
    case = ZOO[f"qwen3-moe-{how}"]
    model = case.make()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("self_attn" in name)
    with fg.Probe(model, strict=True) as probe:
        model(**case.batch(3, 1)).loss.backward()
    assert not probe.stats().meta["mixes_examples"]
