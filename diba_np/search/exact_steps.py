"""Exact steps on a `State`: diagonals in closed form, flips that improve, errors and grids."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from diba_np.kernels.flips import update_forms
from diba_np.matrix.diagonals import Widths, fit_grid
from diba_np.search.grids import round_diagonal
from diba_np.search.moves import Move, Walks
from diba_np.search.state import Side, State, normalise
from diba_np.search.target import Target

Floats = NDArray[np.float64]
Equations = tuple[Floats, Floats]  # gram (k, k) and cross (rows, k)

# a flip must lower a row's error by more than this share of the row's mean energy
SLACK = 1e-12

# relative to the diagonal of the system for d2: keeps components that nearly cancel from
# taking huge scales, which rounding to 16 bits would turn into error
_RIDGE = 1e-7


def weighed_gram(target: Target, N: Floats, weighed: Floats) -> Floats:
    """Return ``N^T weighed``, which is symmetric."""
    if weighed is N:
        return target.pool.gram(N)
    product = target.pool.matmul(np.ascontiguousarray(N.T), weighed)
    result: Floats = (product + product.T) / 2.0
    return result


def normal_equations(target: Target, side: Side) -> Equations:
    """Return ``G = M M^T`` (k, k) and ``C = A M^T`` of the rows of one side, as float64.

    M is everything on the other side of that side's bits: D2 (B2 - shift) D3 for the left. With
    weights ``G = M H M^T``, ``C = A H M^T`` for the left, W in the place of H for the right; where
    a matrix couples the rows of the side itself, C is weighed by it too.
    Cost: ``2 m n k + 2 k^2 n`` flops.
    """
    if target.is_coupled:
        return target.coupled_equations(side)
    state = side.state
    if target.takes_single(len(state.d2)):
        N = np.empty(side.other.bits.shape, np.float32)
        for rows in target.pool.row_blocks(*N.shape):
            N[rows] = side.other.scaled(rows) * state.d2
        gram = target.pool.gram(N).astype(np.float64)
        cross = np.empty((target.shape[side.axis], len(gram)))
        # made in the second half of its place, of which no row is overwritten before it is read
        single = cross.reshape(-1).view(np.float32)[cross.size :].reshape(cross.shape)
        target.product(side.axis, N, single)
        for rows in target.pool.row_blocks(*cross.shape):
            cross[rows] = single[rows]
        return gram, cross
    if side.axis == 0:
        other = side.other.scaled()
        other *= state.d2
        weighed = target.weigh_columns(other)
        return weighed_gram(target, other, weighed), target.matmul(weighed)
    k = len(state.d2)
    gram, cross = np.zeros((k, k)), np.zeros((target.shape[1], k))

    def others(rows: slice) -> Floats:
        scaled = side.other.scaled(rows)
        scaled *= state.d2
        return scaled

    for _, part, other, weighed in target.weighed_rows(others):
        gram += weighed_gram(target, other, weighed)
        cross += target.pool.matmul(part.T, weighed)
    return gram, cross


def row_forms(target: Target, side: Side, gram: Floats) -> Floats:
    """Return ``y^T gram y`` for the values y of each row of one side."""
    forms = np.empty(len(side.bits))

    def fill(rows: slice) -> None:
        values = side.values(rows)
        np.einsum("ik,ik->i", values, values @ gram, out=forms[rows])

    target.pool.by_rows(side.bits.shape, fill)
    return forms


def sweep(target: Target, side: Side, move: Move, equations: Equations | None = None) -> int:
    """Make a kind of moves over the rows of one side; return the number of flips.

    Moves that change the scale write it into the state. `equations` are the side's
    `normal_equations`, where they are at hand. Sides that weights couple are left to the target.
    """
    if target.coupling(side.axis) is not None:
        return target.sweep_coupled(side, move, equations)
    bits, scales = side.bits, side.scales
    gram, cross = equations or normal_equations(target, side)
    slack = np.full(len(bits), SLACK * target.energy / len(bits))
    flips = np.zeros(len(bits), np.int64)

    def walk(rows: slice) -> None:
        h = side.values(rows) @ gram
        move.rows(bits[rows], h, gram, cross[rows], scales[rows], slack[rows], flips[rows])

    target.pool.by_rows(bits.shape, walk)
    return int(flips.sum())


def update_row_scales(target: Target, side: Side, equations: Equations | None = None) -> None:
    """Set d1 (or d3) to its least-squares value, row by row; kept where the row is empty.

    Where weights couple a side, its scales are solved for as a whole.
    """
    if target.coupling(side.axis) is not None:
        target.solve_coupled(side, equations)
        return
    scales = side.scales
    gram, cross = equations or normal_equations(target, side)
    p, q = np.empty(len(scales)), np.empty(len(scales))

    def fill(rows: slice) -> None:
        values = side.values(rows)
        np.einsum("ik,ik->i", values, cross[rows], out=p[rows])
        np.einsum("ik,ik->i", values, values @ gram, out=q[rows])

    target.pool.by_rows(side.bits.shape, fill)
    _set_scales(side, slice(None), p, q, gram)


def _set_scales(side: Side, rows: slice, p: Floats, q: Floats, gram: Floats) -> None:
    """Set the scales of some rows to ``p / q``, on their grid; kept where q vanishes."""
    scales = side.scales[rows]
    np.divide(p, q, out=scales, where=q > 1e-12 * np.diag(gram).max(initial=0.0))
    if side.grid is not None:
        scales[:] = side.grid.round(scales)


def walk(target: Target, side: Side, walks: Walks, equations: Equations) -> None:
    """Set the scales of one side, walk over its rows' bits, and set the scales for the new ones.

    Where weights couple a side its walks set scales as they go, and those of the side are solved
    for as a whole after them. Else all is done row by row, with one product of the bits with the
    Gram matrix: ``2 m k^2`` flops.
    """
    if target.coupling(side.axis) is not None:
        target.sweep_coupled(side, walks, equations)
        target.solve_coupled(side, equations)
        return
    gram, cross = equations
    slack = np.full(len(side.bits), SLACK * target.energy / len(side.bits))
    flips = np.zeros(len(side.bits), np.int64)
    kind = np.dtype(np.float32 if target.takes_single(len(gram)) else np.float64)
    factor = gram.astype(kind, copy=False)

    def improve(rows: slice) -> None:
        bits, own = side.bits[rows], cross[rows]
        values = side.values(rows)
        h: Floats = np.matmul(values.astype(kind, copy=False), factor).astype(
            np.float64, copy=False
        )
        p, q = np.einsum("ik,ik->i", values, own), np.einsum("ik,ik->i", values, h)
        _set_scales(side, rows, p, q, gram)
        before = bits.copy()
        walks.rows(bits, h, gram, own, side.scales[rows], slack[rows], flips[rows])
        update_forms(before, bits, h, gram, own, p, q)
        _set_scales(side, rows, p, q, gram)

    target.pool.by_rows(side.bits.shape, improve)


def d2_equations(target: Target, state: State) -> tuple[Floats, Floats]:
    """Return H (k, k) and r (k,) of the squared error ``|A|^2 - 2 r^T d2 + d2^T H d2``.

    ``H = (U^T U) * (V V^T)``, ``r = diag(U^T A V^T)`` with U = D1 (B1 - shift),
    V = (B2 - shift) D3; with weights W of the outputs and G of the inputs ``U^T W U``, ``V G V^T``
    and ``U^T W A G V^T``. Cost: ``2 m n k + k^2 (m + n)`` flops.
    """
    if target.is_coupled:
        return target.coupled_d2_equations(state)
    V = state.right.scaled()
    GV = target.weigh_columns(V)
    k = len(state.d2)
    normal, right = np.zeros((k, k)), np.zeros(k)
    for _, part, U, WU in target.weighed_rows(state.left.scaled):
        normal += weighed_gram(target, U, WU)
        right += np.einsum("ik,ik->k", WU, target.pool.matmul(part, GV))
    normal *= weighed_gram(target, V, GV)
    return normal, right


def update_d2(target: Target, state: State, on: NDArray[np.intp] | None = None) -> float:
    """Set d2 to its least-squares value; return the squared error, in units of the target.

    On a grid a good grid point is taken instead. The old d2 stays if the new one is worse. Costs a
    (k, k) solve beside `d2_equations`. `on` are the components to solve for, all by default; those
    left out must be zero.
    """
    normal, right = d2_equations(target, state)
    old = state.d2
    if on is not None:
        normal, right, old = normal[np.ix_(on, on)], right[on], old[on]

    def error(d2: Floats) -> float:
        return float(target.energy - 2.0 * (d2 @ right) + d2 @ (normal @ d2))

    solved: Floats
    if state.grids is None:
        own = np.diag(normal)
        least = max(1e-12 * float(own.mean()), np.finfo(np.float64).tiny)
        ridged = normal.copy()
        ridged[np.diag_indices_from(ridged)] += np.maximum(_RIDGE * own, least)
        solved = np.asarray(np.linalg.solve(ridged, right), np.float64)
    else:
        solved = round_diagonal(normal, right, old, state.grids[1].values / target.unit)
    before, after = error(old), error(solved)
    if np.isfinite(after) and after <= before:
        if on is None:
            state.d2 = solved
        else:
            state.d2 = np.zeros_like(state.d2)
            state.d2[on] = solved
        return max(after, 0.0)
    return max(before, 0.0)


def fit_grids(
    target: Target, state: State, widths: Widths, on: NDArray[np.intp] | None = None
) -> float:
    """Fit a grid to each diagonal and round to it, those that follow solved again.

    Returns the squared error, in units of the target. `on` is as for `update_d2`.
    """
    normalise(state)
    state.grids = None
    fitted = []
    for side in state.sides:
        equations = normal_equations(target, side)
        update_row_scales(target, side, equations)
        weights = row_forms(target, side, equations[0]) * target.entry_weights(side.axis)
        del equations  # the other side's need the room
        grid = fit_grid(side.scales, np.maximum(weights, 0.0), widths[2 * side.axis])
        side.scales[:] = grid.round(side.scales)
        fitted.append(grid)
    update_d2(target, state, on)
    normal, _ = d2_equations(target, state)
    middle = fit_grid(state.d2 * target.unit, np.diag(normal), widths[1])
    state.grids = (fitted[0], middle, fitted[1])
    # what is off the grid must not win against what is on it
    state.d2 = middle.round(state.d2 * target.unit).astype(np.float64) / target.unit
    return update_d2(target, state, on)


def sort_components(target: Target, state: State) -> None:
    """Order the components by how much the squared error would rise without each, most first."""
    H, r = d2_equations(target, state)
    # E(d2 - d2_l e_l) - E(d2), exact for the other components as they are
    rise = state.d2 * (2.0 * (r - H @ state.d2) + state.d2 * np.diag(H))
    order = np.argsort(-rise, kind="stable")
    state.b1 = np.ascontiguousarray(state.b1[:, order])
    state.b2 = np.ascontiguousarray(state.b2[:, order])
    state.d2 = state.d2[order]


def residuals(target: Target, *states: State) -> Iterator[tuple[slice, Floats, Floats]]:
    """Yield (rows, ``A[rows] / unit``, its residual for the sum of the states), block by block."""
    rights = []
    for state in states:
        other = state.right.scaled()
        other *= state.d2
        rights.append(np.ascontiguousarray(other.T))
        del other
    for rows, part in target.blocks(np.float64):
        E = part
        for state, right in zip(states, rights, strict=True):
            E = E - target.pool.matmul(state.left.scaled(rows), right)
        yield rows, part, E


def squared_error(target: Target, *states: State) -> float:
    """Return ``|A / unit - D1 B1 D2 B2 D3|_F^2`` from the residual itself, block by block.

    Several states are summed. With weights ``tr(W E H E^T)`` of that residual E.
    """
    return target.squares((rows, E) for rows, _, E in residuals(target, *states))
