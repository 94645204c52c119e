"""What a factorization is weighed by: the Gram matrix of its inputs and weights of its outputs."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike, NDArray

from diba_np.arrays import Index, largest_magnitude, row_blocks
from diba_np.checks import as_matrix, as_real, as_samples, check_dense, digest
from diba_np.machine.thread_pool import ThreadPool

Floats = NDArray[np.float64]

# the share by which correlations are shrunk: this times n / N, within these bounds. Measured on
# MiniLM's inputs: N / n = 3 likes 0.1 ... 0.3, 20 likes 0.01 ... 0.1, 36 likes 0.01
SHRINKAGE, LEAST_SHRINKAGE, MOST_SHRINKAGE = 0.5, 0.01, 0.5

# what every channel gets on top, as a share of its own mean square: no unit of a channel counts
RIDGE = 1e-4

# asymmetry and negative eigenvalues up to these shares of the trace pass for rounding in float32
_ASYMMETRY = 1e-6
_INDEFINITE = 1e-6


@dataclass(frozen=True)
class Weights:
    """Checked weights of one call of `factorize`.

    Attributes
    ----------
    gram : (n, n) float64 or None
        Mean product of two channels, divided by the mean of its diagonal; nothing added yet.
    outputs : (m,) float64 or None
        Weights of the outputs, mean 1.
    output_gram : (m, m) float64 or None
        Their Gram matrix instead, mean of its diagonal 1; positive definite.
    shrinkage : float
        Share by which the products of different channels are reduced.
    facts : dict
        For the record: where they are from, SHA-256, rows, shrinkage, dead channels.
    """

    gram: Floats | None
    outputs: Floats | None
    output_gram: Floats | None
    shrinkage: float
    facts: dict[str, Any]

    def part(self, rows: Index, columns: Index) -> Weights:
        """Return the weights of some rows and columns of the matrix, each of mean 1 again."""

        def of_one_side(weights: Floats | None, index: Index) -> Floats | None:
            if weights is None:
                return None
            part = weights[np.ix_(*[index] * weights.ndim)]
            mean = float(part.mean() if part.ndim == 1 else np.diag(part).mean())
            return part / mean if mean > 0 else None

        gram = of_one_side(self.gram, columns)
        outputs, output_gram = of_one_side(self.outputs, rows), of_one_side(self.output_gram, rows)
        return replace(self, gram=gram, outputs=outputs, output_gram=output_gram)

    def regularised(self) -> Floats | None:
        """Return ``(1 - a) H + (a + RIDGE) diag(H)`` with the shrinkage a; positive definite."""
        return None if self.gram is None else _shrunk(self.gram, self.shrinkage)


def gram_of_inputs(X: NDArray[Any], pool: ThreadPool) -> Floats:
    """Return ``X^T X / N`` for X (N, n), times any constant, summed in float64 over row blocks.

    Blocks follow from the shape alone. Cost: ``2 N n^2`` flops; X is never held in float64 whole.
    """
    total = np.zeros((X.shape[1], X.shape[1]))
    largest = largest_magnitude(X)
    # its factor does not count; squares of such numbers would vanish or overflow
    unit = 1.0 if not largest or 1e-100 < largest < 1e100 else largest
    for rows in row_blocks(X.shape):
        part = np.ascontiguousarray(X[rows], np.float64) / unit
        total += pool.matmul(np.ascontiguousarray(part.T), part)
    result: Floats = (total + total.T) / (2.0 * X.shape[0])
    return result


def as_weights(
    inputs: ArrayLike | None,
    gram: ArrayLike | None,
    output_weight: ArrayLike | None,
    shape: tuple[int, int],
    pool: ThreadPool,
) -> Weights | None:
    """Check what `factorize` was given; None if that is nothing.

    Parameters
    ----------
    inputs : (..., n) array_like, optional
        One sample a row, leading axes are samples; a memory map is read in row blocks.
    gram : (n, n) array_like, optional
        Symmetric and positive semidefinite, to rounding in float32.
    output_weight : (m,) or (m, m) array_like, optional
        Not negative, not all zero; or symmetric and positive semidefinite, as `gram`.
    shape : (int, int)
        (m, n) of the matrix.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong kind, shape or value; the message names it.

    Warns
    -----
    UserWarning
        There are fewer rows than channels, or channels that are always zero.
    """
    if inputs is not None and gram is not None:
        raise TypeError("give at most one of inputs=, gram=, got both")
    m, n = shape
    facts: dict[str, Any] = {}
    H = None
    shrinkage = LEAST_SHRINKAGE
    if inputs is not None:
        X = as_samples(inputs, "inputs", n)
        if len(X) < n:
            warnings.warn(
                f"inputs has {len(X)} rows for {n} channels: too few to tell all their "
                "correlations, so the result may fit these rows better than others",
                UserWarning,
                stacklevel=3,
            )
        H = gram_of_inputs(X, pool)
        shrinkage = min(max(SHRINKAGE * n / len(X), LEAST_SHRINKAGE), MOST_SHRINKAGE)
        facts |= {"from": "inputs", "rows": len(X), "sha256": digest(X)}
    elif gram is not None:
        as_given = as_matrix(gram, "gram")
        H = check_gram(as_given, "gram", n)
        facts |= {"from": "gram", "rows": None, "sha256": digest(as_given)}
    if H is not None:
        facts |= {"shrinkage": shrinkage, "ridge": RIDGE}
        H = _normalised(H, facts)
    outputs = output_gram = None
    if output_weight is not None:
        given, as_given = _check_output_weight(output_weight, m)
        facts["output_weight_sha256"] = digest(as_given)
        if given.ndim == 1:
            with np.errstate(over="ignore"):
                mean = given.mean()
            if not np.isfinite(mean):
                given = given / given.max()
                mean = given.mean()
            outputs = given / mean
        else:
            output_gram = _shrunk(given / (np.trace(given) / m), LEAST_SHRINKAGE)
    if H is None and output_weight is None:
        return None
    return Weights(H, outputs, output_gram, shrinkage, facts)


def _shrunk(H: Floats, share: float) -> Floats:
    """Return ``(1 - share) H + (share + RIDGE) diag(H)``; positive definite.

    In the same units as H, whatever those of single channels; one that is always zero gets the
    ridge of a channel of middling size.
    """
    shrunk = (1.0 - share) * H
    own = np.maximum(np.diag(H), 0.0)
    shrunk[np.diag_indices_from(shrunk)] = np.where(
        own > 0, (1.0 + RIDGE) * own, RIDGE * middling(own)
    )
    return shrunk


def middling(weights: Floats) -> float:
    """Return the geometric mean of the weights that are not zero."""
    return float(np.exp(np.mean(np.log(weights[weights > 0]))))


def check_gram(given: NDArray[Any], name: str, n: int | None = None) -> Floats:
    """Return a Gram matrix (n, n) over its largest entry, exactly symmetric.

    Raises
    ------
    ValueError
        It is not square, or not of size n; not symmetric or not positive semidefinite, to rounding
        in float32.
    """
    if n is not None and given.shape != (n, n):
        raise ValueError(f"{name} must have shape ({n}, {n}), got {given.shape}")
    if given.shape[0] != given.shape[1]:
        raise ValueError(f"{name} must be square, got shape {given.shape}")
    H = given.astype(np.float64)
    largest = float(np.abs(H).max())
    H /= largest or 1.0  # so that nothing overflows below
    gap = np.abs(H - H.T)
    i, j = np.unravel_index(int(gap.argmax()), gap.shape)
    if gap[i, j] > _ASYMMETRY:
        raise ValueError(
            f"{name} must be symmetric, got {given[i, j]:g} at ({i}, {j}) "
            f"and {given[j, i]:g} at ({j}, {i})"
        )
    H = (H + H.T) / 2.0
    trace = float(np.trace(H))
    shifted = H.copy()
    shifted[np.diag_indices_from(shifted)] += _INDEFINITE * max(trace, np.finfo(float).tiny)
    if trace < 0 or (largest and scipy.linalg.lapack.dpotrf(shifted, lower=1)[1] != 0):
        least = float(np.linalg.eigvalsh(H)[0])
        raise ValueError(
            f"{name} must be positive semidefinite, "
            f"got a smallest eigenvalue of {least * largest:.4g}"
        )
    return H


def _normalised(H: Floats, facts: dict[str, Any]) -> Floats:
    """Divide by the mean of the diagonal; tell of dead channels."""
    name = facts["from"]
    diagonal = np.diag(H)
    mean = float(diagonal.mean())
    if mean <= 0:
        raise ValueError(f"{name} must not be all zero")
    dead = np.flatnonzero(diagonal <= 0)
    if dead.size:
        channels = "channel that is" if dead.size == 1 else "channels that are"
        warnings.warn(
            f"{name} has {dead.size} {channels} always zero, the first at {int(dead[0])}; "
            "weights there count next to nothing",
            UserWarning,
            stacklevel=4,
        )
    facts["dead_channels"] = int(dead.size)
    return H / mean


def _check_output_weight(output_weight: ArrayLike, m: int) -> tuple[Floats, NDArray[Any]]:
    """Return the weights of the outputs, (m,) or (m, m) float64, and the matrix of the digest."""
    check_dense(output_weight, "output_weight")
    try:
        given = np.asanyarray(output_weight)
    except ValueError as error:
        raise ValueError(f"output_weight must be a vector or matrix: {error}") from None
    given = as_real(given, "output_weight")
    if given.shape not in ((m,), (m, m)):
        raise ValueError(
            f"output_weight must have shape ({m},) or ({m}, {m}), got {tuple(given.shape)}"
        )
    if given.ndim == 2:
        as_given = as_matrix(given, "output_weight")
        weights = check_gram(as_given, "output_weight", m)
    else:
        weights = given.astype(np.float64)
        as_given = weights[:, None]
        wrong = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
        if wrong.size:
            raise ValueError(
                "output_weight must be finite and not negative, "
                f"got {weights[wrong[0]]:g} at {int(wrong[0])}"
            )
    if not weights.any():
        raise ValueError("output_weight must not be all zero")
    return weights, as_given
