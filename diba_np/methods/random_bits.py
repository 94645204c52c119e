"""The control: random binaries of the same size, of which only the diagonals are fitted."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diba_np.checks import as_matrix, check_count
from diba_np.matrix import budgets
from diba_np.matrix.diagonals import half_diagonals
from diba_np.matrix.factors import DiBAFactors
from diba_np.training.moments import LeastSquares, Moments

_SWEEPS = 20


def random_factors(
    A: ArrayLike,
    *,
    bits: float,
    gram: ArrayLike | None = None,
    seed: int = 0,
) -> DiBAFactors:
    """Fit the three diagonals around binaries of independent fair bits.

    What a factorization is worth beyond its diagonals shows against this.

    Parameters
    ----------
    A : (m, n) array_like
    bits : float
        Budget in bits per weight, as in `factorize`; 16-bit diagonals.
    gram : (n, n) array_like, optional
        ``X^T X`` of the inputs, times any constant: the error of the outputs is minimised.
    seed : int

    Returns
    -------
    DiBAFactors

    Raises
    ------
    TypeError, ValueError
        As `factorize`.

    Notes
    -----
    20 sweeps of the closed forms, each ``O(k n (m + n) + k^3 + n^3)``.
    """
    matrix = as_matrix(A).astype(np.float64)
    m, n = matrix.shape
    k = budgets.intermediate_dimension("bits", bits, (m, n), 16)
    rng = np.random.default_rng(check_count(seed, "seed", least=0))
    H: NDArray[Any] = np.eye(n) if gram is None else as_matrix(gram, "gram").astype(np.float64)
    if H.shape != (n, n):
        raise ValueError(f"gram must have shape ({n}, {n}), got {H.shape}")
    H = H / (float(np.trace(H)) / n or 1.0)
    start = DiBAFactors(
        np.ones(m),
        rng.integers(0, 2, (m, k)),
        rng.choice([-1.0, 1.0], k),
        rng.integers(0, 2, (k, n)),
        np.ones(n),
    )
    yx = matrix @ H
    solver = LeastSquares(
        start, Moments(H, yx, float(np.vdot(yx, matrix)), np.zeros(n), np.zeros(m))
    )
    for _ in range(_SWEEPS):
        solver.sweep()
    d1, d2, d3 = half_diagonals(*(solver.d[name] for name in ("d1", "d2", "d3")))
    record = {"solver": "random", "seed": seed, "sweeps": _SWEEPS}
    return DiBAFactors(d1, start.b1, d2, start.b2, d3, start.shift, record)
