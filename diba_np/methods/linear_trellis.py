"""A trellis code whose values are sums of taps, so that its bits multiply as they are stored.

A trellis looks a value up by the last bits of a path, so it has to be decoded before anything is
multiplied. Here the value is linear in the signs of those bits: ``A ~ D1 T [S_1 ... S_b] D3`` with
packed matrices S_r of signs, and a short circular filter T on their sums.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from diba_np.kernels.filters import filter_back, filter_sums
from diba_np.matrix.base import Array
from diba_np.matrix.packed_bits import PackedBits
from diba_np.methods.seeded import Rotation
from diba_np.methods.trellis import Trellis
from diba_np.methods.trellis_fit import rotations, scales_of
from diba_np.methods.trellis_modes import LINEAR_MODES, Mode
from diba_np.products.product import Product


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
    def _parts(self) -> list[_Part]:
        coded, (m, n) = self.coded, self.shape
        d3 = scales_of(coded.columns, n)
        return [
            _Part(self.modes[number - 1], np.flatnonzero(coded.chosen == position), codes, d3, m)
            for position, (number, codes) in enumerate(zip(coded.used, coded.codes, strict=True))
            if number
        ]

    def _row_scales(self, dtype: np.dtype[Any]) -> Array:
        """(m, 1): the scales of rows and of all."""
        if dtype not in self._typed_scales:
            rows = scales_of(self.coded.rows, self.shape[0]).astype(np.float64)
            self._typed_scales[dtype] = (self.scale * rows[:, None]).astype(dtype)
        return self._typed_scales[dtype]

    @functools.cached_property
    def _typed_scales(self) -> dict[Any, Array]:
        return {}

    @functools.cached_property
    def _turns(self) -> tuple[Rotation | None, Rotation | None]:
        return rotations(self.coded.rotation, self.shape, self.seed)

    def _apply(self, X: Array) -> Array:
        return self._product(X, self._multiply, lambda x: self._dense() @ x)

    def _apply_transposed(self, Y: Array) -> Array:
        return self._product(Y, self._multiply_transposed, lambda y: self._dense().T @ y)

    def _product(
        self, X: Array, fast: Callable[[Array], Array], dense: Callable[[Array], Array]
    ) -> Array:
        """Multiply with real columns; through the dense matrix where something is not finite."""
        X = np.asarray(X)
        if X.dtype.kind == "c":
            real, imaginary = (self._product(part, fast, dense) for part in (X.real, X.imag))
            return real + 1j * imaginary
        if X.dtype.kind not in "buif":
            raise TypeError(f"the operand must hold real numbers, got dtype {X.dtype}")
        x = np.ascontiguousarray(X, np.result_type(np.float32, X.dtype))
        if not x.size:
            return np.asarray(dense(x))
        with np.errstate(over="ignore", invalid="ignore"):
            y = fast(x)
            # a sum is not finite if a term is not; one that overflows is looked at again
            return y if math.isfinite(float(y.sum())) else np.asarray(dense(x))

    def _multiply(self, x: Array) -> Array:
        outputs, inputs = self._turns
        x = x if inputs is None else inputs.apply(x)
        parts = [part.multiply(x) for part in self._parts]
        out = parts[0]
        for more in parts[1:]:
            out += more
        out *= self._row_scales(x.dtype)
        return out if outputs is None else outputs.apply_transposed(out)

    def _multiply_transposed(self, y: Array) -> Array:
        outputs, inputs = self._turns
        y = y if outputs is None else outputs.apply(y)
        y = y * self._row_scales(y.dtype)
        out = np.zeros((self.shape[1], y.shape[1]), y.dtype)
        for part in self._parts:
            out[part.columns] = part.multiply_transposed(y)
        return out if inputs is None else inputs.apply_transposed(out)


class _Part:
    """The columns of one mode: their bits as one packed matrix, and the filter.

    Parameters
    ----------
    mode : Mode
    columns : (c,) int
    codes : (c, T) uint8
    d3 : (n,) float32
    m : int
    """

    def __init__(self, mode: Mode, columns: Array, codes: Array, d3: Array, m: int) -> None:
        self.mode, self.steps, self.m = mode, codes.shape[1], m
        self.columns: Any = slice(None) if columns.size == d3.size else columns
        planes = (codes.T[None] >> np.arange(mode.bits, dtype=np.uint8)[:, None, None]) & 1
        self._bits = PackedBits(planes.reshape(mode.bits * self.steps, columns.size))
        self._d3 = d3[self.columns]
        # a bit b stands for b - 1/2
        self._taps = {t: (2.0 * mode.taps).astype(t) for t in map(np.dtype, (np.float32, float))}

    @functools.cached_property
    def _forward(self) -> Product:
        return Product(self._bits, d_in=self._d3, alpha=0.5)

    @functools.cached_property
    def _backward(self) -> Product:
        return Product(self._bits.T, d_out=self._d3, alpha=0.5)

    def multiply(self, x: Array) -> Array:
        """Return the (m, N) product with x (n, N), without the scales of rows."""
        mode, N = self.mode, x.shape[1]
        x = x[self.columns]
        sums = self._forward.vector(x[:, 0]) if N == 1 else self._forward.matrix(x)
        planes = np.zeros((mode.weights, self.steps * N), x.dtype)
        filter_sums(sums.reshape(mode.bits, -1), self._taps[x.dtype], N, planes)
        if mode.weights == 1:
            return planes.reshape(-1, N)
        by_step = planes.reshape(mode.weights, self.steps, N).transpose(1, 0, 2)
        return by_step.reshape(-1, N)[: self.m]

    def multiply_transposed(self, y: Array) -> Array:
        """Return the (columns, N) product of the transpose with y (m, N)."""
        mode, N = self.mode, y.shape[1]
        if mode.weights > 1:
            padded = np.zeros((self.steps * mode.weights, N), y.dtype)
            padded[: self.m] = y
            y = np.ascontiguousarray(padded.reshape(-1, mode.weights, N).transpose(1, 0, 2))
        sums = np.zeros((mode.bits, self.steps * N), y.dtype)
        filter_back(y.reshape(mode.weights, -1), self._taps[y.dtype], N, sums)
        if N == 1:
            return self._backward.vector(sums.ravel())[:, None]
        return self._backward.matrix(sums.reshape(-1, N))
