"""What the fits of all methods share: checked arguments, Gram matrix of inputs, half precision."""

from __future__ import annotations

import copy
import numbers
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from diba_np.arrays import largest_magnitude
from diba_np.checks import as_matrix, as_samples, check_count, check_magnitude, check_number
from diba_np.errors import BudgetError
from diba_np.matrix.base import Array, CompressedMatrix
from diba_np.matrix.budgets import bits_within

if TYPE_CHECKING:
    from typing_extensions import Self


class Problem:
    """The checked arguments of a `fit`.

    Attributes
    ----------
    W : (m, n) float64
        ``A / scale``, root mean square 1 (all zero where A is).
    scale : float
    budget : int
        Stored bits allowed.
    X : (N, n) float64 or None
        Divided by a power of two where they are very small or large.
    rng : numpy.random.Generator
    """

    def __init__(self, W: Array, scale: float, bits: float, X: Array | None, seed: int) -> None:
        self.W, self.scale, self.bits, self.X, self.seed = W, scale, bits, X, seed
        self.shape = W.shape
        self.budget = bits_within(W.shape[0], W.shape[1], bits)
        self.rng = np.random.default_rng(seed)
        self._start = time.perf_counter()

    def without(self, part: Array, bits: int) -> Self:
        """Return the problem of what a part (m, n) leaves over, stored in so many bits."""
        rest = copy.copy(self)
        rest.W, rest.budget = self.W - part, self.budget - bits
        rest.bits = self.bits - bits / self.W.size
        return rest

    def record(self, **settings: Any) -> dict[str, Any]:
        """Return the record of a fit that ends now."""
        return {
            "bits": self.bits,
            "seed": self.seed if isinstance(self.seed, numbers.Integral) else None,
            "inputs": None if self.X is None else len(self.X),
            "seconds": time.perf_counter() - self._start,
        } | settings


def check_problem(
    A: ArrayLike, bits: float, inputs: ArrayLike | None = None, seed: int = 0
) -> Problem:
    """Check the arguments every `fit` shares and normalise `A`; return a `Problem`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, the rule and the value.
    """
    A = np.ascontiguousarray(as_matrix(A), np.float64)
    number = check_number(bits, "bits", above=0.0)
    if not isinstance(seed, np.random.Generator):
        check_count(seed, "seed", least=0)
    X = None
    if inputs is not None:
        X = np.ascontiguousarray(as_samples(inputs, "inputs", A.shape[1]), np.float64)
        largest = largest_magnitude(X)
        # their unit does not count; squares of squares of such numbers would vanish or overflow
        if largest and not 1e-30 < largest < 1e30:
            X = np.ldexp(X, -int(np.frexp(largest)[1]))
    peak = check_magnitude(A, "A")
    scale = peak * float(np.sqrt(np.mean((A / peak) ** 2))) if peak > 0.0 else 1.0
    return Problem(A / scale, scale, number, X, seed)


def too_small(method: str, bits: float, least_bits: float, shape: tuple[int, int]) -> BudgetError:
    """Return the error of a budget that no setting of `method` fits."""
    least = least_bits / (shape[0] * shape[1])
    return BudgetError(
        f"bits must be at least {least:.4g} for {method} on shape {shape}, got {bits}"
    )


def check_fitted(matrix: Any, shape: tuple[int, ...], name: str) -> CompressedMatrix:
    """Return what a caller's ``fit`` gave for a layer's matrix.

    Raises
    ------
    TypeError, ValueError
        It is no compressed matrix, or of another shape.
    """
    if not isinstance(matrix, CompressedMatrix):
        raise TypeError(
            "what fit returns must be a matrix of a method, "
            f"got {type(matrix).__name__} for {name!r}"
        )
    if tuple(matrix.shape) != tuple(shape):
        raise ValueError(f"fit must return shape {shape} for {name!r}, got {matrix.shape}")
    return matrix


def gram(X: Array | None, n: int, ridge: float = 0.01, weights: Array | None = None) -> Array:
    """Return ``H = X^T diag(w) X / sum(w) + ridge * mean diagonal * I``, (n, n) float64.

    Without inputs H is the identity: white inputs.
    """
    if X is None:
        return np.eye(n)
    w = np.ones(len(X)) if weights is None else weights
    H = (X * w[:, None]).T @ X / w.sum()
    mean = float(np.trace(H)) / n
    H[np.diag_indices(n)] += ridge * mean if mean > 0.0 else 1.0
    return np.asarray(H)


def to_half(values: ArrayLike) -> Array:
    """Round to float16, clipped to its finite range."""
    return np.clip(values, -65504.0, 65504.0).astype("<f2")


def half_of(values: Array, unit: float, before: Array | None = None) -> tuple[Array, float]:
    """Return numbers as float16, and their unit.

    It is the given one where they are in it what they were `before`, or where float16 holds the
    largest well; else that times a power of two.
    """
    halves = to_half(values / unit)
    largest = float(np.abs(values).max(initial=0.0)) / unit
    same = before is not None and np.array_equal(halves, before)
    if same or not largest or 2.0**-4 <= largest <= 2.0**15:
        return halves, unit
    unit *= 2.0 ** int(np.frexp(largest)[1])
    return to_half(values / unit), unit
