"""Double binary factorization: the peer, ``A ~ D1 S1 D2 S2 D3`` with signs (arXiv 2505.11076).

Our own implementation from the published description: an ADMM alternating over the two factors,
260 outer and 3 inner iterations, a ridge of 3 % and a penalty of the first inner step that rises as
``t^3``. It runs on the kernels of our own solver, so that seconds compare like with like. There is
no polish, no rounding that the others adapt to, and the 16-bit scales are counted. What it knows of
inputs is as published too: a weight for each column, the norm of its inputs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diba_np.checks import as_matrix, as_samples, check_count, check_largest
from diba_np.machine.thread_pool import ThreadPool
from diba_np.matrix import budgets
from diba_np.matrix.diagonals import HALF
from diba_np.matrix.factors import DiBAFactors
from diba_np.search.conversion import factors_of, round_diagonals
from diba_np.search.progress import Run
from diba_np.search.relaxation import Published, relax
from diba_np.search.target import Target
from diba_np.search.weighted_target import ScaledTarget

OUTER, INNER, RIDGE = 260, 3, 0.03

# column weights stay within this share of their root mean square
_LEAST_WEIGHT = 1e-2


def dbf(
    A: ArrayLike,
    *,
    k: int | None = None,
    bits: float | None = None,
    inputs: ArrayLike | None = None,
    outer: int = OUTER,
    seed: int = 0,
    threads: int | None = None,
) -> DiBAFactors:
    """Factorize by the peer's method.

    Parameters
    ----------
    A : (m, n) array_like
    k, bits : int or float
        Exactly one: intermediate dimension, or stored bits per weight with 16-bit scales.
    inputs : (N, n) array_like, optional
        What the matrix is multiplied with: errors in a column count as the norm of its inputs.
    outer : int, default 260
        Outer iterations.
    seed : int
    threads : int, optional

    Returns
    -------
    DiBAFactors
        With ``shift=0.5`` and 16-bit diagonals; d2 by least squares.
    """
    matrix = as_matrix(A)
    shape = (int(matrix.shape[0]), int(matrix.shape[1]))
    name, value = budgets.chosen({"k": k, "bits": bits})
    size = budgets.intermediate_dimension(name, value, shape)
    run = Run()
    with ThreadPool(threads, flops=2.0 * shape[0] * shape[1] * size) as pool:
        target: Target = Target(matrix, pool)
        check_largest(target.largest, "A")
        columns = np.ones(shape[1])
        if inputs is not None:
            columns = _norms(inputs, shape[1])
            target = ScaledTarget(matrix, pool, np.ones(shape[0]), columns)
        state = relax(
            target,
            size,
            shift=0.5,
            rng=np.random.default_rng(seed),
            iterations=check_count(outer, "outer"),
            run=run,
            schedule=Published(RIDGE, INNER),
        ).state
        round_diagonals(target, state, HALF, columns)
    state.d3 /= columns
    seconds = round(run.seconds, 3)
    record = {"method": "dbf", "outer": outer, "seed": seed, "seconds": seconds}
    return factors_of(state, target.unit, record)


def _norms(inputs: ArrayLike, n: int) -> NDArray[np.float64]:
    """Return the norms of the input channels over their root mean square, none too small."""
    X = as_samples(inputs, "inputs", n)
    norms = np.linalg.norm(X.astype(np.float64), axis=0)
    weights: NDArray[np.float64] = norms / (np.sqrt(np.mean(norms**2)) or 1.0)
    return weights.clip(_LEAST_WEIGHT)
