"""Losses of a batch of outputs: ``(y_pred, y) -> (value, gradient)``, both means over samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from diba_np.checks import check_number

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


def softened_cross_entropy(temperature: float) -> Loss:
    """Return the cross-entropy of softmax(y_pred / T) to softmax(y / T), times T^2.

    The loss of distillation [1]_: y are the scores that a teacher gives, (N, m). With T above 1 the
    scores of classes that are far from the answer count too, which `cross_entropy` does not see
    where the teacher is certain; with T = 1 it is `cross_entropy` to the teacher's probabilities.

    Parameters
    ----------
    temperature : float
        T, above 0.

    References
    ----------
    .. [1] G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network",
       arXiv 1503.02531.
    """
    T = check_number(temperature, "temperature", above=0.0)

    def loss(y_pred: Array, y: Array) -> tuple[float, Array]:
        kind = y_pred.dtype.type
        value, gradient = cross_entropy(y_pred / kind(T), softmax(y / kind(T), axis=1))
        return T * T * value, gradient * kind(T)

    return loss


LOSSES: dict[str, Loss] = {"mse": mse, "cross_entropy": cross_entropy}
