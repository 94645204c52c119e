"""MESA by training, and its five comparisons, as settings of one pipeline.

Steps (Hsu et al., Section 4): a block-diagonal mask, a penalty on the differences of
neighbouring blocks, k-means with centroid retraining, cyclic deltas, Huffman codes.
FC+Q+H, Deep Compression, MPDCompress and M+Q+H leave steps out or change the mask.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from mlp import MLP, Augment

from diba_np.matrix.base import Array, CompressedMatrix
from diba_np.methods.deep_compression import DeepCompression, HuffmanCoded
from diba_np.methods.entropy_coding import entropy
from diba_np.methods.fitting import to_half
from diba_np.methods.mesa import MESA, block_layout, block_orders, cyclic_delta
from diba_np.methods.mesa_layer import difference_penalty, kmeans, nearest

Data = tuple[Array, Array, Array, Array]

PIPELINES = ("FC", "FC+Q+H", "DeepC", "MPDC", "M+Q+H", "MESA")


@dataclasses.dataclass
class Outcome:
    """One compressed network.

    Attributes
    ----------
    name : str
        One of `PIPELINES`.
    accuracy : float
        On the test rows, with the weights decoded from the stored form.
    network : MLP
    layers : list of CompressedMatrix
        Empty for FC, whose weights count 32 bits each.
    kept : int
        Unpruned weights.
    bits : int
        Stored bits of all weight matrices (code books and indices counted, biases not).
    """

    name: str
    accuracy: float
    network: MLP
    layers: list[Any]
    kept: int
    bits: int

    @property
    def average_bits(self) -> float:
        """Stored bits per unpruned weight."""
        return self.bits / self.kept

    @property
    def compression(self) -> float:
        """Bits of the dense float32 weights divided by the stored bits."""
        return float(32 * sum(W.size for W in self.network.weights) / self.bits)


def block_penalty(
    weights: list[Array], orders: list[tuple[Array, Array]], alpha: float
) -> tuple[float, list[Array]]:
    """Return the penalty on block differences and its gradient.

    ``L = alpha / layers * sum_i sum_j |B_{j+1} - B_j|^2 / (bn_i - 1)``; the gradient of
    block j is ``2 alpha / (layers (bn - 1)) [(B_j - B_{j-1}) - (B_{j+1} - B_j)]``.

    Parameters
    ----------
    weights : list of (m, n) arrays
    orders : list of ((bn, rows), (bn, columns)) int arrays
        Rows and columns of every block.
    alpha : float

    Returns
    -------
    float, list of (m, n) arrays
    """
    total, gradients = 0.0, []
    for W, (rows, columns) in zip(weights, orders, strict=True):
        gradient = np.zeros_like(W)
        if len(rows) > 1:
            where = (rows[:, :, None], columns[:, None, :])
            value, blocks = difference_penalty(W[where], alpha / len(weights))
            total += value
            gradient[where] = blocks
        gradients.append(gradient)
    return total, gradients


def delta_entropy(layer: MESA) -> tuple[float, float]:
    """Return the entropies of a coded `MESA` layer: (code indices, deltas), bits a symbol."""
    r = 1 if layer.centroids is None else len(layer.centroids)
    return entropy(layer.blocks), entropy(cyclic_delta(layer.blocks[:-1], layer.blocks[1:], r))


def _orders_of(
    sizes: Sequence[int], p: Sequence[float], order: Sequence[str], rng: np.random.Generator
) -> list[tuple[Array, Array]]:
    """Return block rows and columns of every layer; random ones for order = "random"."""
    result = []
    for (n, m), keep, how in zip(itertools.pairwise(sizes), p, order, strict=True):
        layout = count, rows, columns = block_layout((m, n), keep)
        where: str | tuple[Array, Array] = how
        if how == "random":
            where = rng.permutation(m)[: count * rows], rng.permutation(n)[: count * columns]
        result.append(block_orders(where, layout))
    return result


def run_pipeline(
    name: str,
    data: Data,
    sizes: Sequence[int] = (784, 300, 100, 10),
    p: Sequence[float] = (0.1, 0.1, 0.2),
    q: int = 5,
    alpha: float = 0.1,
    epochs: int = 30,
    retrain: int = 8,
    order: str | Sequence[str] = ("natural", "stride", "stride"),
    coder: str = "huffman",
    seed: int = 0,
    dense: MLP | None = None,
    rate: float | None = None,
    decay: float = 0.0,
    augment: Augment | None = None,
) -> Outcome:
    """Train and compress a network in one of the six ways.

    Parameters
    ----------
    name : str
        One of `PIPELINES`.
    data : (X_train, y_train, X_test, y_test)
        Rows are samples; X float32, y int.
    sizes : sequence of int
    p : sequence of float
        Share of weights kept in every layer.
    q : int
        Bits of a centroid index: 2**q centroids a layer.
    alpha : float
        Weight of the block differences (MESA).
    epochs, retrain : int
        Epochs of the first training, and of each retraining.
    order : {"stride", "natural"} or one of them for every layer
        Inputs of the blocks of MESA; see `stride_order`.  "natural" is the paper's, made
        for layers that follow convolutions. By default the first layer sees strips of the
        image and the others take inputs from all blocks below.
    coder : {"huffman", "rans", "auto"}
    seed : int
        The same seed starts all pipelines from the same draws.
    dense : MLP, optional
        A trained FC network to start from, where the pipeline starts from one.

    rate : float, optional
        First step size of Adam: 1e-3 for the pipelines that start from the dense network,
        6e-3 for those that train blocks, whose units have a tenth of the inputs.
    decay : float
        Weight decay, decoupled; see `MLP.train`.
    augment : callable, optional
        See `MLP.train`; the same for every pipeline.

    Returns
    -------
    Outcome
    """
    if name not in PIPELINES:
        raise ValueError(f"name must be one of {', '.join(PIPELINES)}, got {name!r}")
    if len(p) != len(sizes) - 1:
        raise ValueError(f"p must have {len(sizes) - 1} entries, one a layer, got {len(p)}")
    if not 1 <= q <= 8:
        raise ValueError(f"q must lie in [1, 8], got {q}")
    order = (order,) * len(p) if isinstance(order, str) else tuple(order)
    if len(order) != len(p) or any(how not in ("stride", "natural") for how in order):
        raise ValueError(f"order must be stride or natural, once or for every layer, got {order!r}")
    X, y, X_test, y_test = data
    rng = np.random.default_rng(seed)
    if rate is None:
        rate = 1e-3 if name in ("FC", "FC+Q+H", "DeepC") else 6e-3
    if name in ("FC", "FC+Q+H", "DeepC"):
        network = MLP(sizes, rng) if dense is None else dense.copy()
        if dense is None:
            network.train(X, y, rng, epochs, rate=rate, decay=decay, augment=augment)
        if name == "FC":
            kept = sum(W.size for W in network.weights)
            return Outcome(name, network.accuracy(X_test, y_test), network, [], kept, 32 * kept)
        if name == "DeepC":
            network.masks = [
                _largest_mask(W, keep) for W, keep in zip(network.weights, p, strict=True)
            ]
            network.weights = [
                W * mask for W, mask in zip(network.weights, network.masks, strict=True)
            ]
            network.train(X, y, rng, epochs, rate=rate, decay=decay, augment=augment)
        orders = []
    else:
        orders = _orders_of(sizes, p, order if name == "MESA" else ("random",) * len(p), rng)
        masks = []
        for (n, m), (rows, columns) in zip(itertools.pairwise(sizes), orders, strict=True):
            mask = np.zeros((m, n), bool)
            mask[rows[:, :, None], columns[:, None, :]] = True
            masks.append(mask)
        network = MLP(sizes, rng, masks)
        penalty = None
        if name == "MESA" and alpha:

            def penalty(weights: list[Array]) -> list[Array]:
                return block_penalty(weights, orders, alpha)[1]

        network.train(X, y, rng, epochs, penalty=penalty, rate=rate, decay=decay, augment=augment)
    share: list[Array] = []
    if name != "MPDC":
        share = _share(network, q)
        network.train(X, y, rng, retrain, rate=0.3 * rate, share=share, augment=augment)
    layers = _store(name, network, orders, share, order, coder)
    network.weights = [layer.to_dense() for layer in layers]
    kept = sum(
        W.size if network.masks is None else int(network.masks[i].sum())
        for i, W in enumerate(network.weights)
    )
    bits = sum(layer.storage_bits() for layer in layers)
    return Outcome(name, network.accuracy(X_test, y_test), network, layers, kept, bits)


def _largest_mask(W: Array, keep: float) -> Array:
    """Mark the share `keep` of entries of largest magnitude."""
    count = max(int(keep * W.size), 1)
    threshold = np.partition(np.abs(W).ravel(), W.size - count)[W.size - count]
    result: Array = (np.abs(W) >= threshold).astype(np.float32)
    return result


def _share(network: MLP, q: int) -> list[Array]:
    """Cluster the kept weights of every layer in place; return codes from 1, pruned ones 0."""
    share = []
    for layer, W in enumerate(network.weights):
        mask = np.ones(W.shape, bool) if network.masks is None else network.masks[layer] > 0
        values = W[mask].astype(np.float64)
        codes = np.zeros(W.shape, np.int64)
        centroids = kmeans(values, min(2**q, values.size))
        codes[mask] = nearest(values, centroids) + 1
        network.weights[layer] = np.concatenate([[0.0], centroids]).astype(np.float32)[codes]
        share.append(codes)
    return share


def _store(
    name: str,
    network: MLP,
    orders: list[tuple[Array, Array]],
    share: list[Array],
    order: Sequence[str],
    coder: str,
) -> list[CompressedMatrix]:
    """Put every layer into its stored form."""
    layers: list[CompressedMatrix] = []
    for index, W in enumerate(network.weights):
        if name == "MPDC":
            rows, columns = orders[index]
            blocks = W[rows[:, :, None], columns[:, None, :]]
            layers.append(MESA(W.shape, blocks, None, False, (rows.ravel(), columns.ravel())))
            continue
        mask = share[index] > 0
        values, codes = np.unique(W[mask], return_inverse=True)
        centroids = to_half(values)
        full = np.zeros(W.shape, np.int64)
        full[mask] = codes.ravel()
        if name == "FC+Q+H":
            layers.append(HuffmanCoded(full, centroids, coder))
        elif name == "DeepC":
            positions = np.flatnonzero(mask)
            layers.append(
                DeepCompression(W.shape, positions, full.ravel()[positions], centroids, 5, coder)
            )
        else:
            rows, columns = orders[index]
            blocks = full[rows[:, :, None], columns[:, None, :]]
            deltas = name == "MESA"
            where = order[index] if deltas else (rows.ravel(), columns.ravel())
            layers.append(MESA(W.shape, blocks, centroids, deltas, where, coder))
    return layers
