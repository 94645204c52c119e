"""Losses of a batch of outputs: ``(y_pred, y) -> (value, gradient)``, both means over samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Loss = Callable[[Array, Array], tuple[float, Array]]


def mse(y_pred: Array, y: Array) -> tuple[float, Array]:
    """Squared error summed over outputs, averaged over the N samples, and its gradient (N, m)."""
    # squares of float32 outputs may leave its range
    difference = y_pred.astype(np.float64) - y
    value = float(np.einsum("ij,ij->", difference, difference, dtype=np.float64)) / len(y)
    return value, (difference * (2.0 / len(y))).astype(y_pred.dtype)


def cross_entropy(y_pred: Array, y: Array) -> tuple[float, Array]:
    """Cross-entropy of softmax(y_pred) in nats, averaged over the samples, and its gradient.

    Parameters
    ----------
    y_pred : (N, m) float
        Logits.
    y : (N,) int or (N, m) float
        Class labels, or the probabilities aimed at.
    """
    shifted = y_pred - y_pred.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    if y.ndim == 1:
        rows = np.arange(len(y))
        value = -float(log_p[rows, y].sum(dtype=np.float64)) / len(y)
        gradient = np.exp(log_p)
        gradient[rows, y] -= 1
    else:
        value = -float(np.einsum("ij,ij->", y, log_p, dtype=np.float64)) / len(y)
        gradient = np.exp(log_p) * y.sum(axis=1, keepdims=True) - y
    return value, gradient / y_pred.dtype.type(len(y))


LOSSES: dict[str, Loss] = {"mse": mse, "cross_entropy": cross_entropy}
