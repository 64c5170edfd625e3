"""The check behind the coverage matrix sees what it is there to see."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgrad as fg
from fastgrad.errors import ProbeError
from tests import coverage_matrix
from tests.exactness import Outcome, check
from tests.models import randomised
from tests.scenarios import SCENARIOS
from tests.zoo import ZOO, Case


class Small(nn.Module):
    """A classifier that speaks transformers' language; ``peculiar`` is done to its activations."""

    config = SimpleNamespace(use_cache=False)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(6))
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 5)

    def peculiar(self, x: Tensor) -> Tensor:
        return x

    def forward(self, pixel_values: Tensor, labels: Tensor) -> SimpleNamespace:
        x = self.peculiar(self.body(pixel_values))
        return SimpleNamespace(loss=F.cross_entropy(self.head(x), labels))


class Mixing(Small):
    def peculiar(self, x: Tensor) -> Tensor:
        return x - x.mean(0) / 2


class Exotic(Small):
    """No tap can know whose rows these are: an autograd function that PyTorch does not announce."""

    def peculiar(self, x: Tensor) -> Tensor:
        return Solve.apply(self.weight, x)


class Solve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(weight, x)
        return x @ weight

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        weight, x = ctx.saved_tensors
        return x.T @ grad, grad @ weight.T


class Broken(Small):
    def forward(self, pixel_values: Tensor, labels: Tensor) -> SimpleNamespace:
        if torch.overrides._get_current_function_mode_stack():
            raise IndexError("only under a probe")
        return super().forward(pixel_values, labels)


def case(make: type[Small]) -> Case:
    def batch(n: int, seed: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(seed)
        return {
            "pixel_values": torch.randn(n, 6, generator=g),
            "labels": torch.randint(0, 5, (n,), generator=g),
        }

    return Case(make.__name__, "image", lambda: randomised(make), batch, shift=False)


@pytest.mark.parametrize(
    ("make", "status", "why"),
    [
        (Small, "exact", ""),
        (Mixing, "mixes", "not the sum"),
        (Exotic, "missing", ""),
        (Broken, "fails", "only under a probe"),
    ],
)
def test_each_status(make, status, why):
    outcome = check(case(make), "plain")
    assert outcome.status == status, outcome
    assert why in outcome.detail
    assert set(outcome.missing) == ({"weight"} if make is Exotic else set())


def test_a_scenario_that_makes_no_sense():
    assert check(case(Small), "left padding").status == "–"


def test_a_refusal(monkeypatch):
    def refuse(*args, **kwargs):
        raise ProbeError("not today")

    monkeypatch.setattr(fg, "Probe", refuse)
    assert check(case(Small), "plain") == Outcome("refused", "not today")


@pytest.mark.parametrize("what", ["sq", "mean_factor", "label_tokens", "batch_sq", "block_sq"])
@pytest.mark.parametrize("scenario", ["row blocks", "bfloat16"])
def test_an_error_of_a_few_percent_is_seen(monkeypatch, scenario, what):
    """In bfloat16 too, where rounding errors are allowed for: they are not that large here."""
    honest = fg.Probe.stats

    def dishonest(self):
        stats = honest(self)
        if what == "block_sq":
            for values in stats.block_sq.values():
                values[0] *= 1.1
        elif what == "label_tokens":
            stats.label_tokens[0] += 1
        else:
            getattr(stats, what)[..., :2] *= 1.1
        return stats

    monkeypatch.setattr(fg.Probe, "stats", dishonest)
    expected = "exact" if what == "block_sq" and scenario == "bfloat16" else "wrong"
    assert check(ZOO["llama"], scenario).status == expected  # only row blocks has block_sq


def test_the_page_is_read_as_it_was_written(monkeypatch, tmp_path):
    row = {s: Outcome("exact", error=3e-7) for s in SCENARIOS}
    row["plain"] = Outcome("missing", missing={"a.weight": "no | tap", "b": "no | tap"})
    row["eval"] = Outcome("–")
    page = tmp_path / "coverage.md"
    monkeypatch.setattr(coverage_matrix, "PAGE", page)
    monkeypatch.setattr(coverage_matrix, "measured", lambda models: {"llama": row})
    assert coverage_matrix.main(["--write"]) == 0
    assert coverage_matrix.documented() == {"llama": {s: o.status for s, o in row.items()}}
    assert "- plain: missing `a.weight`, `b`: no | tap" in page.read_text()
    assert coverage_matrix.main(["--check"]) == 0
    row["plain"] = Outcome("exact")
    assert coverage_matrix.main(["--check"]) == 1
