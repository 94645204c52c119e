"""A trellis code whose values are sums of taps, so that its bits multiply as they are stored.

A trellis looks a value up by the last bits of a path, so it has to be decoded before anything is
multiplied. Here the value is linear in the signs of those bits: ``A ~ D1 T [S_1 ... S_b] D3`` with
packed matrices S_r of signs, and a short circular filter T on their sums.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from diba_np.arrays import RowIndex
from diba_np.kernels.few_columns import few_columns, few_columns_back
from diba_np.kernels.filters import filter_back, filter_sums
from diba_np.matrix.base import Array
from diba_np.matrix.operator import real_product, with_total
from diba_np.matrix.packed_bits import PackedBits
from diba_np.methods.seeded import Rotation
from diba_np.methods.trellis import Trellis
from diba_np.methods.trellis_fit import Coded, rotations, scales_of
from diba_np.methods.trellis_modes import LINEAR_MODES, Mode
from diba_np.products.cpu import vector_path
from diba_np.products.plan import KERNELS, Chain, Filter, Plan, Turn
from diba_np.products.product import Product, parts_worth


class LinearTrellis(Trellis):
    """As `Trellis`, with a tap for each of the last bits of the path instead of a look-up.

    Notes
    -----
    A product costs one pass over the packed bits, as they are stored, a filter of 12 to 15 taps on
    its sums, and n log n or m log m additions for each side that is rotated; nothing is decoded.
    """

    method = "linear-trellis"
    modes = LINEAR_MODES

    @functools.cached_property
    def _scales(self) -> tuple[Array, Array]:
        """Scales of the rows, that of all in them, (m,) float64; and of the columns."""
        m, n = self.shape
        rows = scales_of(self.coded.rows, m).astype(np.float64)
        return self.scale * rows, scales_of(self.coded.columns, n)

    @functools.cached_property
    def _values(self) -> Values:
        return Values(self.modes, self.coded, self.shape, *self._scales)

    @functools.cached_property
    def turns(self) -> tuple[Rotation | None, Rotation | None]:
        """Rotations of the outputs and of the inputs, None where there is none."""
        return rotations(self.coded.rotation, self.shape, self.seed)

    def row_expander(self, columns: RowIndex = slice(None)) -> Callable[[RowIndex], Array]:
        """Return a function from a slice or vector of rows to those of the matrix, float32.

        Without a rotation of the outputs a row takes ``n`` sums of 12 to 15 taps; nothing else is
        decoded.
        """
        outputs, inputs = self.turns
        if outputs is not None:
            return super().row_expander(columns)
        m = self.shape[0]
        d1, d3 = self._scales
        low = self.coded.low

        def rows(wanted: RowIndex) -> Array:
            index = np.arange(m)[wanted]
            found = (self._values.rows(index) * d1[index, None] * d3).astype(np.float32)
            if inputs is not None:
                found = inputs.apply_transposed(np.ascontiguousarray(found.T)).T
            if low is not None:
                found += low.rows(index)
            result: Array = np.ascontiguousarray(found[:, columns])
            return result

        return rows

    def _apply(self, X: Array) -> Array:
        size = self.packed_weights if X.shape[1] == 1 and X.dtype == np.float32 else None
        if size and parts_worth(size) == 1 and self._plan is not None:
            x = X if X.flags.carray else np.require(X, requirements=["C", "W", "A"])
            out = np.empty((self.shape[0], 1), np.float32)
            kernel = KERNELS[vector_path()]
            if math.isfinite(self._plan.run(kernel, x.reshape(-1), _NOTHING, out.reshape(-1))):
                return out
        return real_product(X, self._multiply, lambda x: self._dense() @ x)

    def _apply_transposed(self, Y: Array) -> Array:
        return real_product(Y, self._multiply_transposed, lambda y: self._dense().T @ y)

    @functools.cached_property
    def packed_weights(self) -> int | None:
        """Bits that a `Plan` multiplies with in one pass; None where it cannot hold the matrix."""
        return None if self.coded.low is not None else self._values.packed_weights

    def chain(self, start: int = 0, bias: ArrayLike | None = None) -> Chain:
        """Return what a `Plan` holds of the matrix, which has `packed_weights`."""
        outputs, inputs = self.turns
        return self._values.chain(
            start,
            bias,
            turn_in=None if inputs is None else inputs.turn(False),
            turn_out=None if outputs is None else outputs.turn(True),
        )

    @functools.cached_property
    def _plan(self) -> Plan | None:
        """The plan for one vector in float32 on one thread, None on a path without a kernel."""
        return Plan([self.chain()]) if vector_path() in KERNELS else None

    def _multiply(self, x: Array) -> tuple[Array, float]:
        outputs, inputs = self.turns
        low = self.coded.low
        out, total = self._values.multiply(x if inputs is None else inputs.apply(x))
        if outputs is None and low is None:
            return out, total
        out = out if outputs is None else outputs.apply_transposed(out)
        return with_total(out if low is None else out + low.multiply(x))

    def _multiply_transposed(self, y: Array) -> tuple[Array, float]:
        outputs, inputs = self.turns
        low = self.coded.low
        out = self._values.multiply_transposed(y if outputs is None else outputs.apply(y))
        out = out if inputs is None else inputs.apply_transposed(out)
        return with_total(out if low is None else out + low.multiply_transposed(y))


_NOTHING = np.empty(0, np.float32)

_MOST_COLUMNS = 1 << 24  # a plan holds the places of decoded ones in float32

# entries up to which columns of rare modes are kept decoded: a packed product costs more than they
_FEW_ENTRIES = 1 << 16


class Values:
    """What the paths of a coded matrix stand for: products from the bits.

    Budgets leave a few columns to another mode than nearly all others have. They are kept decoded,
    at most 2^16 weights, because a packed product of their own costs several times as much.

    Parameters
    ----------
    modes : sequence of Mode
    coded : Coded
    shape : (int, int)
    d1, d3 : (m,) and (n,) float, optional
        Scales of the rows and columns; ones by default.
    """

    def __init__(
        self,
        modes: Sequence[Mode],
        coded: Coded,
        shape: tuple[int, int],
        d1: Array | None = None,
        d3: Array | None = None,
    ) -> None:
        self.shape = shape
        parts = [
            _Part(modes[number - 1], np.flatnonzero(coded.chosen == position), codes, shape, d1, d3)
            for position, (number, codes) in enumerate(zip(coded.used, coded.codes, strict=True))
            if number
        ]
        # one that spans all columns comes first, the others are put into its results
        self._parts = sorted(parts, key=lambda part: not part.spans)
        self._zero = np.flatnonzero(np.array(coded.used)[coded.chosen] == 0)
        few = self._parts[1:] if self._parts[0].spans else []
        self._few = few if sum(part.columns.size for part in few) * shape[0] <= _FEW_ENTRIES else []
        self._packed = [part for part in self._parts if part not in self._few]
        self._decoded: dict[Any, tuple[Array, Array]] = {}

    def _few_columns(self, dtype: np.dtype[Any]) -> tuple[Array, Array]:
        """Return the numbers (c,) of the decoded columns and their weights (c, m)."""
        if dtype not in self._decoded:
            index = np.arange(self.shape[0])
            weights = [part.weights(index).T for part in self._few]
            self._decoded[dtype] = (
                np.concatenate([part.columns for part in self._few]),
                np.ascontiguousarray(np.concatenate(weights), dtype),
            )
        return self._decoded[dtype]

    def multiply(self, x: Array) -> tuple[Array, float]:
        """Return the (m, N) product with x (n, N), C-order float32 or float64, and its total.

        The total is a number that is not finite if an entry is not.
        """
        out = np.empty((self.shape[0], x.shape[1]), x.dtype)
        if self._few:
            columns, weights = self._few_columns(x.dtype)
            few_columns(weights, x.take(columns, axis=0), out)
        for number, part in enumerate(self._packed):
            total = part.multiply(x, out, number > 0 or bool(self._few))
        if self._zero.size and not self._parts[0].spans:
            # NaN and infinity reach the result from there too
            with np.errstate(invalid="ignore"):
                out[0] += 0 * np.add.reduce(x[self._zero], axis=0)
            return with_total(out)
        return out, total

    def multiply_transposed(self, y: Array) -> Array:
        """Return the (n, N) product of the transpose with y (m, N)."""
        first, *others = self._packed
        if first.spans:
            out = first.multiply_transposed(y)
        else:
            others = self._packed
            out = np.zeros((self.shape[1], y.shape[1]), y.dtype)
        for part in others:
            out[part.columns] = part.multiply_transposed(y)
        if self._few:
            columns, weights = self._few_columns(y.dtype)
            found = np.empty((columns.size, y.shape[1]), y.dtype)
            few_columns_back(weights, y, found)
            out[columns] = found
        return out

    @property
    def packed_weights(self) -> int | None:
        """Bits of the part that spans all columns; None if there are others beside decoded ones."""
        if len(self._packed) != 1 or not self._packed[0].spans or self.shape[1] >= _MOST_COLUMNS:
            return None
        return self._packed[0].packed_weights

    def chain(
        self, start: int, bias: ArrayLike | None, turn_in: Turn | None, turn_out: Turn | None
    ) -> Chain:
        """Return what a `Plan` holds, with rotations of either side."""
        few = self._few_columns(np.dtype(np.float32)) if self._few else None
        return self._packed[0].chain(self.shape[0], start, bias, few, turn_in, turn_out)

    def rows(self, index: Array) -> Array:
        """Return rows (R, n) float64 without any scales."""
        found = np.zeros((len(index), self.shape[1]))
        for part in self._parts:
            found[:, part.columns] = part.rows(index)
        return found


# share of the columns from which a part takes all: to gather its own costs more than bits of zero
_SPANNING = 0.9


class _Part:
    """The columns of one mode: their bits as one packed matrix, and the filter.

    Parameters
    ----------
    mode : Mode
    columns : (c,) int
    codes : (c, T) uint8
    shape : (int, int)
        (m, n).
    d1, d3 : (m,) and (n,) float, or None

    Attributes
    ----------
    columns : (c,) int
    spans : bool
        Whether operands and results are of all n columns, of which those of others count nothing.
    """

    def __init__(
        self,
        mode: Mode,
        columns: Array,
        codes: Array,
        shape: tuple[int, int],
        d1: Array | None,
        d3: Array | None,
    ) -> None:
        m, n = shape
        self.mode, self.steps, self.columns, self._codes = mode, codes.shape[1], columns, codes
        self.spans = columns.size >= _SPANNING * n
        self._places = columns if self.spans else np.arange(columns.size)
        self._width = n if self.spans else columns.size
        self._d3 = None
        if d3 is not None or columns.size < self._width:
            self._d3 = np.zeros(self._width)
            self._d3[self._places] = 1.0 if d3 is None else d3[columns]
        self._d1 = np.ones(self.steps * mode.weights)
        self._d1[:m] = 1.0 if d1 is None else d1
        self._prepared: dict[Any, tuple[Array, Array]] = {}

    def _typed(self, dtype: np.dtype[Any]) -> tuple[Array, Array]:
        """Return the taps (V, width) and the scales of rows (V, T) in a type."""
        if dtype not in self._prepared:
            scales = self._d1.reshape(-1, self.mode.weights).T
            # a bit b stands for b - 1/2
            self._prepared[dtype] = (
                (2.0 * self.mode.taps).astype(dtype),
                np.ascontiguousarray(scales, dtype),
            )
        return self._prepared[dtype]

    @functools.cached_property
    def _bits(self) -> PackedBits:
        """(bits steps, columns): the planes of bits, one below the other."""
        bits = self.mode.bits
        planes = np.zeros((bits, self.steps, self._width), np.uint8)
        for bit, plane in enumerate(planes):
            plane[:, self._places] = (self._codes.T >> bit) & 1
        return PackedBits(planes.reshape(bits * self.steps, -1))

    @functools.cached_property
    def _forward(self) -> Product:
        return Product(self._bits, d_in=self._d3, shift=0.5)

    @functools.cached_property
    def _backward(self) -> Product:
        return Product(self._bits.T, d_out=self._d3, shift=0.5)

    def multiply(self, x: Array, out: Array, more: bool) -> float:
        """Write the product with x (n, N) to out (m, N), or add it; return the sum of `out`."""
        mode, N = self.mode, x.shape[1]
        x = x if self.spans else x.take(self.columns, axis=0)
        sums = self._forward.vector(x[:, 0]) if N == 1 else self._forward.matrix(x)
        taps, scales = self._typed(x.dtype)
        total: float = filter_sums(
            sums.reshape(mode.bits, -1), taps, scales, N, more, out.reshape(-1)
        )
        return total

    def multiply_transposed(self, y: Array) -> Array:
        """Return the product of the transpose with y (m, N), of all columns if it spans them."""
        mode, N = self.mode, y.shape[1]
        taps, scales = self._typed(y.dtype)
        sums = np.empty((mode.bits, self.steps * N), y.dtype)
        filter_back(y.reshape(-1), taps, scales, N, sums)
        if N == 1:
            return self._backward.vector(sums.ravel())[:, None]
        return self._backward.matrix(sums.reshape(mode.bits * self.steps, N))

    @property
    def packed_weights(self) -> int:
        """Packed bits, those of columns of other parts counted too."""
        return int(self.mode.bits * self.steps * self._width)

    def chain(
        self,
        m: int,
        start: int,
        bias: ArrayLike | None,
        few: tuple[Array, Array] | None,
        turn_in: Turn | None,
        turn_out: Turn | None,
    ) -> Chain:
        """Return what a `Plan` holds of a part that spans all columns."""
        taps, scales = self._typed(np.dtype(np.float32))
        return Chain(
            tiles2=self._bits.tiles,
            tiles1=np.empty((-(-m // 32), 0, 16), np.uint32),
            d_in=np.ones(self._width) if self._d3 is None else self._d3,
            d_mid=np.ones(self.mode.bits * self.steps),
            d_out=np.ones(m),
            shift=0.5,
            start=start,
            bias=bias,
            filter=Filter(taps, scales, few, turn_in, turn_out),
        )

    def weights(self, index: Array) -> Array:
        """Return rows (R, c) float64 with the scales."""
        found = self.rows(index) * self._d1[index, None]
        return found if self._d3 is None else found * self._d3[self._places]

    def rows(self, index: Array) -> Array:
        """Return rows (R, c) float64, without scales."""
        mode = self.mode
        step, place = np.divmod(index, mode.weights)
        found = np.zeros((len(index), len(self._codes)))
        for i in range(mode.width):
            lag, bit = divmod(i, mode.bits)
            signs = 2.0 * ((self._codes[:, (step - lag) % self.steps].T >> bit) & 1) - 1.0
            found += mode.taps[place, i][:, None] * signs
        return found


def run_each_kernel_of_trellis() -> None:
    """Run every kernel of fits and products here once, on small matrices.

    That compiles them, or loads them from Numba's cache.
    """
    A = np.outer(np.arange(1.0, 17.0), np.ones(16))
    f = LinearTrellis.fit(A, 6.0, rotation="both", threads=1)
    for x in (np.ones((16, 1), np.float32), np.ones((16, 1))):
        f @ x
        f.T @ x
        few_columns(x, x, x[:1].copy())
        few_columns_back(x, x[:1], x.copy())
