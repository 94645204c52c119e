"""`Target`: the matrix that is factorized, checked once and read in row blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diba_np.arrays import Index, RowIndex, largest_magnitude, row_blocks
from diba_np.machine.thread_pool import ThreadPool

_PIECE = 1 << 18  # entries that are converted at a time
_WORTH_ROUNDING = 1e8  # flops


class Target:
    """A matrix in units of its root mean square, read in row blocks.

    An array in memory is converted once for each precision and kept; a memory map, or any array
    where the pool is told to stream, is converted block by block at every pass.

    Parameters
    ----------
    A : (m, n) array, as `as_matrix` returns it
    pool : ThreadPool
        Runs the products.

    Attributes
    ----------
    shape : (int, int)
    unit : float
        Root mean square of the entries (1.0 for a zero matrix); ``A / unit`` is what is fitted.
    largest : float
        Largest magnitude of the entries: of what is left over it may be anything.
    energy : float
        Squared Frobenius norm of ``A / unit``: m n, or 0.0.
    rough : bool
        Whether single precision will do for equations, where the target has a choice.

    Notes
    -----
    The errors of a plain target are weighed by nothing: `diba_np.search.weighted_target` has the
    other kind, whose methods of the same names weigh them.
    """

    def __init__(self, A: NDArray[Any], pool: ThreadPool) -> None:
        self.A = A
        self.shape = (int(A.shape[0]), int(A.shape[1]))
        self.pool = pool
        self._streamed = pool.streamed or isinstance(A, np.memmap)
        self._converted: dict[np.dtype[Any], NDArray[Any]] = {}
        self.largest = largest = largest_magnitude(A)
        squares = 0.0
        for rows in row_blocks(self.shape, pool.entries):
            part = self.read(rows)
            part /= largest or 1.0
            squares += float(np.vdot(part, part))
        self.unit = largest * float(np.sqrt(squares / A.size)) or 1.0
        self.energy = float(A.size) if squares else 0.0
        self.rough = False

    def takes_single(self, k: int) -> bool:
        """Tell whether equations of k components are made in single precision: rough and large."""
        return self.rough and self.worth_rounding(k)

    def worth_rounding(self, k: int) -> bool:
        """Tell whether products with k columns are large enough for fewer digits to save time."""
        return 2.0 * self.shape[0] * self.shape[1] * k >= _WORTH_ROUNDING

    def part(self, rows: Index, columns: Index, scales: Any = 1.0) -> Target:
        """Return some rows and columns, copied and times `scales`, as a target of its own."""
        return Target(self.entries(rows, columns) * scales, self.pool)

    def entries(self, rows: Index, columns: Index) -> NDArray[np.float64]:
        """Return the entries of some rows in some columns, as they are read."""
        found = np.empty((len(rows), len(columns)))
        for at in row_blocks((len(rows), self.shape[1]), self.pool.entries):
            found[at] = self.read(rows[at])[:, columns]
        return found

    def read(self, rows: RowIndex) -> NDArray[np.float64]:
        """Return some rows of the matrix in float64; all that is read of it comes from here."""
        return self.A[rows].astype(np.float64)

    def blocks(self, dtype: Any) -> Iterator[tuple[slice, NDArray[Any]]]:
        """Yield (rows, ``A[rows] / unit``) in C order as `dtype`, each good until the next."""
        slices = self.pool.row_blocks(*self.shape)
        if not self._streamed:
            for rows in slices:
                yield rows, self._whole(dtype)[rows]
            return
        # one array serves all blocks, and pieces keep what the conversion takes small
        buffer = np.empty((slices[0].stop, self.shape[1]), dtype)
        for rows in slices:
            part = buffer[: rows.stop - rows.start]
            for at in row_blocks(part.shape, _PIECE):
                part[at] = self._part(slice(rows.start + at.start, rows.start + at.stop), dtype)
            yield rows, part

    def _part(self, rows: slice, dtype: Any) -> NDArray[Any]:
        part = self.read(rows)
        part /= self.unit
        return part.astype(dtype, copy=False)

    def _whole(self, dtype: Any) -> NDArray[Any]:
        dtype = np.dtype(dtype)
        if dtype not in self._converted:
            whole = np.empty(self.shape, dtype)
            for rows in row_blocks(self.shape):
                whole[rows] = self._part(rows, dtype)
            self._converted[dtype] = whole
        return self._converted[dtype]

    def weighed_rows(
        self, make: Callable[[slice], NDArray[np.float64]]
    ) -> Iterator[tuple[slice, NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]]:
        """Yield (rows, ``A[rows] / unit``, rows of N, rows of ``W N``), ``N[rows] = make(rows)``.

        W are the weights of the outputs; here there are none.
        """
        for rows, part in self.blocks(np.float64):
            N = make(rows)
            yield rows, part, N, N

    def weigh_rows(self, N: NDArray[Any]) -> NDArray[Any]:
        """Return ``W N`` for N (m, k) with the weights W of the outputs; here N itself."""
        return N

    def weigh_columns(self, N: NDArray[Any]) -> NDArray[Any]:
        """Return ``H N`` for N (n, k) with the Gram matrix H of the inputs; here N itself."""
        return N

    def squares(self, blocks: Iterable[tuple[slice, NDArray[Any]]]) -> float:
        """Return ``tr(W E H E^T)`` of E given in row blocks; here the sum of squares."""
        return sum(float(np.vdot(E, E)) for _, E in blocks)

    def coupling(self, axis: int) -> NDArray[np.float64] | None:
        """Return W (m, m) or H (n, n) where it couples the rows of B1 (axis 0) or columns of B2."""
        return None

    @property
    def is_coupled(self) -> bool:
        """Whether weights couple rows or columns."""
        return any(self.coupling(axis) is not None for axis in (0, 1))

    def coupled_equations(self, side: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the normal equations of a side where weights couple this one or the other."""
        raise NotImplementedError

    def coupled_d2_equations(self, state: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the equations for d2 where weights couple a side."""
        raise NotImplementedError

    def sweep_coupled(self, side: Any, move: Any, equations: Any = None) -> int:
        """Move over one side whose rows or columns are coupled; return the flips."""
        raise NotImplementedError

    def entry_weights(self, axis: int) -> Any:
        """Return the weight of each row (axis 0) or column of the error by itself; 1.0 for none."""
        return 1.0

    def solve_coupled(self, side: Any, equations: Any = None) -> None:
        """Solve for d1 or d3 where the rows or columns are coupled."""
        raise NotImplementedError

    def product(
        self,
        axis: int,
        N: NDArray[Any],
        out: NDArray[Any] | None = None,
        rounded: bool = False,
    ) -> NDArray[Any]:
        """Return `matmul` for axis 0, `rmatmul` for axis 1."""
        return self.rmatmul(N, out, rounded) if axis else self.matmul(N, out, rounded)

    def matmul(
        self, N: NDArray[Any], out: NDArray[Any] | None = None, rounded: bool = False
    ) -> NDArray[Any]:
        """Return ``(A / unit) @ N`` for N (n, k), in N's dtype; (m, k).

        With `rounded` as `ThreadPool.matmul` rounds.
        """
        if out is None:
            out = np.empty((self.shape[0], N.shape[1]), N.dtype)
        if not self._streamed:
            return self.pool.matmul(self._whole(N.dtype), N, out, rounded)
        for rows, part in self.blocks(N.dtype):
            self.pool.matmul(part, N, out[rows], rounded)
        return out

    def rmatmul(
        self, N: NDArray[Any], out: NDArray[Any] | None = None, rounded: bool = False
    ) -> NDArray[Any]:
        """Return ``(A / unit).T @ N`` for N (m, k), in N's dtype; (n, k)."""
        if out is None:
            out = np.empty((self.shape[1], N.shape[1]), N.dtype)
        if not self._streamed:
            return self.pool.matmul(self._whole(N.dtype).T, N, out, rounded)
        out[:] = 0
        for rows, part in self.blocks(N.dtype):
            out += self.pool.matmul(part.T, N[rows], rounded=rounded)
        return out
