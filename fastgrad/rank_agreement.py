"""How well two scorings of the same submodules agree."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr, weightedtau

Array = NDArray[np.float64]

#: The part of the submodules whose membership a selection lives by: the usual budget.
TOP = 0.2

#: Below this reliability of the whole local sample even a perfect blueprint could correlate with
#: it by no more than √0.7 = 0.84, which cannot be told from moderate drift. So for a release.
MIN_RELIABILITY = 0.7

#: Rank correlations over fewer submodules are dominated by single ones.
MIN_SUBMODULES = 5


class Agreement(NamedTuple):
    """How well two scorings of the same submodules agree."""

    spearman: float
    weighted_tau: float
    top_jaccard: float


def agreement(a: Array, b: Array) -> Agreement | None:
    """Agreement of two score vectors; None where ranks mean nothing."""
    if a.size < MIN_SUBMODULES or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    top = max(1, round(TOP * a.size))
    best_a, best_b = (set(np.argsort(-x, kind="stable")[:top].tolist()) for x in (a, b))
    return Agreement(
        float(spearmanr(a, b).statistic),
        float(weightedtau(a, b).statistic),
        len(best_a & best_b) / len(best_a | best_b),
    )
