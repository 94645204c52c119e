"""What a matrix has of low rank, a mean above all, in bytes: taken out before the rest is coded."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.linalg import qr, svd

from diba_np.matrix.base import Array
from diba_np.methods.seeded import normals

# of components at most, and how often the sketch that finds them is multiplied with the matrix
_MOST = 64
_POWERS = 2

# decibels that a bit a weight is worth, and those that the components must gain beyond their bits:
# normal numbers have 0.1 dB of them for 0.3 dB of bits
_BIT = 6.02
_LEAST_GAIN = 0.5

LARGEST = 127  # whole steps of an entry


@dataclass(frozen=True)
class LowRank:
    """``scale * u diag(steps) v^T``.

    Attributes
    ----------
    u, v : (m, r) and (n, r) int8
    steps : (r,) float32
    scale : float
    """

    u: Array
    v: Array
    steps: Array
    scale: float = 1.0
    # U and V by type, made by the first product
    _held: dict[np.dtype[np.floating], tuple[Array, Array]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def bits(self) -> int:
        """Stored bits."""
        return component_bits(len(self.u), len(self.v)) * self.steps.size

    def factors(self, dtype: np.dtype[np.floating]) -> tuple[Array, Array]:
        """Return U (m, r) and V (n, r) in a type; the matrix is ``U V^T``."""
        if dtype not in self._held:
            scales = self.steps.astype(np.float64) * self.scale
            self._held[dtype] = (self.u * scales).astype(dtype), self.v.astype(dtype)
        return self._held[dtype]

    def rows(self, index: Array | slice = slice(None)) -> Array:
        """Return rows of the matrix, float64."""
        U, V = self.factors(np.dtype(np.float64))
        result: Array = U[index] @ V.T
        return result

    def multiply(self, x: Array) -> Array:
        """Return the (m, N) product with x (n, N), in its type."""
        U, V = self.factors(x.dtype)
        result: Array = U @ (V.T @ x)
        return result

    def multiply_transposed(self, y: Array) -> Array:
        """Return the (n, N) product of the transpose with y (m, N), in its type."""
        U, V = self.factors(y.dtype)
        result: Array = V @ (U.T @ y)
        return result


def component_bits(m: int, n: int) -> int:
    """Return the bits of a component: a byte an entry, and a step."""
    return 8 * (m + n) + 32


def low_rank_part(W: Array, most_bits: int) -> LowRank | None:
    """Return the leading components of W (m, n) float64 that gain more than their bits, or None.

    ``8 r (m + n)`` bits gain what is left of the squares of W. A sketch of 64 columns finds them:
    ``O(64 m n)`` flops.
    """
    m, n = W.shape
    cost = component_bits(m, n)
    most = min(_MOST, m, n, most_bits // cost)
    energy = float(np.sum(W * W))
    if most < 1 or energy == 0.0:
        return None
    width = min(_MOST, m, n)
    found = W @ normals(0, n * width).reshape(n, width)
    for _ in range(_POWERS):
        found = W @ (W.T @ qr(found, mode="economic")[0])
    base = qr(found, mode="economic")[0]
    left, s, right = svd(base.T @ W, full_matrices=False)
    root = np.sqrt(s[:most])
    u, u_step = _rounded((base @ left)[:, :most] * root)
    v, v_step = _rounded(right[:most].T * root)
    steps = (u_step * v_step).astype(np.float32)
    U, V = u * steps.astype(np.float64), v.astype(np.float64)
    # squares that are left by the first 1, 2, ... components as they are rounded
    taken = np.cumsum(2.0 * np.einsum("ir,ir->r", U, W @ V))
    products = (U.T @ U) * (V.T @ V)
    own = np.cumsum(2.0 * np.tril(products).sum(axis=1) - np.diagonal(products))
    rest = np.maximum(energy - taken + own, 1e-12 * energy)
    gains = 10.0 * np.log10(energy / rest) - _BIT * cost / W.size * np.arange(1, most + 1)
    rank = int(np.argmax(gains)) + 1
    if gains[rank - 1] < _LEAST_GAIN:
        return None
    return LowRank(u[:, :rank], v[:, :rank], steps[:rank])


def _rounded(factor: Array) -> tuple[Array, Array]:
    """Return the columns of a factor in whole steps, int8, and the steps of the columns."""
    step = np.abs(factor).max(axis=0) / LARGEST
    return in_steps(factor, step), step


def in_steps(factor: Array, step: Array) -> Array:
    """Return a factor (N, r) in whole steps of its columns (r,), int8; zeros where a step is 0."""
    unit = np.where(step > 0, step, 1).astype(np.float64)
    return np.clip(np.rint(factor / unit), -LARGEST, LARGEST).astype(np.int8)
