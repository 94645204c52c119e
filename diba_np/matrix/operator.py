"""What an operator does: products, entries, the transpose, as scipy's ``LinearOperator``.

`Expandable` can be written out; `Operator` multiplies on both sides by two maps of columns, and
`Adjoint` is its transpose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse.linalg import LinearOperator

from diba_np.arrays import RowIndex, float_type, row_blocks
from diba_np.checks import as_real, check_dense
from diba_np.matrix import quality

Array = NDArray[Any]


def as_operand(X: ArrayLike) -> Array:
    """Return numbers in the precision of a product with them, that of every compressed matrix.

    Raises
    ------
    TypeError
        They are neither real nor complex.
    """
    X = np.asarray(X)
    if X.dtype.kind == "c":
        return X.astype(np.complex64 if X.dtype.itemsize == 8 else np.complex128, copy=False)
    X = np.asarray(as_real(X, "the operand", "hold real numbers"))
    return X.astype(float_type(X.dtype), copy=False)


def along_stack(apply: Callable[[Array], Array], X: Array) -> Array:
    """Apply a map on (n, N) arrays to each matrix of X (..., n, N), all of them at once."""
    if X.ndim < 3:
        return apply(X)
    columns = np.moveaxis(X, -2, 0)
    y = apply(columns.reshape(len(columns), -1))
    return np.moveaxis(y.reshape(len(y), *columns.shape[1:]), 0, -2)


_PLAIN = (np.dtype(np.float32), np.dtype(np.float64))


def is_plain(x: Any, n: int) -> bool:
    """Tell whether x is what most products are with: float32 or float64, (n,) or (n, N).

    Such products do without scipy's checks, which take longer than a small product.
    """
    return type(x) is np.ndarray and x.dtype in _PLAIN and x.ndim in (1, 2) and len(x) == n


def with_total(y: Array) -> tuple[Array, float]:
    """Return an array and its sum, which is not finite if an entry is not; or if it overflows."""
    return y, np.add.reduce(y, axis=None)


def real_product(
    X: Array, fast: Callable[[Array], tuple[Array, float]], dense: Callable[[Array], Array]
) -> Array:
    """Multiply from stored parts, or with the dense matrix where the result is not finite.

    Parameters
    ----------
    X : (n, N) array
        As of `as_operand`; complex columns are multiplied as real and imaginary parts.
    fast, dense : callable
        From real C-order (n, N) to (m, N), float32 or float64; `fast` with a number that is not
        finite if an entry is not, as of `with_total`.
    """
    if X.dtype.kind == "c":
        real, imaginary = (real_product(part, fast, dense) for part in (X.real, X.imag))
        return real + 1j * imaginary
    if not X.flags.carray:
        X = np.require(X, requirements=["C", "W", "A"])
    with np.errstate(over="ignore", invalid="ignore"):
        if X.size:
            y, total = fast(X)
            if math.isfinite(total):
                return y
        return np.asarray(dense(X))


def _index(index: Any) -> Any:
    """Return an index as NumPy takes it: an empty list is one of integers, not of floats."""
    if isinstance(index, tuple):  # tuples inside are lists
        return tuple(_index(list(part) if isinstance(part, tuple) else part) for part in index)
    return np.asarray(index, np.intp) if isinstance(index, list) and not index else index


class Expandable(LinearOperator):  # type: ignore[misc]  # scipy ships no types
    """A linear operator that can be written out, whole or in parts: NumPy's matrix where asked.

    A subclass has `to_dense`, and `_map` for products.
    """

    def to_dense(self) -> Array:
        """Return the matrix as (m, n) float32."""
        raise NotImplementedError

    def _map(self, X: Array) -> Array:
        """Return ``A_hat @ X`` for X of shape (n, N), of real or complex numbers."""
        raise NotImplementedError

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("a compressed matrix cannot become an array without a copy")
        return self.to_dense().astype(dtype or np.float32, copy=bool(copy))

    def row_expander(self, columns: RowIndex = slice(None)) -> Callable[[RowIndex], Array]:
        """Return a function from a slice or vector of rows to those of the matrix, float32.

        Of their entries those in `columns`, a slice or vector.
        """
        rows: Callable[[RowIndex], Array] = self.to_dense()[:, columns].__getitem__
        return rows

    def rows(self, index: Any) -> NDArray[np.float32]:
        """Return rows of the matrix, without the rest of it.

        Parameters
        ----------
        index : int, slice, or array_like of int or bool
            Which rows, with the meaning it has for a NumPy array of m entries.

        Returns
        -------
        (..., n) float32 ndarray
            ``to_dense()[index]``: (n,) for an int, (r, n) for r rows.

        Raises
        ------
        IndexError
            As NumPy raises it: out of range, not integers, too many indices.

        Notes
        -----
        Of a `DiBAFactors` ``k n`` steps and ``4 k n`` bytes a call, then ``2 k n`` flops a row: ask
        for many rows at once.
        """
        m, n = self.shape
        picked = np.asarray(np.arange(m)[_index(index)])
        out = np.empty((*picked.shape, n), np.float32)
        if picked.size:
            flat, chosen = out.reshape(-1, n), picked.ravel()
            expand = self.row_expander()
            for part in row_blocks(flat.shape):
                flat[part] = expand(chosen[part])
        return out

    def __getitem__(self, index: Any) -> Any:
        """Return entries of the matrix as a NumPy array gives them, ``to_dense()[index]``.

        Parameters
        ----------
        index : int, slice, array_like of int or bool, Ellipsis, None, or a tuple of them
            ``f[3, 5]`` is an entry, ``f[3]`` a row, ``f[:, 1]`` a column, ``f[2:4, ::2]`` a block,
            ``f[[0, 1], [2, 3]]`` two entries, ``f[mask]`` those of an (m, n) mask.

        Returns
        -------
        float32 or ndarray of float32

        Raises
        ------
        IndexError
            As NumPy raises it.

        Notes
        -----
        The rows that are needed are expanded block by block, only their columns that are needed
        where a method can: of a `DiBAFactors` of c columns ``2 k c`` flops a row.
        """
        m, n = self.shape
        index = _index(index)
        parts = index if isinstance(index, tuple) else (index,)
        axes = [part for part in parts if part is not None and part is not Ellipsis]
        if len(parts) == len(axes) == 1 and np.ndim(axes[0]) < 2:
            return self.rows(axes[0])
        if len(axes) < 3 and all(
            isinstance(axis, (int, np.integer, slice)) and not isinstance(axis, bool)
            for axis in axes
        ):
            return self._block(index, parts, axes)
        # the numbers of the rows and of the columns that stand in the result
        at_row = np.broadcast_to(np.arange(m)[:, None], (m, n))[index]
        at_column = np.broadcast_to(np.arange(n), (m, n))[index]
        rows, row_of = np.unique(at_row, return_inverse=True)
        columns, column_of = np.unique(at_column, return_inverse=True)
        out = np.empty(np.shape(at_row), np.float32)
        flat, row_of, column_of = out.reshape(-1), row_of.reshape(-1), column_of.reshape(-1)
        if not out.size:
            return out
        expand = self.row_expander(columns)
        order = np.argsort(row_of, kind="stable")
        for part in row_blocks((len(rows), len(columns))):
            block = expand(rows[part])
            at = order[slice(*np.searchsorted(row_of, (part.start, part.stop), sorter=order))]
            flat[at] = block[row_of[at] - part.start, column_of[at]]
        return out if isinstance(at_row, np.ndarray) else out[()]

    def _block(self, index: Any, parts: tuple[Any, ...], axes: Sequence[Any]) -> Any:
        """Return the entries at an index of one or two slices or ints, with None and Ellipsis."""
        own = [*axes, *[slice(None)] * (2 - len(axes))]
        if len(axes) == 1 and Ellipsis in parts[: parts.index(axes[0])]:
            own.reverse()
        like = np.broadcast_to(np.float32(0), self.shape)[index]  # its shape, and errors
        rows, columns = (
            np.atleast_1d(np.arange(s)[a]) for s, a in zip(self.shape, own, strict=True)
        )
        out = np.empty((len(rows), len(columns)), np.float32)
        if out.size:
            expand = self.row_expander(columns)
            for part in row_blocks(out.shape):
                out[part] = expand(rows[part])
        out = out.reshape(like.shape)
        return out if isinstance(like, np.ndarray) else out[()]

    def _matmat(self, X: Array) -> Array:
        """Return ``A_hat @ X`` for X (..., n, N)."""
        return along_stack(self._map, as_operand(X))

    def _matvec(self, x: Array) -> Array:
        """Return ``A_hat x`` for x (..., n), one vector along the last axis, or a column (n, 1)."""
        x, (m, n) = as_operand(x), self.shape
        if x.ndim == 1:
            return self._map(x[:, None])[:, 0]
        if x.shape[-1] != n and x.shape == (n, 1):
            return self._map(x)
        return np.ascontiguousarray(self._map(x.reshape(-1, n).T).T).reshape(*x.shape[:-1], m)

    def __matmul__(self, x: Any) -> Any:
        if is_plain(x, self.shape[1]):
            return self._map(x[:, None])[:, 0] if x.ndim == 1 else self._map(x)
        return super().__matmul__(x)

    def __rmatmul__(self, x: Any) -> Any:
        if type(x) is np.ndarray and is_plain(x.T, self.shape[0]):
            return self.T @ x if x.ndim == 1 else (self.T @ x.T).T
        if getattr(x, "ndim", 0) > 2 and x.shape[-1] == self.shape[0]:
            return np.swapaxes(self.T.dot(np.swapaxes(x, -1, -2)), -1, -2)
        return super().__rmatmul__(x)

    # what scipy turns into plain arrays before it comes to a product
    def dot(self, x: Any) -> Any:
        """Return the product with a vector, a matrix, a stack of matrices or an operator."""
        check_dense(x, "the operand")
        if getattr(x, "ndim", 0) > 2 and x.shape[-2] == self.shape[1]:  # before SciPy 1.18 refused
            return self._matmat(x)
        return super().dot(x)

    def matvec(self, x: ArrayLike) -> Any:
        """Multiply with a vector, or with many along leading axes.

        Parameters
        ----------
        x : (n,), (n, 1) or (..., n) array_like

        Returns
        -------
        (m,), (m, 1) or (..., m) ndarray
        """
        n = self.shape[1]
        if is_plain(x, n) and np.ndim(x) == 1:  # as iterative solvers ask
            return self @ x
        check_dense(x, "the operand")
        if np.shape(x) == (n, 1):  # scipy takes no column for a vector from 1.20 on
            return self.matmat(x)
        if np.ndim(x) > 1 and np.shape(x)[-1] == n:  # nor, before 1.18, many vectors
            return self._matvec(np.asanyarray(x))
        return super().matvec(x)

    def matmat(self, X: ArrayLike) -> Any:
        """Return the product with a matrix (n, N), as scipy has it."""
        check_dense(X, "the operand")
        return super().matmat(X)

    def rmatvec(self, x: ArrayLike) -> Any:
        """Multiply the transpose with a vector (m,), a column, or many vectors; see `matvec`."""
        return self.T.matvec(x)

    def rmatmat(self, X: ArrayLike) -> Any:
        """Return the product of the transpose with a matrix (m, N)."""
        return self.T.matmat(X)

    def snr(self, A: ArrayLike) -> float:
        """Return ``10 log10(|A|_F^2 / |A - A_hat|_F^2)`` in dB."""
        return quality.snr_db(A, self)


class Operator(Expandable):
    """An operator whose products decode the matrix once and keep the dense copy.

    A subclass that multiplies from stored parts overrides `_apply` and `_apply_transposed`.
    """

    _decoded: Any = None

    def _dense(self) -> Any:
        if self._decoded is None:
            self._decoded = self.to_dense()
        return self._decoded

    def _apply(self, X: Array) -> Array:
        """Return ``A_hat @ X`` for X of shape (n, N)."""
        result: Array = self._dense() @ X
        return result

    def _apply_transposed(self, Y: Array) -> Array:
        """Return ``A_hat.T @ Y`` for Y of shape (m, N)."""
        result: Array = self._dense().T @ Y
        return result

    def _map(self, X: Array) -> Array:
        return self._apply(X)

    def _adjoint(self) -> LinearOperator:
        return Adjoint(self)

    _transpose = _adjoint


class Adjoint(Expandable):
    """The transposed operator of an `Operator` (real, so also its adjoint)."""

    def __init__(self, parent: Operator) -> None:
        super().__init__(parent.dtype, parent.shape[::-1])
        self.parent = parent

    def to_dense(self) -> Array:
        """Return the transpose as (n, m) float32."""
        return np.ascontiguousarray(self.parent.to_dense().T)

    def _map(self, X: Array) -> Array:
        return self.parent._apply_transposed(X)

    def _adjoint(self) -> LinearOperator:
        return self.parent

    _transpose = _adjoint
