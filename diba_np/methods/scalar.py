"""Matrices coded entry by entry: the container, the layouts of a budget, scales by least squares.

One container serves all scalar codes (`rounding`, `gptq`, `bitat`): a small code an entry, a
float16 scale a row or a group of columns, a table of values. Where the budget is under what all
columns need, the weakest columns are dropped (stored as one bit each, restored as zero), so that
every method answers at every rate and no bit goes uncounted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri

from diba_np.matrix.base import Array, CompressedMatrix, take
from diba_np.methods.fitting import Problem, to_half
from diba_np.methods.streams import pack_digits, packed_bytes, unpack_digits

if TYPE_CHECKING:
    from typing_extensions import Self


Layout = tuple[int, int, int]  # levels, group, kept columns

MOST_LEVELS = 256  # of a grid: codes are bytes
GROUPS = (0, 256, 128, 64, 32, 16)  # columns that share a scale; 0 = the whole row

# of the search for a layout: the finest grids of all columns, and rows, that are tried
_FINEST, _MOST_ROWS = 4, 384


def uniform_values(levels: int) -> Array:
    """Return the symmetric grid ``-(L-1)/2, ..., (L-1)/2`` of step 1, (levels,) float64."""
    return np.arange(levels) - (levels - 1) / 2.0


def normal_values(levels: int) -> Array:
    """Return a normal-float code: quantiles of the normal law, scaled to [-1, 1].

    Each half has evenly spaced quantiles and zero is a value of its own, as in NF4
    (T. Dettmers et al., arXiv 2305.14314, Section 3) at 16 levels. With 2 or 3 levels it
    is the uniform grid.
    """
    if levels <= 3:
        return uniform_values(levels) * 2.0 / (levels - 1)
    tail = 0.5 * (1.0 / (2 * levels) + 1.0 / (2 * levels - 2))
    up = ndtri(np.linspace(0.5, 1.0 - tail, levels // 2 + 1))
    down = ndtri(np.linspace(tail, 0.5, levels - levels // 2))
    values = np.concatenate([down[:-1], up])
    scaled: Array = values / np.abs(values).max()
    return scaled


def group_starts(n: int, group: int) -> Array:
    """Return the first column of every group of `group` columns (0: one group)."""
    return np.arange(0, n, group or max(n, 1))


def group_index(n: int, group: int) -> Array:
    """Return the group of every column, where `group` columns share one (0: one group)."""
    return np.arange(n) // (group or max(n, 1))


class ScalarQuantized(CompressedMatrix):
    """A matrix as one small code an entry: ``A_hat_ij = scale * s_ig * table[code_ij]``.

    Parameters
    ----------
    codes : (m, nk) uint8
        Entries of the kept columns.
    levels : int
        Codes lie in [0, levels).
    group : int
        Kept columns that share a scale in each row; 0 = all of them.
    scales : (m, groups) float16
    kept : (n,) bool
        Columns that are stored; the others are zero.
    table : (levels,) float16 or float64
        Values; stored only by a class that fits them (`stores_table`).
    """

    dataset_kinds: ClassVar[dict[str, str]] = {
        "codes": "payload",
        "scales": "scales",
        "kept": "index",
        "table": "codebook",
    }
    stores_table = False

    def __init__(
        self,
        shape: tuple[int, int],
        codes: Array,
        levels: int,
        group: int,
        scales: Array,
        kept: Array,
        table: Array,
        scale: float = 1.0,
        record: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(shape, scale, record)
        self.codes, self.levels, self.group = codes, levels, group
        self.scales, self.kept, self.table = scales, kept, table

    @staticmethod
    def default_table(levels: int) -> Array:
        """Return the values that `levels` codes stand for where none are stored."""
        return uniform_values(levels)

    def to_dense(self) -> Array:
        """Return the matrix as (m, n) float32."""
        nk = self.codes.shape[1]
        result = np.zeros(self.shape, np.float32)
        if nk:
            scales = self.scales.astype(np.float64)[:, group_index(nk, self.group)]
            values = np.asarray(self.table, np.float64)[self.codes] * scales
            result[:, self.kept] = values * self.scale
        return result

    def to_datasets(self) -> tuple[dict[str, Any], dict[str, Array]]:
        """Return ``(attrs, arrays)``; see `CompressedMatrix.to_datasets`."""
        everything = bool(self.kept.all())
        arrays = {
            "codes": pack_digits(self.codes, self.levels),
            "scales": np.ascontiguousarray(self.scales).ravel(),
            "kept": np.zeros(0, np.uint8)
            if everything
            else np.packbits(self.kept, bitorder="little"),
            "table": self.table if self.stores_table else np.zeros(0, "<f2"),
        }
        attrs = {"levels": self.levels, "group": self.group, "n_kept": int(self.kept.sum())}
        return attrs, arrays

    @classmethod
    def from_datasets(cls, attrs: dict[str, Any], arrays: dict[str, Array]) -> Self:
        """Build the matrix again from `to_datasets`."""
        m, n, levels, group, nk = (
            int(attrs[key]) for key in ("m", "n", "levels", "group", "n_kept")
        )
        codes = unpack_digits(arrays["codes"], m * nk, levels).astype(np.uint8).reshape(m, nk)
        if nk == n:
            kept = np.ones(n, bool)
        else:
            kept = np.unpackbits(
                take(arrays, "kept", "u1", -(-n // 8)), count=n, bitorder="little"
            ).astype(bool)
        if int(kept.sum()) != nk:
            raise ValueError(f"kept must mark {nk} columns, found {int(kept.sum())}")
        n_groups = group_starts(nk, group).size
        scales = take(arrays, "scales", "<f2", m * n_groups).reshape(m, n_groups)
        table = (
            take(arrays, "table", "<f2", levels) if cls.stores_table else cls.default_table(levels)
        )
        return cls((m, n), codes, levels, group, scales, kept, table, attrs["scale"])


# ---- layouts within a budget -----------------------------------------------------------
def layout_bits(
    shape: tuple[int, int], levels: int, group: int, n_kept: int, stores_table: bool = False
) -> int:
    """Stored bits of a `ScalarQuantized` of these sizes (the bytes it really writes)."""
    m, n = shape
    bits = 8 * packed_bytes(m * n_kept, levels) + 16 * m * group_starts(max(n_kept, 1), group).size
    bits += 0 if n_kept == n else 8 * -(-n // 8)
    return bits + (16 * levels if stores_table else 0)


def least_bits(
    shape: tuple[int, int], levels: int = 2, group: int = 0, stores_table: bool = False
) -> int:
    """Return the fewest bits that a layout of these levels and groups takes."""
    # all columns need no mask, which may cost more than they do
    return min(layout_bits(shape, levels, group, kept, stores_table) for kept in (1, shape[1]))


def layouts(
    shape: tuple[int, int],
    budget: int,
    groups: Sequence[int] = GROUPS,
    levels_range: Sequence[int] = range(2, MOST_LEVELS + 1),
    stores_table: bool = False,
) -> list[Layout]:
    """List the ``(levels, group, n_kept)`` worth trying within `budget` bits.

    For every group size: the `_FINEST` finest grids that leave all columns in, and the
    coarsest ones above them with as many columns as fit, down to 3 in 4. If no grid keeps
    three columns in four, the coarsest grid with whatever fits.
    """
    n = shape[1]
    choices = []
    for group in groups:
        if group >= n:
            continue
        whole = [L for L in levels_range if layout_bits(shape, L, group, n, stores_table) <= budget]
        choices += [(L, group, n) for L in whole[-_FINEST:]]
        above = [L for L in levels_range if not whole or L > whole[-1]][:2]
        for L in above:
            low, high = 0, n - 1
            while low < high:
                middle = (low + high + 1) // 2
                if layout_bits(shape, L, group, middle, stores_table) <= budget:
                    low = middle
                else:
                    high = middle - 1
            if low >= 1 and layout_bits(shape, L, group, low, stores_table) <= budget:
                choices.append((L, group, low))
    near = [item for item in choices if item[2] >= 0.75 * n]
    return near or sorted(choices, key=lambda item: -item[2])[:3]


def strongest_columns(W: Array, count: int, weight: Array | None = None) -> Array:
    """Mark the `count` columns of largest (weighted) energy; (n,) bool, ties to the left."""
    energy = np.sum(W**2, axis=0) * (1.0 if weight is None else weight)
    kept = np.zeros(W.shape[1], bool)
    kept[np.argsort(-energy, kind="stable")[:count]] = True
    return kept


# ---- scales by least squares -------------------------------------------------------------
def nearest_codes(W: Array, table: ArrayLike) -> Array:
    """Return the index of the nearest value of the sorted `table`, as uint8, shape of W."""
    table = np.asarray(table, np.float64)
    gaps = np.diff(table)
    if gaps.size and np.ptp(gaps) <= 1e-12 * gaps[0]:
        # the next line is what the search below gives on an even grid, several times faster
        codes: Array = np.clip(np.rint((W - table[0]) / gaps[0]), 0, len(table) - 1)
        return codes.astype(np.uint8)
    return np.searchsorted(0.5 * (table[1:] + table[:-1]), W).astype(np.uint8)


def fit_scales(
    W: Array,
    table: ArrayLike,
    group: int,
    weight: Array | None = None,
    candidates: int = 24,
    rounds: int = 3,
) -> Array:
    """Find for each row and group the scale that loses least with nearest rounding.

    Parameters
    ----------
    W : (m, nk) float64
    table : (levels,) sorted float64
    group : int
        0 = the whole row.
    weight : (nk,) float64, optional
        Importance of each column.
    candidates : int
        Clipping points tried before the least-squares rounds.

    Returns
    -------
    (m, groups) float16

    Notes
    -----
    O(candidates m nk log levels).
    """
    starts = group_starts(W.shape[1], group)
    index = group_index(W.shape[1], group)
    w = np.ones(W.shape[1]) if weight is None else weight
    table = np.asarray(table, np.float64)
    peak = np.maximum.reduceat(np.abs(W), starts, axis=1)
    unit = np.where(peak > 0, peak, 1.0) / np.abs(table).max()

    def loss(step: Array) -> tuple[Array, Array]:
        full = step.astype(np.float64)[:, index]
        safe = np.where(full > 0, full, 1.0)
        values = table[nearest_codes(W / safe, table)]
        return np.add.reduceat((W - values * full) ** 2 * w, starts, axis=1), values

    best = to_half(np.where(peak > 0, unit, 0.0))
    best_loss, _ = loss(best)
    for fraction in np.linspace(0.95, 1.5 / len(table) if len(table) > 2 else 0.2, candidates):
        step = to_half(unit * fraction)
        new_loss, _ = loss(step)
        better = new_loss < best_loss
        best, best_loss = np.where(better, step, best), np.where(better, new_loss, best_loss)
    for _ in range(rounds):
        _, values = loss(best)
        top = np.add.reduceat(W * values * w, starts, axis=1)
        bottom = np.add.reduceat(values**2 * w, starts, axis=1)
        step = to_half(np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1.0), 0.0))
        new_loss, _ = loss(step)
        better = (new_loss < best_loss) & (step > 0)
        best, best_loss = np.where(better, step, best), np.where(better, new_loss, best_loss)
    return best.astype("<f2")


def round_codes(W: Array, table: ArrayLike, group: int, scales: Array) -> Array:
    """Return the nearest codes, (m, nk) uint8, under the given scales."""
    index = group_index(W.shape[1], group)
    full = scales.astype(np.float64)[:, index]
    return nearest_codes(W / np.where(full > 0, full, 1.0), np.asarray(table, np.float64))


def _row_sample(problem: Problem) -> Array:
    m = problem.shape[0]
    if m <= _MOST_ROWS:
        return np.arange(m)
    return np.sort(np.random.default_rng(0).choice(m, _MOST_ROWS, replace=False))


def search_layouts(
    cls: type[ScalarQuantized],
    problem: Problem,
    candidates: list[Layout],
    weight: Array | None = None,
) -> list[Layout]:
    """Return the (levels, group, n_kept) of least weighted error, tried on `_MOST_ROWS` rows."""
    rows = _row_sample(problem)
    scored = []
    for levels, group, n_kept in candidates:
        kept = strongest_columns(problem.W, n_kept, weight)
        W = problem.W[np.ix_(rows, kept)]
        w = None if weight is None else weight[kept]
        table = cls.default_table(levels)
        scales = fit_scales(W, table, group, w, candidates=10, rounds=2)
        index = group_index(n_kept, group)
        error = (
            W
            - np.asarray(table)[round_codes(W, table, group, scales)]
            * scales.astype(float)[:, index]
        )
        all_w = np.ones(problem.shape[1]) if weight is None else weight
        lost = float(np.sum(error**2 * all_w[kept])) + float(
            np.sum(problem.W[np.ix_(rows, ~kept)] ** 2 * all_w[~kept])
        )
        scored.append((lost, (levels, group, n_kept)))
    scored.sort(key=lambda item: item[0])
    return [item for _, item in scored]
