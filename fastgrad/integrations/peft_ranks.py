"""Sharing out ranks: where the gradient is, adapters are larger, within one parameter budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastgrad.errors import SelectionError

Ints = NDArray[np.int64]


def share_ranks(
    mass: Sequence[float],
    cost: Sequence[int],
    budget: int,
    lowest: int,
    highest: Sequence[int],
) -> Ints:
    """Ranks such that each adapter's parameters are in proportion to its gradient mass.

    With ``c_i`` parameters for each rank, ``r_i = clip(λ m_i / c_i, lowest, highest_i)``, λ such
    that ``Σ c_i r_i`` is the budget; then whole numbers: all rounded down, and what is left goes
    to those that lost most by it, as far as it reaches. Equal masses give equal sizes.

    Args:
        mass: gradient mass of each target, finite and not negative.
        cost: parameters of an adapter of rank one.
        budget: parameters of all adapters together; never exceeded.
        lowest, highest: bounds of the ranks; a ``highest_i`` below ``lowest`` counts for both.

    Returns:
        ``[n]`` int64 ranks.

    Raises:
        SelectionError: if the budget is too small for the lowest ranks.
    """
    m, c = np.asarray(mass, dtype=np.float64), np.asarray(cost, dtype=np.int64)
    high = np.asarray(highest, dtype=np.int64)
    low = np.minimum(lowest, high)
    if int(c @ low) > budget:
        raise SelectionError(f"rank {lowest} for each of {c.size} targets takes {int(c @ low):,} "
                             f"parameters, more than the budget of {budget:,}. Remedy: fewer "
                             "targets or a larger budget")
    if int(c @ high) <= budget:
        return high
    density = m / c
    if not density.any():
        density = 1.0 / c  # nothing is known to be larger

    def ranks(scale: float) -> NDArray[np.float64]:
        return np.clip(scale * density, low, high)

    below, above = 0.0, 1.0 / density[density > 0].max()
    while c @ ranks(above) < budget and (ranks(above) < high)[density > 0].any():
        above *= 2.0
    for _ in range(200):
        middle = (below + above) / 2
        if c @ ranks(middle) <= budget:
            below = middle
        else:
            above = middle
    wanted = ranks(below)
    found = np.floor(wanted + 1e-9).astype(np.int64)
    left = budget - int(c @ found)
    order = np.argsort(-(wanted - found), kind="stable")
    while (fits := (found < high) & (c <= left)).any():
        for i in order[fits[order]]:
            if c[i] <= left:
                found[i] += 1
                left -= int(c[i])
    return found


__all__ = ["share_ranks"]
