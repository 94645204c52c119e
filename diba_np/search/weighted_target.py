"""The objective with activations, ``tr(W E H E^T)`` with ``E = A - A_hat``, and its exact steps.

H (n, n) is the Gram matrix of the inputs, W (m, m) the weights of the outputs: a diagonal, or a
Gram matrix of theirs. Where a side's matrix is not diagonal its rows or columns are coupled: they
are searched one after another, and its scales are solved for as a whole. The others stay
independent, with ``G = M H M^T`` and ``C = A H M^T`` for the rows of B1, in the equations of
`diba_np.search.exact_steps`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from diba_np.arrays import Index, RowIndex
from diba_np.machine.thread_pool import ThreadPool, mirror
from diba_np.matrix.quality import decibels
from diba_np.search.exact_steps import SLACK, Equations, residuals, squared_error, weighed_gram
from diba_np.search.grids import round_diagonal
from diba_np.search.moves import Move
from diba_np.search.state import Side, State
from diba_np.search.target import Target
from diba_np.search.weights import Floats, Weights, middling

# columns whose gradient is made by one matrix product; in between it is passed on, O(k) a pair
BLOCK = 64

_FORM_ROWS = 256  # of a block of a form of all rows or columns

# the surrogate's scale of an output whose weight is zero, beside that of a middling one
_LEAST_SCALE = 1e-2

# energy of an error beside that of its row from which on the row counts as lost: under 0.5 dB
_NOTHING = 0.9

# energy of a row beside the mean of all under which it can be lost for want of range
_SMALL = 1e-3


@dataclass(frozen=True)
class _SideProducts:
    """One side ``N = D (B - shift)`` (rows, k) under the weights, where a matrix couples any rows.

    Attributes
    ----------
    bits : (rows, k) uint8
    scales : (rows,) float64
        Those that all else is of.
    own : (rows, k) float64
        N, or ``w N`` with weights of single rows.
    weighed : (rows, k) float64
        ``H N`` or ``W N``.
    form : (k, k) float64
        ``N^T H N``.
    cross : (other rows, k) float64
        ``W A H N`` of the matrices that there are, for the left side ``(W A H)^T N``.
    """

    bits: NDArray[np.uint8]
    scales: Floats
    own: Floats
    weighed: Floats
    form: Floats
    cross: Floats

    def is_of(self, side: Side, kind: type[np.floating[Any]]) -> bool:
        """Whether this is the side as it is now, in this precision."""
        return (
            self.own.dtype == kind
            and np.array_equal(self.scales, side.scales)
            and np.array_equal(self.bits, side.bits)
        )


def _form(values: Floats, P: Floats, pool: ThreadPool) -> Floats:
    """Return ``values P values^T`` (n, n), P symmetric; half of it is computed."""
    n = len(values)
    right = pool.matmul(values, P)
    out = np.empty((n, n), right.dtype)

    def fill(start: int) -> None:
        rows = slice(start, start + _FORM_ROWS)
        np.matmul(right[rows], values[start:].T, out=out[rows, start:])

    pool.run(fill, list(range(0, n, _FORM_ROWS)))
    mirror(out)
    return out


class WeightedTarget(Target):
    """A matrix together with the weights of its errors.

    Parameters
    ----------
    A : (m, n) array, as `as_matrix` returns it
    pool : ThreadPool
    weights : Weights

    Attributes
    ----------
    weights : Weights
    gram, H : (n, n) float64 or None
        Gram matrix of the inputs, mean of its diagonal 1: as it was given, and regularised.
    w : (m,) float64 or None
        Weights of the outputs, mean 1.
    W : (m, m) float64 or None
        Their Gram matrix instead, mean of its diagonal 1.
    energy : float
        ``tr(W A H A^T)`` in units of the target.
    """

    def __init__(self, A: NDArray[Any], pool: ThreadPool, weights: Weights) -> None:
        super().__init__(A, pool)
        self.weights = weights
        self.gram = weights.gram
        self.H = weights.regularised()
        self.w, self.W = weights.outputs, weights.output_gram
        self.energy = self.squares(self.blocks(np.float64))
        self._held: dict[Any, Floats] = {}
        self._known: list[_SideProducts | None] = [None, None]

    def part(self, rows: Index, columns: Index, scales: Any = 1.0) -> Target:
        A = self.entries(rows, columns) * scales
        return WeightedTarget(A, self.pool, self.weights.part(rows, columns))

    def coupling(self, axis: int) -> Floats | None:
        return self.H if axis else self.W

    def entry_weights(self, axis: int) -> Any:
        coupled = self.coupling(axis)
        if coupled is not None:
            return np.diag(coupled)
        return 1.0 if axis or self.w is None else self.w

    def weighed_rows(
        self, make: Callable[[slice], Floats]
    ) -> Iterator[tuple[slice, Floats, Floats, Floats]]:
        if self.W is None:
            for rows, part in self.blocks(np.float64):
                N = make(rows)
                yield rows, part, N, N if self.w is None else N * self.w[rows, None]
            return
        whole = make(slice(None))
        weighed = self.pool.matmul(self.W, whole)
        for rows, part in self.blocks(np.float64):
            yield rows, part, whole[rows], weighed[rows]

    def weigh_rows(self, N: NDArray[Any]) -> NDArray[Any]:
        if self.W is not None:
            return self.pool.matmul(self.W, N)
        return N if self.w is None else N * self.w[:, None]

    def weigh_columns(self, N: NDArray[Any]) -> NDArray[Any]:
        return N if self.H is None else self.pool.matmul(self.H, N)

    def squares(self, blocks: Iterable[tuple[slice, Floats]]) -> float:
        if self.W is not None:
            whole = np.empty(self.shape)
            for rows, E in blocks:
                whole[rows] = E
            return float(np.vdot(self.pool.matmul(self.W, whole), self._weigh_inputs(whole)))
        total = 0.0
        for rows, E in blocks:
            squares = np.einsum("ij,ij->i", E, self._weigh_inputs(E))
            total += float(squares.sum() if self.w is None else squares @ self.w[rows])
        return total

    def _weigh_inputs(self, E: Floats) -> Floats:
        return E if self.H is None else self.pool.matmul(E, self.H)

    def _seen(self, side: Side) -> _SideProducts:
        """Return what the other side and d2 need of a side; made anew only when it has changed."""
        known = self._known[side.axis]
        if known is not None and known.is_of(side, self._kind):
            return known
        matmul = self.pool.matmul
        N = side.scaled().astype(self._kind, copy=False)
        coupling = self._own_coupling(side.axis)
        own = N
        if side.axis == 0 and self.w is not None:
            own = N * self.w[:, None].astype(N.dtype)
        weighed = own if coupling is None else matmul(coupling, N)
        whole = self._weighed_matrix()
        cross = matmul(whole if side.axis else whole.T, own)
        form = weighed_gram(self, N, weighed)
        seen = _SideProducts(side.bits.copy(), side.scales.copy(), own, weighed, form, cross)
        self._known[side.axis] = seen
        return seen

    def takes_single(self, k: int) -> bool:
        """Tell whether `normal_equations` are made in single precision: never under weights."""
        return False

    def _weighed_matrix(self) -> Floats:
        """Return ``W A H / unit`` of the matrices among the two that are there, (m, n)."""
        if "W A H" not in self._held:
            whole = np.empty(self.shape)
            for rows, part in self.blocks(np.float64):
                whole[rows] = part
            if self.H is not None:
                whole = self.pool.matmul(whole, self.H)
            if self.W is not None:
                whole = self.pool.matmul(self.W, whole)
            self._held["W A H"] = whole
        return self._in_kind("W A H", self._held["W A H"])

    def _in_kind(self, name: str, array: Floats) -> Floats:
        """Return an array in the precision of now; in single precision it is converted once."""
        if not self.rough:
            return array
        if (name, "rough") not in self._held:
            self._held[name, "rough"] = array.astype(np.float32)
        return self._held[name, "rough"]

    @property
    def _kind(self) -> type[np.floating[Any]]:
        return np.float32 if self.rough else np.float64

    def _own_coupling(self, axis: int) -> Floats | None:
        """Return `coupling` in the precision of now."""
        gram = self.coupling(axis)
        return None if gram is None else self._in_kind("WH"[axis], gram)

    def coupled_equations(self, side: Side) -> Equations:
        """Return `normal_equations` of a side, one of the two sides being coupled.

        If it is this one, the cross products are weighed by its matrix too:
        ``P = D2 U^T W U D2`` (k, k) and ``(D2 U^T W A H)^T`` (n, k) for the right.
        """
        seen, d2 = self._seen(side.other), side.state.d2
        return seen.form * d2 * d2[:, None], seen.cross * d2  # d2 makes them float64

    def coupled_d2_equations(self, state: State) -> Equations:
        """Return `d2_equations`, one of the two sides being coupled."""
        left, right = self._seen(state.left), self._seen(state.right)
        right_side = np.einsum("ik,ik->k", left.own, right.cross, dtype=np.float64)
        return left.form.astype(np.float64) * right.form, right_side

    def sweep_coupled(self, side: Side, move: Move, equations: Equations | None = None) -> int:
        """Move over rows or columns in order; return the flips.

        Time O(n^2 k + n k^2) in matrix products for n of them, and what the move takes.
        """
        coupling = self._coupling_of(side)
        H, kind = self._in_kind("WH"[side.axis], coupling), self._kind
        P, pull = equations or self.coupled_equations(side)
        own_P = P.astype(kind, copy=False)
        N = side.scaled()
        weighed = self._seen(side).weighed.copy()
        matmul = self.pool.matmul
        total = 0
        for start in range(0, len(N), BLOCK):
            part, later = slice(start, start + BLOCK), slice(start + BLOCK, None)
            scales, bits = side.scales[part], side.bits[part]
            h = matmul(side.values(part).astype(kind, copy=False), own_P).astype(np.float64)
            R = pull[part] - matmul(weighed[part], own_P)
            slack = np.full(len(bits), SLACK * self.energy / len(N))
            flips = np.zeros(len(bits), np.int64)
            own = np.ascontiguousarray(coupling[part, part])
            move.columns(bits, h, P, R, own, scales, slack, flips)
            change = side.scaled(part) - N[part]
            moved = np.flatnonzero(change.any(axis=1))
            if moved.size and later.start < len(N):
                change = change[moved].astype(kind, copy=False)
                weighed[later] += matmul(H[later, part][:, moved], change)
            total += int(flips.sum())
        return total

    def solve_coupled(self, side: Side, equations: Equations | None = None) -> None:
        """Set d3 to its least-squares value: ``((Q^T W Q) * H) d3 = diag(Q^T W A H)``; or d1.

        Q = D1 B1 D2 B2; for d1 the same of the transpose. On a grid a good grid point is taken
        instead. The old scales stay if the new ones are worse; from off their grid they are brought
        there first. Cost: ``n k (n + 2 k) + n^3 / 3`` flops for n scales.
        """
        H = self._coupling_of(side)
        P, pull = equations or self.coupled_equations(side)
        scales, values = side.scales, side.values()
        kind = self._kind
        form = _form(values.astype(kind, copy=False), P.astype(kind, copy=False), self.pool)
        normal = form * H
        right = np.einsum("jk,jk->j", values, pull)

        def error(d: Floats) -> float:
            return float(d @ (normal @ d) - 2.0 * (d @ right))

        if side.grid is not None:
            scales[:] = side.grid.round(scales)
            rounded = round_diagonal(normal, right, scales, side.grid.values, anew=False)
            if error(rounded) <= error(scales):
                scales[:] = rounded
            return
        # in units of each channel, so that thresholds mean the same for all
        units = np.sqrt(np.diag(H))
        even = normal / units[:, None] / units
        largest = max(float(np.diag(even).max(initial=0.0)), np.finfo(np.float64).tiny)
        empty = np.diag(even) <= 1e-12 * largest
        even[np.diag_indices_from(even)] += 1e-12 * largest
        _, solved, failed = scipy.linalg.lapack.dposv(even, right / units, lower=1)
        if failed:
            return
        solved /= units
        solved[empty] = scales[empty]
        if np.isfinite(solved).all() and error(solved) <= error(scales):
            scales[:] = solved

    def _coupling_of(self, side: Side) -> Floats:
        gram = self.coupling(side.axis)
        if gram is None:
            raise ValueError("nothing couples this side")
        return gram

    def surrogate(self) -> ScaledTarget:
        """Return the plain problem ``sqrt(W) A sqrt(diag H)``, whose columns are independent."""
        m, n = self.shape
        w = np.diag(self.W) if self.W is not None else self.w
        rows = np.ones(m) if w is None else np.sqrt(w)
        rows[rows == 0] = _LEAST_SCALE * middling(rows)
        columns = np.ones(n) if self.H is None else np.sqrt(np.diag(self.H))
        return ScaledTarget(self.A, self.pool, rows, columns)


class ScaledTarget(Target):
    """``diag(rows) A diag(columns)``, scaled as it is read."""

    def __init__(self, A: NDArray[Any], pool: ThreadPool, rows: Floats, columns: Floats) -> None:
        self.rows, self.columns = rows, columns
        super().__init__(A, pool)

    def read(self, rows: RowIndex) -> Floats:
        return super().read(rows) * self.rows[rows, None] * self.columns

    def restore(self, state: State, unit: float) -> None:
        """Turn a factorization of the scaled matrix into one of ``A / unit``."""
        state.d1 = state.d1 / self.rows
        state.d3 = state.d3 / self.columns
        state.d2 = state.d2 * (self.unit / unit)


class Lost:
    """Rows and columns of a matrix that a state loses: hardly anything of them is left.

    Attributes
    ----------
    energies : list of (3,) rows of float64
        Of each row: its energy, that of what it became, and that of the error; then of columns.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self.energies = [np.zeros((3, size)) for size in shape]

    def add(self, rows: slice, part: Floats, residual: Floats) -> None:
        """Take in rows of the matrix and their residual."""
        for i, array in enumerate((part, part - residual, residual)):
            squares = np.square(array)
            self.energies[0][i, rows] = squares.sum(axis=1)
            self.energies[1][i] += squares.sum(axis=0)

    def counts(self) -> dict[str, int]:
        """Return how many rows and columns that are not zero came out as zero."""
        names = ("zero_rows", "zero_columns")
        return {
            name: int(((before > 0) & (after == 0)).sum())
            for name, (before, after, _) in zip(names, self.energies, strict=True)
        }

    def sentence(self, plain: bool) -> str | None:
        """Return what to warn of, if anything; `plain`: the error is that of the matrix itself.

        Of rows that are small beside the others: what few components leave of an ordinary row is
        what the SNR tells, and `counts`. Under weights an error larger than a row may be the
        smaller one as they see it.
        """
        parts = []
        for name, (before, after, error) in zip(("row", "column"), self.energies, strict=True):
            small = (before > 0) & (before < _SMALL * before.mean())
            at = np.flatnonzero(small & ((after == 0) | (plain & (error > _NOTHING * before))))
            if at.size:
                parts.append(f"{at.size} {name}{'s' * (at.size > 1)} (the first {int(at[0])})")
        if not parts:
            return None
        return (
            f"A loses {' and '.join(parts)}, small beside the others: nothing of them is right in "
            "the result; give more bits, scale_bits=32, or an output_weight= that evens rows out"
        )


