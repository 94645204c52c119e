"""`DiBAFactors`: what a factorization is, as a scipy LinearOperator."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diba_np.arrays import RowIndex
from diba_np.checks import check_count, check_shift, single_vector
from diba_np.files.container import Container
from diba_np.matrix.base import CompressedMatrix
from diba_np.matrix.budgets import DENSE_BITS, storage_bits
from diba_np.matrix.diagonals import Grids, ScaleBits, stored_scale_bits
from diba_np.matrix.factors_format import payload, rebuild
from diba_np.matrix.packed_bits import PackedBits, joined_tiles
from diba_np.matrix.packed_operator import PackedOperator
from diba_np.matrix.quality import without_figures
from diba_np.matrix.registry import ADAPTATION, resolve
from diba_np.matrix.terms import expander, single_terms
from diba_np.products.product import Product
from diba_np.products.terms import SumProduct

Vector = NDArray[np.float32]


# of a single term; a sum of several has none of its own
_OF_ONE_TERM = frozenset({"d1", "b1", "d2", "b2", "d3", "grids", "scale_bits"})
_FIXED = _OF_ONE_TERM | {"shift", "bias", "_terms"}


class DiBAFactors(PackedOperator, CompressedMatrix):
    """A matrix as ``D1 (B1 - shift) D2 (B2 - shift) D3``: three diagonals, two 0/1 matrices.

    With ``shift=0`` this is DiBA (arXiv 2605.05994); ``shift=0.5`` is the +-1 alphabet on the same
    bits. Several such terms, each with diagonals of its own, can be summed into one object
    (`from_terms`); what is said below of ``d1`` to ``b2`` is then said of each of `terms`.
    Immutable. It is a `scipy.sparse.linalg.LinearOperator` of dtype float32, so ``f @ x``,
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
        Intermediate dimension; of several terms the sum.
    terms : tuple of DiBAFactors
        The factorizations of one term whose sum this is; of a single one itself.
    d1, d2, d3 : float32 vectors, read-only
    b1, b2 : PackedBits
    shift : float
    record : dict
    grids : (LogGrid, LogGrid, LogGrid) or None
    scale_bits : int or (int, int, int)
        Bits an entry of the diagonals takes in a file without loss: 16 or 32, or with grids the
        code widths of d1, d2 and d3.
    bias : (m,) float32 vector, read-only, or None
        Of several terms, of their sum.
    nbytes : int
        Bytes of memory held now.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong kind, shape or value; the message names it.
    AttributeError
        `d1`, `b1`, `d2`, `b2`, `d3`, `grids` or `scale_bits` is asked of several terms.

    Notes
    -----
    A product is computed and returned in ``np.result_type(np.float32, x.dtype)``, at most float64:
    in float32 for float32 and what it holds exactly (float16, bfloat16, bool, integers of up to 16
    bits), in float64 for every other real operand, with a complex one on both parts. Objects are
    refused. It is exact to the
    rounding of that type and the same for any number of threads (`numba.set_num_threads`); with
    ``shift > 1/2``, where large terms may cancel, to the rounding of those terms.
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
    uses_inputs: ClassVar[bool] = True
    _terms: tuple[DiBAFactors, ...] = ()  # of a sum of several
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
        self.d1 = single_vector(d1, "d1", m)
        self.d2 = single_vector(d2, "d2", k)
        self.d3 = single_vector(d3, "d3", n)
        self.bias = None if bias is None else single_vector(bias, "bias", m)
        self.shift = check_shift(shift)
        if record is not None and not isinstance(record, dict):
            raise TypeError(f"record must be a dict, got {type(record).__name__}")
        self.grids = None if grids is None else (grids[0], grids[1], grids[2])
        for name, grid in zip(("d1", "d2", "d3"), self.grids or (), strict=False):
            if not np.array_equal(grid.round(getattr(self, name)), getattr(self, name)):
                raise ValueError(f"{name} must consist of levels of its grid, {grid}")
        # the transpose made of this is held, what this is the transpose of is not: no circle
        # keeps either alive
        self._flipped: DiBAFactors | None = None
        self._source: weakref.ref[DiBAFactors] | None = None
        super().__init__((m, n), record=record)

    @classmethod
    def from_terms(
        cls,
        terms: Iterable[DiBAFactors],
        record: dict[str, Any] | None = None,
        *,
        bias: ArrayLike | None = None,
    ) -> DiBAFactors:
        """Return the sum of several factorizations, each with diagonals of its own.

        Parameters
        ----------
        terms : iterable of DiBAFactors
            At least one, of one shape and shift and without a bias. Of those that are sums
            themselves the terms are taken.
        record : dict, optional
            How the sum was made.
        bias : (m,) array_like of float, optional

        Returns
        -------
        DiBAFactors
            `terms` in their order; of a single one it does not differ from an ordinary one.

        Raises
        ------
        TypeError, ValueError
            The terms are no factorizations, none, or do not fit each other.

        Notes
        -----
        A product costs what it costs with one term of the same k, and a scaled copy of the operand
        for each term.

        Examples
        --------
        >>> f = DiBAFactors([1.0, 2.0], [[1], [1]], [3.0], [[1, 0]], [1.0, 1.0])
        >>> g = DiBAFactors.from_terms([f, f])
        >>> g.k, len(g.terms), g.terms[1].d2
        (2, 2, array([3.], dtype=float32))
        >>> g.to_dense()
        array([[ 6.,  0.],
               [12.,  0.]], dtype=float32)
        """
        single = single_terms(terms, cls)
        if record is not None and not isinstance(record, dict):
            raise TypeError(f"record must be a dict, got {type(record).__name__}")
        if len(single) == 1:
            return single[0]._labelled(single[0].record if record is None else record, bias)
        whole = cls.__new__(cls)
        shape = single[0].shape
        whole._terms = single
        whole.shift = single[0].shift
        whole.bias = None if bias is None else single_vector(bias, "bias", shape[0])
        whole._flipped = whole._source = None
        CompressedMatrix.__init__(whole, shape, record=record)
        return whole

    @property
    def terms(self) -> tuple[DiBAFactors, ...]:
        """The factorizations of one term whose sum this is; of a single one itself."""
        return self._terms or (self,)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIXED and (name in self.__dict__ or (name in _OF_ONE_TERM and self._terms)):
            raise AttributeError(f"{name} of a factorization is fixed; make another DiBAFactors")
        super().__setattr__(name, value)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name in _OF_ONE_TERM and self._terms:
                raise AttributeError(
                    f"a sum of {len(self._terms)} terms has no {name} of its own: "
                    f"read f.terms[0].{name}, f.terms[1].{name} and so on"
                )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def with_record(self, record: dict[str, Any]) -> DiBAFactors:
        """Return the same factorization with another record.

        Parameters
        ----------
        record : dict

        Returns
        -------
        DiBAFactors

        Raises
        ------
        TypeError
            `record` is no dict.
        """
        return self._labelled(record, self.bias)

    def with_bias(self, bias: ArrayLike | None) -> DiBAFactors:
        """Return the same factorization with another bias, or without one.

        Parameters
        ----------
        bias : (m,) array_like of float, or None

        Returns
        -------
        DiBAFactors

        Raises
        ------
        TypeError, ValueError
            `bias` is of another shape, or does not hold finite real numbers.
        """
        return self._labelled(self.record, bias)

    def _labelled(self, record: dict[str, Any], bias: ArrayLike | None) -> DiBAFactors:
        """Return the same matrix with what is carried along with it, a record and a bias."""
        if self._terms:
            return DiBAFactors.from_terms(self._terms, record, bias=bias)
        parts = (self.d1, self.b1, self.d2, self.b2, self.d3, self.shift)
        return DiBAFactors(*parts, record, grids=self.grids, bias=bias)

    # -- sizes ---------------------------------------------------------------------------------

    @property
    def k(self) -> int:
        """Intermediate dimension; of several terms the sum."""
        return sum(term.k for term in self._terms) if self._terms else self.b1.shape[1]

    @property
    def scale_bits(self) -> ScaleBits:
        """Bits an entry of the diagonals takes in a file: 16, 32, or three code widths."""
        if self._terms:  # answered as for the diagonals
            raise AttributeError("scale_bits")
        if self.grids is not None:
            return (self.grids[0].bits, self.grids[1].bits, self.grids[2].bits)
        return stored_scale_bits(self.d1, self.d2, self.d3)

    def storage_bits(self, scale_bits: ScaleBits | None = None) -> int:
        """Return ``k (m + n) + scale_bits (m + k + n)``, everything that is stored.

        The diagonals of each term count. A bias takes 32 bits an output more.

        Parameters
        ----------
        scale_bits : int or (int, int, int), optional
            Bits an entry of the diagonals; by default what `save` writes. Three code widths count
            the grids too (`diba_np.matrix.budgets.storage_bits`).
        """
        m, n = self.shape
        bias = 0 if self.bias is None else 32 * m
        if self._terms:
            return sum(term.storage_bits(scale_bits) for term in self._terms) + bias
        own = self.scale_bits if scale_bits is None else scale_bits
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
        for half in (self, self._flipped or self._turned_from()):
            if half is not None:
                for f in half.terms:
                    held += sum(part.nbytes for part in (f.d1, f.d2, f.d3, f.b1, f.b2))
                held += half._product.nbytes if "_product" in half.__dict__ else 0
        return held

    def truncate(self, k: int, A: ArrayLike | None = None) -> DiBAFactors:
        """Return the factorization by the first `k` components: coarser and smaller.

        Of several terms the last are left off, and the one that `k` cuts is cut as a single one.
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
            Of the same shift, bias and `scale_bits`. Its record keeps no figures of the whole; with
            `A` it has the new ``snr_db``.

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
        left, parts = k, []
        for f in self.terms:
            if left:
                size = min(left, f.k)
                left -= size
                b1, b2 = f.b1.to_dense()[:, :size], f.b2.to_dense()[:size]
                parts.append(DiBAFactors(f.d1, b1, f.d2[:size], b2, f.d3, f.shift, grids=f.grids))
        record = without_figures(self.record, "stages", "retune") | {"truncated_from": self.k}
        coarse = DiBAFactors.from_terms(parts, record)
        if A is not None:
            coarse = resolve(ADAPTATION)(coarse, A)
            reached = coarse.snr(A)
            coarse.record["snr_db"] = reached if math.isfinite(reached) else None
        return coarse.with_bias(self.bias)

    # -- dense ---------------------------------------------------------------------------------

    def row_expander(self, columns: RowIndex = slice(None)) -> Callable[[RowIndex], Vector]:
        """Return a function from a slice or vector of rows to those of the matrix, float32.

        It holds the right half (k, c) of the c `columns`, made once; a row then costs ``2 k c``
        flops.
        """
        return expander(self.terms, columns)

    def to_dense(self) -> Vector:
        """Return the (m, n) float32 matrix."""
        return self.row_expander()(slice(None))

    # -- products ------------------------------------------------------------------------------

    @functools.cached_property
    def _product(self) -> Product:
        if self._terms:
            tiles2 = joined_tiles([term.b2 for term in self._terms])
            tiles1 = joined_tiles([term.b1 for term in self._terms])
            return SumProduct([term._product for term in self._terms], tiles2, tiles1)
        return Product(
            self.b2, self.b1, d_in=self.d3, d_mid=self.d2, d_out=self.d1, shift=self.shift
        )

    def _turned_from(self) -> DiBAFactors | None:
        """Return what this is the transpose of, if that is in use."""
        return None if self._source is None else self._source()

    def _adjoint(self) -> DiBAFactors:
        """Return the transpose ``D3 B2^T D2 B1^T D1``, itself a factorization; made once."""
        turned = self._flipped or self._turned_from()
        if turned is None:
            turned = self._turn()
            turned._source = weakref.ref(self)
            self._flipped = turned
        return turned

    def _turn(self) -> DiBAFactors:
        record = _turned(self.record)
        if self._terms:
            return DiBAFactors.from_terms([term._adjoint() for term in self._terms], record)
        halves = (self.d3, self.b2.T, self.d2, self.b1.T, self.d1)
        grids = None if self.grids is None else self.grids[::-1]
        return DiBAFactors(*halves, self.shift, record, grids=grids)

    _transpose = _adjoint

    # -- files ---------------------------------------------------------------------------------

    def contents(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Return the ``(attributes, arrays)`` that stand for the factorization in a file."""
        return payload(self)

    @classmethod
    def rebuild(cls, contents: Container) -> DiBAFactors:
        """Build the factorization from what a file holds; `FormatError` if it is inconsistent."""
        return rebuild(cls, contents)

    def __repr__(self) -> str:
        m, n = self.shape
        shift = f", shift={self.shift:g}" if self.shift else ""
        terms = f" in {len(self._terms)} terms" if self._terms else ""
        return (
            f"DiBAFactors({m} x {n}, k={self.k}{terms}{shift}, "
            f"{self.bits_per_weight:.4g} bits per weight)"
        )


_SIDES = {"zero_rows": "zero_columns", "zero_columns": "zero_rows"}


def _turned(record: dict[str, Any]) -> dict[str, Any]:
    """Return what the record of a matrix tells of its transpose: not of its source and inputs."""
    of_one = ("source", "activations", "output_snr_db", "retune")
    return {_SIDES.get(name, name): value for name, value in record.items() if name not in of_one}
