"""Numbers and rotations that a seed stands for, the same in every version and on every machine.

NumPy does not promise that a generator gives the same numbers in a later version; a file that holds
a seed has to be read for ever. So these come from a counter and a mixing function (splitmix64).
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from scipy.linalg import qr
from scipy.special import ndtri

from diba_np.kernels.hadamard import hadamard, rotate_vector
from diba_np.matrix.base import Array


def uniforms(seed: int, count: int) -> Array:
    """Return `count` numbers in (0, 1), (count,) float64."""
    with np.errstate(over="ignore"):
        state = np.uint64(seed) * np.uint64(0xD1342543DE82EF95) + np.uint64(0x9E3779B97F4A7C15)
        z = state + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    result: Array = ((z >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return result


def normals(seed: int, count: int) -> Array:
    """Return `count` independent standard normal numbers, (count,) float64."""
    result: Array = ndtri(uniforms(seed, count))
    return result


class Rotation:
    """A random orthogonal matrix R of a size n, of which only the seed has to be kept.

    Signs, then a Hadamard matrix of the largest power of two that divides n, with a random
    orthogonal matrix of the odd factor q that is left: ``R = (H_p x Q_q) diag(signs)``.

    Parameters
    ----------
    size : int
    seed : int
        From 0 to 2^63 - 1.

    Notes
    -----
    A product with N vectors costs ``N n (log2 p + 2 q)`` flops.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.power = size & -size
        self.odd = size // self.power
        self._typed: dict[Any, tuple[Array, Array, Array]] = {}

    @functools.cached_property
    def signs(self) -> Array:
        """(n, 1) float32, 1 and -1."""
        return np.where(uniforms(2 * self.seed, self.size) < 0.5, -1.0, 1.0).astype(np.float32)[
            :, None
        ]

    @functools.cached_property
    def factor(self) -> Array:
        """(q, q) float64: the odd factor, the norm of the Hadamard matrix divided out."""
        q = self.odd
        Q, R = qr(normals(2 * self.seed + 1, q * q).reshape(q, q))
        result: Array = Q * np.where(np.diagonal(R) < 0, -1.0, 1.0) / np.sqrt(self.power)
        return result

    def _held(self, dtype: Any) -> tuple[Array, Array, Array]:
        """Return the signs, the odd factor and its transpose, in a type and in C-order."""
        if dtype not in self._typed:
            factor = self.factor.astype(dtype, order="C")
            turned = np.ascontiguousarray(factor.T)
            self._typed[dtype] = (self.signs.astype(dtype), factor, turned)
        return self._typed[dtype]

    def turn(self, back: bool) -> tuple[Array, Array]:
        """Return the signs and the factor as `rotate_vector` takes them, float32."""
        signs, factor, turned = self._held(np.dtype(np.float32))
        return signs, factor if back else turned

    def _mixed(self, x: Array, scale: Array | None, factor: Array) -> Array:
        """Return ``(H x Q) (scale * x)``; an odd factor of one is in the scale."""
        mixed = x if scale is None else np.multiply(x, scale, order="C")
        if self.odd > 1:
            mixed = np.matmul(factor, mixed.reshape(self.power, self.odd, x.shape[1]), order="C")
        hadamard(mixed.reshape(-1), self.odd * x.shape[1])
        return mixed.reshape(x.shape)

    def _vector(self, x: Array, signs: Array, factor: Array, back: bool) -> Array:
        """Rotate one column (n, 1), for which the steps of `_mixed` take longer than the work."""
        room, out = np.empty((2, x.size), x.dtype)
        rotate_vector(x.reshape(-1), signs.reshape(-1), factor, back, room, out)
        turned: Array = out.reshape(x.shape)
        return turned

    def apply(self, x: Array) -> Array:
        """Return ``R x`` for x (n, N), in its type."""
        signs, factor, turned = self._held(x.dtype)
        if x.shape[1] == 1:
            return self._vector(x, signs, turned, False)
        return self._mixed(x, signs * factor if self.odd == 1 else signs, factor)

    def apply_transposed(self, x: Array) -> Array:
        """Return ``R^T x`` for x (n, N), in its type."""
        signs, factor, _ = self._held(x.dtype)
        if x.shape[1] == 1:
            return self._vector(x, signs, factor, True)
        mixed = self._mixed(x, factor if self.odd == 1 else None, factor.T)
        mixed *= signs
        return mixed
