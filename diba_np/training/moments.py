"""Second moments of samples, and the closed forms of the diagonals for squared error on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diba_np.matrix.diagonals import DIAGONALS
from diba_np.matrix.factors import DiBAFactors
from diba_np.matrix.terms import diagonal_names
from diba_np.training.optimisers import root_mean_square

Array = NDArray[Any]

RIDGE = 1e-7  # on closed forms, relative to the mean diagonal of their systems


def ridge_of(normal: Array) -> float:
    """Return a small ridge for a system, so that no direction is left undetermined."""
    return RIDGE * float(np.trace(normal)) / len(normal) + float(np.finfo(np.float64).tiny)


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

    def error(self, A: Array) -> float:
        """Return the squared error per sample of ``Y ~ X A^T`` (with the best bias if centred)."""
        return float(self.yy - 2.0 * np.vdot(A, self.yx) + np.vdot(A @ self.xx, A))


def moments(pairs: Iterable[tuple[Array, Array]], centred: bool, offset: Array) -> Moments:
    """Accumulate `Moments` in float64 over batches of X (N, n) and Y - offset (N, m)."""
    total: list[Any] = [0.0, 0.0, 0.0, 0.0, 0.0, 0]
    for x, y in pairs:
        X, Y = x.astype(np.float64), y.astype(np.float64) - offset
        parts = (X.T @ X, Y.T @ X, float(np.vdot(Y, Y)), X.sum(axis=0), Y.sum(axis=0), len(X))
        total = [a + b for a, b in zip(total, parts, strict=True)]
    xx, yx, yy, x_sum, y_sum, count = total
    x_mean = x_sum / count if centred else np.zeros_like(x_sum)
    y_mean = y_sum / count if centred else np.zeros_like(y_sum)
    return Moments(
        xx / count - np.outer(x_mean, x_mean),
        yx / count - np.outer(y_mean, x_mean),
        yy / count - float(y_mean @ y_mean),
        x_mean,
        y_mean,
    )


class TargetMoments:
    """Weighted second moments of what a layer reads (z) and of what it should give (t).

    Sums are about two origins, the means of the first samples: squares in float32 of
    inputs that hardly change would leave nothing of their changes. Inputs are taken with a constant
    1 behind them, so that means and biases need no care.

    Parameters
    ----------
    m, n : int
        Outputs and inputs of the layer.

    Attributes
    ----------
    zz, tz, tt : (n + 1, n + 1) and (m, n + 1) float64, float
        The sums.
    z0, t0 : (n,) and (m,) float64
        The origins.
    count : int
        Samples.
    """

    def __init__(self, m: int, n: int) -> None:
        self.zz, self.tz, self.tt = np.zeros((n + 1, n + 1)), np.zeros((m, n + 1)), 0.0
        self.z0, self.t0 = np.zeros(n), np.zeros(m)
        self.count = 0

    def add(self, z: Array, t: Array, weights: Array | None = None) -> None:
        """Add samples (N, n) and (N, m), each as much as its weight (N,).

        Products of float32 samples are float32, about twice as fast; sums of calls are float64.
        """
        if not self.count:
            self.z0, self.t0 = _origin(z), _origin(t)
        Z, T = _with_ones(z, self.z0, t, self.t0)
        # the product of an array with its own transpose is half the work
        root = Z if weights is None else Z * np.sqrt(weights)[:, None].astype(Z.dtype)
        self.zz += root.T @ root
        self.tz += T.T @ (Z if weights is None else Z * weights[:, None].astype(Z.dtype))
        squares = np.einsum("ij,ij->i", T, T, dtype=np.float64)
        self.tt += float(squares.sum() if weights is None else weights @ squares)
        self.count += len(Z)

    def moments(self, centred: bool) -> Moments:
        """Return the `Moments`, about the means or not."""
        total = self.zz[-1, -1]
        z_mean, t_mean = self.zz[:-1, -1] / total, self.tz[:, -1] / total
        zz = self.zz + self.zz.T  # some BLAS round both halves apart
        zz /= 2 * total
        xx, yx = np.outer(z_mean, z_mean), self.tz[:, :-1] / total
        np.subtract(zz[:-1, :-1], xx, out=xx)
        del zz  # wide layers have no room for it
        yx -= np.outer(t_mean, z_mean)
        yy = self.tt / total - float(t_mean @ t_mean)
        z_mean, t_mean = self.z0 + z_mean, self.t0 + t_mean
        if centred:
            return Moments(xx, yx, yy, z_mean, t_mean)
        xx += np.outer(z_mean, z_mean)
        yx += np.outer(t_mean, z_mean)
        yy += float(t_mean @ t_mean)
        return Moments(xx, yx, yy, np.zeros_like(z_mean), np.zeros_like(t_mean))

    def noise(self, A_hat: Array, bias: Array) -> float:
        """Return ``|T - Z A_hat^T - bias|^2``, weighted and summed over the samples."""
        wide = A_hat.astype(np.float64)
        b = np.concatenate([wide, (bias + wide @ self.z0 - self.t0)[:, None]], axis=1)
        noise = self.tt - 2.0 * float(np.vdot(b, self.tz)) + float(np.vdot(b @ self.zz, b))
        return max(noise, 0.0)


class LinearMoments:
    """Weighted second moments of two inputs of a linear map: x, and z in whose place it is fitted.

    They give the `TargetMoments` of z and ``A x`` without a product with A for each sample: the
    cheaper way unless A has fewer rows than columns. Sums are about the means of the first samples.

    Parameters
    ----------
    n : int
    """

    def __init__(self, n: int) -> None:
        self.zz, self.xz, self.xx = np.zeros((n + 1, n + 1)), np.zeros((n, n + 1)), np.zeros((n, n))
        self.z0, self.x0 = np.zeros(n), np.zeros(n)
        self.count = 0  # rows

    def add(self, z: Array, x: Array, weights: Array | None = None) -> None:
        """Add samples (N, n) of both, each as much as its weight (N,), as `TargetMoments.add`."""
        if not self.count:
            self.z0, self.x0 = _origin(z), _origin(x)
        Z, X = _with_ones(z, self.z0, x, self.x0)
        if weights is not None:
            root = np.sqrt(weights)[:, None].astype(Z.dtype)
            Z, X = Z * root, X * root
        self.zz += Z.T @ Z
        self.xz += X.T @ Z
        self.xx += X.T @ X
        self.count += len(Z)

    def give_to(self, targets: TargetMoments, A: Array) -> float:
        """Make those of z and of ``A x``, A (m, n), of empty ones; return the squares of A x."""
        if targets.count:
            raise ValueError("targets must hold no samples: their sums are about another origin")
        wide = A.astype(np.float64, copy=False)
        at = wide @ self.x0
        moved = wide @ self.xz
        squares = float(np.vdot(wide @ self.xx, wide))
        targets.zz, targets.tz, targets.tt = self.zz, moved, squares
        targets.z0, targets.t0, targets.count = self.z0, at, self.count
        return squares + float(at @ (2.0 * moved[:, -1] + self.zz[-1, -1] * at))


def _origin(samples: Array) -> Array:
    """Return the means over samples (N, n) as numbers of their type, in float64."""
    mean = samples.mean(axis=0, dtype=np.float64) if len(samples) else np.zeros(samples.shape[1])
    return mean.astype(samples.dtype).astype(np.float64)


def _with_ones(z: Array, z0: Array, t: Array, t0: Array) -> tuple[Array, Array]:
    """Return ``z - z0`` with a constant 1 behind it, and ``t - t0``, in float32 if both are."""
    kind: Any = np.float32 if z.dtype == t.dtype == np.float32 else np.float64
    Z = np.ones((len(z), z.shape[1] + 1), kind)
    np.subtract(z, z0.astype(kind), out=Z[:, :-1])
    return Z, np.subtract(t, t0.astype(kind), dtype=kind)


class LeastSquares:
    """Alternating closed forms of the diagonals on `Moments`, of one term after another.

    Parameters
    ----------
    factors : DiBAFactors, (m, n)
    data : Moments
    stay : float
        Weight, in units of the squared error per sample, of the mean squared distance of each
        diagonal from its start relative to its root mean square there.

    Attributes
    ----------
    d : dict of str to (size,) float64
        The diagonals by name, see `diba_np.matrix.terms.diagonal_names`.
    """

    def __init__(self, factors: DiBAFactors, data: Moments, stay: float = 0.0) -> None:
        shift = np.float64(factors.shift)
        self.bits = [
            (term.b1.to_dense() - shift, term.b2.to_dense() - shift) for term in factors.terms
        ]
        self.names = diagonal_names(factors)
        self.d = {
            own: getattr(term, name).astype(np.float64)
            for term, names in zip(factors.terms, self.names, strict=True)
            for name, own in names.items()
        }
        self.start = {name: value.copy() for name, value in self.d.items()}
        self.weights = {
            name: stay / (value.size * root_mean_square(value) ** 2)
            for name, value in self.d.items()
        }
        self.data = data

    def _pull(self, name: str, size: float) -> tuple[float, Array]:
        """Return the weight on the diagonal of a system, and its right side: two known points.

        The ridge pulls to where the diagonal is, so that no direction is left undetermined.
        """
        low = RIDGE * size + np.finfo(np.float64).tiny
        weight = self.weights[name]
        return weight + low, weight * self.start[name] + low * self.d[name]

    def _solve(self, name: str, normal: Array, right: Array) -> None:
        """Minimise ``d N d - 2 r d`` plus the weight on staying near the start."""
        weight, pulled = self._pull(name, float(np.trace(normal)) / len(normal))
        near = normal + weight * np.eye(len(normal))
        self.d[name] = np.linalg.solve(near, right + pulled)

    def _terms(self) -> Iterator[tuple[Array, Array, Array, Array, Array]]:
        """Yield d1, B1, d2, B2 and d3 of each term."""
        for (b1, b2), names in zip(self.bits, self.names, strict=True):
            d1, d2, d3 = (self.d[names[name]] for name in DIAGONALS)
            yield d1, b1, d2, b2, d3

    def apply(self, x: Array) -> Array:
        """Return ``A_hat x``."""
        parts = [d1 * (b1 @ (d2 * (b2 @ (d3 * x)))) for d1, b1, d2, b2, d3 in self._terms()]
        result: Array = sum(parts[1:], start=parts[0])
        return result

    def sweep(self) -> None:
        """Solve d1, d2 and d3 of each term once."""
        if len(self.bits) == 1:
            self._sweep_term(0, self.data.yx)
            return
        parts = [(d1[:, None] * b1 * d2) @ (b2 * d3) for d1, b1, d2, b2, d3 in self._terms()]
        whole = np.sum(parts, axis=0)
        for i, part in enumerate(parts):
            whole -= part
            whole += self._sweep_term(i, self.data.yx - whole @ self.data.xx)

    def _sweep_term(self, term: int, yx: Array) -> Array:
        """Solve the diagonals of one term for targets of these moments; return its matrix."""
        (b1, b2), names, xx = self.bits[term], self.names[term], self.data.xx
        d3 = self.d[names["d3"]]
        v = (b2 * d3) @ xx  # (k, n): moments of v with x
        vv = v @ (b2 * d3).T
        vy = yx @ (b2 * d3).T  # (m, k)
        t = b1 * self.d[names["d2"]]
        normal, right = np.einsum("ik,ik->i", t @ vv, t), np.einsum("ik,ik->i", t, vy)
        weight, pulled = self._pull(names["d1"], float(normal.mean()))
        self.d[names["d1"]] = (right + pulled) / (normal + weight)
        u = b1 * self.d[names["d1"]][:, None]
        self._solve(names["d2"], (u.T @ u) * vv, np.einsum("ik,ik->k", u, vy))
        q = (u * self.d[names["d2"]]) @ b2  # (m, n)
        self._solve(names["d3"], (q.T @ q) * xx, np.einsum("ij,ij->j", q, yx))
        matrix: Array = q * self.d[names["d3"]]
        return matrix
