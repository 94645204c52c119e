"""Yardstick: rounding with error compensation under the input statistics (GPTQ).

E. Frantar et al., arXiv 2210.17323: columns are rounded one after another, and the error
of each is spread over those still to come through the Cholesky factor of H^-1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from diba_np.matrix.base import Array
from diba_np.methods.feedback import output_error, sequential_rounding
from diba_np.methods.fitting import Problem, check_problem, gram
from diba_np.methods.rounding import UniformRounding
from diba_np.methods.scalar import fit_scales, group_starts, nearest_codes, strongest_columns

if TYPE_CHECKING:
    from typing_extensions import Self


class GPTQ(UniformRounding):
    """Uniform codes as in `UniformRounding`, rounded with error compensation.

    Without inputs H is the identity and nothing is compensated: it equals `UniformRounding`
    up to the choice of scales.
    """

    method = "gptq"
    uses_inputs = True

    @classmethod
    def fit(
        cls,
        A: ArrayLike,
        bits: float,
        inputs: ArrayLike | None = None,
        seed: int = 0,
        levels: int | None = None,
        group: int | None = None,
        ridge: float = 0.01,
        most: int = 3,
    ) -> Self:
        """Choose grid, group and kept columns of least output error within the budget.

        Parameters
        ----------
        A : (m, n) array_like, real
        bits : float
            Budget in bits per weight.
        inputs : (N, n) array_like, optional
            Cached inputs, one sample a row.
        seed : int
            Not used.
        levels, group : int, optional
            Fix the grid or the group size (0 = row).
        ridge : float
            Added to H, in units of its mean diagonal entry.
        most : int
            Layouts tried in full, best first by plain rounding.
        """
        problem = check_problem(A, bits, inputs, seed)
        n = problem.shape[1]
        H = gram(problem.X, n, ridge)
        weight = np.diagonal(H).copy()
        ranked = cls._choose(problem, levels, group, weight, most=max(most, 2))[:most]
        tried = [cls._compensated(problem, H, *layout) for layout in ranked]
        best = min(tried, key=lambda candidate: output_error(problem.W - candidate.to_dense(), H))
        best.scale = problem.scale
        best.record = problem.record(
            levels=best.levels, group=best.group, kept=int(best.kept.sum()), ridge=ridge
        )
        return best

    @classmethod
    def _compensated(cls, problem: Problem, H: Array, levels: int, group: int, n_kept: int) -> Self:
        """Round all of W in column order; dropped columns go first, as zeros."""
        m, n = problem.shape
        weight = np.diagonal(H)
        kept = strongest_columns(problem.W, n_kept, weight)
        order = np.concatenate([np.flatnonzero(~kept), np.flatnonzero(kept)])
        table = cls.default_table(levels)
        starts = group_starts(n_kept, group)
        scales = np.zeros((m, starts.size), "<f2")
        codes = np.empty((m, n_kept), np.uint8)
        dropped = n - n_kept
        columns = weight[kept]
        if not group:
            scales[:] = fit_scales(problem.W[:, kept], table, 0, columns)

        def quantize(position: int, rest: Array) -> Array:
            j = position - dropped
            if j < 0:
                return np.zeros(m)
            g = j // group if group else 0
            if group and j % group == 0:
                width = min(group, len(rest))
                scales[:, g] = fit_scales(
                    rest[:width].T, table, 0, columns[j : j + width], candidates=12
                )[:, 0]
            full = scales[:, g].astype(np.float64)
            codes[:, j] = nearest_codes(rest[0] / np.where(full > 0, full, 1.0), table)
            return table[codes[:, j]] * full

        # a block's end inside a group would hide its last columns from the scale
        block = group * max(1, 128 // group) if group else 128
        sequential_rounding(problem.W, H, order, quantize, block, dropped)
        return cls(problem.shape, codes, levels, group, scales, kept, table)
