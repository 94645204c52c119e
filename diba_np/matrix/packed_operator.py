"""`PackedOperator`: an operator that multiplies from packed bits, by a `Product`."""

from __future__ import annotations

from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diba_np.checks import check_dense
from diba_np.matrix.operator import Operator, along_stack, is_plain
from diba_np.products.product import Product


class PackedOperator(Operator):
    """An operator whose products are those of a `Product`, of any operand; nothing is decoded."""

    @property
    def _product(self) -> Product:
        """What multiplies; made once."""
        raise NotImplementedError

    def _matmat(self, X: NDArray[Any]) -> NDArray[Any]:
        """Return ``A_hat @ X`` for X (..., n, b); a vector (n,) is taken too."""
        X = np.asarray(X)
        if X.dtype.kind == "c":
            return self._matmat(X.real) + 1j * self._matmat(X.imag)
        if X.ndim == 1:
            return self._product.vector(X)
        return along_stack(self._product.matrix, X)

    def _matvec(self, x: NDArray[Any]) -> NDArray[Any]:
        """Return ``A_hat x`` for x (..., n), one vector along the last axis."""
        x = np.asarray(x)
        n = self.shape[1]
        if x.ndim == 1 or (x.shape == (n, 1) and n != 1):
            return self._matmat(x.reshape(n))
        if x.dtype.kind == "c":
            return self._matvec(x.real) + 1j * self._matvec(x.imag)
        return self._product.rows(x.reshape(-1, n)).reshape(*x.shape[:-1], self.shape[0])

    @overload
    def __matmul__(self, x: NDArray[Any]) -> NDArray[Any]: ...
    @overload
    def __matmul__(self, x: Any) -> Any: ...

    def __matmul__(self, x: Any) -> Any:
        if is_plain(x, self.shape[1]):
            return self._product.vector(x) if x.ndim == 1 else self._product.matrix(x)
        return super().__matmul__(x)

    def matvec_rounded(self, x: ArrayLike) -> NDArray[np.float32]:
        """Multiply with a vector in 16-bit tables: up to 1.6 (AVX2: 2.2) times as fast, not exact.

        Parameters
        ----------
        x : (n,) array_like of real numbers

        Returns
        -------
        (m,) float32 ndarray

        Raises
        ------
        TypeError, ValueError
            `x` is not real or not of shape (n,).

        Notes
        -----
        On CPUs with AVX2, NEON, or AVX-512 with VNNI; elsewhere this is ``f @ x`` in float32.
        For the transpose call ``f.T.matvec_rounded(y)``.

        The error is that of a random rounding, 1e-4 to 4e-4 in the root mean square over the
        result, relative to the *+-1 part*: what ``D1 (B1 - 1/2) D2 (B2 - 1/2) D3 x`` would be if
        its signs were random. It is no bound for single entries, and where the terms of the
        result cancel it is that much larger relative to the result. It grows with the largest
        sum of 30 neighbours' magnitudes in ``d3 * x`` (AVX2 and NEON: of 8), over the root mean
        square, and likewise between the two binaries; where such outliers would make it more than
        1e-3, the product is done in float32. The largest possible error of one entry, after the
        first binary, is ``n / 5`` half steps of which 131 040 make up that largest sum (AVX2 and
        NEON: ``4 n / 15``, of which 64 480 do).
        """
        check_dense(x, "x")
        x = np.asarray(x)
        if x.shape != (self.shape[1],):
            raise ValueError(f"x must have shape ({self.shape[1]},), got {x.shape}")
        return self._product.vector_rounded(x)
