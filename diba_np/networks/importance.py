"""How much each token and each output of a network's layers matters, by gradients of its loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diba_np.files.atomic import atomic_path
from diba_np.networks.calibration import Calibration, iterate_batches
from diba_np.networks.network import Network

Array = NDArray[Any]

EVEN = 0.2  # share of the weights that does not follow the gradients
MOST = 20.0  # times the mean that one token's gradients may count


@dataclass
class Importance:
    """What the errors of one layer's outputs are weighed by.

    Attributes
    ----------
    tokens : list of (S, T) arrays
        Weights of the tokens, a batch each; mean 1, padding 0.
    outputs : (m,) array
        Weights of the outputs, mean 1.
    energy : float
        How much the loss would rise, to second order and in an unit common to all layers, if the
        outputs were lost.
    """

    tokens: list[Array]
    outputs: Array
    energy: float


def importance(net: Network, rows: Calibration, seed: int = 0) -> dict[str, Importance]:
    """Return how much tokens and outputs of each layer of the trunk matter.

    Gradients are those of the cross-entropy to labels that are drawn from what the network
    predicts: their mean squares are the diagonal of its Fisher information. A network without a
    head is taken at random signs times its last hidden states.

    Parameters
    ----------
    net : Network
    rows : Calibration
    seed : int
        Draws the labels.

    Returns
    -------
    dict of str to Importance

    Notes
    -----
    In language models a few tokens, the first of a row above all, carry activations hundreds of
    times the rest, which the norm after them takes back: their gradients are as much smaller. The
    share `EVEN` that does not follow the gradients falls off with the mean square of what a token
    reads and of the residual branch it is added to, in units of its median, and no token counts
    more than `MOST` times the mean. So such tokens are weighed by what they do.
    Cost: a forward and a backward pass.
    """
    rng = np.random.default_rng(seed)
    names = set(net.weights)
    squares: dict[str, list[Array]] = {name: [] for name in net.weights}
    sizes: dict[str, list[Array]] = {name: [] for name in net.weights}
    gradients: dict[str, Array] = {}
    outputs: dict[str, Array] = {}
    masks: list[Array] = []

    def call(name: str, x: Array, added: Array | None = None, keep: Array | None = None) -> Any:
        if name not in names:
            return net.linear(name, x, added=added)
        y, back = net.linear(name, x)
        size = _relative_size(x)
        if added is not None:
            size = np.maximum(size, _relative_size(added))
        bounded = 1.0 / (1.0 + size)
        sizes[name].append(bounded)
        mask = masks[-1]
        part = np.einsum("st,stm->m", (bounded * mask).astype(y.dtype), np.square(y))
        outputs[name] = outputs.get(name, 0.0) + part.astype(np.float64)
        if added is not None:
            y = y + added
        return y, back

    def watch(name: str, gradient: Array) -> None:
        if name in names:
            squares[name].append(np.einsum("stm,stm->st", gradient, gradient))
            own = np.square(gradient).reshape(-1, gradient.shape[-1])
            gradients[name] = gradients.get(name, 0.0) + own.sum(axis=0, dtype=np.float64)

    for _, inputs, mask in iterate_batches(rows):
        state = net.start(net.begin(inputs, mask), net.plain)[0]
        masks.append(np.asarray(state["mask"], bool))
        hidden, back = net.forward(inputs, mask, call)
        net.watch = watch
        try:
            back({-1: pulled(net, hidden[-1], masks[-1], rng)})
        finally:
            net.watch = None
    net.zero_grad()
    return {
        name: _weights(squares[name], sizes[name], masks, gradients[name], outputs[name])
        for name in net.weights
        if squares[name]
    }


def pulled(net: Network, x: Array, mask: Array, rng: np.random.Generator) -> Array:
    """Return the gradient at the last hidden states (S, T, width) for labels that are drawn."""
    g = np.zeros_like(x)
    if net.head_name is None and net.tensors.find("classifier") is None:
        g[mask] = rng.choice([-1.0, 1.0], (int(mask.sum()), x.shape[-1]))
        return g
    for row in range(len(x)):  # the logits of one row at a time
        some = slice(row, row + 1)
        y, back = net.head(x[some], mask[some])
        p = y - y.max(axis=-1, keepdims=True)
        np.exp(p, out=p)
        p /= p.sum(axis=-1, keepdims=True)
        flat = p.reshape(-1, p.shape[-1])
        drawn = rng.random((len(flat), 1)).astype(np.float64)
        label = (np.cumsum(flat, axis=1, dtype=np.float64) < drawn).sum(axis=1)
        flat[np.arange(len(flat)), np.minimum(label, flat.shape[1] - 1)] -= 1
        if p.ndim == 3:
            p *= mask[some][..., None]
        g[some] = back(p)
    return g


def _relative_size(x: Array) -> Array:
    """Return the squares of x (..., n), summed over channels, in units of their median."""
    squares: Array = np.einsum("...i,...i->...", x, x, dtype=np.float64)
    return squares / (float(np.median(squares)) or 1.0)


def _weights(
    squares: list[Array], sizes: list[Array], masks: list[Array], gradient: Array, output: Array
) -> Importance:
    """Bring sums over a layer to weights of mean 1."""
    count = sum(int(mask.sum()) for mask in masks)
    mean = sum(float((g * mask).sum()) for g, mask in zip(squares, masks, strict=True)) / count
    even = sum(float((b * mask).sum()) for b, mask in zip(sizes, masks, strict=True)) / count
    tokens = [
        ((1 - EVEN) * np.minimum(g / (mean or 1.0), MOST) + EVEN * b / even) * mask
        for g, b, mask in zip(squares, sizes, masks, strict=True)
    ]
    whole = sum(float(part.sum()) for part in tokens) / count
    tokens = [part / whole for part in tokens]
    outputs = (1 - EVEN) * gradient / (float(gradient.mean()) or 1.0) + EVEN
    return Importance(tokens, outputs, float(gradient @ output) / (count * even * count))


# -- kept on disk ----------------------------------------------------------------------------------


def save_importance(path: Path, matters: Mapping[str, Importance]) -> None:
    """Keep what `importance` found, in single precision."""
    arrays: dict[str, Array] = {}
    for name, measure in matters.items():
        for at, part in enumerate(measure.tokens):
            arrays[f"{name}/tokens/{at}"] = part.astype(np.float32)
        arrays[f"{name}/outputs"] = measure.outputs.astype(np.float32)
        arrays[f"{name}/energy"] = np.array(measure.energy)
    with atomic_path(path) as part_path, open(part_path, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def load_importance(path: Path) -> dict[str, Importance]:
    """Return what `save_importance` kept."""
    table: dict[str, Importance] = {}
    with np.load(path, allow_pickle=False) as arrays:
        for key in arrays.files:
            name, what, *_ = key.rsplit("/", 2 if "/tokens/" in key else 1)
            each = table.setdefault(name, Importance([], np.zeros(0), 0.0))
            if what == "tokens":
                each.tokens.append(arrays[key])
            elif what == "outputs":
                each.outputs = arrays[key]
            else:
                each.energy = float(arrays[key])
    return table
