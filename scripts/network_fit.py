"""Compress a `Bert` layer by layer on what the compressed prefix produces; what a task is.

`compress` gives the encoder to `diba_np.networks.layerwise.compress_layers`, with its residual
branches and with how much tokens and outputs matter. `network_train` goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bert import Array, Back, Bert, softmax

import diba_np as dn
from diba_np import methods
from diba_np.files.atomic import atomic_path
from diba_np.layers.registry import as_layer
from diba_np.matrix.base import CompressedMatrix
from diba_np.methods.random_bits import random_factors
from diba_np.models.file import ModelFactors, open_model
from diba_np.networks.inputs import batches, padded
from diba_np.networks.layerwise import compress_layers
from diba_np.training.losses import cross_entropy

TOKENS = 2048  # of a batch; larger ones leave the second-level cache
EVEN = 0.2  # share of the tokens' weights that is the same for all

Form = CompressedMatrix
# takes a layer's name, the matrix aimed at, the Gram matrix of its inputs, weights of its outputs
Fit = Callable[[str, Array, Array, Array], Form]


class Task:
    """What a network is for: rows of tokens with what is known of them, a head, a loss, a score.

    Parameters
    ----------
    texts : dict of str to list of list of int
        Tokens of the rows "fit", and of the rows "judge" that nothing is fitted to.
    labels : dict of str to array
        Of the same rows.
    network : callable
        Gives the dense network, a new one at every call.
    """

    name = title = ""

    def __init__(
        self,
        texts: dict[str, list[list[int]]],
        labels: dict[str, Array],
        network: Callable[[], Bert],
    ) -> None:
        self.texts, self.labels, self.network = texts, labels, network

    @property
    def fit(self) -> list[list[int]]:
        return self.texts["fit"]

    @property
    def judge(self) -> list[list[int]]:
        return self.texts["judge"]

    def mix(self, count: int) -> Array:
        """Put so many rows made of others beside the rows "fit"; return their places (count,)."""
        raise SystemExit(f"--mixed: rows of {self.name} cannot be made of others")

    def read(self, part: str, rows: Array) -> tuple[Array, Array, Any]:
        """Return ids (S, T), mask (S, T) and what is known of these rows."""
        ids, mask = padded([self.texts[part][i] for i in rows])
        return ids, mask, self.labels[part][rows]

    def head(self, net: Bert, x: Array, mask: Array, known: Any) -> tuple[Array, Back]:
        """Return the outputs of a batch and the step back to the last hidden states."""
        raise NotImplementedError

    def loss(self, y: Array, taught: Array, known: Any) -> tuple[float, Array]:
        """Return loss and gradient of outputs: cross-entropy to the dense network's softmax."""
        return cross_entropy(y, softmax(taught))

    def score(self, found: list[tuple[Array, Array, Any]]) -> dict[str, tuple[float, float]]:
        """Return scores with their standard errors, of what `evaluate` gives."""
        raise NotImplementedError


def accuracy(right: Array, group: Array | None = None) -> tuple[float, float]:
    """Return the share of `right` (N,) and its standard error, groups of targets taken whole."""
    group = np.arange(len(right)) if group is None else group
    mean = float(right.mean())
    apart = np.bincount(group, right - mean)
    return mean, float(np.sqrt(np.square(apart).sum()) / len(right))


# -- one matrix ------------------------------------------------------------------------------------


def by_weights(A: Array, bits: float, **how: Any) -> Form:
    """Bits fitted to the weights alone."""
    return dn.factorize(A, bits=bits, **how)


def at_random(A: Array, bits: float, **how: Any) -> Form:
    """Random bits; the diagonals are as good as they can be for the weights."""
    return random_factors(A, bits=bits)


def by_label(label: str) -> Callable[..., Form]:
    """Return what compresses a matrix by a method of `diba_np.methods`."""

    def by_one(A: Array, bits: float, gram: Array | None = None, **how: Any) -> Form:
        """By the weights alone, or by the Gram matrix of the inputs."""
        # the rows of a Cholesky factor have the same Gram matrix as the inputs
        inputs = None if gram is None else np.linalg.cholesky(gram).T
        made: Any = methods.fit(label, A, bits, inputs=inputs)
        return made  # type: ignore[no-any-return]

    return by_one


# -- layer by layer --------------------------------------------------------------------------------


@dataclass
class Importance:
    """How much the outputs of a layer matter.

    Attributes
    ----------
    tokens : list of (S T,) arrays
        Weights of the tokens, a batch each; mean 1, padding 0.
    channels : (m, m) array
        Gram matrix of the channels; its diagonal has mean 1.
    together : float
        Mean cosine of the gradients of two tokens of one row, 0 to 1: whether their errors add up.
    """

    tokens: list[Array]
    channels: Array
    together: float


