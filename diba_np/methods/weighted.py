"""Methods as models and networks fit them: errors weighed by a Gram matrix and by the outputs.

And the choice among them: short fits of a part of the matrix tell which is the better at a rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diba_np.errors import BudgetError
from diba_np.matrix.base import Array, CompressedMatrix
from diba_np.matrix.budgets import bits_within, storage_bits
from diba_np.methods import METHODS, get
from diba_np.methods import fit as fit_method
from diba_np.methods.random_bits import random_factors
from diba_np.search.factorization import factorize
from diba_np.search.options import SearchOptions
from diba_np.search.representatives import representatives
from diba_np.search.size import least_bits as least_of_diba

# what "best" chooses among
CHOICES = ("diba", "linear-trellis")
BEST = "best"

# pilots that lie so near to the best of them, in dB, do not decide: both are fitted
NEAR = 0.5

# rows and columns of a pilot's part
_SIDE = 256

# of a pilot's search
_SWEEPS = 16
_TOLERANCE = 1e-2

# bits a row and column of a pilot's scales, given on top of its rate; and what is usual
_SCALES = 8
_USUAL_SCALES = 5

_SLOPE = 5.5  # dB that a bit a weight buys


@dataclass(frozen=True)
class FitOptions:
    """How a matrix is fitted, whatever the method.

    Attributes
    ----------
    seed : int
    threads : int or None
    effort : str
        Of `diba_np.factorize`.
    scale_bits : int or None
        Bits of the codes of scales and diagonals; None for what the method takes by itself.
    looked_up : bool
        Whether rows of the matrix will be looked up one by one, as in a table of tokens.
    search : mapping
        More keyword arguments for `diba_np.factorize`.
    """

    seed: int = 0
    threads: int | None = None
    effort: str = "balanced"
    scale_bits: int | None = None
    looked_up: bool = False
    search: Mapping[str, Any] = field(default_factory=dict)


Fit = Callable[..., CompressedMatrix]


def _diba(
    A: Array, bits: float, gram: Array | None, outputs: Array | None, how: FitOptions
) -> CompressedMatrix:
    given: dict[str, Any] = {
        "seed": how.seed,
        "threads": how.threads,
        "effort": how.effort,
        "scale_bits": how.scale_bits,
    }
    return factorize(A, bits=bits, gram=gram, output_weight=outputs, **(given | dict(how.search)))


def _trellis_options(how: FitOptions) -> dict[str, Any]:
    more: dict[str, Any] = {} if how.scale_bits is None else {"scale_bits": how.scale_bits}
    if how.looked_up:  # a row of rotated outputs takes all rows
        more["rotation"] = ("none", "inputs")
    return more


def _trellis(method: str) -> Fit:
    def fit(
        A: Array, bits: float, gram: Array | None, outputs: Array | None, how: FitOptions
    ) -> CompressedMatrix:
        cls: Any = get(method)[0]
        more = _trellis_options(how)
        made: CompressedMatrix = cls.fit(
            A, bits, gram=gram, output_weight=outputs, seed=how.seed, threads=how.threads, **more
        )
        return made

    return fit


def _random(
    A: Array, bits: float, gram: Array | None, outputs: Array | None, how: FitOptions
) -> CompressedMatrix:
    return random_factors(A, bits=bits, gram=gram, seed=how.seed)


# method -> fit(A, bits, gram, outputs, how); of all others `inputs` of the same Gram matrix
FITS: dict[str, Fit] = {
    "diba": _diba,
    "trellis": _trellis("trellis"),
    "linear-trellis": _trellis("linear-trellis"),
    "random": _random,
}


def fit_weighted(
    method: str,
    A: Array,
    bits: float,
    gram: Array | None = None,
    outputs: Array | None = None,
    how: FitOptions | None = None,
) -> CompressedMatrix:
    """Compress a matrix so that ``tr(W E H E^T)`` is small, E its error.

    Parameters
    ----------
    method : str
        "diba", "random" (the control), a label of `diba_np.methods.METHODS`, or "best" of
        `CHOICES`.
    A : (m, n) array
    bits : float
        Stored bits a weight at most.
    gram : (n, n) array, optional
        H, ``X^T X / N`` of the inputs.
    outputs : (m,) array, optional
        W, weights of the outputs; heeded by DiBA and the trellises.
    how : FitOptions, optional

    Returns
    -------
    CompressedMatrix

    Raises
    ------
    TypeError, ValueError
        As the method raises them.
    """
    how = how or FitOptions()
    if method == BEST:
        m, n = np.shape(A)
        reached = pilots(A, bits, gram, outputs, how)
        affordable = {
            one: error
            for one, error in reached.items()
            if least_bits(one, (m, n), how, gram is not None) <= bits_within(m, n, bits)
        }
        return best_of(nearest(affordable or reached), A, bits, gram, outputs, how)
    if method in FITS:
        return FITS[method](A, bits, gram, outputs, how)
    inputs = None if gram is None else _inputs_of(gram)
    return fit_method(method, A, bits, inputs, how.seed)


def least_bits(method: str, shape: tuple[int, int], how: FitOptions, weighed: bool) -> int:
    """Return the stored bits under which `fit_weighted` has nothing.

    Parameters
    ----------
    method, how
        As there.
    shape : (int, int)
    weighed : bool
        Whether there is a Gram matrix.

    Returns
    -------
    int
        0 where the entries decide.
    """
    if method == BEST:
        return min(least_bits(one, shape, how, weighed) for one in CHOICES)
    if method == "random":
        return storage_bits(*shape, 1)
    if method == "diba":
        given = SearchOptions(scale_bits=how.search.get("scale_bits", how.scale_bits))
        return least_of_diba(shape, given.scales_for("bits"))
    cls, more = get(method)
    if method in FITS:
        more = _trellis_options(how) | {"weighed": weighed}
    return int(cls.least_bits(shape, **more))


def _inputs_of(gram: Array) -> Array:
    """Return n inputs of a Gram matrix, which may be singular."""
    sizes, vectors = np.linalg.eigh(np.asarray(gram, np.float64))
    inputs: Array = (vectors * np.sqrt(np.maximum(sizes, 0.0))).T
    return inputs


def best_of(
    methods: Sequence[str],
    A: Array,
    bits: float,
    gram: Array | None,
    outputs: Array | None,
    how: FitOptions,
) -> CompressedMatrix:
    """Return the best fit of some methods; one that the bits do not pay for is left out.

    BudgetError where they pay for none; all other errors are raised.
    """
    made: list[CompressedMatrix] = []
    for i, method in enumerate(methods):
        try:
            made.append(fit_weighted(method, A, bits, gram, outputs, how))
        except BudgetError:
            if i + 1 == len(methods) and not made:
                raise
    if len(made) == 1:
        return made[0]
    return min(made, key=lambda one: weighted_error(A - one.to_dense(), gram, outputs))


def weighted_error(E: Array, gram: Array | None = None, outputs: Array | None = None) -> float:
    """Return ``tr(W E H E^T)`` of an error E (m, n)."""
    rows = np.einsum("ij,ij->i", E if gram is None else E @ gram, E, dtype=np.float64)
    return float(rows.sum() if outputs is None else rows @ outputs)


def nearest(errors: Mapping[str, float]) -> list[str]:
    """Return the methods whose errors are within `NEAR` dB of the least."""
    most = min(errors.values()) * 10 ** (NEAR / 10)
    return [method for method, error in errors.items() if error <= most]


# -- pilots ----------------------------------------------------------------------------------------


def pilots(
    A: Array, bits: float, gram: Array | None, outputs: Array | None, how: FitOptions
) -> dict[str, float]:
    """Return the error of each of `CHOICES` at a rate, relative to the energy, on a part of A."""
    part, inner = part_of(A, gram, outputs)
    asked = rate_of(bits, (len(A), len(A[0])))
    found = {}
    for method in CHOICES:
        rate, error = pilot(method, part, inner, asked, how.seed, how.threads)
        # what a method has no use for is not credited to it
        found[method] = error * 10 ** (_SLOPE / 10 * (rate - min(asked, most_rate(method))))
    return found


def most_rate(method: str) -> float:
    """Return the bits a weight, without scales, beyond which more are of no use to a method."""
    modes = getattr(get(method)[0], "modes", ()) if method in METHODS else ()
    return max((mode.bits / mode.weights for mode in modes), default=math.inf)


def rate_of(bits: float, shape: tuple[int, int]) -> float:
    """Return about the bits a weight that scales leave over, at least a tenth of all."""
    m, n = shape
    return max(bits - _USUAL_SCALES * (m + n) / (m * n), 0.1 * bits)


def pilot(
    method: str,
    part: Array,
    gram: Array | None,
    rate: float,
    seed: int,
    threads: int | None,
    shift: float = 0.0,
) -> tuple[float, float]:
    """Fit a part of a matrix (m, n) quickly at about a rate, scales not counted.

    Returns
    -------
    rate, error : float
        Bits of a weight without scales, and ``tr(E H E^T)`` relative to the part's energy.
    """
    m, n = part.shape
    if method == "diba":
        k = max(1, round(rate * m * n / (m + n)))
        f = factorize(
            part,
            k=k,
            gram=gram,
            shift=shift,
            seed=seed,
            effort="fast",
            max_sweeps=_SWEEPS,
            tol=_TOLERANCE,
            threads=threads,
        )
        reached = f.record["snr_db" if gram is None else "output_snr_db"]
        # no number: the part is zero, or its fit is exact
        error = 0.0 if reached is None else 10.0 ** (-reached / 10.0)
        return k * (m + n) / (m * n), min(max(error, 1e-12), 1.0)
    extra = (_SCALES * (m + n) + 256) / (m * n)
    made = fit_weighted(method, part, rate + extra, gram, None, FitOptions(seed, threads))
    energy = weighted_error(part, gram)
    error = weighted_error(part - made.to_dense(), gram) / energy if energy > 0 else 0.0
    stored = made.storage_breakdown()["payload"] / (m * n)
    return stored, min(max(error, 1e-12), 1.0)


def part_of(
    A: Array, gram: Array | None, outputs: Array | None = None
) -> tuple[Array, Array | None]:
    """Return a part of a matrix that stands for it, weights of outputs in its rows; and its Gram.

    At most 256 rows and columns: those of the largest share in the energy, and others evenly spaced
    that stand for the rest.
    """
    wide = np.asarray(A, np.float64)
    if outputs is not None:
        wide = wide * np.sqrt(outputs)[:, None]
    seen = wide if gram is None else wide @ gram
    (rows, left), (columns, right) = (
        representatives(np.abs(np.einsum("ij,ij->" + kept, wide, seen)), _SIDE) for kept in "ij"
    )
    part = wide[np.ix_(rows, columns)] * np.outer(left, right)
    inner = None if gram is None else np.asarray(gram[np.ix_(columns, columns)])
    return part, inner
