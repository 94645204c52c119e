"""Products with packed 0/1 matrices: which kernel runs, on how many threads, for which operand.

`Product` is one chain ``D_out (B1 - shift) D_mid (B2 - shift) D_in``, or half of it with one packed
matrix, applied to vectors and matrices. The arithmetic is in ``kernels/``, the tiled copies of the
bits are `PackedBits.tiles`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diba_np.arrays import float_type
from diba_np.checks import as_real
from diba_np.kernels import (
    columns,
    columns_simd,
    lookup_int16,
    lookup_neon,
    lookup_portable,
    lookup_simd,
    lookup_words,
)
from diba_np.kernels.threads import number_of_threads
from diba_np.kernels.transpose import transpose
from diba_np.products.cpu import has_rounded, kernel_path, permutes_as_it_loads, vector_path
from diba_np.products.parallel import Real, run_kernel
from diba_np.products.plan import KERNELS, Chain, Plan


class Bits(Protocol):
    """What a product reads of a packed 0/1 matrix: `PackedBits`."""

    shape: tuple[int, int]

    @property
    def T(self) -> Bits: ...
    @property
    def tiles(self) -> NDArray[np.uint32]: ...


_SINGLE, _DOUBLE = np.dtype(np.float32), np.dtype(np.float64)
_NOTHING = np.empty(0, np.float32)

# The rest of the numbers here are measured; see scripts/bench_products.py.

# a thread with fewer look-ups than this many weights costs more to start than it saves
_WEIGHTS_PER_THREAD = 1_000_000

# rows an input, a mean of both stages, from which AVX-512 takes all columns in registers, if the
# CPU permutes as it loads
_PERMUTING_ROWS = 1000

# columns left over after whole cache lines, from which a line padded with zeros is faster than the
# same columns in registers (avx512) or one after another as vectors
_PANEL_FROM = {
    ("avx512", _SINGLE): 12,
    ("avx2", _SINGLE): 6,
    ("portable", _SINGLE): 4,
    ("portable", _DOUBLE): 3,
    ("neon", _SINGLE): 4,  # estimated
}

# bits a weight from which a dense product is faster than look-ups, the dense matrix given; and the
# memory that a block of its columns may take
_DENSE_FROM_BITS = 3.4
_DENSE_BYTES = 64 << 20
# magnitudes of a dense matrix whose smaller entries, and sums, float32 holds too
_SMALLEST, _LARGEST = 1e-20, 1e25

# Beyond, the error expected of 16-bit tables, 4e-6 times the roughness, passes 1e-3 of the +-1
# part; and 32-bit sums of them, 32763 for 30 columns (2 x 16121 for 15), overflow.
_LARGEST_ROUGHNESS = 240.0
_LARGEST_ROUNDED_COLUMNS = {"avx512": 1_900_000, "avx2": 980_000, "neon": 980_000}

# what a product keeps that was made of its bits' tiles
_OF_TILES = ("_plan", "_rounded_arguments")

Kernels = tuple[Any, ...]  # a kernel and its parallel twin

_VECTOR_KERNELS: dict[str, Kernels] = {
    "portable": (lookup_portable.product_portable, lookup_portable.product_portable_par),
    "avx2": (lookup_simd.product_avx2, lookup_simd.product_avx2_par),
    "avx512": (lookup_simd.product_avx512, lookup_simd.product_avx512_par),
    "neon": (lookup_neon.product_neon, lookup_neon.product_neon_par),
}
_ROUNDED_KERNELS = {
    "avx2": (lookup_words.product_avx2_rounded, lookup_words.product_avx2_rounded_par),
    "avx512": (lookup_int16.product_int16, lookup_int16.product_int16_par),
    "neon": (lookup_neon.product_neon_rounded, lookup_neon.product_neon_rounded_par),
}
_PANEL_KERNELS: Kernels = (columns.product_columns, columns.product_columns_par)
_COLUMN_KERNELS: Kernels = (
    columns_simd.product_columns_avx512,
    columns_simd.product_columns_avx512_par,
)


def operand(x: ArrayLike) -> Real:
    """Return x in C-order and writeable: float32 where that holds every value of its dtype.

    A read-only or strided array would be one more type, and one more compilation, to Numba.
    """
    if type(x) is np.ndarray and x.dtype in (_SINGLE, _DOUBLE) and x.flags.carray:
        return x  # the common cases, in a fraction of the time
    array = np.asarray(as_real(x, "the operand", "hold real numbers"))
    if array.ndim == 2 and array.flags.f_contiguous and not array.flags.c_contiguous:
        return transposed(array.T)
    return np.require(array, float_type(array.dtype), ["C", "W", "A"])


def parts_worth(weights: int) -> int:
    """Return how many threads so many weights, times columns, are worth."""
    worth = weights // _WEIGHTS_PER_THREAD
    return 1 if worth <= 1 else min(worth, number_of_threads())


def transposed(array: NDArray[Any]) -> Real:
    """Return the transpose of a matrix of real numbers, in C-order, its type as of `operand`."""
    dtype = float_type(array.dtype)
    array = np.require(array, dtype, ["C", "W", "A"])
    out = np.empty(array.shape[::-1], dtype)
    transpose(array, out)
    return out


class Product:
    """The map ``x -> d_out * ((B1 - shift) (d_mid * ((B2 - shift) (d_in * x))))``.

    Without `second` it is ``x -> d_out * ((B2 - shift) (d_in * x))``.

    Parameters
    ----------
    first : PackedBits, (k, n)
        B2, which acts first.
    second : PackedBits, (m, k), optional
        B1.
    d_in, d_mid, d_out : vectors, optional
        All ones by default; `d_mid` only with `second`.
    shift : float, default 0.0
        A bit b stands for ``b - shift``.
    path : {"portable", "avx2", "avx512", "neon"}, optional
        By default `kernel_path`.

    Raises
    ------
    TypeError, ValueError
        Sizes do not fit, here or of an operand; an operand does not hold real numbers.

    Notes
    -----
    Float32 operands, and those that float32 holds without loss, are computed and returned in
    float32, others in float64 on the portable path. The number of threads is Numba's
    (`numba.set_num_threads`); no result depends on it. Sums that leave the range of float32 on the
    way are done again in float64. Operands with NaN or infinity give what the dense matrix gives.

    Where a dense product would be faster (over 3.4 bits a weight and very many columns) a matrix
    is multiplied through BLAS, by dense blocks of 64 MiB; its last digits are then BLAS's own.
    """

    _panel_kernels, _column_kernels = _PANEL_KERNELS, _COLUMN_KERNELS

    def __init__(
        self,
        first: Bits,
        second: Bits | None = None,
        *,
        d_in: ArrayLike | None = None,
        d_mid: ArrayLike | None = None,
        d_out: ArrayLike | None = None,
        shift: float = 0.0,
        path: str | None = None,
    ) -> None:
        self._bits = (first,) if second is None else (first, second)
        self.shape = (self._bits[-1].shape[0], first.shape[1])
        self.weights: int = sum(bits.shape[0] * bits.shape[1] for bits in self._bits)
        self._inputs = sum(bits.shape[1] for bits in self._bits)
        self.shift = shift
        self._path = kernel_path() if path is None else path
        self._vector_path = vector_path() if path is None else path
        # kernels scale by d2 after the first stage and by d1 after the second
        d2, d1 = (d_out, None) if second is None else (d_mid, d_out)
        k = first.shape[0]
        d_in, d2, d1 = (None if d is None else np.array(d) for d in (d_in, d2, d1))
        self._scales = (
            (d_in, self.shape[1]),
            (d2, k),
            (d1, 0 if second is None else self.shape[0]),
        )
        if second is None and d_mid is not None:
            raise ValueError("d_mid= needs second=")
        if second is not None and second.shape[1] != k:
            raise ValueError(f"second must have {k} columns, got {second.shape[1]}")
        names = "d_in", "d_out" if second is None else "d_mid", "d_out"
        for name, (scale, size) in zip(names, self._scales, strict=True):
            # the kernels read so many entries without asking
            if scale is not None and np.shape(scale) != (size,):
                raise ValueError(f"{name} must have shape ({size},), got {np.shape(scale)}")
        self._arguments: dict[np.dtype[Any], tuple[Any, ...]] = {}
        self._planned = None if second is None else KERNELS.get(self._vector_path)

    def _chains(self) -> list[Chain]:
        """Return what a plan holds of this."""
        d3, tiles2, d2, tiles1, d1, shift = self._prepared(_SINGLE)
        return [Chain(tiles2, tiles1, d3, d2, d1, shift, 0)]

    @functools.cached_property
    def _plan(self) -> Plan:
        return Plan(self._chains())

    def _prepared(self, dtype: np.dtype[Any]) -> tuple[Any, ...]:
        """Return the kernels' constant arguments: (d3, tiles2, d2, tiles1, d1, shift)."""
        prepared = self._arguments.get(dtype)  # once: another thread may make this `forget`
        if prepared is None:
            d3, d2, d1 = (
                np.ones(size, dtype) if scale is None else np.array(scale, dtype, order="C")
                for scale, size in self._scales
            )
            tiles = [bits.tiles for bits in self._bits]
            if len(tiles) == 1:
                tiles.append(np.empty((0, 0, 16), np.uint32))
            shift = dtype.type(self.shift)
            prepared = self._arguments[dtype] = (d3, tiles[0], d2, tiles[1], d1, shift)
        return prepared

    def forget(self) -> None:
        """Let go of what was made of the bits' tiles; it is made again when it is asked for."""
        self._arguments.clear()
        for name in _OF_TILES:
            self.__dict__.pop(name, None)

    def __getstate__(self) -> dict[str, Any]:
        # a plan holds addresses, which are the original's
        state = {name: value for name, value in self.__dict__.items() if name not in _OF_TILES}
        return state | {"_arguments": {}}

    @functools.cached_property
    def _mixed_d2(self) -> Real:
        """``(B1 - shift) d2`` as float32; empty with one packed matrix."""
        if len(self._bits) == 1:
            return np.empty(0, np.float32)
        mixing = Product(self._bits[1], shift=self.shift, path=self._path)
        return mixing.vector(self._prepared(_SINGLE)[2])

    @functools.cached_property
    def _rounded_arguments(self) -> tuple[Any, ...] | None:
        """The constant arguments of the kernel with 16-bit tables, or None: it cannot be used."""
        largest = _LARGEST_ROUNDED_COLUMNS.get(self._path, 0)
        if not has_rounded() or max(bits.shape[1] for bits in self._bits) >= largest:
            return None
        return (*self._prepared(_SINGLE), self._mixed_d2)

    @property
    def nbytes(self) -> int:
        """Bytes of the diagonals and the room arrays for the kernels; not those of the tiles."""
        arrays = [array for prepared in self._arguments.values() for array in prepared]
        if "_mixed_d2" in self.__dict__:
            arrays.append(self._mixed_d2)
        size: int = sum(array.nbytes for array in arrays if array.ndim == 1)
        return size + (self._plan.nbytes if "_plan" in self.__dict__ else 0)

    def _checked(self, x: Real, ndim: int) -> Real:
        """Return x if it has so many axes and n entries along the first; kernels do not ask."""
        if x.ndim != ndim or len(x) != self.shape[1]:
            wanted = f"({self.shape[1]},)" if ndim == 1 else f"({self.shape[1]}, b)"
            raise ValueError(f"the operand must have shape {wanted}, got {x.shape}")
        return x

    def _parts(self, n_columns: int = 1) -> int:
        """Return how many threads a product with so many columns is worth."""
        work = self.weights * n_columns
        return 1 if work < 2 * _WEIGHTS_PER_THREAD else parts_worth(work)

    def vector(self, x: ArrayLike) -> Real:
        """Apply to a vector (n,); returns (m,)."""
        x = self._checked(operand(x), 1)
        out = np.empty(self.shape[0], x.dtype)
        if not math.isfinite(self._run_vector(x, out)):
            self._mend(x[:, np.newaxis], out[:, np.newaxis])
        return out

    def _run_vector(self, x: Real, out: Real) -> float:
        """Write the product with a vector; return a number that is finite only if all is."""
        parts = self._parts()
        if parts == 1 and self._planned is not None and x.dtype == _SINGLE:
            total = self._plan.run(self._planned, x, _NOTHING, out)  # the same sums
            if not math.isfinite(total):
                out[:] = np.nan  # nothing was written
            return total
        arguments = self._arguments.get(x.dtype) or self._prepared(x.dtype)
        kernels = self._vector_kernels(x.dtype)
        result: float = run_kernel(kernels, parts, self.weights, x, arguments, out)
        return result

    def vector_rounded(self, x: ArrayLike) -> Real:
        """Apply to a vector (n,) in float32, with 16-bit tables if the CPU gains by them.

        Notes
        -----
        The tables' step is set by the largest sum of 30 neighbours' magnitudes in ``d_in * x``
        (AVX2 and NEON: 2.3 times that of 8), and again between the stages. With R that sum over the
        root mean square (30 to 40 for data without outliers), the error is random and about
        ``4e-6 R`` of the +-1 part (what the product would be for bits +-1/2) of each stage: 1e-4 to
        4e-4 for such data. Where outliers make more than 1e-3 to be expected, the product is done
        without rounding.
        """
        x = self._checked(operand(x), 1)
        if x.dtype != _SINGLE:
            with np.errstate(over="ignore"):
                x = x.astype(_SINGLE)
        arguments = self._rounded_arguments
        if arguments is None:
            return self.vector(x)
        out = np.empty(self.shape[0], x.dtype)
        total, roughness = run_kernel(
            _ROUNDED_KERNELS[self._path], self._parts(), self.weights, x, arguments, out
        )
        if math.isfinite(total) and roughness <= _LARGEST_ROUGHNESS:
            return out
        return self.vector(x)

    def matrix(self, x: ArrayLike) -> Real:
        """Apply to every column of (n, b); returns (m, b), C-order."""
        x = self._checked(operand(x), 2)
        out = np.empty((self.shape[0], x.shape[1]), x.dtype)
        if not math.isfinite(self._run_matrix(x, out)):
            bad = ~(np.isfinite(x).all(axis=0) & np.isfinite(out).all(axis=0))
            if bad.any():
                mended = out[:, bad]
                self._mend(x[:, bad], mended)
                out[:, bad] = mended
        return out

    def rows(self, x: NDArray[Any]) -> Real:
        """Apply to every row of (b, n); returns (b, m), C-order."""
        if len(x) == 1:
            return self.vector(x[0])[np.newaxis]
        return transposed(self.matrix(x.T))

    def _run_matrix(self, x: Real, out: Real) -> float:
        """Write the product in the way that is fastest for so many columns.

        That is through BLAS, or by panels, whole cache lines of columns, and one of three ways for
        the rest. Returns a number that is finite only if the operand and the product are.
        """
        if self._is_faster_dense(x):
            return self._run_dense(x, out)
        n_columns, lanes = x.shape[1], 64 // x.itemsize
        panel_from = self._panel_from(x.dtype)
        rest = n_columns % lanes if panel_from <= lanes else n_columns
        if rest == n_columns:
            return self._run_rest(x, out, panel_from)
        total = self._run_kernels(self._panel_kernels, x, out)  # leaves the rest alone
        if rest:
            result = np.empty((out.shape[0], rest), out.dtype)
            total += self._run_rest(np.ascontiguousarray(x[:, -rest:]), result, panel_from)
            out[:, -rest:] = result
        return total

    def _run_rest(self, x: Real, out: Real, panel_from: float) -> float:
        """Do what `_run_matrix` does for columns that do not fill a panel, or need not."""
        n_columns = x.shape[1]
        if n_columns >= panel_from:
            return self._run_padded(x, out)
        if self._path_for(x.dtype) == "avx512" and n_columns > 1:
            return self._run_kernels(self._column_kernels, x, out)
        return self._run_vectors(x, out)

    def _run_padded(self, x: Real, out: Real) -> float:
        """Write the product by one panel that is filled up with zeros."""
        lanes = 64 // x.itemsize
        panel = np.zeros((len(x), lanes), x.dtype)
        panel[:, : x.shape[1]] = x
        result = np.empty((len(out), lanes), x.dtype)
        total = self._run_kernels(self._panel_kernels, panel, result)
        out[...] = result[:, : x.shape[1]]
        return total

    def _run_vectors(self, x: Real, out: Real) -> float:
        """Write the product by a product with a vector for each column."""
        total = 0.0
        products = np.empty(out.shape[::-1], out.dtype)
        for vector, product in zip(np.ascontiguousarray(x.T), products, strict=True):
            total += self._run_vector(vector, product)
        out[...] = products.T
        return total

    def _path_for(self, dtype: np.dtype[Any]) -> str:
        return self._path if dtype == _SINGLE else "portable"

    def _vector_kernels(self, dtype: np.dtype[Any]) -> Kernels:
        return _VECTOR_KERNELS[self._vector_path if dtype == _SINGLE else "portable"]

    def _panel_from(self, dtype: np.dtype[Any]) -> float:
        """Return from how many columns on a panel, a cache line of them, is the fastest way."""
        path = self._path_for(dtype)
        if path == "avx512" and self.weights >= _PERMUTING_ROWS * self._inputs:
            if permutes_as_it_loads():
                return math.inf
        return _PANEL_FROM[path, dtype]

    def _run_kernels(self, kernels: tuple[Any, ...], x: Real, out: Real) -> float:
        """Run one kernel over a matrix, as far as it goes; return its total."""
        n_columns = x.shape[1]
        work = n_columns * self.weights
        total: float = run_kernel(
            kernels, self._parts(n_columns), work, x, self._prepared(x.dtype), out
        )
        return total

    # -- the dense matrix, in pieces ---------------------------------------------------------------

    def _is_faster_dense(self, x: Real) -> bool:
        """Tell whether BLAS is faster: dense columns cost look-ups, those of x then save some."""
        n, n_columns = x.shape
        bits = self.weights / (self.shape[0] * n)
        if bits <= _DENSE_FROM_BITS:
            return False
        saved = n_columns * (1 - _DENSE_FROM_BITS / bits)  # in columns by look-ups
        return saved > _width(n) and (x.dtype == _DOUBLE or self._is_moderate)

    @functools.cached_property
    def _is_moderate(self) -> bool:
        """Tell whether float32 holds the dense matrix and ``d_mid d_in``, which it is made from."""
        d3, _, d2, _, d1, *_ = self._prepared(_SINGLE)
        inner = float(np.abs(d3).max()) * float(np.abs(d2).max())
        outer = float(np.abs(d1).max()) if d1.size else 1.0
        return all(_SMALLEST < size < _LARGEST for size in (inner, inner * outer))

    def _columns(self, indices: NDArray[np.intp], dtype: np.dtype[Any]) -> Real:
        """Return some columns of the dense matrix."""
        width = _width(indices.size)
        unit = np.zeros((self.shape[1], width), dtype)
        unit[indices, np.arange(indices.size)] = 1
        out = np.empty((self.shape[0], width), dtype)
        self._run_kernels(self._panel_kernels, unit, out)
        return out[:, : indices.size]

    def _run_dense(self, x: Real, out: Real) -> float:
        """Write the product through BLAS, by dense blocks that take up to 64 MiB at a time.

        Returns a number that is finite only if the operand and the product are.
        """
        out[...] = 0
        n = self.shape[1]
        block = max(64, _DENSE_BYTES // (x.itemsize * max(self.shape)))
        with np.errstate(invalid="ignore", over="ignore"):
            for start in range(0, n, block):
                stop = min(start + block, n)
                out += self._columns(np.arange(start, stop), x.dtype) @ x[start:stop]
            return float(x.sum() + out.sum())

    def _mend(self, x: Real, out: Real) -> None:
        """Write the product of columns that hold, or that led to, something not finite.

        A NaN makes its whole column NaN. An infinity is multiplied with its column of the dense
        matrix: NaN where the weight is zero or where infinities of both signs meet. Sums that are
        only too large for float32 on the way come out right from float64.
        """
        missing = np.isnan(x).any(axis=0)
        if missing.any():
            out[:, missing] = np.nan
            if not missing.all():
                rest = out[:, ~missing]
                self._mend(x[:, ~missing], rest)
                out[:, ~missing] = rest
            return
        wide = np.where(np.isfinite(x), x, 0).astype(np.float64, order="C")
        result = np.empty(out.shape, np.float64)
        self._run_matrix(wide, result)
        with np.errstate(over="ignore"):
            out[...] = result
        infinite = np.isinf(x)
        with np.errstate(invalid="ignore"):
            for rows in _blocks(np.flatnonzero(infinite.any(axis=1))):
                out += self._columns(rows, _DOUBLE) @ np.where(infinite[rows], x[rows], 0)
                if np.isnan(out).all():  # and stays so
                    break


def _width(n_columns: int) -> int:
    """Return how many columns the fewest whole cache lines of float32 hold."""
    return -(-n_columns // 16) * 16


def _blocks(indices: NDArray[np.intp]) -> Iterator[NDArray[np.intp]]:
    for start in range(0, indices.size, 64):
        yield indices[start : start + 64]


def run_each_kernel(bits: Bits) -> Iterator[str]:
    """Run every kernel that products here may use, once, on one entry; yield their names.

    That compiles them, or loads them from Numba's cache.

    Parameters
    ----------
    bits : PackedBits, (1, 1)
    """
    _ = bits.T.tiles
    yield "tile_columns"
    _ = bits.tiles
    yield "tile_rows"
    number_of_threads()
    yield "number_of_threads"
    for dtype in (_SINGLE, _DOUBLE):
        transposed(np.ones((1, 1), dtype))
        yield f"transpose {dtype}"
    product = Product(bits, bits)
    Uses = tuple[tuple[Callable[..., Any], ...], np.dtype[Any], tuple[int, ...], tuple[Any, ...]]
    uses: list[Uses] = [
        (_VECTOR_KERNELS[product._vector_path], _SINGLE, (1,), ()),
        (_VECTOR_KERNELS["portable"], _DOUBLE, (1,), ()),
        (_PANEL_KERNELS, _SINGLE, (1, 16), ()),
        (_PANEL_KERNELS, _DOUBLE, (1, 8), ()),
    ]
    if product._path == "avx512":
        uses.append((_COLUMN_KERNELS, _SINGLE, (1, 2), ()))
    if has_rounded():
        uses.append((_ROUNDED_KERNELS[product._path], _SINGLE, (1,), (product._mixed_d2,)))
    for kernels, dtype, shape, extra in uses:
        arguments = (*product._prepared(dtype), *extra)
        for kernel in kernels:
            kernel(np.ones(shape, dtype), *arguments, 1, np.empty(shape, dtype))
            yield f"{kernel.__name__} {dtype}"