def importance(net: Bert, task: Task, places: Sequence[Array]) -> dict[str, Importance]:
    """Return how much the outputs of each layer matter, rows of `task` read batch by batch.

    It is of gradients of random combinations of the network's outputs: the blocks of its
    Gauss-Newton matrix, taken as products of one part of the token and one of the channels, `EVEN`
    included.
    """
    rng = np.random.default_rng(0)
    names = net.encoder_names()
    tokens: dict[str, list[Array]] = {name: [] for name in names}
    channels = {name: np.zeros((len(net.own[f"{name}.bias"]),) * 2) for name in names}
    sums = {name: np.zeros(3) for name in names}
    masks: list[Array] = []

    def watch(name: str, gradient: Array) -> None:
        if name in tokens:
            squares = np.einsum("ij,ij->i", gradient, gradient)
            tokens[name].append(squares)
            channels[name] += gradient.T @ gradient
            shape = masks[-1].shape
            row = gradient.reshape(*shape, -1).sum(axis=1)
            most = np.sqrt(squares).reshape(shape).sum(axis=1)
            sums[name] += np.vdot(row, row), squares.sum(), np.vdot(most, most)

    net.watch = watch
    for rows in places:
        ids, mask, known = task.read("fit", rows)
        masks.append(mask)
        hidden, back = net.encode(ids, mask)
        y, back_head = task.head(net, hidden[-1], mask, known)
        back({-1: back_head(rng.choice([-1.0, 1.0], y.shape).astype(y.dtype))})
    net.watch = None
    net.zero_grad()
    count = sum(int(mask.sum()) for mask in masks)
    found = {}
    for name, parts in tokens.items():
        unit = (1 - EVEN) * count / sum(float(part.sum()) for part in parts)
        weights = [
            (unit * part + EVEN) * mask.ravel() for part, mask in zip(parts, masks, strict=True)
        ]
        mean = np.trace(channels[name]) / len(channels[name])
        gram = (1 - EVEN) / mean * channels[name] + EVEN * np.eye(len(channels[name]))
        whole, apart, most = sums[name]
        # where one token of a row counts for all there are no two that could differ
        cosine = (whole - apart) / (most - apart) if most > 1.01 * apart else 0.0
        found[name] = Importance(weights, gram, float(np.clip(cosine, 0.0, 1.0)))
    return found


def save_importance(path: Path, matters: Mapping[str, Importance]) -> None:
    """Keep what `importance` found; in single precision, the rest is noise of its estimate."""
    arrays: dict[str, Array] = {}
    for name, found in matters.items():
        arrays[f"{name}/lengths"] = np.array([len(part) for part in found.tokens])
        arrays[f"{name}/tokens"] = np.concatenate(found.tokens).astype(np.float32)
        arrays[f"{name}/channels"] = found.channels.astype(np.float32)
        arrays[f"{name}/together"] = np.array(found.together)
    write(path, arrays)


def load_importance(path: Path) -> dict[str, Importance]:
    """Return what `save_importance` kept."""
    found = {}
    with np.load(path, allow_pickle=False) as arrays:
        for name in dict.fromkeys(key.rsplit("/", 1)[0] for key in arrays.files):
            ends = np.cumsum(arrays[f"{name}/lengths"])[:-1]
            tokens = np.split(arrays[f"{name}/tokens"].astype(np.float64), ends)
            channels = arrays[f"{name}/channels"].astype(np.float64)
            found[name] = Importance(tokens, channels, float(arrays[f"{name}/together"]))
    return found


def with_sums(
    x: Array, added: Array | None, weights: Array, mask: Array, share: float
) -> tuple[Array, Array | None, Array]:
    """Return inputs, what is added, and weights with a sample more for each row of tokens.

    The squared errors e of a row count as ``(1 - share) sum(w e^2) + share (sum(w^0.5 e))^2``.

    Parameters
    ----------
    x : (S T, n) array
    added : (S T, m) array, optional
    weights : (S T,) array
    mask : (S, T) array
    share : float
        0 to 1.

    Notes
    -----
    Layers are affine: the new samples are means over a row. The two ends are the two Kronecker
    forms of layers that share weights (R. Eschenhagen et al., "Kronecker-factored approximate
    curvature for modern neural network architectures", 2023).
    """
    root = np.sqrt(weights).reshape(mask.shape)
    total = root.sum(axis=1)
    root = root / total[:, None]

    def joined(x: Array) -> Array:
        means = np.einsum("st,std->sd", root, x.reshape(*mask.shape, -1))
        return np.concatenate([x, means.astype(x.dtype)])

    both = np.concatenate([(1 - share) * weights, share * total**2])
    return joined(x), None if added is None else joined(added), both


