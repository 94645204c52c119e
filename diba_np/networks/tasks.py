"""What a network is for: outputs that are read off its last hidden states, and how far two differ.

Shapes: last hidden states x (S, T, width), mask and asked (S, T), outputs y (N, size) of N targets.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from diba_np.networks.blocks.block import Back
from diba_np.networks.network import Network
from diba_np.networks.steps import Linear
from diba_np.networks.texts import pooled, unit_means
from diba_np.training.losses import cross_entropy

Array = NDArray[Any]

_MOST = 1 << 22  # outputs that are held at a time, where rows are small enough


class Task:
    """A task by its name: its outputs, its loss, and gradients that stand for those of any loss.

    Attributes
    ----------
    name : str
    step_tokens : int
        Of a step of training.
    """

    name = ""
    step_tokens = 1024

    def size(self, net: Network) -> int:
        """Return how many outputs a target has."""
        raise NotImplementedError

    def count(self, asked: Array) -> int:
        """Return how many targets rows have, of which some tokens (S, T) are asked for."""
        return len(asked)

    def parts(self, net: Network, asked: Array) -> Iterator[slice]:
        """Yield rows whose outputs are to be held at a time."""
        yield slice(0, len(asked))

    def outputs(
        self, net: Network, x: Array, mask: Array, asked: Array, linear: Linear | None = None
    ) -> tuple[Array, Back]:
        """Return the outputs of a network's last hidden states, and the step back to these."""
        raise NotImplementedError

    def loss(self, y: Array, aim: Array) -> tuple[float, Array]:
        """Return a sum over targets of how far outputs are from the dense network's; gradient."""
        raise NotImplementedError

    def drawn(self, y: Array, rng: np.random.Generator) -> Array:
        """Return random gradients of outputs: their mean products tell which errors matter."""
        raise NotImplementedError

    def choices(self, y: Array) -> Array:
        """Return the logits (choices, kinds) of outputs, each choice of one kind among all."""
        return y


