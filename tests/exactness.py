"""Is T exact for this model in this scenario? The tests and the coverage matrix ask here."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

import fastgrad as fg
from fastgrad.errors import FastgradError
from fastgrad_kernels.layout import block_sums, matrix_view
from tests.scenarios import SCENARIOS, Inputs, Setting
from tests.zoo import Case

Gradient = dict[str, Tensor]
Status = Literal["exact", "contribution", "missing", "refused", "wrong", "fails", "mixes", "–"]


@dataclass
class Outcome:
    """What came out.

    ``exact``: every parameter is measured, and all numbers agree with one example at a time.
    ``contribution``: so is each contribution, and the probe names where examples meet, and refuses
    what an example's loss alone would give. ``missing``: the probe names parameters that it cannot
    measure (``missing``: name to reason); all others agree. ``refused``: it raised an error of its
    own. ``wrong``: it calls something exact that is not. ``fails``: it broke with some other error.
    ``mixes``: the model itself lets examples of such a batch see each other. ``–``: makes no sense
    for this model, or the model itself cannot do it (``detail``).
    """

    status: Status
    detail: str = ""
    error: float = 0.0  # worst relative error of what the probe calls exact
    missing: dict[str, str] = field(default_factory=dict)


@dataclass
class Reference:
    """One example at a time, and the batch without a probe."""

    counts: list[int]  # label tokens
    shares: list[float]  # of each example's mean loss in the loss of its batch
    alone: list[Gradient]  # each example's contribution
    batch: Gradient
    rounding: dict[str, float]  # per parameter: error of any one contribution


def check(case: Case, scenario: str) -> Outcome:
    setting = SCENARIOS[scenario].prepare(case)
    if setting is None:
        return Outcome("–")
    try:
        reference = _reference(case, setting)
    except Exception as error:
        return Outcome("–", f"without a probe: {type(error).__name__}: {_first_line(error)}")
    if setting.unrounded is None and setting.lacks is None and _mixes(reference):
        return Outcome("mixes", "the batch's gradient is not the sum of its examples' gradients")
    try:
        with fg.Probe(
            setting.model, setting.blocks, loss_reduction=case.reduction, loss_scale=setting.scale
        ) as probe:
            probed = _backward(setting)
        stats = probe.stats()
    except FastgradError as error:
        return Outcome("refused", _first_line(error))
    except Exception as error:
        return Outcome("fails", f"{type(error).__name__}: {_first_line(error)}")
    outcome = Outcome("exact")
    for name, c in stats.coverage.items():
        if c.status == "missing":
            outcome.status, outcome.missing[name] = "missing", c.reason
    if setting.lacks is not None:
        outcome.status = "contribution" if outcome.status == "exact" else outcome.status
        if not _refused_by_name(stats):
            outcome.status, outcome.detail = "wrong", "it does not say that examples meet"
            return outcome
    found = _compare(setting, stats, reference, probed, outcome)
    if found:
        outcome.status, outcome.detail = "wrong", found
    return outcome


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


# -- the reference ---------------------------------------------------------------------------


def _reference(case: Case, setting: Setting) -> Reference:
    counts = [_label_tokens(case, examples) for examples in setting.alone]
    shares = [_shares(case, c) for c in counts]
    alone = list(_contributions(setting, shares))
    rounding = dict.fromkeys(alone[0], 0.0)
    if setting.unrounded is not None:
        for rounded, exact in zip(alone, _contributions(setting.unrounded, shares), strict=True):
            for name, value in rounded.items():
                distance = float((value - exact[name]).norm())
                rounding[name] = max(rounding[name], distance)
    chain = itertools.chain.from_iterable
    return Reference(
        list(chain(counts)), list(chain(shares)), alone, _backward(setting), rounding
    )


def _label_tokens(case: Case, examples: list[Inputs]) -> list[int]:
    return [
        int(((e["labels"][:, 1:] if case.shift else e["labels"]) != -100).sum()) for e in examples
    ]


def _shares(case: Case, counts: list[int]) -> list[float]:
    if case.reduction == "row_mean":
        return [1 / len(counts)] * len(counts)
    return [c / sum(counts) for c in counts]


def _contributions(setting: Setting, shares: list[list[float]]) -> Iterator[Gradient]:
    """The definition: each example alone, dense gradients of its share of the batch's loss.

    The share multiplies the loss and not the gradient, so that bfloat16 rounds the same values
    as in the batch.
    """
    for examples, weights in zip(setting.alone, shares, strict=True):
        for inputs, share in zip(examples, weights, strict=True):
            setting.model.zero_grad()
            if share:  # the mean loss of no label at all is not a number
                with setting.context():
                    out = setting.model(**inputs)
                    lost = 0.0 if setting.lacks is None else setting.lacks(out, share)
                ((out.loss * share + lost) * setting.scale).backward()
            yield _gradient(setting.model)


def _backward(setting: Setting) -> Gradient:
    setting.model.zero_grad()
    if setting.accumulated:
        for batch in setting.passes:
            (_loss(setting, batch) * setting.scale).backward()
    else:
        losses = torch.stack([_loss(setting, batch) for batch in setting.passes])
        (losses.sum() * setting.scale).backward()
    return _gradient(setting.model)


def _loss(setting: Setting, batch: Inputs) -> Tensor:
    with setting.context():
        return setting.model(**batch).loss


def _gradient(model: nn.Module) -> Gradient:
    return {
        n: (torch.zeros_like(p) if p.grad is None else p.grad).double()
        for n, p in model.named_parameters()
        if p.requires_grad
    }


def _refused_by_name(stats: fg.GradientStats) -> bool:
    try:
        stats.influence("example_mean")
    except FastgradError as error:
        return all(name in str(error) for name in stats.meta["mixes_examples"])
    return False


def _mixes(reference: Reference) -> bool:
    """Whether the batch is anything else than its examples side by side."""
    total = {n: sum(a[n] for a in reference.alone) for n in reference.batch}
    off = sum(float((g - total[n]).square().sum()) for n, g in reference.batch.items())
    size = sum(float(g.square().sum()) for g in reference.batch.values())
    return off > 1e-6 * size


# -- the comparison --------------------------------------------------------------------------


def _compare(
    setting: Setting, stats: fg.GradientStats, reference: Reference, probed: Gradient,
    outcome: Outcome,
) -> str:  # fmt: skip
    """The first thing that the probe calls exact and that is not; "" if there is none."""
    batch, alone, shares = reference.batch, reference.alone, np.array(reference.shares)
    if set(stats.names) != set(batch):
        return f"other names: {sorted(set(stats.names) ^ set(batch))}"
    if stats.label_tokens.tolist() != reference.counts:
        return f"label tokens {stats.label_tokens.tolist()} instead of {reference.counts}"
    inverse = np.divide(1, shares, out=np.zeros_like(shares), where=shares > 0)
    norms = {n: np.array([float(a[n].norm()) for a in alone]) for n in stats.names}
    largest = max(n.max() for n in norms.values())
    for p, name in enumerate(stats.names):
        if name in outcome.missing:
            if not np.isnan(stats.T[p]).all():
                return f"{name} is missing, yet has a T"
            continue
        # Relative to the largest example: where a norm is zero in theory (a key's bias under
        # softmax) both sides hold rounding noise.
        scale = max(norms[name].max(), 1e-3 * largest)
        # Each side of a comparison has a rounding error of its own.
        allowed = setting.tolerance * scale + 2 * reference.rounding[name]
        many = len(alone) * allowed
        blocks = np.stack([_block_norms(stats, name, a[name]) for a in alone], 1)
        change = probed[name] - batch[name]
        comparisons: list[tuple[str, object, object, float]] = [
            ("T", stats.T[p], norms[name], allowed),
            ("the block norm", stats.blocks(name), blocks, allowed),
            ("autograd's gradient", float(change.norm()), 0.0, many),
        ]
        if not setting.accumulated:  # of each pass then, not of their sum
            norm = float(batch[name].norm())
            comparisons.append(("the gradient norm", stats.grad_norm[p], norm, many))
        mean = None if setting.lacks is not None else stats.influence("example_mean")[p]
        if mean is not None:
            own = mean * shares * setting.scale
            comparisons.append(("T of the mean loss", own, norms[name] * (shares > 0), allowed))
        for what, got, want, most in comparisons:
            error = float(np.abs(np.subtract(got, want)).max())
            outcome.error = max(outcome.error, error / scale)
            if not error <= most:
                return f"{what} of {name} is off by {error / scale:.1e}"
        if mean is not None and not np.allclose(
            mean * setting.scale, stats.T[p] * inverse, rtol=1e-6
        ):
            return f"T of the mean loss of {name} has another scale"
    return ""


def _block_norms(stats: fg.GradientStats, name: str, gradient: Tensor) -> np.ndarray:
    grid = stats.grid(name)
    sums = block_sums(matrix_view(gradient).square(), grid.block_rows, grid.block_cols)
    return sums.sqrt().numpy()