def compress(
    net: Bert,
    dense: Bert,
    task: Task,
    rows: Array,
    names: Sequence[str],
    fit: Fit,
    *,
    refit: bool,
    matters: Mapping[str, Importance] | None = None,
    together: float = 0.0,
    folder: Path | None = None,
    states: Path | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Fit the layers `names` of `net` one after the other, in place.

    Parameters
    ----------
    net : Bert
        Its other layers are those of `dense`.
    dense : Bert
        What it should do.
    task : Task
    rows : (R,) int
        Rows of ``task.fit`` that are read.
    names : sequence of str
    fit : callable
        As of `compress_layers`; it also takes the Gram matrix that weighs the outputs, (m, m).
    refit : bool
        Whether diagonals (scales) are solved for after that.
    matters : mapping of str to Importance, optional
        What `importance` gives of these rows, if it is known.
    together : float
        As how much of `Importance.together` the errors of a row's tokens are taken to add up, 0
        to 1. Sums over rows are fewer than tokens: many rows are needed.
    folder : Path, optional
        Where finished layers are kept, and continued from.
    states : Path, optional
        Folder of the dense network's states on these rows, for other calls.
    """
    places = list(batches(task.fit, TOKENS, rows))
    if matters is None:
        matters = importance(dense, task, places)

    def first() -> Iterator[dict[str, Any]]:
        for at, some in enumerate(places):
            ids, mask, _ = task.read("fit", some)
            yield {"x": dense.embed(ids)[0], "mask": mask, "at": np.array(at)}

    def caller(state: Any, linear: Any) -> Callable[[str, Array, Array | None], Any]:
        def through(name: str, x: Array, added: Array | None) -> tuple[Array, Any]:
            if name not in names:
                return dense.linear(name, x, added)
            weights = matters[name].tokens[int(state["at"])]
            share = together * matters[name].together
            if not share:
                return linear(name, x, keep=weights, added=added), None
            more, added, weights = with_sums(x, added, weights, state["mask"], share)
            return linear(name, more, keep=weights, added=added)[: len(x)], None

        return through

    # what is cut between two stages need not be run again for the layers after it
    def mix(i: int) -> Callable[[Any, Any], Any]:
        def run(state: Any, linear: Any) -> Any:
            mixed, _ = dense.mix(i, state["x"], state["mask"], caller(state, linear))
            return {**state, "mixed": mixed}

        return run

    def feed(i: int) -> Callable[[Any, Any], Any]:
        def run(state: Any, linear: Any) -> Any:
            before = dict(state)
            x, _ = dense.feed(i, before.pop("x"), before.pop("mixed"), caller(state, linear))
            return {**before, "x": x}

        return run

    made = compress_layers(
        [part(i) for i in range(dense.layers) for part in (mix, feed)],
        {name: dense.matrices[name] for name in names},
        first,
        lambda name, A, gram: fit(name, A, gram, matters[name].channels),
        biases={name: dense.own[f"{name}.bias"] for name in names},
        refit=refit,
        hold_out=0,
        folder=folder,
        dense_states=states,
        callback=lambda told: tell(
            f"{told['name']}: outputs {told['output_snr_db']:.2f} dB, {told['seconds']:.1f} s"
        ),
    )
    net.replace(made.layers)


# -- kept on disk ----------------------------------------------------------------------------------


def write(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write arrays to an .npz that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as part, open(part, "wb") as file:
        np.savez(file, **arrays)


def save(path: Path, net: Bert) -> None:
    """Keep a network: a model's file of the compressed matrices, and an .npz of the rest."""
    write(path.with_suffix(".npz"), net.own)
    matrices: dict[str, Any] = {name: layer.to_matrix() for name, layer in net.made.items()}
    shapes = {name: (matrix.shape, "<f4") for name, matrix in matrices.items()}
    ModelFactors({}, shapes, matrices).save(path)


def load(path: Path, net: Bert) -> None:
    """Put what `save` kept into a network."""
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as held:
        for name, value in net.own.items():
            value[...] = held[name]
    for name, matrix in load_matrices(path).items():
        net.replace({name: as_layer(matrix, net.own[f"{name}.bias"])})


def load_matrices(path: Path) -> dict[str, Form]:
    """Return the compressed matrices of a saved network."""
    return dict(open_model(path).items())  # type: ignore[arg-type]


def evaluate(net: Bert, task: Task) -> list[tuple[Array, Array, Any]]:
    """Return (rows, outputs, what is known of them) of the rows that judge, batch by batch."""
    frozen = {name: layer.frozen() for name, layer in net.made.items()}

    def linear(name: str, x: Array, added: Array | None) -> tuple[Array, Any]:
        if name not in frozen:
            return net.linear(name, x, added)
        y = frozen[name](x)
        return y if added is None else y + added, None

    found = []
    for rows in batches(task.judge, TOKENS):
        ids, mask, known = task.read("judge", rows)
        hidden, _ = net.encode(ids, mask, linear)
        found.append((rows, task.head(net, hidden[-1], mask, known)[0], known))
    return found
