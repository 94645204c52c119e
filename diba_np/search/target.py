"""`Target`: the matrix that is factorized, checked once and read in row blocks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diba_np.metrics import largest_magnitude, row_blocks
from diba_np.threads import Workers

# magnitudes beyond these leave no room in float32 for the factors and their products
_LARGEST, _SMALLEST = 1e35, 1e-35

_PIECE = 1 << 18  # entries that are converted at a time


def as_matrix(A: ArrayLike, name: str = "A") -> NDArray[Any]:
    """Check that `A` is a real, finite, non-empty matrix; return it uncopied if it is an array.

    Raises
    ------
    TypeError
        Not an array of real numbers.
    ValueError
        Not two-dimensional, empty, or with NaN or infinity.
    """
    if hasattr(A, "tocsr"):
        raise TypeError(f"{name} must be a dense array, got a sparse matrix; pass {name}.toarray()")
    try:
        matrix = np.asanyarray(A)
    except ValueError as error:  # ragged nested lists
        raise ValueError(f"{name} must be a rectangular 2-D array: {error}") from None
    if isinstance(matrix, np.ma.MaskedArray) and matrix.mask.any():
        count = int(matrix.mask.sum())
        raise ValueError(f"{name} must have no masked entries, got {count}")
    if not isinstance(matrix, np.memmap):
        matrix = np.asarray(matrix)  # numpy.matrix and others give blocks of another shape
    if matrix.dtype.kind not in "buif":
        raise TypeError(f"{name} must be an array of real numbers, got dtype {matrix.dtype}")
    if matrix.ndim != 2:
        raise ValueError(f"{name} must be 2-D, got shape {matrix.shape}")
    if 0 in matrix.shape:
        raise ValueError(f"{name} must have rows and columns, got shape {matrix.shape}")
    if matrix.dtype.kind == "f":
        count, first = 0, None
        for rows in row_blocks(matrix.shape):
            wrong = ~np.isfinite(matrix[rows])
            found = int(wrong.sum())
            if found and first is None:
                i, j = np.argwhere(wrong)[0]
                first = (rows.start + int(i), int(j))
            count += found
        if count:
            entries = "entry" if count == 1 else "entries"
            raise ValueError(f"{name} contains {count} non-finite {entries}; first at {first}")
    return matrix


def check_magnitude(A: NDArray[Any], name: str) -> float:
    """Return the largest magnitude; ValueError where float32 diagonals could not carry it."""
    largest = largest_magnitude(A)
    if largest and not _SMALLEST <= largest <= _LARGEST:
        raise ValueError(
            f"the largest magnitude in {name} must lie in [{_SMALLEST:g}, {_LARGEST:g}], "
            f"got {largest:g}; scale {name} first"
        )
    return largest


def digest(A: NDArray[Any]) -> str:
    """Return the SHA-256 of a matrix: its dtype, shape and entries in row order."""
    little = A.dtype.newbyteorder("<") if A.dtype.byteorder == ">" else A.dtype
    sha = hashlib.sha256(f"{little.str} {A.shape[0]} {A.shape[1]} ".encode())
    for rows in row_blocks(A.shape):
        sha.update(np.ascontiguousarray(A[rows], little).data)
    return sha.hexdigest()


class Target:
    """A matrix in units of its root mean square, read in row blocks.

    An array in memory is converted once for each precision and kept; a memory map, or any array
    where the workers are told to stream, is converted block by block at every pass.

    Parameters
    ----------
    A : (m, n) array, as `as_matrix` returns it
    workers : Workers
        Runs the products.

    Attributes
    ----------
    shape : (int, int)
    unit : float
        Root mean square of the entries (1.0 for a zero matrix); ``A / unit`` is what is fitted.
    energy : float
        Squared Frobenius norm of ``A / unit``: m n, or 0.0.

    Notes
    -----
    The errors of a plain target are weighed by nothing: `diba_np.search.activations` has the other
    kind, whose methods of the same names weigh them.
    """

    def __init__(self, A: NDArray[Any], workers: Workers) -> None:
        self.A = A
        self.shape = (int(A.shape[0]), int(A.shape[1]))
        self.workers = workers
        self._streamed = workers.streamed or isinstance(A, np.memmap)
        self._kept: dict[np.dtype[Any], NDArray[Any]] = {}
        largest = check_magnitude(A, "A")
        squares = 0.0
        for rows in row_blocks(self.shape, workers.entries):
            part = self.read(rows)
            part /= largest or 1.0
            squares += float(np.vdot(part, part))
        self.unit = largest * float(np.sqrt(squares / A.size)) or 1.0
        self.energy = float(A.size) if squares else 0.0

    def part(self, rows: slice, columns: slice) -> Target:
        """Return a part of the matrix, copied, as a target of its own."""
        return Target(np.array(self.A[rows, columns]), self.workers)

    def read(self, rows: slice) -> NDArray[np.float64]:
        """Return some rows of A in float64."""
        return self.A[rows].astype(np.float64)

    def blocks(self, dtype: Any) -> Iterator[tuple[slice, NDArray[Any]]]:
        """Yield (rows, ``A[rows] / unit``) in C order as `dtype`, each good until the next."""
        slices = self.workers.row_blocks(*self.shape)
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
        if dtype not in self._kept:
            kept = np.empty(self.shape, dtype)
            for rows in row_blocks(self.shape):
                kept[rows] = self._part(rows, dtype)
            self._kept[dtype] = kept
        return self._kept[dtype]

    def weighed_rows(
        self, make: Callable[[slice], NDArray[np.float64]]
    ) -> Iterator[tuple[slice, NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]]:
        """Yield (rows, ``A[rows] / unit``, rows of N, rows of ``W N``), ``N[rows] = make(rows)``.

        W are the weights of the outputs; here there are none.
        """
        for rows, part in self.blocks(np.float64):
            N = make(rows)
            yield rows, part, N, N

    def weigh_columns(self, N: NDArray[Any]) -> NDArray[Any]:
        """Return ``H N`` for N (n, k) with the Gram matrix H of the inputs; here N itself."""
        return N

    def squares(self, blocks: Iterable[tuple[slice, NDArray[Any]]]) -> float:
        """Return ``tr(W E H E^T)`` of E given in row blocks; here the sum of squares."""
        return sum(float(np.vdot(E, E)) for _, E in blocks)

    def coupling(self, left: bool) -> NDArray[np.float64] | None:
        """Return W (m, m) or H (n, n) where it couples the rows of B1 or columns of B2."""
        return None

    def sweep_coupled(
        self, state: Any, left: bool, kernel: Any, passes: int, *extra: Any, equations: Any = None
    ) -> int:
        """Search one side whose rows or columns are coupled; return the flips."""
        raise NotImplementedError

    def solve_coupled(self, state: Any, left: bool, equations: Any = None) -> None:
        """Solve for d1 or d3 where the rows or columns are coupled."""
        raise NotImplementedError

    def matmul(self, N: NDArray[Any], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Return ``(A / unit) @ N`` for N (n, k), in N's dtype; (m, k)."""
        if out is None:
            out = np.empty((self.shape[0], N.shape[1]), N.dtype)
        if not self._streamed:
            return self.workers.matmul(self._whole(N.dtype), N, out=out)
        for rows, part in self.blocks(N.dtype):
            self.workers.matmul(part, N, out=out[rows])
        return out

    def rmatmul(self, N: NDArray[Any], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Return ``(A / unit).T @ N`` for N (m, k), in N's dtype; (n, k)."""
        if out is None:
            out = np.empty((self.shape[1], N.shape[1]), N.dtype)
        if not self._streamed:
            return self.workers.matmul(self._whole(N.dtype).T, N, out=out)
        out[:] = 0
        for rows, part in self.blocks(N.dtype):
            out += self.workers.matmul(part.T, N[rows])
        return out
