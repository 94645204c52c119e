"""`DiBAFactors`: what a factorization is, as a scipy LinearOperator."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diba_np.arrays import RowIndex
from diba_np.checks import check_count, check_shift
from diba_np.files.container import Container
from diba_np.matrix.base import CompressedMatrix
from diba_np.matrix.budgets import DENSE_BITS, storage_bits
from diba_np.matrix.diagonals import Grids, ScaleBits, stored_scale_bits
from diba_np.matrix.factors_format import payload, rebuild
from diba_np.matrix.packed_bits import PackedBits
from diba_np.matrix.registry import ADAPTATION, resolve
from diba_np.products.product import Product

Vector = NDArray[np.float32]


def _diagonal(values: ArrayLike, name: str, size: int) -> Vector:
    """Check one diagonal and return it as a read-only float32 vector."""
    vector = np.asarray(values)
    if vector.dtype.kind not in "buif":
        raise TypeError(f"{name} must be a vector of real numbers, got dtype {vector.dtype}")
    if vector.shape != (size,):
        raise ValueError(f"{name} must have shape ({size},), got {vector.shape}")
    with np.errstate(over="ignore"):
        single = np.array(vector, np.float32)
    wrong = np.flatnonzero(~np.isfinite(single))
    if wrong.size:
        raise ValueError(
            f"{name} must be finite in float32, got {vector[wrong[0]]} at {int(wrong[0])}"
        )
    single.setflags(write=False)
    return single


_FIXED = frozenset({"d1", "b1", "d2", "b2", "d3", "shift", "grids", "bias"})


class DiBAFactors(CompressedMatrix):
    """A matrix as ``D1 (B1 - shift) D2 (B2 - shift) D3``: three diagonals, two 0/1 matrices.

    With ``shift=0`` this is DiBA (arXiv 2605.05994); ``shift=0.5`` is the +-1 alphabet on the same
    bits. Immutable. It is a `scipy.sparse.linalg.LinearOperator` of dtype float32, so ``f @ x``,
    ``f.T @ y``, ``svds(f, 5)`` and ``lsqr(f, y)`` work; it pickles, and `save` keeps it in HDF5.

    Parameters
    ----------
    d1 : (m,) array_like of float
    b1 : (m, k) PackedBits or array_like of 0 and 1
    d2 : (k,) array_like of float
    b2 : (k, n) PackedBits or array_like of 0 and 1
    d3 : (n,) array_like of float
    shift : float, default 0.0
        Alphabet shift: a bit b stands for ``b - shift``.
    record : dict, optional
        How the factorization was made; anything that JSON can hold.
    grids : (LogGrid, LogGrid, LogGrid), optional
        Where the diagonals are codes of a few bits: the grids of d1, d2 and d3, whose levels the
        entries must be (`diba_np.matrix.diagonals`).
    bias : (m,) array_like of float, optional
        What a layer adds to its outputs. Carried along and stored; `DiBALinear` and the command
        ``apply`` add it, products with the operator do not, for they are linear.

    Attributes
    ----------
    shape : (int, int)
        (m, n).
    k : int
        Intermediate dimension.
    d1, d2, d3 : float32 vectors, read-only
    b1, b2 : PackedBits
    shift : float
    record : dict
    grids : (LogGrid, LogGrid, LogGrid) or None
    scale_bits : int or (int, int, int)
        Bits an entry of the diagonals takes in a file without loss: 16 or 32, or with grids the
        code widths of d1, d2 and d3.
    bias : (m,) float32 vector, read-only, or None
    nbytes : int
        Bytes of memory held now.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong kind, shape or value; the message names it.

    Notes
    -----
    A product with a float32 operand is computed and returned in float32, with any other real
    operand in float64 (``np.result_type``), with a complex one on both parts. It is exact to the
    rounding of that type and the same for any number of threads (`numba.set_num_threads`).
    `matvec_rounded` is faster and less exact. NaN and infinity in the operand reach the result as
    in the dense product. The first product makes a copy of the bits in another order, the first
    product with the transpose another one; `nbytes` counts them. ``DIBA_NP_KERNEL``
    (``portable``, ``avx2``, ``avx512``, ``neon``) forces one kind of kernel.

    Examples
    --------
    >>> import numpy as np
    >>> f = DiBAFactors([1.0, 2.0], np.array([[1], [1]]), [3.0], np.array([[1, 0]]), [1.0, 1.0])
    >>> f
    DiBAFactors(2 x 2, k=1, 21 bits per weight)
    >>> f.to_dense()
    array([[3., 0.],
           [6., 0.]], dtype=float32)
    >>> f @ np.array([1.0, 5.0])
    array([3., 6.])
    """

    method: ClassVar[str] = "diba"
    shape: tuple[int, int]
    T: DiBAFactors
    d1: Vector
    d2: Vector
    d3: Vector
    b1: PackedBits
    b2: PackedBits
    shift: float
    record: dict[str, Any]
    grids: Grids | None
    bias: Vector | None

    def __init__(
        self,
        d1: ArrayLike,
        b1: PackedBits | ArrayLike,
        d2: ArrayLike,
        b2: PackedBits | ArrayLike,
        d3: ArrayLike,
        shift: float = 0.0,
        record: dict[str, Any] | None = None,
        *,
        grids: Grids | None = None,
        bias: ArrayLike | None = None,
    ) -> None:
        self.b1 = b1 if isinstance(b1, PackedBits) else PackedBits(b1)
        self.b2 = b2 if isinstance(b2, PackedBits) else PackedBits(b2)
        (m, k), n = self.b1.shape, self.b2.shape[1]
        if self.b2.shape[0] != k:
            raise ValueError(
                f"b1 (m, k) and b2 (k, n) must share k, got {self.b1.shape} and {self.b2.shape}"
            )
        self.d1 = _diagonal(d1, "d1", m)
        self.d2 = _diagonal(d2, "d2", k)
        self.d3 = _diagonal(d3, "d3", n)
        self.bias = None if bias is None else _diagonal(bias, "bias", m)
        self.shift = check_shift(shift)
        if record is not None and not isinstance(record, dict):
            raise TypeError(f"record must be a dict, got {type(record).__name__}")
        self.grids = None if grids is None else (grids[0], grids[1], grids[2])
        for name, grid in zip(("d1", "d2", "d3"), self.grids or (), strict=False):
            if not np.array_equal(grid.round(getattr(self, name)), getattr(self, name)):
                raise ValueError(f"{name} must consist of levels of its grid, {grid}")
        self._flipped: DiBAFactors | None = None
        super().__init__((m, n), record=record)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIXED and name in self.__dict__:
            raise AttributeError(f"{name} of a factorization is fixed; make another DiBAFactors")
        super().__setattr__(name, value)

    # -- sizes ---------------------------------------------------------------------------------

    @property
    def k(self) -> int:
        """Intermediate dimension."""
        return self.b1.shape[1]

    @property
    def scale_bits(self) -> ScaleBits:
        """Bits an entry of the diagonals takes in a file: 16, 32, or three code widths."""
        if self.grids is not None:
            return (self.grids[0].bits, self.grids[1].bits, self.grids[2].bits)
        return stored_scale_bits(self.d1, self.d2, self.d3)

    def storage_bits(self, scale_bits: ScaleBits | None = None) -> int:
        """Return ``k (m + n) + scale_bits (m + k + n)``, everything that is stored.

        A bias takes 32 bits an output more.

        Parameters
        ----------
        scale_bits : int or (int, int, int), optional
            Bits an entry of the diagonals; by default what `save` writes. Three code widths count
            the grids too (`diba_np.matrix.budgets.storage_bits`).
        """
        m, n = self.shape
        own = self.scale_bits if scale_bits is None else scale_bits
        bias = 0 if self.bias is None else 32 * m
        return storage_bits(m, n, self.k, own) + bias

    def storage_breakdown(self) -> dict[str, int]:
        """Return the stored bits as ``{"payload", "scales", "index", "codebook"}``."""
        payload = self.k * sum(self.shape)
        scales = self.storage_bits() - payload
        return {"payload": payload, "scales": scales, "index": 0, "codebook": 0}

    def storage_ratio(self, scale_bits: ScaleBits | None = None) -> float:
        """Return `storage_bits` as a share of the dense float32 matrix."""
        m, n = self.shape
        return self.storage_bits(scale_bits) / (DENSE_BITS * m * n)

    @property
    def nbytes(self) -> int:
        """Bytes of memory held now: the diagonals and the bits, once as words and, after the first
        product, once more in the order that products read, 16/15 of the words and padding.

        With the transpose, once it was used.
        """
        held = 0
        for half in (self, self._flipped):
            if half is not None:
                held += sum(part.nbytes for part in (half.d1, half.d2, half.d3, half.b1, half.b2))
                held += half._product.nbytes if "_product" in half.__dict__ else 0
        return held

    def truncate(self, k: int, A: ArrayLike | None = None) -> DiBAFactors:
        """Return the factorization by the first `k` components: coarser and smaller.

        `factorize` orders components by how much the squared error would rise without each.

        Parameters
        ----------
        k : int
            At most ``self.k``.
        A : (m, n) array_like, optional
            The matrix that this stands for: diagonals and bits are then adapted to it by a short
            polish. With 0/1 bits that is needed, because their constant parts no longer cancel.

        Returns
        -------
        DiBAFactors
            Of the same shift, bias and `scale_bits`.

        Raises
        ------
        TypeError, ValueError

        Notes
        -----
        Cut where a stage of the search ends (``record["stages"]``), a factorization is about as
        good as a fresh one: at 384x384 and 4 bits, strict, in stages of 336, 200 and 200, the first
        336 keep 10.06 dB without `A` and 10.15 with it, a fresh search reaches 10.16. Within a
        stage components matter about equally, and a cut costs more than a smaller budget: of 172
        at 1 bit, 5.81 dB, 129 keep 1.2 dB without `A` and 4.0 with it, where a fresh search
        reaches 4.5.
        """
        if check_count(k, "k") > self.k:
            raise ValueError(f"k must be at most {self.k}, got {k}")
        b1, b2 = self.b1.to_dense()[:, :k], self.b2.to_dense()[:k]
        record = {**self.record, "truncated_from": self.k}
        coarse = DiBAFactors(
            self.d1,
            b1,
            self.d2[:k],
            b2,
            self.d3,
            self.shift,
            record,
            grids=self.grids,
            bias=self.bias,
        )
        if A is None:
            return coarse
        adapted: DiBAFactors = resolve(ADAPTATION)(coarse, A)
        return adapted

    # -- dense ---------------------------------------------------------------------------------

    def row_expander(self) -> Callable[[RowIndex], Vector]:
        """Return a function from a slice or vector of rows to those of the matrix, float32.

        It holds the right half (k, n), made once; a row then costs ``2 k n`` flops.
        """
        largest = [float(np.abs(d).max()) or 1.0 for d in (self.d1, self.d2, self.d3)]
        # where d2 d3 leaves float32's range the product with d1 may lie within
        single = 1e-20 < largest[1] * largest[2] < 1e25
        kind: Any = np.float32 if single else np.float64
        right = (self.b2.to_dense() - kind(self.shift)) * self.d2[:, None].astype(kind)
        right *= self.d3

        def expand(rows: RowIndex) -> Vector:
            left = self.b1[rows].to_dense() - kind(self.shift)
            left *= self.d1[rows, None]
            product: Vector = (left @ right).astype(np.float32, copy=False)
            return product

        return expand

    def to_dense(self) -> Vector:
        """Return the (m, n) float32 matrix."""
        return self.row_expander()(slice(None))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("a factorization cannot become an array without a copy")
        return self.to_dense().astype(dtype or np.float32, copy=False)

    # -- products ------------------------------------------------------------------------------

    @functools.cached_property
    def _product(self) -> Product:
        return Product(
            self.b2, self.b1, d_in=self.d3, d_mid=self.d2, d_out=self.d1, alpha=self.shift
        )

    def _matmat(self, X: NDArray[Any]) -> NDArray[Any]:
        """Return ``A_hat @ X`` for X (..., n, b); a vector (n,) is taken too."""
        X = np.asarray(X)
        if X.dtype.kind == "c":
            return self._matmat(X.real) + 1j * self._matmat(X.imag)
        if X.ndim == 1:
            return self._product.vector(X)
        if X.ndim == 2:
            return self._product.matrix(X)
        columns = np.moveaxis(X, -2, 0)
        product = self._product.matrix(columns.reshape(self.shape[1], -1))
        return np.moveaxis(product.reshape(self.shape[0], *columns.shape[1:]), 0, -2)

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
        # the common cases without scipy's checks, which take as long as a small product
        if type(x) is np.ndarray and x.dtype == np.float32 and x.ndim in (1, 2):
            if len(x) == self.shape[1]:
                return self._product.vector(x) if x.ndim == 1 else self._product.matrix(x)
        return super().__matmul__(x)

    def matvec(self, x: ArrayLike) -> NDArray[Any]:
        """Multiply with a vector, or with many along leading axes.

        Parameters
        ----------
        x : (n,), (n, 1) or (..., n) array_like

        Returns
        -------
        (m,), (m, 1) or (..., m) ndarray
        """
        x = np.asanyarray(x)
        n = self.shape[1]
        if x.ndim > 1 and x.shape[-1] == n and x.shape != (n, 1):
            return self._matvec(x)
        result: NDArray[Any] = super().matvec(x)
        return result

    def matvec_rounded(self, x: ArrayLike) -> Vector:
        """Multiply with a vector in 16-bit tables: about twice as fast, and not exact.

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
        Only on CPUs with AVX-512 BW and VNNI; elsewhere this is ``f @ x`` in float32. For the
        transpose call ``f.T.matvec_rounded(y)``.

        The error is that of a random rounding, 1e-4 to 4e-4 in the root mean square over the
        result, relative to the *+-1 part*: what ``D1 (B1 - 1/2) D2 (B2 - 1/2) D3 x`` would be if
        its signs were random. It is no bound for single entries, and where the terms of the
        result cancel it is that much larger relative to the result. It grows with the largest
        sum of 30 neighbours' magnitudes in ``d3 * x``, over the root mean square, and likewise
        between the two binaries; where such outliers would make it more than 1e-3, the product
        is done in float32. The largest possible error of one entry, after the first binary, is
        ``n / 5`` half steps of which 131 040 make up that largest sum.
        """
        x = np.asarray(x)
        if x.shape != (self.shape[1],):
            raise ValueError(f"x must have shape ({self.shape[1]},), got {x.shape}")
        return self._product.vector_rounded(x)

    def _adjoint(self) -> DiBAFactors:
        """Return the transpose ``D3 B2^T D2 B1^T D1``, itself a factorization; made once."""
        if self._flipped is None:
            self._flipped = DiBAFactors(
                self.d3,
                self.b2.T,
                self.d2,
                self.b1.T,
                self.d1,
                self.shift,
                self.record,
                grids=None if self.grids is None else self.grids[::-1],
            )
            self._flipped._flipped = self
        return self._flipped

    _transpose = _adjoint

    # -- files and copies ----------------------------------------------------------------------

    def contents(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Return the ``(attributes, arrays)`` that stand for the factorization in a file."""
        return payload(self)

    @classmethod
    def rebuild(cls, contents: Container) -> DiBAFactors:
        """Build the factorization from what a file holds; `FormatError` if it is inconsistent."""
        return rebuild(cls, contents)

    def __reduce__(self) -> tuple[Any, ...]:
        arrays = (self.d1, self.b1, self.d2, self.b2, self.d3)
        return _restore, (*arrays, self.shift, self.record, self.grids, self.bias)

    def __repr__(self) -> str:
        m, n = self.shape
        shift = f", shift={self.shift:g}" if self.shift else ""
        return (
            f"DiBAFactors({m} x {n}, k={self.k}{shift}, {self.bits_per_weight:.4g} bits per weight)"
        )


def _restore(*state: Any) -> DiBAFactors:
    """Make the factorization that a pickle holds."""
    return DiBAFactors(*state[:-2], grids=state[-2], bias=state[-1])
