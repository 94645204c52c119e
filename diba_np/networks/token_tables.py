"""What the fit of a network's table of tokens, or of its head, goes by."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diba_np.networks.calibration import Calibration, iterate_batches
from diba_np.networks.network import Network
from diba_np.networks.stages import layer_by_layer, states_folder

Array = NDArray[Any]

# shares of a row's weight: of every token alike, and of what is read and what is predicted
_EVEN, _COUNTED = 0.2, 0.4


def table_moments(
    net: Network, name: str, A: Array, texts: Calibration, scratch: Path | None = None
) -> tuple[Array, Array]:
    """Return the Gram matrix (width, width) and the weights (tokens,) of the rows of a table.

    A token's row counts as often as it is read, and as much as it is predicted; the columns go by
    the last hidden states where the matrix is a decoder's head.

    Parameters
    ----------
    net : Network
        The dense network.
    name : str
        Its table of tokens or its head.
    A : (tokens, width) float32
        That matrix.
    texts : Calibration
        What is read.
    scratch : Path, optional
        Where a temporary folder for the states between layers is made.
    """
    n = A.shape[1]
    gram, used, predicted = np.zeros((n, n)), np.zeros(len(A)), np.zeros(len(A))
    for _, inputs, mask in iterate_batches(texts):
        at = np.ones(inputs.shape, bool) if mask is None else mask
        if name == net.token_name:
            used += np.bincount(inputs[at], minlength=len(A))
    if name == net.head_name and net.kind.decoder:
        for x, at in _last_hidden(net, texts, scratch):
            for row, some in zip(x, at, strict=True):
                z = row[some] @ A.T
                z -= z.max(axis=1, keepdims=True)
                np.exp(z, out=z)
                z /= z.sum(axis=1, keepdims=True)
                predicted += z.sum(axis=0, dtype=np.float64)
                gram += row[some].T @ row[some]
    even = np.eye(n)
    trace = float(np.trace(gram))
    if trace:
        even = 0.5 * even + 0.5 * gram * (n / trace)
    weights = np.full(len(A), _EVEN)
    for part in (used, predicted):
        weights += _COUNTED * part / (float(part.mean()) or 1.0)
    return even, weights


def _last_hidden(
    net: Network, texts: Calibration, scratch: Path | None
) -> Iterator[tuple[Array, Array]]:
    """Yield last hidden states (S, T, width) and mask (S, T) of every batch."""
    begun = (net.begin(inputs, mask) for _, inputs, mask in iterate_batches(texts))
    with states_folder(scratch) as space:
        for layer, _, state in layer_by_layer(net, begun, lambda _, at: space / f"{at}.npy"):
            if layer == net.config.layers:
                yield net.ended(state["x"])[0], np.asarray(state["mask"], bool)
