"""`factorize_rows`: one task of a model, by the best of some methods; what an executor is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diba_np.checks import digest
from diba_np.errors import FormatError
from diba_np.files.checkpoint import Checkpoint
from diba_np.machine.versions import versions
from diba_np.matrix import quality
from diba_np.matrix.base import CompressedMatrix
from diba_np.methods.weighted import FitOptions, best_of, weighted_error
from diba_np.search.options import SearchOptions
from diba_np.search.terms import terms_within

CHECKPOINT_EVERY = 20.0  # seconds


def factorize_rows(
    A: NDArray[Any],
    bits: float,
    gram: NDArray[Any] | None,
    options: dict[str, Any],
    checkpoint: str | None = None,
    methods: Sequence[str] = ("diba",),
) -> CompressedMatrix:
    """Fit one task's rows by the best of some methods; what an executor is given.

    Parameters
    ----------
    A : (m, n)
    bits : float
        Most bits a weight.
    gram : (n, n), optional
        Second moments of what the rows multiply with.
    options : dict
        Those of the search; `seed` and `threads` are for all methods.
    checkpoint : str, optional
        Where the search's state is kept, and goes on from.
    methods : sequence of str
    """
    search = dict(options)
    if isinstance(options.get("terms"), int):
        scales = SearchOptions(**options).scales_for("bits")
        search["terms"] = terms_within(options["terms"], bits, A.shape, scales, gram is not None)
    keeper = None if checkpoint is None else Checkpoint(checkpoint, CHECKPOINT_EVERY)
    if keeper is not None:
        search["checkpoint"] = keeper
    how = FitOptions(options.get("seed", 0), options.get("threads"), search=search)
    try:
        made = best_of(methods, A, bits, gram, None, how)
    except FormatError:
        if keeper is None:
            raise
        keeper.remove()  # damaged: the search begins anew, with the same result
        made = best_of(methods, A, bits, gram, None, how)
    if "snr_db" not in made.record:
        made.record |= _facts(A, gram, made)
    return made


def _facts(A: NDArray[Any], gram: NDArray[Any] | None, made: CompressedMatrix) -> dict[str, Any]:
    """Return what the record of a factorization tells beside its settings, of any method."""
    facts: dict[str, Any] = {
        "source": {"shape": list(A.shape), "dtype": str(A.dtype), "sha256": digest(A)},
        "versions": versions(),
    }
    sums = {"snr_db": quality.squared_sums(A, made)}
    if gram is not None:
        wide = A.astype(np.float64)
        lost = weighted_error(wide - made.to_dense(), gram)
        sums["output_snr_db"] = weighted_error(wide, gram), lost
    for name, (signal, noise) in sums.items():
        reached = quality.decibels(signal, noise)
        facts[name] = reached if math.isfinite(reached) else None
    return facts
