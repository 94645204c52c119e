"""How a trellis code is fitted: rotations, scales, rates of the columns, feedback.

Both trellises, with look-ups and linear, are fitted here; they differ in their tables alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from diba_np.machine.thread_pool import ThreadPool
from diba_np.matrix.base import Array
from diba_np.matrix.diagonals import LEAST_CODE, MOST_CODE, LogGrid, fit_grid
from diba_np.methods.feedback import fed_back, sequential_rounding
from diba_np.methods.fitting import Problem, too_small
from diba_np.methods.low_rank import LowRank, low_rank_part
from diba_np.methods.seeded import Rotation
from diba_np.methods.trellis_modes import Mode, allocate, least_bits
from diba_np.methods.trellis_paths import Coder, closing_state, decode

# which sides are rotated: inputs (columns), outputs (rows)
ROTATIONS = {"none": (False, False), "inputs": (True, False), "both": (True, True)}
ROTATIONS["outputs"] = (False, True)

# neighbouring levels of a scale's grid may differ by so much: a path adapts to the rest
_FINEST_RATIO = 1.12

# rows and columns of a trial; and how near the second of several has to be to the best to be fitted
# too, as a factor of the loss: rows that are not rotated differ, and a few do not tell exactly
_TRIAL_ROWS, _TRIAL_COLUMNS = 96, 256
_NEAR = 1.12

# a rotation of a size whose odd factor is larger is a dense product of nearly that order
_LARGEST_ODD = 128

# of a stored grid: two float32
GRID_BITS = 64

# added to every square, as a share of their mean: a row or column of zeros gets the scale zero
_FLOOR = 1e-12


@dataclass
class Coded:
    """What a fit returns, and what is stored.

    Attributes
    ----------
    rotation : str
        Key of `ROTATIONS`.
    used : list of int
        Modes in use: 0 for none, else 1 + the position in the list of modes.
    chosen : (n,) uint8
        Position in `used` of each column.
    codes : list of (columns, steps) uint8
        Paths of the columns of each used mode, in their order; (columns, 0) of none.
    rows, columns : (LogGrid, uint8 codes) or None
        Scales; None stands for ones.
    gain : float
        Factor of all paths.
    low : LowRank or None
        What is added to the paths' matrix, not rotated, and not scaled by theirs.
    """

    rotation: str
    used: list[int]
    chosen: Array
    codes: list[Array] = field(default_factory=list)
    rows: tuple[LogGrid, Array] | None = None
    columns: tuple[LogGrid, Array] | None = None
    gain: float = 1.0
    low: LowRank | None = None

    def values(self, modes: Sequence[Mode], m: int) -> Array:
        """Return the values without scales, (m, n) float32, still rotated."""
        result = np.zeros((m, self.chosen.size), np.float32)
        for position, number in enumerate(self.used):
            if number:
                mode = modes[number - 1]
                columns = np.flatnonzero(self.chosen == position)
                for j, path in zip(columns, self.codes[position], strict=True):
                    result[:, j] = decode(mode, path, closing_state(mode, path), m)
        return result


def scales_of(stored: tuple[LogGrid, Array] | None, size: int) -> Array:
    """Return the scales of rows or columns, (size,) float32."""
    return np.ones(size, np.float32) if stored is None else stored[0].decode(stored[1])


def _grid(values: Array, weights: Array, spread: float, least: int) -> LogGrid:
    """Fit a grid of as few bits as its levels may be apart, but of `least`.

    `spread` widens the range on both sides, for what is not known yet.
    """
    if spread > 1.0:
        values = np.concatenate([values / spread, values, values * spread])
        weights = np.tile(weights, 3)
    for bits in range(least, MOST_CODE + 1):
        grid = fit_grid(values, weights, bits)
        if grid.ratio <= _FINEST_RATIO:
            break
    return grid


def _balanced(W: Array, rows: bool, columns: bool) -> tuple[Array, Array]:
    """Return row and column scales whose product follows the root mean squares of W."""
    square = W * W
    square += _FLOOR * square.mean()
    r, c = np.ones(len(W)), np.ones(W.shape[1])
    for _ in range(8 if rows and columns else 1):
        if rows:
            r = np.sqrt(np.mean(square / (c * c), axis=1))
        if columns:
            c = np.sqrt(np.mean(square / (r * r)[:, None], axis=0))
    return r, c


def fit_coded(
    problem: Problem,
    modes: Sequence[Mode],
    H: Array | None,
    seed: int,
    rotation: str | Sequence[str] = "auto",
    threads: int | None = None,
    outputs: Array | None = None,
    scale_bits: int = LEAST_CODE,
) -> Coded:
    """Return the best coding of ``problem.W`` found within the budget.

    As it is, and where components of low rank gain more than their bits, of what they leave.

    Parameters
    ----------
    problem : Problem
    modes : sequence of Mode
    H : (n, n) float64 or None
        Gram matrix of the inputs, positive definite; None: white inputs.
    seed : int
        Of the rotations.
    rotation : {"auto", "none", "inputs", "outputs", "both"}, or several of them
        Of several what loses least: without inputs in a trial on some of the rows, with inputs
        when fitted. "auto" stands for all but those that turn a side whose size has a large odd
        factor.
    threads : int, optional
        For the columns; with inputs, where they go one after another, for the rotations.
    outputs : (m,) float64, optional
        Weights of the outputs, mean 1. Outputs that are rotated all weigh the same.
    scale_bits : int
        Fewest bits of a scale's code.

    Raises
    ------
    BudgetError
        The budget is too small for one column.

    Notes
    -----
    ``m n 2^width`` steps for the paths, twice where two rotations are near; a trial costs as much
    as `_TRIAL_ROWS` by `_TRIAL_COLUMNS` entries. With inputs as much for each rotation, and
    ``O(m n^2 + n^3)`` flops for its feedback: what some of the rows lose says too little about the
    rest there.
    """
    m, n = problem.shape
    names = _named(rotation, (m, n))
    with ThreadPool(threads) as pool:
        least = fewest_bits(modes, (m, n), names, H is not None)
        parts: list[tuple[Problem, LowRank | None]] = [(problem, None)]
        low = low_rank_part(problem.W, problem.budget - least)
        if low is not None:
            rest = problem.without(low.rows(), low.bits)
            exact = not rest.W.any()
            if exact:  # paths are stored none the less, and count nothing
                rest.W, parts = np.ones((m, n)), []
            parts.append((rest, low))

        def planned(case: tuple[str, Problem, LowRank | None]) -> _Plan:
            name, part, taken = case
            return _Plan(part, modes, H, name, seed, outputs, scale_bits, taken)

        def fitted(case: tuple[str, Problem, LowRank | None]) -> tuple[float, Coded] | None:
            plan = planned(case)
            return plan.encode(pool) if plan.is_possible else None

        cases = [(name, *part) for part in parts for name in names]
        if H is not None:
            results: list[tuple[float, Coded] | None] = pool.run(fitted, cases)
            found = [each for each in results if each is not None]
        else:
            plans = [plan for plan in map(planned, cases) if plan.is_possible]
            if len(plans) > 1:
                tried = [(plan.trial_loss(pool), plan) for plan in plans]
                tried.sort(key=lambda each: each[0])
                plans = [plan for loss, plan in tried[:2] if loss <= _NEAR * tried[0][0]]
            found = [plan.encode(pool) for plan in plans]
        if not found:
            raise too_small("a trellis", problem.bits, least, (m, n))
        best = min(found, key=lambda each: each[0])[1]
        if low is not None and exact:
            best.gain = 0.0
        return best


def _named(rotation: str | Sequence[str], shape: tuple[int, int]) -> list[str]:
    """Return the rotations that are meant."""
    if rotation == "auto":
        return _worth_trying(shape)
    return [rotation] if isinstance(rotation, str) else list(rotation)


def _worth_trying(shape: tuple[int, int]) -> list[str]:
    """Return the rotations that cost little beside a product with the matrix."""
    cheap = [size // (size & -size) <= _LARGEST_ODD for size in shape]
    return [
        name
        for name, (inputs, outputs) in ROTATIONS.items()
        if (cheap[1] or not inputs) and (cheap[0] or not outputs)
    ]


def fewest_bits(
    modes: Sequence[Mode],
    shape: tuple[int, int],
    rotation: str | Sequence[str] = "auto",
    weighed: bool = False,
    scale_bits: int = MOST_CODE,
) -> int:
    """Return the fewest bits of a coding; `weighed` by a Gram matrix, in scales of so many bits."""
    return least_bits(modes, shape) + min(
        sum(
            _stored_bits(scale_bits, size)
            for scaled, size in zip(_scaled(name, weighed), shape, strict=True)
            if scaled
        )
        for name in _named(rotation, shape)
    )


def _scaled(rotation: str, weighed: bool) -> tuple[bool, bool]:
    """Tell whether rows have scales, and whether columns have.

    Rotated rows are alike, and so are rotated columns of white inputs.
    """
    inputs, outputs = ROTATIONS[rotation]
    return not outputs, weighed or not inputs


def _stored_bits(width: int, size: int) -> int:
    """Return the bits of some scales as codes of a width, in whole bytes, with their grid."""
    return 8 * -(-width * size // 8) + GRID_BITS


class _Plan:
    """One rotation of what is to be coded: its scales, and the mode of each column."""

    def __init__(
        self,
        problem: Problem,
        modes: Sequence[Mode],
        H: Array | None,
        rotation: str,
        seed: int,
        importance: Array | None,
        scale_bits: int,
        low: LowRank | None = None,
    ) -> None:
        W, (m, n) = problem.W, problem.shape
        rows, columns = _scaled(rotation, H is not None)
        self.importance = np.ones(m) if importance is None else importance
        if not rows:  # errors of rotated outputs are even
            self.importance = np.ones(m)
        # what it costs to lose all
        energy = np.sum(W * (W if H is None else W @ H), axis=1)
        self.energy = float(self.importance @ energy)
        self.root = np.sqrt(self.importance)
        self.modes, self.rotation, self.low = modes, rotation, low
        self._found: tuple[list[Array], Array, Array] | None = None  # by a trial of all rows
        turns = rotations(rotation, (m, n), seed)
        self.W = turned(W, *turns)
        # descending importance, so that what matters most is compensated by most
        self.order = np.arange(n)
        weight = np.ones(n)
        if H is not None:
            if turns[1] is not None:
                H = turned(H, turns[1], turns[1])
                H = 0.5 * (H + H.T)
            else:
                self.order = np.argsort(-np.diagonal(H), kind="stable")
            square = self.importance @ self.W**2 / m
            self.fed, weight = fed_back(square, H, self.order, problem.bits)
            self.aim = cho_solve(cho_factor(self.fed), H @ self.W.T).T
        self.H = H
        r, c = _balanced(self.W, rows, columns)
        self.row_grid = self.column_grid = None
        if rows:
            self.row_grid = _grid(r, self.importance * r * r, 1.0, scale_bits)
        if columns:
            # what feedback makes of a column is not known yet
            self.column_grid = _grid(c, c * c, 1.0 if H is None else 1.5, scale_bits)
        self.r = r if self.row_grid is None else self.row_grid.round(r).astype(np.float64)
        self.c = c if self.column_grid is None else self.column_grid.round(c).astype(np.float64)
        budget = problem.budget - self._scale_bits()
        self.costs = weight * (self.importance @ self.W**2)
        self.coders = [Coder(mode) for mode in modes]
        chosen = allocate(modes, m, self.costs, budget)
        self.is_possible = chosen is not None
        if chosen is not None:
            self.chosen, self.used = chosen
            self.number = np.array(self.used)[self.chosen]  # 0 or 1 + position in modes

    def _scale_bits(self) -> int:
        bits = 0
        for grid, size in zip((self.row_grid, self.column_grid), self.W.shape, strict=True):
            bits += 0 if grid is None else _stored_bits(grid.bits, size)
        return bits

    def trial_loss(self, pool: ThreadPool) -> float:
        """Return about what squared error the weights lose, from some of them, inputs white."""
        m, n = self.W.shape
        rows = np.arange(m) if m <= _TRIAL_ROWS else np.arange(_TRIAL_ROWS) * m // _TRIAL_ROWS
        columns = np.arange(n)
        if n > _TRIAL_COLUMNS:
            columns = np.arange(_TRIAL_COLUMNS) * n // _TRIAL_COLUMNS
        # a path over some of the rows is not closed in the fit
        paths = self._paths(pool, rows, closed=len(rows) == m, columns=columns)
        self._found = paths if (len(rows), len(columns)) == (m, n) else None
        _, c, values = paths
        root = self.root[rows, None]
        W = root * self.W[np.ix_(rows, columns)]
        coded = root * self.r[rows, None] * values[:, columns] * c[columns]
        energy, lost = np.sum(W * W, axis=0), np.sum((W - coded) ** 2, axis=0)
        number = self.number[columns]
        figures = np.array([1.0] + [mode.distortion for mode in self.modes])
        expected = figures[number] * energy
        if not self.costs.any():
            return 0.0
        # how the columns that were not tried differ from those that were, the figures tell
        share = float(self.costs @ figures[self.number] / self.costs.sum())
        ratio = float(lost.sum() / expected.sum()) if expected.any() else 1.0
        return self.energy * share * ratio

    def _paths(
        self, pool: ThreadPool, rows: Array, closed: bool, columns: Array | None = None
    ) -> tuple[list[Array], Array, Array]:
        """Return the codes of the columns, their scales, and the values without scales.

        Of some `columns` alone, inputs white, the others zero.
        """
        W, root, c = self.W[rows], self.root[rows], self.c.copy()
        r = self.r[rows]
        m, n = W.shape
        weighted = root * r
        codes = [np.empty(0, np.uint8)] * n
        values = np.zeros((m, n))
        row_energy = float(weighted @ weighted)

        def encode(j: int, column: Array) -> None:
            coder = self.coders[self.number[j] - 1]
            codes[j], start = coder.encode(root * column, c[j] * weighted, closed)
            values[:, j] = decode(coder.mode, codes[j], start, m)
            if self.column_grid is not None:  # the level next to the least-squares scale
                v = values[:, j] * weighted
                energy = float(v @ v)
                if energy > 0.0:
                    fitted = max(float(v @ (root * column)) / energy, 0.0)
                    c[j] = self.column_grid.round([fitted])[0]

        def encode_block(block: Array) -> None:
            for j in block:
                encode(j, W[:, j])

        def quantize(position: int, rest: Array) -> Array:
            j = int(self.order[position])
            if not self.number[j]:
                return np.zeros(m)
            if self.column_grid is not None:
                size = np.linalg.norm(root * rest[0]) / np.sqrt(row_energy) if row_energy else 0.0
                c[j] = self.column_grid.round([size])[0]
            encode(j, rest[0])
            result: Array = values[:, j] * r * c[j]
            return result

        if self.H is None:
            stored = np.arange(n) if columns is None else columns
            stored = stored[self.number[stored] > 0]
            pool.run(encode_block, [stored[at : at + 16] for at in range(0, stored.size, 16)])
        else:
            sequential_rounding(self.aim[rows], self.fed, self.order, quantize)
        return codes, c, values

    def encode(self, pool: ThreadPool) -> tuple[float, Coded]:
        """Return the squared error of the outputs, and the coding of all rows."""
        m, n = self.W.shape
        paths, c, values = self._found or self._paths(pool, np.arange(m), closed=True)
        # the last factor of all is free: it goes into the scale of the matrix
        coded = (self.root * self.r)[:, None] * values * c
        product = coded if self.H is None else coded @ self.H
        energy, goal = float(np.sum(product * coded)), self.root[:, None] * self.W
        gained = float(np.sum(product * goal))
        gain = gained / energy if energy > 0.0 else 1.0
        whole = float(np.sum(goal * (goal if self.H is None else goal @ self.H)))
        loss = self.energy * (1.0 - gain * gained / whole) if whole > 0.0 else 0.0
        codes = []
        for position, number in enumerate(self.used):
            members = [paths[j] for j in range(n) if self.chosen[j] == position]
            codes.append(np.array(members) if number else np.empty((len(members), 0), np.uint8))
        rows, columns = (
            None if grid is None else (grid, grid.encode(scales))
            for grid, scales in ((self.row_grid, self.r), (self.column_grid, c))
        )
        return loss, Coded(
            self.rotation, self.used, self.chosen, codes, rows, columns, gain, self.low
        )


def rotations(
    name: str, shape: tuple[int, int], seed: int
) -> tuple[Rotation | None, Rotation | None]:
    """Return the rotations (or None) of the outputs and of the inputs."""
    inputs, outputs = ROTATIONS[name]
    m, n = shape
    return (
        Rotation(m, 2 * seed + 1) if outputs else None,
        Rotation(n, 2 * seed) if inputs else None,
    )


def turned(W: Array, outputs: Rotation | None, inputs: Rotation | None) -> Array:
    """Return ``R_out W R_in^T``, C-order."""
    if inputs is not None:
        W = inputs.apply(np.ascontiguousarray(W.T)).T
    if outputs is not None:
        W = outputs.apply(np.ascontiguousarray(W))
    return np.ascontiguousarray(W)


def turned_back(W: Array, outputs: Rotation | None, inputs: Rotation | None) -> Array:
    """Return ``R_out^T W R_in``, C-order."""
    if inputs is not None:
        W = inputs.apply_transposed(np.ascontiguousarray(W.T)).T
    if outputs is not None:
        W = outputs.apply_transposed(np.ascontiguousarray(W))
    return np.ascontiguousarray(W)
