"""Quality in decibels, of a matrix and of the outputs for some inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diba_np.arrays import largest_magnitude, row_blocks
from diba_np.checks import as_real, as_samples

# what a record tells of bits and diagonals as they were found: true of no others
FIGURES = (
    "snr_db",
    "output_snr_db",
    "zero_rows",
    "zero_columns",
    "objective_history",
    "improving_flips_left",
    "loss",
)


def without_figures(record: dict[str, Any], *also: str) -> dict[str, Any]:
    """Return a record without its `FIGURES`, and without other entries by name."""
    return {name: value for name, value in record.items() if name not in (*FIGURES, *also)}


def retuned(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record of a matrix whose numbers were trained: no figures of what they were."""
    return without_figures(record, "retune") | {"retuned": True}


def _as_real(A: ArrayLike, name: str) -> NDArray[Any]:
    """Return an array of real numbers; subclasses that slice in their own way become plain."""
    array = as_real(A, name)
    return array if isinstance(array, np.memmap) else np.asarray(array)


def decibels(signal: float, noise: float) -> float:
    """Return ``10 log10(signal / noise)``: +inf without noise, -inf for noise without signal."""
    if noise == 0:
        return float("inf")
    if signal == 0:
        return float("-inf")
    return float(10 * (np.log10(signal) - np.log10(noise)))


def snr_db(A: ArrayLike, A_hat: Any) -> float:
    """Signal-to-noise ratio of an approximation in dB.

    ``10 log10(|A|_F^2 / |A - A_hat|_F^2)``, accumulated in float64 over row blocks.

    Parameters
    ----------
    A : (m, n) array_like
        The reference.
    A_hat : (m, n) array_like
        The approximation; a `DiBAFactors` is expanded block by block.

    Returns
    -------
    float
        In dB; inf if the two are equal.

    Raises
    ------
    TypeError, ValueError
        The entries are not real numbers; the shapes differ or are not two-dimensional.

    Examples
    --------
    >>> round(snr_db([[1.0, 2.0]], [[1.0, 1.9]]), 2)
    26.99
    """
    return decibels(*squared_sums(A, A_hat))


def squared_sums(A: ArrayLike, A_hat: Any, unit: float | None = None) -> tuple[float, float]:
    """Return ``|A|_F^2`` and ``|A - A_hat|_F^2``, as `snr_db` takes them, in units of ``unit^2``.

    By default the unit is the largest magnitude of `A`, so that no square overflows or vanishes.

    Raises
    ------
    ValueError
        The shapes differ or are not two-dimensional.
    """
    reference = _as_real(A, "A")
    streamed = hasattr(A_hat, "row_expander")
    approximation = A_hat if streamed else _as_real(A_hat, "A_hat")
    if reference.ndim != 2 or reference.shape != tuple(approximation.shape):
        raise ValueError(
            f"A and A_hat must be 2-D of one shape, got {reference.shape} and {approximation.shape}"
        )
    expand = A_hat.row_expander() if streamed else approximation.__getitem__
    unit = unit or largest_magnitude(reference) or 1.0
    signal = noise = 0.0
    for rows in row_blocks(reference.shape):
        a = reference[rows].astype(np.float64) / unit
        e = a - np.asarray(expand(rows), np.float64) / unit
        signal += float(np.vdot(a, a))
        noise += float(np.vdot(e, e))
    return signal, noise


def output_snr_db(A: ArrayLike, A_hat: Any, X: ArrayLike) -> float:
    """Signal-to-noise ratio of the outputs ``Y = X A^T`` in dB.

    ``10 log10(|X A^T|_F^2 / |X (A - A_hat)^T|_F^2)``, accumulated in float64 over row blocks of X.
    It tells about data in general only on inputs that were not used for fitting.

    Parameters
    ----------
    A : (m, n) array_like
        The reference.
    A_hat : (m, n) array_like
        The approximation; a `DiBAFactors` is expanded.
    X : (..., n) array_like
        Inputs, one sample a row; leading axes are samples.

    Returns
    -------
    float
        In dB; inf if the outputs are equal.

    Raises
    ------
    ValueError
        The shapes do not fit together.

    Examples
    --------
    >>> round(output_snr_db([[1.0, 2.0]], [[1.0, 1.9]], [[1.0, 0.0], [0.0, 1.0]]), 2)
    26.99
    >>> output_snr_db([[1.0, 2.0]], [[1.0, 1.9]], [[1.0, 0.0]])
    inf
    """
    reference = _as_real(A, "A")
    dense = A_hat.to_dense() if hasattr(A_hat, "to_dense") else A_hat
    approximation = _as_real(dense, "A_hat")
    if reference.ndim != 2 or reference.shape != approximation.shape:
        raise ValueError(
            f"A and A_hat must be 2-D of one shape, got {reference.shape} and {approximation.shape}"
        )
    inputs = as_samples(X, "X", reference.shape[1])
    unit = largest_magnitude(reference) or 1.0
    a = reference.astype(np.float64) / unit
    e = a - approximation.astype(np.float64) / unit
    signal = noise = 0.0
    widest = max(inputs.shape[1], len(a))
    for rows in row_blocks((len(inputs), widest)):
        x = inputs[rows].astype(np.float64)
        y, d = x @ a.T, x @ e.T
        signal += float(np.vdot(y, y))
        noise += float(np.vdot(d, d))
    return decibels(signal, noise)
