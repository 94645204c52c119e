"""How much each token and each output of a network's layers matters, by gradients of its loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diba_np.files.atomic import atomic_path
from diba_np.networks.calibration import Calibration, iterate_batches
from diba_np.networks.network import Network
from diba_np.networks.stages import layer_by_layer, load_state, save_state, states_folder
from diba_np.networks.tasks import task_of

Array = NDArray[Any]

EVEN = 0.2  # share of the weights that does not follow the gradients
SHRUNK = 0.1  # share by which products of different inputs are shrunk, in `Importance.energy`
MOST = 20.0  # times the mean that one token's gradients may count

_BLOCK = 256  # outputs whose products are made at a time where only their squares are asked for


@dataclass
class Importance:
    """What the errors of one layer's outputs are weighed by.

    Attributes
    ----------
    tokens : list of (S, T) arrays
        Weights of the tokens, a batch each; mean 1, padding 0.
    outputs : (m, m) or (m,) array
        Gram matrix of the weights of the outputs, mean of its diagonal 1; positive definite. Or
        its diagonal alone.
    energy : float or None
        What the loss would rise by, to second order and in a unit common to all layers, at a bit a
        weight less than nothing: ``m n`` times the mean square of the weights and the geometric
        means of the eigenvalues of their inputs' Gram matrix and of their outputs' weights. That is
        what an ideal code's error starts from; where a few directions hold most of the energy it
        is far below the energy of the outputs, and few bits are enough. None where it was not asked
        for.
    """

    tokens: list[Array]
    outputs: Array
    energy: float | None


def importance(
    net: Network,
    rows: Calibration,
    seed: int = 0,
    scratch: Path | None = None,
    coupled: int | None = None,
    energies: bool = True,
) -> Iterator[tuple[str, Importance]]:
    """Yield how much tokens and outputs of each layer of the trunk matter, the last layers first.

    Gradients of next tokens are those of the cross-entropy to labels that are drawn from what the
    network predicts: their mean squares are the diagonal of its Fisher information. Those of masked
    tokens, classes, scores and vectors of whole rows are of random signs times these outputs.

    Parameters
    ----------
    net : Network
    rows : Calibration
    seed : int
        Draws the labels.
    scratch : Path, optional
        Where a temporary folder for the states between layers is made.
    coupled : int, optional
        Most outputs of a layer whose weights are a matrix; of wider ones the diagonal alone is
        made. By default all.
    energies : bool, default True
        Whether `Importance.energy` is made, which takes a fifth of the time.

    Yields
    ------
    name : str
    Importance

    Notes
    -----
    In language models a few tokens, the first of a row above all, carry activations hundreds of
    times the rest, which the norm after them takes back: their gradients are as much smaller. The
    share `EVEN` that does not follow the gradients falls off with the mean square of what a token
    reads and of the residual branch it is added to, in units of its median, and no token counts
    more than `MOST` times the mean. So such tokens are weighed by what they do.

    The network runs one layer after another over all batches, forwards and then backwards, so that
    dense weights of one layer and what it keeps of one batch are in memory; on disk are the states
    before every layer. Cost: two forward passes and a backward one.
    """
    rng = np.random.default_rng(seed)
    layers = net.layer_steps()
    with states_folder(scratch) as space:

        def path(layer: int | str, at: int) -> Path:
            return space / f"{layer}-{at}.npy"

        masks: list[Array] = []
        asked: list[Array] = []
        begun = (net.begin(inputs, mask) for _, inputs, mask in iterate_batches(rows))
        for number, at, state in layer_by_layer(net, begun, path):
            if number == 0:
                masks.append(np.asarray(state["mask"], bool))
                asked.append(rows.asked(rows.read(rows.places[at])[0], masks[-1]))
        with net.released():
            for at, mask in enumerate(masks):
                x, back = net.ended(load_state(path(len(layers), at))["x"])
                save_state(path("gradient", at), back(pulled(net, x, mask, asked[at], rng)))
        for number in reversed(range(len(layers))):
            with net.released():
                sums: dict[str, _Sums] = {}
                for at, mask in enumerate(masks):
                    state, g = load_state(path(number, at)), load_state(path("gradient", at))
                    g = _through_layer(net, layers[number], state, g, mask, sums, coupled, energies)
                    save_state(path("gradient", at), g)
            net.zero_grad()
            for name in list(sums):
                yield name, sums.pop(name).finish(masks, net.weights[name])


class _Sums:
    """What a pass over all batches sums up for one layer.

    Attributes
    ----------
    squares, sizes : list of (S, T) arrays
        Squares of the gradients, and the bounded weights that do not follow them, a batch each.
    gradients : (m, m) or (m,) array
        Sum over tokens of the products of gradients, or of their squares.
    inputs : (n, n) array, or None
        Sum over tokens of the products of inputs, weighed by `bounded_weights`; or None.
    """

    def __init__(self) -> None:
        self.squares: list[Array] = []
        self.sizes: list[Array] = []
        self.gradients: Any = 0.0
        self.inputs: Array | None = None

    def finish(self, masks: list[Array], A: Array) -> Importance:
        """Return the weights, given those of the layer (m, n); once, sums are changed in place."""
        count = sum(int(mask.sum()) for mask in masks)
        parts = list(zip(self.squares, self.sizes, masks, strict=True))
        mean = sum(float((g * mask).sum()) for g, _, mask in parts) / count
        even = sum(float((b * mask).sum()) for _, b, mask in parts) / count
        tokens = [
            ((1 - EVEN) * np.minimum(g / (mean or 1.0), MOST) + EVEN * b / even) * mask
            for g, b, mask in parts
        ]
        whole = sum(float(part.sum()) for part in tokens) / count
        tokens = [part / whole for part in tokens]
        outputs = self.gradients
        own = outputs if outputs.ndim == 1 else np.einsum("ii->i", outputs)
        middle = float(own.mean()) or 1.0
        outputs *= 1 - EVEN
        outputs /= middle
        own += EVEN
        if self.inputs is None:
            return Importance(tokens, outputs, None)
        # of wide layers few tokens know no more than the diagonal
        logs = np.log(own).mean() + np.log(middle)
        H = self.inputs
        H /= count
        squares = SHRUNK * np.diag(H)
        H *= 1 - SHRUNK
        H[np.diag_indices_from(H)] += squares
        H[np.diag_indices_from(H)] += 1e-6 * (float(np.trace(H)) / len(H) or 1.0)
        logs += np.linalg.slogdet(H)[1] / len(H)
        energy = float(np.exp(logs) * np.square(A, dtype=np.float64).sum())
        return Importance(tokens, outputs, energy)


def _through_layer(
    net: Network,
    steps: list[Any],
    state: Any,
    gradient: Array,
    mask: Array,
    sums: dict[str, _Sums],
    coupled: int | None,
    energies: bool,
) -> Array:
    """Run a layer forwards and backwards, add to sums, return the gradient before it."""

    def call(name: str, x: Array, added: Array | None = None, keep: Array | None = None) -> Any:
        if name not in net.weights:
            return net.linear(name, x, added=added)
        y, back = net.linear(name, x)
        own = sums.setdefault(name, _Sums())
        own.sizes.append(bounded_weights(x, added))
        if energies:
            root = np.sqrt(own.sizes[-1] * mask)[..., None].astype(x.dtype)
            read = (x * root).reshape(-1, x.shape[-1])
            moment = (read.T @ read).astype(np.float64)
            if own.inputs is None:
                own.inputs = moment
            else:
                own.inputs += moment

        def watched(g: Array) -> Array:
            flat = g.reshape(-1, g.shape[-1])
            own.squares.append(np.einsum("...m,...m->...", g, g))
            own.gradients += _products(flat, coupled).astype(np.float64)
            pulled: Array = back(g)
            return pulled

        return (y if added is None else y + added), watched

    backs = []
    for step in steps:
        state, back = step(state, call)
        backs.append(back)
    g = {"x": gradient}
    for back in reversed(backs):
        g = back(g)
    return g["x"]


def _products(flat: Array, coupled: int | None) -> Array:
    """Return the products (m, m) of gradients (N, m), or for m above `coupled` their squares."""
    m = flat.shape[1]
    if coupled is None or m <= coupled:
        whole: Array = flat.T @ flat
        return whole
    blocks = (flat[:, at : at + _BLOCK] for at in range(0, m, _BLOCK))
    return np.concatenate([np.diag(block.T @ block) for block in blocks])  # bits of the whole


def pulled(net: Network, x: Array, mask: Array, asked: Array, rng: np.random.Generator) -> Array:
    """Return the gradient at the last hidden states (S, T, width) that the network's task draws."""
    task, g = task_of(net), np.zeros_like(x)
    for some in task.parts(net, asked):
        y, back = task.outputs(net, x[some], mask[some], asked[some])
        g[some] = back(task.drawn(y, rng))
    return g


