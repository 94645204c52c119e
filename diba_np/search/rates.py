"""`sweep`: the rate-distortion curve of one matrix, each point a real factorization."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from diba_np.checks import as_matrix, check_number
from diba_np.files.atomic import PathLike, as_path
from diba_np.files.checkpoint import EVERY, Checkpoint
from diba_np.matrix.budgets import check_most
from diba_np.matrix.factors import DiBAFactors
from diba_np.search.factorization import factorize
from diba_np.search.options import SearchOptions

# refused: the budget of a point is `bits`
_BUDGETS = ("k", "ratio", "snr")


def sweep(
    A: ArrayLike,
    bits: float | Iterable[float] = (0.5, 1.0, 2.0, 4.0),
    *,
    effort: str = "fast",
    scale_bits: int | tuple[int, int, int] | str = "auto",
    callback: Callable[[DiBAFactors], Any] | None = None,
    checkpoint: PathLike | None = None,
    checkpoint_every: float = EVERY,
    **options: Any,
) -> list[DiBAFactors]:
    """Factorize one matrix at several rates: its rate-distortion curve.

    Parameters
    ----------
    A : (m, n) array_like
        Any real matrix.
    bits : float or iterable of float
        Budgets in stored bits per weight, in any order; equal ones count once.
    effort : {"fast", "balanced", "best"}
        As for `diba_np.factorize`. "fast" lies 0.1 to 0.2 dB below "balanced" at all rates alike.
    scale_bits : int, (int, int, int) or "auto"
        As for `diba_np.factorize`; chosen at each rate by default.
    callback : callable, optional
        Called with every factorization as it is done; a true return value ends the sweep there.
    checkpoint : path-like, optional
        Keeps the state: every rate's search in a file of its own, this name with the rate at its
        end. The same call goes on from them; they are removed when all rates are done.
    checkpoint_every : float, default 60
        Seconds, at least, between two writes.
    options
        Passed on to `diba_np.factorize`: ``shift``, ``inputs``, ``seed``, ``threads`` and so on.

    Returns
    -------
    list of DiBAFactors
        By rising rate. ``f.bits_per_weight`` and ``f.record["snr_db"]`` are a point of the curve;
        with inputs also ``f.record["output_snr_db"]``. Each is what `factorize` gives for that
        budget, and can be used as it is.

    Raises
    ------
    TypeError, ValueError
        As `diba_np.factorize`; all budgets are checked before the first search.

    Notes
    -----
    The cost is that of the single searches, of which the highest rate takes about half. Searches
    are not started from one another: an ADMM begun at the signs of another rate, in the order of
    importance, ends no higher than one begun at random with as many iterations (measured from 0.5
    to 2 bits on trained weights; twenty iterations from either, 0.1 to 0.5 dB below sixty-five).

    Examples
    --------
    >>> A = np.random.default_rng(0).standard_normal((48, 40))
    >>> [f.k for f in sweep(A, bits=[2, 4], scale_bits=16)]
    [23, 60]
    """
    for name in _BUDGETS:
        if name in options:
            raise TypeError(f"sweep takes the budgets bits=, got {name}=")
    if "init" in options:
        raise TypeError("sweep has no init=: one start is of one size; pass it to factorize")
    own = {one.name for one in fields(SearchOptions)}
    SearchOptions(  # checked before the first search
        effort=effort, scale_bits=scale_bits, **{k: v for k, v in options.items() if k in own}
    )
    matrix = as_matrix(A)
    given = list(np.atleast_1d(np.asarray(bits, object)))
    rates = sorted({check_number(rate, "bits", above=0.0) for rate in given})
    if not rates:
        raise ValueError("bits must hold at least one rate, got none")
    check_most("bits", rates[-1], matrix.shape)
    keepers: list[Checkpoint] = []
    curve = []
    for rate in rates:
        if checkpoint is not None:
            place = as_path(checkpoint, "checkpoint")
            keepers.append(
                Checkpoint(place.with_name(f"{place.name}.{rate!r}-bits"), checkpoint_every)
            )
        keeper = keepers[-1] if keepers else None
        options |= {"effort": effort, "scale_bits": scale_bits, "checkpoint": keeper}
        curve.append(factorize(matrix, bits=rate, **options))
        if callback is not None and callback(curve[-1]):
            break
    for keeper in keepers:
        keeper.remove()
    return curve
