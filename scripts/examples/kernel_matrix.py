"""Gaussian-process regression with a compressed covariance matrix.

Covariances are smooth and of low rank, the hard case for bits: shift=0.5, the +-1 alphabet, is the
better choice there. What is left over is treated as noise.

    python scripts/examples/kernel_matrix.py
"""

from __future__ import annotations

import numpy as np
from scipy.sparse.linalg import LinearOperator, cg

import diba_np as dn


def covariance(a: np.ndarray, b: np.ndarray, length: float = 0.5) -> np.ndarray:
    """Matern 1/2 covariance of points (N, 2) and (M, 2)."""
    distance = np.sqrt(((a[:, None] - b) ** 2).sum(axis=2))
    return np.exp(-distance / length)


def main() -> None:
    rng = np.random.default_rng(0)
    points, others = rng.uniform(0, 2, (200, 2)), rng.uniform(0, 2, (200, 2))

    def surface(p: np.ndarray) -> np.ndarray:
        return np.sin(3 * p[:, 0]) * np.cos(2 * p[:, 1])

    noise = 0.1
    values = surface(points) + noise * rng.normal(size=200)
    K = covariance(points, points)
    cross = covariance(others, points)
    print("covariance of 200 points; error of the regression at 200 others")
    for name, operator, bits in (
        ("dense", LinearOperator(K.shape, matvec=K.__matmul__, dtype=np.float64), 32.0),
        *(
            (f"compressed, shift={shift:g}", f, f.bits_per_weight)
            for shift in (0.0, 0.5)
            for f in [dn.factorize(K, bits=4.0, shift=shift, effort="fast")]
        ),
    ):
        # symmetrized, with what compression adds as noise on the diagonal
        rough = 0.0 if bits == 32 else float(np.linalg.norm(K - operator.to_dense(), 2))

        def regularized(v: np.ndarray, op: LinearOperator = operator, r: float = rough):
            return 0.5 * (op @ v + op.T @ v if r else 2 * (op @ v)) + (noise**2 + r) * v

        A = LinearOperator(K.shape, matvec=regularized, dtype=np.float64)
        weights, _ = cg(A, values, rtol=1e-6, maxiter=500)
        error = np.sqrt(np.mean((cross @ weights - surface(others)) ** 2))
        print(f"  {name:<22} {bits:5.2f} bits an entry   rms error {error:.3f}")


if __name__ == "__main__":
    main()
