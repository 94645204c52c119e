"""A multilayer perceptron in NumPy: ReLU, softmax cross-entropy, gradients by hand.

Just enough to retrain compressed networks: masks, a penalty on the weights, and weights
that share values. It is not a general training library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from diba_np.matrix.base import Array
from diba_np.training.losses import cross_entropy
from diba_np.training.optimisers import Adam, share_of_rate

Augment = Callable[[Array, np.random.Generator], Array]

_LEAST_RATE = 0.05  # share of the first rate that the last step takes


class MLP:
    """``x_{l+1} = relu(x_l W_l^T + b_l)``; the last layer gives class scores.

    Parameters
    ----------
    sizes : sequence of int
        Units of every layer, inputs first: (784, 300, 100, 10) is LeNet-300-100.
    rng : numpy.random.Generator
    masks : sequence of (m_l, n_l) bool, optional
        Weights outside the mask are zero and stay zero.

    Attributes
    ----------
    weights : list of (m_l, n_l) float32
    biases : list of (m_l,) float32
    """

    def __init__(
        self, sizes: Sequence[int], rng: np.random.Generator, masks: Sequence[Array] | None = None
    ) -> None:
        self.sizes = tuple(sizes)
        self.weights, self.biases = [], []
        for layer, (n, m) in enumerate(zip(self.sizes[:-1], self.sizes[1:], strict=True)):
            W = rng.standard_normal((m, n))
            fan_in = float(n)
            if masks is not None:
                W *= masks[layer]
                fan_in = max(float(masks[layer].sum()) / m, 1.0)
            self.weights.append((W * np.sqrt(2.0 / fan_in)).astype(np.float32))
            self.biases.append(np.zeros(m, np.float32))
        self.masks = None if masks is None else [np.asarray(mask, np.float32) for mask in masks]

    def copy(self) -> MLP:
        """Return an independent copy."""
        other = object.__new__(MLP)
        other.sizes = self.sizes
        other.weights = [W.copy() for W in self.weights]
        other.biases = [b.copy() for b in self.biases]
        other.masks = None if self.masks is None else list(self.masks)
        return other

    def forward(self, X: Array) -> list[Array]:
        """Return the activations of every layer, inputs first: list of (N, units)."""
        activations = [X]
        last = len(self.weights) - 1
        for layer, (W, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            X = X @ W.T + b
            if layer < last:
                X = np.maximum(X, 0.0)
            activations.append(X)
        return activations

    def accuracy(self, X: Array, labels: Array) -> float:
        """Return the share of rows of X whose highest score is their label."""
        return float(np.mean(np.argmax(self.forward(X)[-1], axis=1) == labels))

    def loss_and_gradients(self, X: Array, labels: Array) -> tuple[float, list[Array], list[Array]]:
        """Return the mean cross-entropy and the gradients of weights and biases."""
        activations = self.forward(X)
        loss, upstream = cross_entropy(activations[-1], labels)
        grad_w: list[Any] = [None] * len(self.weights)
        grad_b: list[Any] = [None] * len(self.weights)
        for layer in range(len(self.weights) - 1, -1, -1):
            grad_w[layer] = upstream.T @ activations[layer]
            grad_b[layer] = upstream.sum(axis=0)
            if layer:
                upstream = (upstream @ self.weights[layer]) * (activations[layer] > 0)
        return loss, grad_w, grad_b

    def train(
        self,
        X: Array,
        labels: Array,
        rng: np.random.Generator,
        epochs: int,
        rate: float = 1e-3,
        batch: int = 64,
        penalty: Callable[[list[Array]], list[Array]] | None = None,
        share: list[Array] | None = None,
        decay: float = 0.0,
        augment: Augment | None = None,
    ) -> list[float]:
        """Train with Adam; the rate falls to a twentieth along a half cosine.

        Parameters
        ----------
        X : (N, n) float32
        labels : (N,) int
        rng : numpy.random.Generator
            Shuffles the samples.
        epochs : int
        rate : float
        batch : int
        penalty : callable, optional
            ``penalty(weights) -> list of gradients`` added to those of the loss.
        share : list of (m_l, n_l) int arrays, optional
            Weights with the same index hold one value: its gradient is the sum over its
            members. Index 0 is the pruned weights, which stay zero.
        decay : float
            Weight decay, decoupled from the gradient.
        augment : callable, optional
            ``augment(rows, rng) -> rows`` changes each batch before it is used.

        Returns
        -------
        list of float
            Mean loss of every epoch, without the penalty.
        """
        shared = self.weights if share is None else _centroids(self.weights, share)
        values = _named(shared, self.biases)
        # neither biases nor values that weights share decay
        decays = {name: decay for name, value in values.items() if value.ndim == 2}
        optimiser = Adam(values, rate, relative=False, decay=decays)
        history, total = [], max(epochs * -(-len(X) // batch), 1)
        for _ in range(epochs):
            order = rng.permutation(len(X))
            losses = []
            for start in range(0, len(X), batch):
                rows = order[start : start + batch]
                samples = X[rows] if augment is None else augment(X[rows], rng)
                loss, grad_w, grad_b = self.loss_and_gradients(samples, labels[rows])
                losses.append(loss)
                if penalty is not None:
                    grad_w = [g + p for g, p in zip(grad_w, penalty(self.weights), strict=True)]
                if self.masks is not None:
                    grad_w = [g * mask for g, mask in zip(grad_w, self.masks, strict=True)]
                if share is not None:
                    grad_w = [
                        _sums(g, s, len(v)) for g, s, v in zip(grad_w, share, shared, strict=True)
                    ]
                rate_now = share_of_rate("cosine", (optimiser.steps + 1) / total, _LEAST_RATE)
                optimiser.step(_named(grad_w, grad_b), rate_now)
                if share is not None:
                    self.weights = [v[s] for v, s in zip(shared, share, strict=True)]
            history.append(float(np.mean(losses)))
        return history


def _named(weights: list[Array], biases: list[Array]) -> dict[str, Array]:
    """Return the arrays of all layers under one name each, by reference."""
    pairs = enumerate(zip(weights, biases, strict=True))
    return {
        f"{name}{i}": array for i, pair in pairs for name, array in zip("Wb", pair, strict=True)
    }


def _centroids(weights: list[Array], share: list[Array]) -> list[Array]:
    """Return the shared values of every layer; index 0 (pruned) is zero."""
    result = []
    for W, indices in zip(weights, share, strict=True):
        count = np.bincount(indices.ravel())
        total = np.bincount(indices.ravel(), W.ravel())
        values = (total / np.maximum(count, 1)).astype(np.float32)
        values[0] = 0.0
        result.append(values)
    return result


def _sums(gradient: Array, indices: Array, count: int) -> Array:
    """Sum a gradient over the members of every shared value; zero for index 0."""
    sums = np.bincount(indices.ravel(), gradient.ravel(), count).astype(np.float32)
    sums[0] = 0.0
    return sums
