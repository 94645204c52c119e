"""Trellises and their rates: bits and weights a step, tables of values; which column gets which."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diba_np.matrix.base import Array
from diba_np.matrix.budgets import lower_hull
from diba_np.methods.seeded import normals
from diba_np.methods.streams import packed_bytes
from diba_np.methods.taps import TAPS

WIDTH = 12  # bits of a state of the trellis with look-ups


@dataclass(frozen=True)
class Mode:
    """One trellis: a path of `bits` bits a step, each step worth `weights` weights.

    Attributes
    ----------
    bits, weights : int
    width : int
        Bits of a state: what a value depends on.
    linear : bool
        Whether the value is a sum of a tap for each bit of the state, else a look-up.
    decibels : float
        Signal-to-noise ratio on normal numbers. A look-up table is scaled by it, so it is part of
        the file format as the taps are, and must not change.
    """

    bits: int
    weights: int
    width: int
    linear: bool
    decibels: float

    @property
    def number(self) -> int:
        """What stands for the mode in files."""
        return 16 * self.bits + self.weights

    @property
    def distortion(self) -> float:
        """Mean squared error on numbers of variance 1."""
        return float(10.0 ** (-self.decibels / 10.0))

    def steps(self, size: int) -> int:
        """Return the steps of a column of `size` weights."""
        return -(-size // self.weights)

    def column_bits(self, size: int) -> int:
        """Return the bits of a column of `size` weights."""
        return self.bits * self.steps(size)

    @functools.cached_property
    def taps(self) -> Array:
        """(V, width) float64 of a linear mode, newest bit first."""
        return np.array(TAPS[self.bits, self.weights, self.width // self.bits])

    @functools.cached_property
    def table(self) -> Array:
        """(V, 2^width) float32: the values of each state."""
        if not self.linear:
            values = normals(1000 * self.bits + self.weights, self.weights << self.width)
            # an optimal code is less spread than what it stands for, by its error
            values *= np.sqrt((1.0 - self.distortion) / np.mean(values**2))
            return values.reshape(self.weights, -1).astype(np.float32)
        states = np.arange(1 << self.width)
        values = np.zeros((self.weights, states.size))
        for i in range(self.width):
            values += self.taps[:, i : i + 1] * (2.0 * ((states >> i) & 1) - 1.0)
        return values.astype(np.float32)


# decibels: python scripts/fit_taps.py --judge
LOOKUP_MODES = tuple(
    Mode(bits, weights, WIDTH, False, decibels)
    for bits, weights, decibels in (
        (1, 2, 2.77),
        (1, 1, 5.62),
        (3, 2, 8.44),
        (2, 1, 11.33),
        (5, 2, 14.0),
        (3, 1, 17.06),
        (7, 2, 19.21),
        (4, 1, 22.68),
    )
)
LINEAR_MODES = tuple(
    Mode(bits, weights, bits * length, True, decibels)
    for bits, weights, length, decibels in (
        (1, 1, 12, 4.38),
        (4, 3, 3, 6.66),
        (3, 2, 4, 7.80),
        (2, 1, 6, 10.99),
        (5, 2, 3, 14.22),
        (3, 1, 4, 17.12),
        (7, 2, 2, 19.81),
        (4, 1, 3, 22.84),
    )
)


def allocate(
    modes: Sequence[Mode], size: int, importance: Array, budget: int
) -> tuple[Array, list[int]] | None:
    """Give each column a mode, or none at all, so that the sum of weighted errors is least.

    Parameters
    ----------
    modes : sequence of Mode
        With descending distortion.
    size : int
        Weights of a column.
    importance : (n,) float64, at least 0
        What an error as large as the column itself costs.
    budget : int
        Bits of all columns and of what tells their modes.

    Returns
    -------
    chosen : (n,) uint8
        Position in `used`.
    used : list of int
        Ascending: 0 for no mode (the column is zero), else 1 + the position in `modes`.
        None instead of both if nothing fits.

    Notes
    -----
    Reverse water-filling: bits go where they lower the error most. For every range of modes that
    columns may have; what tells them apart costs 1 bit a column and more.
    """
    n = importance.size
    rates = np.array([0] + [mode.column_bits(size) for mode in modes])
    errors = np.array([1.0] + [mode.distortion for mode in modes])
    best: tuple[float, Array, list[int]] | None = None
    for low in range(len(rates)):
        for high in range(low, len(rates)):
            # of short columns, whose last step is filled up, some modes are not on it
            hull = low + np.array(lower_hull(rates[low : high + 1], errors[low : high + 1]))
            left = budget - index_bits(n, high - low + 1) - n * int(rates[hull[0]])
            if left < 0 or high == 0:
                continue
            place, steps = np.zeros(n, np.int64), len(hull) - 1
            if steps:
                rises = np.diff(rates[hull])
                slopes = np.maximum(importance, 0.0)[:, None] * (-np.diff(errors[hull]) / rises)
                prices = np.broadcast_to(rises, slopes.shape).ravel()
                # stable, and on a convex curve the steps of a column stay in their order
                order = np.argsort(-slopes.ravel(), kind="stable")
                whole = int(np.searchsorted(np.cumsum(prices[order]), left, side="right"))
                np.add.at(place, order[:whole] // steps, 1)
                left -= int(prices[order[:whole]].sum())
                for at in order[whole : whole + 256]:  # what is left is worth a few steps
                    column, step = divmod(int(at), steps)
                    if place[column] == step and prices[at] <= left:
                        place[column] += 1
                        left -= int(prices[at])
            level = hull[place]
            loss = float(np.sum(importance * errors[level]))
            if level.max() > 0 and (best is None or loss < best[0] * (1 - 1e-12)):
                used = np.unique(level)
                # fewer than the range allows: cheaper to tell, never dearer
                best = (loss, np.searchsorted(used, level).astype(np.uint8), used.tolist())
    return None if best is None else best[1:]


def index_bits(n: int, used: int) -> int:
    """Return the bits that tell which of the used modes each of n columns has.

    With them the number of each mode, and what its codes take more in whole bytes.
    """
    return 8 * (packed_bytes(n, used) + 2 * used)


def least_bits(modes: Sequence[Mode], shape: tuple[int, int]) -> int:
    """Return the fewest bits that `allocate` can do with."""
    m, n = shape
    lowest = modes[0].column_bits(m)
    return min(index_bits(n, 2) + lowest, index_bits(n, 1) + n * lowest)