class Tokens(Task):
    """The next tokens, or those that are masked: divergence of their probabilities, in nats."""

    def __init__(self, name: str) -> None:
        self.name = name

    def size(self, net: Network) -> int:
        return net.layers[net.need_head()].shape[0]

    def count(self, asked: Array) -> int:
        return int(asked.sum())

    def parts(self, net: Network, asked: Array) -> Iterator[slice]:
        size = max(1, _MOST // (asked.shape[1] * self.size(net)))
        for at in range(0, len(asked), size):
            yield slice(at, at + size)

    def outputs(
        self, net: Network, x: Array, mask: Array, asked: Array, linear: Linear | None = None
    ) -> tuple[Array, Back]:
        y, pull = net.head(x[asked], linear=linear)

        def back(gradient: Array) -> Array:
            g = np.zeros_like(x)
            g[asked] = pull(gradient)
            return g

        return y, back

    def loss(self, y: Array, aim: Array) -> tuple[float, Array]:
        return divergence(y, aim)

    def drawn(self, y: Array, rng: np.random.Generator) -> Array:
        """Return random signs about their mean: most masked tokens are certain."""
        return centred_signs(y, rng)


class NextTokens(Tokens):
    """The next tokens, of which few are certain."""

    step_tokens = 256  # each is a target: a step of 1024 is no better, and there are fewer

    def drawn(self, y: Array, rng: np.random.Generator) -> Array:
        """Return the gradients of the cross-entropy to labels that the outputs themselves draw."""
        p: Array = np.exp(log_softmax(y, axis=-1))
        drawn = rng.random((len(p), 1))
        label = (np.cumsum(p, axis=1, dtype=np.float64) < drawn).sum(axis=1)
        p[np.arange(len(p)), np.minimum(label, p.shape[1] - 1)] -= 1
        return p


class Classes(Task):
    """Classes of whole rows: divergence of their probabilities, in nats."""

    name = "classes"

    def size(self, net: Network) -> int:
        return net.layers[net.tensors.need("classifier")].shape[0]

    def outputs(
        self, net: Network, x: Array, mask: Array, asked: Array, linear: Linear | None = None
    ) -> tuple[Array, Back]:
        return net.head(x, linear=linear)

    def loss(self, y: Array, aim: Array) -> tuple[float, Array]:
        return divergence(y, aim)

    def drawn(self, y: Array, rng: np.random.Generator) -> Array:
        """Return random signs about their mean; where a class is certain labels tell nothing."""
        return centred_signs(y, rng)


class Labels(Classes):
    """Several labels of whole rows, each there or not: divergence of these choices, in nats."""

    name = "labels"

    def loss(self, y: Array, aim: Array) -> tuple[float, Array]:
        value, gradient = divergence(self.choices(y), self.choices(aim))
        return value, gradient[:, 1].reshape(y.shape)

    def drawn(self, y: Array, rng: np.random.Generator) -> Array:
        return random_signs(y, rng)

    def choices(self, y: Array) -> Array:
        """Return a choice for each label of each row: of 0 for no, of its output for yes."""
        return np.stack([np.zeros_like(y), y], axis=-1).reshape(-1, 2)


class Scores(Classes):
    """Numbers of a whole row, which have no probabilities: squared error."""

    name = "scores"

    def loss(self, y: Array, aim: Array) -> tuple[float, Array]:
        gap = y - aim
        return float(np.vdot(gap, gap)), 2 * gap

    def drawn(self, y: Array, rng: np.random.Generator) -> Array:
        return random_signs(y, rng)


class Sentences(Task):
    """Vectors of whole rows as `Network.embed` makes them: one minus the cosine."""

    name = "sentences"

    def size(self, net: Network) -> int:
        return net.config.width

    def outputs(
        self, net: Network, x: Array, mask: Array, asked: Array, linear: Linear | None = None
    ) -> tuple[Array, Back]:
        return unit_means(x, pooled(mask, net.config.pooling))

    def loss(self, y: Array, aim: Array) -> tuple[float, Array]:
        return len(y) - float(np.vdot(y, aim)), -aim

    def drawn(self, y: Array, rng: np.random.Generator) -> Array:
        return random_signs(y, rng)


NEXT, MASKED = NextTokens("next tokens"), Tokens("masked tokens")
CLASSES, LABELS, SCORES, SENTENCES = Classes(), Labels(), Scores(), Sentences()

# ``problem_type`` of a configuration -> what a head for classes tells then
_PROBLEMS: dict[Any, Task] = {"regression": SCORES, "multi_label_classification": LABELS}


def task_of(net: Network) -> Task:
    """Return what a network is for: by its head; without one its rows become vectors.

    A head for classes tells scores or labels where the configuration says so; one that has one
    output tells no classes: that is a score.
    """
    if net.head_name is not None:
        return NEXT if net.kind.decoder else MASKED
    if net.tensors.find("classifier") is None:
        return SENTENCES
    if SCORES.size(net) == 1:
        return SCORES
    return _PROBLEMS.get(net.config.source.get("problem_type"), CLASSES)


def random_signs(y: Array, rng: np.random.Generator) -> Array:
    """Return random signs of the shape of outputs (N, size)."""
    signs: Array = rng.choice([-1.0, 1.0], y.shape).astype(y.dtype)
    return signs


def centred_signs(y: Array, rng: np.random.Generator) -> Array:
    """Return random signs of the shape of outputs (N, size), about the mean of each target."""
    signs = random_signs(y, rng)
    centred: Array = signs - signs.mean(axis=1, keepdims=True)
    return centred


def divergence(y: Array, aim: Array) -> tuple[float, Array]:
    """Return the Kullback-Leibler divergence from the aim's probabilities, a sum; its gradient."""
    logs = log_softmax(aim, axis=-1)
    p = np.exp(logs)
    value, gradient = cross_entropy(y, p)
    return value * len(y) + float(np.vdot(p, logs)), gradient * len(y)
