"""Second moments of samples, and the closed forms of the diagonals for squared error on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diba_np.factors import DiBAFactors
from diba_np.linear import DIAGONALS
from diba_np.metrics import row_blocks

Array = NDArray[Any]

_RIDGE = 1e-7  # on the closed forms, relative to the mean diagonal of their systems


@dataclass
class Moments:
    """Second moments of inputs and targets, from which squared error is exact.

    Attributes
    ----------
    xx : (n, n) float64
        ``X^T X / N``, centred where a bias is fitted.
    yx : (m, n) float64
        ``Y^T X / N``, likewise.
    yy : float
        ``|Y|^2 / N``, likewise.
    x_mean, y_mean : (n,), (m,) float64
        Zero where no bias is fitted.
    """

    xx: Array
    yx: Array
    yy: float
    x_mean: Array
    y_mean: Array


def moments(X: Array, Y: Array, rows: NDArray[np.intp], centred: bool, offset: Array) -> Moments:
    """Accumulate `Moments` in float64 over blocks of `rows` of X (N, n) and Y - offset (N, m)."""
    n, m = X.shape[1], Y.shape[1]
    xx, yx, yy = np.zeros((n, n)), np.zeros((m, n)), 0.0
    x_sum, y_sum = np.zeros(n), np.zeros(m)
    for block in row_blocks((len(rows), n + m)):
        x, y = X[rows[block]].astype(np.float64), Y[rows[block]].astype(np.float64) - offset
        xx += x.T @ x
        yx += y.T @ x
        yy += float(np.vdot(y, y))
        x_sum += x.sum(axis=0)
        y_sum += y.sum(axis=0)
    count = len(rows)
    x_mean = x_sum / count if centred else np.zeros(n)
    y_mean = y_sum / count if centred else np.zeros(m)
    return Moments(
        xx / count - np.outer(x_mean, x_mean),
        yx / count - np.outer(y_mean, x_mean),
        yy / count - float(y_mean @ y_mean),
        x_mean,
        y_mean,
    )


class LeastSquares:
    """Alternating closed forms of the three diagonals on `Moments`."""

    def __init__(self, factors: DiBAFactors, data: Moments, stay: float) -> None:
        self.b1 = factors.b1.to_dense() - np.float64(factors.shift)
        self.b2 = factors.b2.to_dense() - np.float64(factors.shift)
        self.d = {name: getattr(factors, name).astype(np.float64) for name in DIAGONALS}
        self.start = {name: value.copy() for name, value in self.d.items()}
        self.data, self.stay = data, stay

    def _solve(self, name: str, normal: Array, right: Array) -> None:
        """Minimise ``d N d - 2 r d`` plus the weight on staying near the start."""
        size = float(np.trace(normal)) / len(normal)
        weight = self.stay * size
        ridge = _RIDGE * size + weight + np.finfo(np.float64).tiny
        near = normal + ridge * np.eye(len(normal))
        # both weights pull to a known point, so that no direction is left undetermined
        pulled = right + weight * self.start[name] + _RIDGE * size * self.d[name]
        self.d[name] = np.linalg.solve(near, pulled)

    def apply(self, x: Array) -> Array:
        """Return ``A_hat x``."""
        result: Array = self.d["d1"] * (self.b1 @ (self.d["d2"] * (self.b2 @ (self.d["d3"] * x))))
        return result

    def sweep(self) -> float:
        """Solve d1, d2 and d3 once each; return the squared error per sample."""
        b1, b2, data = self.b1, self.b2, self.data
        v = (b2 * self.d["d3"]) @ data.xx  # (k, n): moments of v with x
        vv = v @ (b2 * self.d["d3"]).T
        vy = data.yx @ (b2 * self.d["d3"]).T  # (m, k)
        t = b1 * self.d["d2"]
        self._solve_rows(np.einsum("ik,ik->i", t @ vv, t), np.einsum("ik,ik->i", t, vy))
        u = b1 * self.d["d1"][:, None]
        self._solve("d2", (u.T @ u) * vv, np.einsum("ik,ik->k", u, vy))
        q = (u * self.d["d2"]) @ b2  # (m, n)
        self._solve("d3", (q.T @ q) * data.xx, np.einsum("ij,ij->j", q, data.yx))
        return self.error(q)

    def _solve_rows(self, normal: Array, right: Array) -> None:
        size = float(normal.mean())
        weight = self.stay * size
        low = _RIDGE * size + np.finfo(np.float64).tiny
        pulled = right + weight * self.start["d1"] + low * self.d["d1"]
        self.d["d1"] = pulled / (normal + weight + low)

    def error(self, q: Array) -> float:
        """Squared error per sample for ``Q = D1 B1 D2 B2`` and the present d3."""
        a = q * self.d["d3"]
        cross, own = np.vdot(a, self.data.yx), np.vdot(a @ self.data.xx, a)
        return float(self.data.yy - 2.0 * cross + own)
