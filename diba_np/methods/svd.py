"""Yardstick: truncated singular value decomposition with 16- or 8-bit factors."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import svd as dense_svd

from diba_np.matrix.base import Array, CompressedMatrix, take
from diba_np.matrix.operator import real_product, with_total
from diba_np.methods.fitting import check_problem, to_half, too_small
from diba_np.methods.low_rank import LARGEST, component_bits, in_steps

if TYPE_CHECKING:
    from typing_extensions import Self


class TruncatedSVD(CompressedMatrix):
    """``A ~ scale * U V^T`` with U (m, r), V (n, r), the singular values shared evenly.

    width 16: float16 entries.  width 8: integers in [-127, 127] with a float16 scale for
    every column of U and of V.

    Notes
    -----
    Bits: ``16 r (m + n)``, or ``8 r (m + n) + 32 r``. Products cost O(r (m + n)).
    """

    method = "svd"
    dataset_kinds: ClassVar[dict[str, str]] = {
        "u": "payload",
        "v": "payload",
        "u_scale": "scales",
        "v_scale": "scales",
    }

    def __init__(
        self,
        shape: tuple[int, int],
        u: Array,
        v: Array,
        u_scale: Array,
        v_scale: Array,
        scale: float = 1.0,
        record: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(shape, scale, record)
        self.u, self.v, self.u_scale, self.v_scale = u, v, u_scale, v_scale

    @classmethod
    def fit(
        cls,
        A: ArrayLike,
        bits: float,
        inputs: ArrayLike | None = None,
        seed: int = 0,
        width: int | None = None,
    ) -> Self:
        """Keep as many singular triplets as the budget holds.

        Parameters
        ----------
        A : (m, n) array_like, real
        bits : float
            Budget in bits per weight.
        inputs : (N, n) array_like, optional
            Checked and not used: the plain SVD knows nothing of the inputs.
        seed : int
            Not used.
        width : {16, 8}, optional
            Bits of a factor entry; None takes whichever loses less.

        Raises
        ------
        ValueError
            If not even rank one fits.
        """
        if width not in (None, 8, 16):
            raise ValueError(f"width must be 8, 16 or None, got {width!r}")
        problem = check_problem(A, bits, inputs, seed)
        m, n = problem.shape
        U, s, Vt = dense_svd(problem.W, full_matrices=False)
        costs = _costs(m, n, width)
        best, best_error = None, np.inf
        for w, cost in costs.items():
            rank = min(problem.budget // cost, s.size)
            if rank < 1:
                continue
            root = np.sqrt(s[:rank])
            u, u_scale = _round(U[:, :rank] * root, w)
            v, v_scale = _round(Vt[:rank].T * root, w)
            candidate = cls(problem.shape, u, v, u_scale, v_scale)
            error = float(np.sum((problem.W - candidate.to_dense()) ** 2))
            if error < best_error:
                best, best_error = candidate, error
        if best is None:
            raise too_small("svd", bits, cls.least_bits(problem.shape, width), problem.shape)
        best.scale = problem.scale
        best.record = problem.record(
            rank=best.u.shape[1], width=16 if best.u.dtype.kind == "f" else 8
        )
        return best

    @classmethod
    def least_bits(cls, shape: tuple[int, int], width: int | None = None) -> int:
        """Return the bits of one triplet, of entries of a width where it is given."""
        costs = _costs(*shape, width)
        return min(costs.values())

    def _factors(self) -> tuple[Array, Array]:
        u, v = self.u.astype(np.float32), self.v.astype(np.float32)
        if self.u_scale.size:
            u, v = u * self.u_scale.astype(np.float32), v * self.v_scale.astype(np.float32)
        return u, v

    def to_dense(self) -> Array:
        """Return the matrix as (m, n) float32."""
        u, v = self._factors()
        return ((u @ v.T) * self.scale).astype(np.float32)

    @functools.cached_property
    def _halves(self) -> tuple[Array, Array]:
        """U with the scale and V, float32."""
        u, v = self._factors()
        return u * np.float32(self.scale), v

    def _apply(self, X: Array) -> Array:
        u, v = self._halves
        return real_product(X, lambda x: with_total(u @ (v.T @ x)), lambda x: self._dense() @ x)

    def _apply_transposed(self, Y: Array) -> Array:
        u, v = self._halves
        return real_product(Y, lambda y: with_total(v @ (u.T @ y)), lambda y: self._dense().T @ y)

    def to_datasets(self) -> tuple[dict[str, Any], dict[str, Array]]:
        """Return ``(attrs, arrays)``; see `CompressedMatrix.to_datasets`."""
        attrs = {"rank": self.u.shape[1], "width": 8 * self.u.dtype.itemsize}
        arrays = {
            "u": self.u.ravel(),
            "v": self.v.ravel(),
            "u_scale": self.u_scale,
            "v_scale": self.v_scale,
        }
        return attrs, arrays

    @classmethod
    def from_datasets(cls, attrs: dict[str, Any], arrays: dict[str, Array]) -> Self:
        """Build the matrix again from `to_datasets`."""
        m, n, rank, width = (int(attrs[key]) for key in ("m", "n", "rank", "width"))
        kind, n_scales = ("<f2", 0) if width == 16 else ("i1", rank)
        u = take(arrays, "u", kind, m * rank).reshape(m, rank)
        v = take(arrays, "v", kind, n * rank).reshape(n, rank)
        u_scale, v_scale = (take(arrays, name, "<f2", n_scales) for name in ("u_scale", "v_scale"))
        return cls((m, n), u, v, u_scale, v_scale, attrs["scale"])


def _costs(m: int, n: int, width: int | None) -> dict[int, int]:
    """Return the bits of a triplet by the width of its entries, of all widths or one."""
    costs = {16: 16 * (m + n), 8: component_bits(m, n)}
    return costs if width is None else {width: costs[width]}


def _round(factor: Array, width: int) -> tuple[Array, Array]:
    """Round an (N, r) factor; return entries and column scales (none for 16 bits)."""
    if width == 16:
        return to_half(factor), np.zeros(0, "<f2")
    step = to_half(np.abs(factor).max(axis=0) / LARGEST)
    return in_steps(factor, step), step