def bounded_weights(x: Array, added: Array | None = None) -> Array:
    """Return weights (...) that fall off with the size of what a token reads and is added to.

    Parameters
    ----------
    x : (..., n) array
    added : (..., m) array, optional
        The residual branch; of the two sizes the larger one counts.

    Returns
    -------
    (...) float64 array
        ``1 / (1 + s)`` with the sum of squares s in units of its median: in (0, 1].
    """
    size = _relative_size(x)
    if added is not None:
        size = np.maximum(size, _relative_size(added))
    weights: Array = 1.0 / (1.0 + size)
    return weights


def _relative_size(x: Array) -> Array:
    squares: Array = np.einsum("...i,...i->...", x, x, dtype=np.float64)
    return squares / (float(np.median(squares)) or 1.0)


# -- kept on disk ----------------------------------------------------------------------------------


class KeptImportance:
    """What `importance` found, a file for each matrix; read when asked for, in single precision.

    Parameters
    ----------
    folder : Path
        Made where it is missing.
    names : sequence of str
        Of all matrices, in an order that stays.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self._numbers = folder, {name: at for at, name in enumerate(names)}
        folder.mkdir(parents=True, exist_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{self._numbers[name]}.npz"

    @property
    def complete(self) -> bool:
        """Whether `finish` was called."""
        return (self.folder / "complete").exists()

    def finish(self) -> None:
        """Mark that all is there."""
        with atomic_path(self.folder / "complete") as path:
            path.touch()

    def write(self, name: str, found: Importance) -> None:
        """Keep what was found of one matrix."""
        arrays = {str(at): part.astype(np.float32) for at, part in enumerate(found.tokens)}
        arrays |= {"outputs": found.outputs.astype(np.float32)}
        if found.energy is not None:
            arrays["energy"] = np.array(found.energy)
        with atomic_path(self._path(name)) as path, open(path, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    def tokens(self, name: str) -> list[Array]:
        """Return the weights of the tokens, a batch each."""
        with np.load(self._path(name), allow_pickle=False) as arrays:
            return [arrays[at] for at in sorted(filter(str.isdigit, arrays.files), key=int)]

    def outputs(self, name: str) -> Array | None:
        """Return the weights of the outputs; None of a matrix that is not of the trunk.

        Raises
        ------
        FileNotFoundError
            This process does not see the folder.
        """
        if name not in self._numbers:
            return None
        if not self._path(name).exists():
            if self.complete:  # of a matrix that is never called nothing was found
                return None
            raise FileNotFoundError(
                f"{self.folder}: not seen by this process; executor= needs a folder that its "
                "processes see"
            )
        with np.load(self._path(name), allow_pickle=False) as arrays:
            found: Array = arrays["outputs"]
            return found

    def names(self) -> list[str]:
        """Return the matrices that were called."""
        return [name for name in self._numbers if self._path(name).exists()]

    def energies(self) -> dict[str, float]:
        """Return how much each matrix that was called matters."""
        found: dict[str, float] = {}
        for name in self.names():
            with np.load(self._path(name), allow_pickle=False) as arrays:
                found[name] = float(arrays["energy"])
        return found