def snr_facts(target: Target, *states: State, lost: Lost | None = None) -> dict[str, float | None]:
    """Return the SNRs of a sum of states in dB for the record; None stands for an exact fit.

    `lost` takes in what the same pass tells about rows and columns. ``snr_db`` is that of the
    matrix itself. With a Gram matrix ``output_snr_db`` is that of the outputs for the inputs as
    given, neither shrunk nor weighted.
    """
    gram = target.gram if isinstance(target, WeightedTarget) else None
    signal, noise = np.zeros(2), np.zeros(2)
    for rows, part, residual in residuals(target, *states):
        if lost is not None:
            lost.add(rows, part, residual)
        for total, E in ((signal, part), (noise, residual)):
            total[0] += np.vdot(E, E)
            if gram is not None:
                total[1] += np.vdot(E, target.pool.matmul(E, gram))
    facts = {"snr_db": decibels(signal[0], noise[0]) if noise[0] else None}
    if gram is not None:
        facts["output_snr_db"] = decibels(signal[1], noise[1]) if noise[1] > 0 else None
    return facts


def reached_db(target: Target, *states: State) -> float:
    """Return the SNR that ``snr=`` is about: of the outputs, or else of the (weighted) error."""
    if isinstance(target, WeightedTarget) and target.gram is not None:
        output = snr_facts(target, *states)["output_snr_db"]
        return float("inf") if output is None else output
    return decibels(target.energy, squared_error(target, *states))
