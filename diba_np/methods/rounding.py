"""Yardsticks that code every entry by itself: signs, uniform grids, normal-float codes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from diba_np.checks import check_count
from diba_np.matrix.base import Array
from diba_np.methods.fitting import Problem, check_problem, to_half, too_small
from diba_np.methods.scalar import (
    GROUPS,
    MOST_LEVELS,
    ScalarQuantized,
    fit_scales,
    group_index,
    group_starts,
    layouts,
    least_bits,
    normal_values,
    round_codes,
    search_layouts,
    strongest_columns,
    uniform_values,
)

if TYPE_CHECKING:
    from typing_extensions import Self


class UniformRounding(ScalarQuantized):
    """Round to nearest on a uniform grid, with a scale a row or a group.

    The grid is symmetric, ``-(L-1)/2 ... (L-1)/2``; L = 3 is the 1.58-bit ternary code.
    L need not be a power of two: codes are packed as base-L digits.
    """

    method = "rtn"

    @classmethod
    def fit(
        cls,
        A: ArrayLike,
        bits: float,
        inputs: ArrayLike | None = None,
        seed: int = 0,
        levels: int | None = None,
        group: int | None = None,
    ) -> Self:
        """Choose grid, group and kept columns of least error within the budget.

        Parameters
        ----------
        A : (m, n) array_like, real
        bits : float
            Budget in bits per weight.
        inputs : (N, n) array_like, optional
            Checked and not used; `GPTQ` is the variant that uses them.
        seed : int
            Not used.
        levels, group : int, optional
            Fix the grid, of 2 to 256 levels, or the group size (0 = row, less than n) instead of
            choosing.

        Raises
        ------
        TypeError, ValueError
            Bad arguments; BudgetError where the bits pay for no column.
        """
        problem = check_problem(A, bits, inputs, seed)
        choice = cls._choose(problem, levels, group)
        matrix = cls._make(problem, *choice)
        matrix.record = problem.record(levels=choice[0], group=choice[1], kept=choice[2])
        return matrix

    @classmethod
    def least_bits(
        cls, shape: tuple[int, int], levels: int | None = None, group: int | None = None
    ) -> int:
        """Return the fewest bits of a fit, of a grid and a group size where they are given."""
        return least_bits(shape, levels or 2, group or 0, cls.stores_table)

    @classmethod
    def _choose(
        cls,
        problem: Problem,
        levels: int | None = None,
        group: int | None = None,
        weight: Array | None = None,
        most: int = 1,
    ) -> Any:
        if levels is not None:
            check_count(levels, "levels", least=2)
            if levels > MOST_LEVELS:
                raise ValueError(f"levels must be at most {MOST_LEVELS}, got {levels}")
        if group is not None:
            check_count(group, "group", least=0)
            if group >= problem.shape[1]:
                raise ValueError(
                    f"group must be below the {problem.shape[1]} columns (0 for the row), "
                    f"got {group}"
                )
        candidates = layouts(
            problem.shape,
            problem.budget,
            GROUPS if group is None else (group,),
            range(2, MOST_LEVELS + 1) if levels is None else (levels,),
            cls.stores_table,
        )
        if not candidates:
            least = cls.least_bits(problem.shape, levels, group)
            raise too_small(cls.method, problem.bits, least, problem.shape)
        ranked = search_layouts(cls, problem, candidates, weight)
        return ranked[0] if most == 1 else ranked[:most]

    @classmethod
    def _make(cls, problem: Problem, levels: int, group: int, n_kept: int) -> Self:
        kept = strongest_columns(problem.W, n_kept)
        W = problem.W[:, kept]
        table = cls.default_table(levels)
        scales = fit_scales(W, table, group)
        codes = round_codes(W, table, group, scales)
        return cls(problem.shape, codes, levels, group, scales, kept, table, problem.scale)


class NormalFloat(UniformRounding):
    """Codes that follow the law of the weights: NF4-style quantiles, then Lloyd-Max.

    The table starts from the quantiles of the normal law and is refitted to the matrix by
    Lloyd's rule; the refitted values are stored (16 bits each) and counted.
    """

    method = "nf"
    stores_table = True

    @staticmethod
    def default_table(levels: int) -> Array:
        """Return the normal-float values of `levels` codes."""
        return normal_values(levels)

    @classmethod
    def _make(
        cls, problem: Problem, levels: int, group: int, n_kept: int, rounds: int = 12
    ) -> Self:
        kept = strongest_columns(problem.W, n_kept)
        W = problem.W[:, kept]
        index = group_index(n_kept, group)
        table = to_half(cls.default_table(levels))
        best: Any = None
        for _ in range(rounds):
            values = table.astype(np.float64)
            scales = fit_scales(W, values, group, candidates=12 if best is None else 0)
            if best is not None:
                scales = _refit(W, values, group, best[2], scales)
            codes = round_codes(W, values, group, scales)
            full = scales.astype(np.float64)[:, index]
            error = float(np.sum((W - values[codes] * full) ** 2))
            if best is not None and error >= best[0] * (1 - 1e-5):
                break
            best = (error, codes, scales, table)
            top = np.bincount(codes.ravel(), (W * full).ravel(), levels)
            bottom = np.bincount(codes.ravel(), (full**2).ravel(), levels)
            table = np.sort(
                to_half(np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1.0), values))
            )
        _, codes, scales, table = best
        return cls(problem.shape, codes, levels, group, scales, kept, table, problem.scale)


def _refit(W: Array, table: Array, group: int, old: Array, new: Array) -> Array:
    """Take, row by row and group by group, whichever of two sets of scales loses less."""
    starts = group_starts(W.shape[1], group)
    index = group_index(W.shape[1], group)
    losses = []
    for scales in (old, new):
        values = table[round_codes(W, table, group, scales)] * scales.astype(np.float64)[:, index]
        losses.append(np.add.reduceat((W - values) ** 2, starts, axis=1))
    # one least-squares step from the old scales
    values = table[round_codes(W, table, group, old)]
    bottom = np.add.reduceat(values**2, starts, axis=1)
    step = to_half(
        np.where(
            bottom > 0,
            np.add.reduceat(W * values, starts, axis=1) / np.where(bottom > 0, bottom, 1),
            0,
        )
    )
    step = np.where(step > 0, step, old)
    values = table[round_codes(W, table, group, step)] * step.astype(np.float64)[:, index]
    losses.append(np.add.reduceat((W - values) ** 2, starts, axis=1))
    best: Array = np.choose(np.argmin(losses, axis=0), [old, new, step]).astype("<f2")
    return best


class SignRows(ScalarQuantized):
    """The sign of every entry with one scale a row, ``mean |a|``: one bit a weight.

    Bits: ``m n + 16 m``. Under that budget the weakest columns are dropped; above it
    nothing is gained.
    """

    method = "sign"

    @classmethod
    def fit(cls, A: ArrayLike, bits: float, inputs: ArrayLike | None = None, seed: int = 0) -> Self:
        """Keep the signs of as many columns as the budget holds."""
        problem = check_problem(A, bits, inputs, seed)
        n_kept = sign_columns(problem.shape, problem.budget)
        if n_kept < 1:
            raise too_small(cls.method, bits, cls.least_bits(problem.shape), problem.shape)
        kept = strongest_columns(problem.W, n_kept)
        W = problem.W[:, kept]
        scales = to_half(2.0 * np.mean(np.abs(W), axis=1, keepdims=True))
        matrix = cls(
            problem.shape,
            (W >= 0).astype(np.uint8),
            2,
            0,
            scales,
            kept,
            uniform_values(2),
            problem.scale,
        )
        matrix.record = problem.record(kept=n_kept)
        return matrix

    @classmethod
    def least_bits(cls, shape: tuple[int, int]) -> int:
        """Return the bits of one column, or of all without a mask."""
        return least_bits(shape)


def sign_columns(shape: tuple[int, int], budget: int) -> int:
    """Return how many columns of one bit an entry and one scale a row fit the budget."""
    choices = layouts(shape, budget, groups=(0,), levels_range=(2,))
    return max((n_kept for _, _, n_kept in choices), default=0)
