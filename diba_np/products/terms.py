"""Products with a sum of several chains, each with diagonals of its own: one kernel for all.

`SumProduct` is ``sum_t D_out,t (B1_t - shift) D_mid,t (B2_t - shift) D_in,t``; the bits of all
terms lie in one piece of memory, and one call of a kernel goes over all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diba_np.kernels import columns, columns_simd, lookup_neon, lookup_portable, lookup_simd
from diba_np.products.parallel import Real
from diba_np.products.plan import KERNELS, Chain
from diba_np.products.product import Kernels, Product, operand

Tiles = NDArray[np.uint32]

_VECTOR_KERNELS: dict[str, Kernels] = {
    "portable": (
        lookup_portable.product_terms_portable,
        lookup_portable.product_terms_portable_par,
    ),
    "avx2": (lookup_simd.product_terms_avx2, lookup_simd.product_terms_avx2_par),
    "avx512": (lookup_simd.product_terms_avx512, lookup_simd.product_terms_avx512_par),
    "neon": (lookup_neon.product_terms_neon, lookup_neon.product_terms_neon_par),
}


class SumProduct(Product):
    """The sum of several maps ``x -> d_out * ((B1 - shift) (d_mid * ((B2 - shift) (d_in * x))))``.

    Everything but the constructor is that of `Product`.

    Parameters
    ----------
    parts : sequence of Product
        At least one, each of two packed matrices; one shape, shift and path.
    tiles2, tiles1 : (units, 16) uint32
        The tiles of all first, and of all second packed matrices, one after the other in one piece.

    Raises
    ------
    ValueError
        The parts do not fit each other.
    """

    _panel_kernels: Kernels = (columns.product_terms_columns, columns.product_terms_columns_par)
    _column_kernels: Kernels = (
        columns_simd.product_terms_columns_avx512,
        columns_simd.product_terms_columns_avx512_par,
    )

    def __init__(self, parts: Sequence[Product], tiles2: Tiles, tiles1: Tiles) -> None:
        self._terms = tuple(parts)
        for part in parts:
            part.forget()  # the tiles that it has multiplied with are no longer those of its bits
        kinds = {(part.shape, float(part.shift), part._path, len(part._bits)) for part in parts}
        if len(kinds) != 1 or next(iter(kinds))[-1] != 2:
            raise ValueError("the terms of a product must be chains of one shape, shift and path")
        self.shape, self.shift, self._path = parts[0].shape, parts[0].shift, parts[0]._path
        self._vector_path = parts[0]._vector_path
        self.weights = sum(part.weights for part in parts)
        self._inputs = sum(part._inputs for part in parts)
        n_units = -(-self.shape[1] // 15)
        self._flat = tiles2.reshape(-1, n_units, 16), tiles1
        m, k = self.shape[0], 0
        starts = [(0, 0, 0, 0)]
        for part in parts:
            k = part._bits[0].shape[0]
            tiles, units = -(-k // 32), -(-k // 15)
            step = (k, tiles, -(-m // 32) * units, 15 * units)
            starts.append(tuple(np.add(starts[-1], step).tolist()))
        self._starts = np.array(starts, np.int64)
        self._arguments: dict[np.dtype[Any], tuple[Any, ...]] = {}
        self._planned = KERNELS.get(self._vector_path)

    def _chains(self) -> list[Chain]:
        return [chain for part in self._terms for chain in part._chains()]

    def _vector_kernels(self, dtype: np.dtype[Any]) -> Kernels:
        return _VECTOR_KERNELS[self._vector_path if dtype == np.float32 else "portable"]

    def _prepared(self, dtype: np.dtype[Any]) -> tuple[Any, ...]:
        """Return the constant arguments: (d3, tiles2, d2, tiles1, d1, starts, shift)."""
        prepared = self._arguments.get(dtype)
        if prepared is None:
            d3, d2, d1 = zip(*(part._scales for part in self._terms), strict=True)

            def values(scales: tuple[Any, ...]) -> list[Any]:
                return [np.ones(n) if scale is None else scale for scale, n in scales]

            prepared = self._arguments[dtype] = (
                np.array(values(d3), dtype, order="C"),
                self._flat[0],
                np.concatenate(values(d2)).astype(dtype),
                self._flat[1],
                np.array(values(d1), dtype, order="C"),
                self._starts,
                dtype.type(self.shift),
            )
        return prepared

    @property
    def nbytes(self) -> int:
        """Bytes of the diagonals and the room arrays for the kernels; not those of the tiles."""
        arrays = [array for prepared in self._arguments.values() for array in prepared]
        own: int = sum(array.nbytes for array in arrays if array.dtype != np.uint32)
        own += self._plan.nbytes if "_plan" in self.__dict__ else 0
        return own + sum(part.nbytes for part in self._terms)

    def vector_rounded(self, x: ArrayLike) -> Real:
        """Apply to a vector (n,) in float32, term after term; see `Product.vector_rounded`."""
        out = self._terms[0].vector_rounded(x)
        with np.errstate(invalid="ignore", over="ignore"):
            for part in self._terms[1:]:
                out += part.vector_rounded(x)
            # infinities of the terms may meet where the sum's weight is finite, or be a zero's NaN
            return out if np.isfinite(out).all() else self.vector(operand(x).astype(np.float32))


def run_each_kernel_of_sums(product: Product, tiles2: Tiles, tiles1: Tiles) -> Iterator[str]:
    """Run every kernel that products of several terms may use here, once; yield their names.

    Parameters
    ----------
    product : Product, (1, 1)
    tiles2, tiles1 : (1, 16) uint32
    """
    whole = SumProduct([product], tiles2, tiles1)
    single, double = np.dtype(np.float32), np.dtype(np.float64)
    uses: list[tuple[Kernels, np.dtype[Any], tuple[int, ...]]] = [
        (whole._vector_kernels(single), single, (1,)),
        (_VECTOR_KERNELS["portable"], double, (1,)),
        (whole._panel_kernels, single, (1, 16)),
        (whole._panel_kernels, double, (1, 8)),
    ]
    if whole._path == "avx512":
        uses.append((whole._column_kernels, single, (1, 2)))
    for kernels, dtype, shape in uses:
        for kernel in kernels:
            kernel(np.ones(shape, dtype), *whole._prepared(dtype), 1, np.empty(shape, dtype))
            yield f"{kernel.__name__} {dtype}"
