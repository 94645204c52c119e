"""How the bits of a network are shared among its matrices."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from diba_np.errors import BudgetError

# what a matrix gets at least, as a share of the mean, since the rule of shares does not hold where
# only few directions are coded, and at most, in bits
LEAST, MOST = 0.25, 4.0


def shares(
    energies: Mapping[str, float],
    sizes: Mapping[str, int],
    bits: float,
    smallest: Mapping[str, int],
) -> dict[str, float]:
    """Return bits a weight of every matrix, whose mean over all weights is the budget.

    An ideal code's error falls by a factor of four with each bit; the sum of errors is least where
    all matrices end at one error a weight, so that a matrix of four times the energy a weight gets
    a bit more.

    Parameters
    ----------
    energies : mapping of str to float
        As of `diba_np.networks.importance.Importance`.
    sizes : mapping of str to int
        Weights of each.
    bits : float
        Stored bits a weight of all together.
    smallest : mapping of str to int
        Stored bits that each takes at least.

    Returns
    -------
    dict of str to float

    Raises
    ------
    BudgetError
        The budget does not hold the smallest forms of all.
    """
    check_budget(sizes, bits, smallest)
    weights = np.array([sizes[name] for name in energies])
    level = 0.5 * np.log2(np.maximum(list(energies.values()), 1e-300) / weights)
    needed = np.array([smallest[name] for name in energies])
    least = np.maximum(needed / weights, LEAST * bits)
    most = np.maximum(least, max(MOST, bits))
    low, high = least.min() - level.max(), most.max() - level.min()
    for _ in range(60):
        middle = (low + high) / 2
        spent = np.clip(level + middle, least, most) @ weights
        low, high = (low, middle) if spent > bits * weights.sum() else (middle, high)
    rates = np.clip(level + low, least, most)
    return dict(zip(energies, map(float, rates), strict=True))


def check_budget(
    sizes: Mapping[str, int], bits: float, smallest: Mapping[str, int], method: str = "diba"
) -> None:
    """Refuse a budget that does not hold the smallest forms of all matrices.

    Parameters
    ----------
    sizes, bits, smallest
        As of `shares`.
    method : str
        Whose forms these are.

    Raises
    ------
    BudgetError
    """
    needed, weights = sum(smallest.values()), sum(sizes[name] for name in smallest)
    if needed > bits * weights:
        what = "every matrix" if len(smallest) > 1 else repr(*smallest)
        least = f"{needed / weights:.4g} bits a weight"
        if method == "diba":
            raise BudgetError(f"bits is too small: k=1 of {what} takes {least}, got {bits:g}")
        raise BudgetError(
            f"bits is too small: {what} takes at least {least} by the method {method}, got {bits:g}"
        )
