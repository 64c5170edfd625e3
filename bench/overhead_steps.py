"""The contenders of the step-overhead benchmark, each run once and compared with the definition.

A step is zero_grad, forward and backward; the optimizer, which is the same for all, is left out,
so that the ratios are the strict ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

import fastgrad as fg
from overhead_models import Case
from overhead_peers import for_opacus, opacus_step, torch_func_step

PLAIN, NORMS, MODULE, TILES = "plain step", "gradient norms", "T, per parameter", "T, 128x128 tiles"
OPACUS, FUNC = "Opacus ghost norms", "torch.func"
PEERS = (OPACUS, FUNC)
TOLERANCE = 1e-4  # relative; float32 rounding of two whole backward passes is in it
Step = Callable[[], object]


class Contenders(NamedTuple):
    """Steps by name, the plain one first; why a peer is missing; the largest error of T."""

    steps: dict[str, Step]
    absent: dict[str, str]
    error: float


class ProbedStep:
    """A step inside ``with probe:``, as a training loop has it."""

    def __init__(self, case: Case, blocks: str, per_example: bool) -> None:
        self.case = case
        self.probe = fg.Probe(
            case.model, blocks, per_example=per_example, strict=True, hash_weights=False
        )

    def __call__(self) -> None:
        self.case.model.zero_grad()
        with self.probe:
            self.case.loss().backward()


def contenders(case: Case) -> Contenders:
    """All steps at one shape; ends the program if one of ours gives a wrong figure."""

    def plain() -> None:
        case.model.zero_grad()
        case.loss().backward()

    expected = example_norms(case)
    plain()
    batch = grad_norms(case)[:, None]
    own = {
        NORMS: ProbedStep(case, "module", False),
        MODULE: ProbedStep(case, "module", True),
        TILES: ProbedStep(case, "128x128", True),
    }
    errors = {}
    names = [name for name, _ in case.model.named_parameters()]
    for name, step in own.items():
        step()
        stats = step.probe.stats()
        found = stats.influence("example_mean") if name != NORMS else stats.grad_norm[:, None]
        found = found[[stats.names.index(n) for n in names]]
        errors[name] = relative_error(found, batch if name == NORMS else expected)
        if not errors[name] <= TOLERANCE:  # also if it is not a number
            raise SystemExit(f"{name}: off by {errors[name]:.1e}: no timing on wrong numbers")
    peers = peer_steps(case, np.linalg.norm(expected, axis=0))
    steps: dict[str, Step] = {PLAIN: plain, **own}
    steps |= {name: step for name, step in peers.items() if not isinstance(step, str)}
    absent = {name: step for name, step in peers.items() if isinstance(step, str)}
    return Contenders(steps, absent, max(errors[MODULE], errors[TILES]))


def example_norms(case: Case) -> np.ndarray:
    """T by definition: one example at a time, ``[n_parameters, n_examples]``."""
    columns = []
    for j in range(case.examples):
        case.model.zero_grad()
        case.only(slice(j, j + 1)).loss().backward()
        columns.append(grad_norms(case))
    return np.stack(columns, 1)


def grad_norms(case: Case) -> np.ndarray:
    """Norm of each parameter's gradient; 0 for one that is not used."""
    grads = (p.grad for p in case.model.parameters())
    return np.array([0.0 if g is None else float(g.double().norm()) for g in grads])


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest relative error. Norms below a thousandth of the example's largest are judged
    against that thousandth: both sides hold rounding of the whole backward pass."""
    return float((abs(found - expected) / np.maximum(expected, 1e-3 * expected.max(0))).max())


def peer_steps(case: Case, norms: np.ndarray) -> dict[str, Step | str]:
    """Each peer's step on a model of its own, or why there is none. Opacus refuses tied weights:
    it gets the untied model, which has one gradient more to keep."""
    untied = case.again(tied=False)
    own_norms = np.linalg.norm(example_norms(untied), axis=0) if case.tied else norms
    untied.model.zero_grad()
    batch = for_opacus(untied.model, case.inputs)
    return {
        OPACUS: opacus_step(untied.model, batch, own_norms),
        FUNC: torch_func_step(case.again(case.tied).model, case.inputs, norms),
    }


__all__ = ["FUNC", "MODULE", "NORMS", "OPACUS", "PEERS", "PLAIN", "TILES", "Step", "contenders"]
