"""A short search on a part of the matrix, to choose what a full search is not worth."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from diba_np.matrix import budgets, quality
from diba_np.matrix.budgets import DENSE_BITS, GRID_BITS
from diba_np.matrix.diagonals import HALF, LEAST_CODE, MOST_CODE, ScaleBits, Widths, fit_grid
from diba_np.search.exact_steps import (
    d2_equations,
    normal_equations,
    squared_error,
    update_d2,
    update_row_scales,
)
from diba_np.search.grids import round_diagonal
from diba_np.search.progress import Run
from diba_np.search.rank_one import rank_one
from diba_np.search.representatives import representatives
from diba_np.search.stages import relax_staged
from diba_np.search.state import Side, State, normalise
from diba_np.search.target import Target

Floats = NDArray[np.float64]

# of d1, d2 and d3; best or nearly so on trained weights from 1 to 2 bits
USUAL_WIDTHS: Widths = (4, 3, 4)

_SIDE = 384  # rows and columns of the part
# mean square of a part over that of the matrix, above which the part may stand for it
_LEAST_SHARE = 0.25
# not where one component reaches as many dB of it, and so many more than of the matrix
_SINGLE_DB, _SINGLE_MORE_DB = 20.0, 10.0
_ITERATIONS = 30
SLOPE = 4.5  # dB that a bit per weight buys
_PILOTS = 2
_EXACT = 1e-12  # share of the energy left over under which a fit is exact
_HEADROOM = 0.7  # a full search leaves about this share of the pilot's error
_HEADROOM_SNR = 0.95  # likewise, on average over weights


def part_of(target: Target) -> Target | None:
    """Return a part of the matrix that stands for it, at most `_SIDE` square, weighed as it is.

    The middle, as good a part of most matrices as any. Where that has far less than its share of
    the energy, or is nearly one component and the matrix is not, the rows and columns of most
    energy and some of the others; None where these tell nothing either.
    """
    rows, columns = (np.arange(s)[max(0, (s - _SIDE) // 2) :][:_SIDE] for s in target.shape)
    middle = target.part(rows, columns)
    if middle.shape == target.shape:
        return middle
    of_rows, of_columns = (
        np.broadcast_to(target.entry_weights(axis), size) for axis, size in enumerate(target.shape)
    )
    energies = np.zeros(target.shape[0]), np.zeros(target.shape[1])
    for at, block in target.blocks(np.float64):
        squares = block * block
        energies[0][at] = of_rows[at] * (squares @ of_columns)
        energies[1][:] += (of_rows[at] @ squares) * of_columns
    own = float(of_rows[rows] @ np.square(middle.A / target.unit) @ of_columns[columns])
    share = float(energies[0].sum()) * middle.A.size / target.A.size
    if own > _LEAST_SHARE * share and _tells(middle, target):
        return middle
    (rows, left), (columns, right) = (representatives(energy, _SIDE) for energy in energies)
    part = target.part(rows, columns, np.outer(left, right))
    return part if _tells(part, target) else None


def _tells(part: Target, target: Target) -> bool:
    """Whether a part is neither zero nor nearly all one component, where the matrix is not."""

    def single(one: Target) -> float:
        error = squared_error(one, rank_one(one, 0.0))
        return quality.decibels(one.energy, max(error, _EXACT * one.energy))

    if part.energy == 0:
        return False
    reached = single(part)
    return reached < _SINGLE_DB or reached < single(target) + _SINGLE_MORE_DB


def _pilot(target: Target, rate: float, shift: float, seed: int) -> State:
    m, n = target.shape
    k = max(1, round(rate * m * n / (m + n)))
    state = relax_staged(
        target, k, shift=shift, seed=seed, iterations=_ITERATIONS, uneven=0, run=Run()
    ).state
    for side in state.sides:
        update_row_scales(target, side)
    update_d2(target, state)
    normalise(state)
    return state


def estimate_k(target: Target, goal: float, shift: float, seed: int) -> tuple[int, float]:
    """Return about the k that reaches `goal` dB, and the dB that one more component brings.

    Two pilots at rates near the goal, and a straight line through them.
    """
    m, n = target.shape
    slope = SLOPE  # dB a bit a weight, of which a component takes (m + n) / (m n)
    if target.energy == 0:
        return 1, slope * (m + n) / (m * n)
    usual = budgets.usual_k(goal, target.shape)
    part = part_of(target)
    if part is None:
        return usual, slope * (m + n) / (m * n)
    at = usual * (m + n) / (m * n)
    points: list[tuple[float, float]] = []
    for _ in range(_PILOTS):
        state = _pilot(part, at, shift, seed)
        error = max(_HEADROOM_SNR * squared_error(part, state), _EXACT * part.energy)
        points.append((at, quality.decibels(part.energy, error)))
        if len(points) > 1 and points[-1][0] != points[-2][0]:
            rise = (points[-1][1] - points[-2][1]) / (points[-1][0] - points[-2][0])
            slope = min(max(rise, 0.5), 20.0)
        at = min(max(at + (goal - points[-1][1]) / slope, at / 4), 4 * at, DENSE_BITS)
    return max(1, round(at * m * n / (m + n))), slope * (m + n) / (m * n)


def choose_widths(target: Target, k: int, shift: float, seed: int) -> ScaleBits:
    """Choose the code widths of the diagonals, or 16 bits where no code is fine enough.

    The error that rounding each diagonal adds is read off a pilot at the same rate, and weighed
    against what the bits would buy in more components.

    Parameters
    ----------
    target : Target
    k : int
        About what the full search will have.
    shift : float
    seed : int
    """
    m, n = target.shape
    if target.energy == 0:
        return (LEAST_CODE,) * 3
    part = part_of(target)
    if part is None:
        return USUAL_WIDTHS
    simple = rank_one(part, shift)  # what a full search falls back on, exact where the rank is one
    state = min(
        (simple, _pilot(part, k * (m + n) / (m * n), shift, seed)),
        key=lambda one: max(squared_error(part, one), _EXACT * part.energy),
    )
    floor = max(_HEADROOM * squared_error(part, state), _EXACT * part.energy)

    def cost(added: float, bits: int, size: int) -> float:
        """Return dB lost to the added error and to the bits."""
        return 10 * float(np.log10(1 + added / floor)) + SLOPE * bits * size / (m * n)

    def best(losses: dict[int, float], size: int) -> tuple[float, int]:
        return min((cost(loss, bits, size), bits) for bits, loss in losses.items())

    choices = [
        best(row_losses(part, state.left), m),
        best(_d2_losses(part, state), k),
        best(row_losses(part, state.right), n),
    ]
    coded = sum(c for c, _ in choices) + SLOPE * 3 * GRID_BITS / (m * n)
    if coded > SLOPE * HALF * (m + k + n) / (m * n):
        return HALF
    return (choices[0][1], choices[1][1], choices[2][1])


def row_losses(target: Target, side: Side) -> dict[int, float]:
    """Return the squared error that rounding d1 or d3 adds, by code width."""
    scales, values = side.scales, side.values()
    gram, _ = normal_equations(target, side)
    weights = np.maximum(np.einsum("ik,ik->i", values, values @ gram), 0.0)
    weights = weights * target.entry_weights(side.axis)
    losses = {}
    for width in range(LEAST_CODE, MOST_CODE + 1):
        grid = fit_grid(scales, weights, width)
        losses[width] = float(weights @ (grid.round(scales) - scales) ** 2)
    return losses


def _d2_losses(target: Target, state: State) -> dict[int, float]:
    """Return the squared error that rounding d2 adds, by code width."""
    H, r = d2_equations(target, state)
    exact = float(state.d2 @ (H @ state.d2) - 2 * (r @ state.d2))
    losses = {}
    for width in range(LEAST_CODE, MOST_CODE + 1):
        grid = fit_grid(state.d2, np.diag(H), width)
        d2 = round_diagonal(H, r, state.d2, grid.values)
        losses[width] = max(float(d2 @ (H @ d2) - 2 * (r @ d2)) - exact, 0.0)
    return losses
