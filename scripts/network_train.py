"""Train a compressed `Bert` end to end: diagonals, norms and biases, taught by the dense one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bert import Array, Bert
from network_fit import TOKENS, Task, write

from diba_np.networks.inputs import batches
from diba_np.training.optimisers import Adam


class Teacher:
    """Hidden states of a dense network, computed when they are first asked for.

    Parameters
    ----------
    net : Bert
    folder : Path, optional
        Where they are kept, a file a row of ``2 layers width`` bytes a token; several processes may
        share it. Without one everything is computed each time.

    Notes
    -----
    States are rounded to half precision whether they were kept or not.
    """

    def __init__(self, net: Bert, folder: Path | None = None) -> None:
        self.net, self.folder = net, folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def states(self, rows: Array, ids: Array, mask: Array) -> list[Array]:
        """Return the hidden states (S T, width) of a batch: embeddings, and after each layer.

        Parameters
        ----------
        rows : (S,) int
            By which they are kept.
        ids : (S, T) int
        mask : (S, T) bool
            False for padding, whose states are zeros, as are all embeddings: nothing learns them.
        """
        lengths = mask.sum(axis=1)
        parts = [self._read(row) for row in rows]
        if any(part is None for part in parts):
            hidden, _ = self.net.encode(ids, mask)
            made = np.stack(hidden[1:]).reshape(self.net.layers, *mask.shape, -1).astype(np.float16)
            parts = [made[:, i, :length] for i, length in enumerate(lengths)]
            for row, part in zip(rows, parts, strict=True):
                self._write(row, part)
        width = len(self.net.own["embeddings.LayerNorm.bias"])
        wide = np.zeros((1 + self.net.layers, *mask.shape, width), self.net.dtype)
        for i, (part, length) in enumerate(zip(parts, lengths, strict=True)):
            wide[1:, i, :length] = part
        return list(wide.reshape(len(wide), -1, width))

    def _read(self, row: int) -> Array | None:
        if self.folder is None:
            return None
        try:
            found: Array = np.load(self.folder / f"{row}.npy", allow_pickle=False)
        except (FileNotFoundError, EOFError, ValueError):  # cut short where the machine went down
            return None
        return found

    def _write(self, row: int, states: Array) -> None:
        if self.folder is None:
            return
        path = self.folder / f"{row}.npy"
        part = path.with_suffix(f".{os.getpid()}.part")
        with open(part, "wb") as file:
            np.save(file, states, allow_pickle=False)
        part.replace(path)


def matched(
    now: Sequence[Array], aim: Sequence[Array], mask: Array
) -> tuple[float, dict[int, Array]]:
    """Return the mean over layers of the relative squared error of hidden states, and gradients."""
    total, gradients = 0.0, {}
    at = mask.ravel().astype(np.float32)
    for place in range(1, len(now)):
        gap = (now[place] - aim[place]) * at[:, None]
        mean = at @ aim[place] / at.sum()
        size = float(at @ np.einsum("ij,ij->i", aim[place] - mean, aim[place] - mean))
        share = np.float32(1.0 / (size * (len(now) - 1)))
        total += float(np.vdot(gap, gap)) * float(share)
        gap *= 2 * share
        gradients[place] = gap
    return total, gradients


def train(
    net: Bert,
    dense: Bert,
    task: Task,
    rows: Array,
    *,
    epochs: int = 1,
    rate: float = 2e-3,
    hidden: float = 1.0,
    tokens: int = 2048,
    states: Path | None = None,
    path: Path | None = None,
    every: float = 60.0,
    seed: int = 0,
    penalty: Callable[[], float] | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Train all diagonals or scales, layer norms and biases of `net` end to end, in place.

    Parameters
    ----------
    net, dense : Bert
        What is trained, and what teaches.
    task : Task
    rows : (R,) int
        Rows of ``task.fit``.
    epochs : int
    rate : float
        Of Adam, relative to the size of each array; it rises over the first twentieth and falls
        along a half cosine.
    hidden : float
        Weight of the hidden states' relative squared error beside the task's loss.
    tokens : int
        Of a step; it is made of parts of `TOKENS`.
    states : Path, optional
        Folder of the hidden states of `dense`, see `Teacher`.
    path : Path, optional
        Where the state is kept every so many seconds, and continued from.
    penalty : callable, optional
        Called after each way back: adds to the layers' gradients, and returns what it adds to the
        loss.

    Raises
    ------
    FloatingPointError
        The loss is no longer finite.
    """
    steps: list[Array] = []
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        made = list(_steps(task, rng.permutation(rows), tokens, rng))
        steps += [made[i] for i in rng.permutation(len(made))]
    teacher = Teacher(dense, states)
    parameters = net.parameters
    optimiser = Adam(parameters, rate)
    done, history = 0, []
    if path is not None and path.exists():
        done = _load(path, optimiser)
    saved = time.monotonic()
    for at in range(done, len(steps)):
        net.zero_grad()
        loss = np.zeros(2)
        parts = list(batches(task.fit, min(tokens, TOKENS), steps[at]))
        for part in parts:
            ids, mask, known = task.read("fit", part)
            share = np.float32(len(part) / len(steps[at]))
            aims = teacher.states(part, ids, mask)
            taught, _ = task.head(dense, aims[-1], mask, known)
            now, back = net.encode(ids, mask)
            y, back_head = task.head(net, now[-1], mask, known)
            value, gradient = task.loss(y, taught, known)
            apart, gradients = matched(now, aims, mask)
            gradients = {k: g * np.float32(hidden * share) for k, g in gradients.items()}
            last = len(now) - 1
            gradients[last] = gradients[last] + back_head(gradient * share)
            back(gradients)
            loss += float(share) * np.array([value, apart])
        if penalty is not None:
            loss[0] += penalty()
        if not np.isfinite(loss).all():
            raise FloatingPointError(f"step {at + 1} of {len(steps)}: the loss is {loss}")
        gradients = net.gradients
        warm = min(1.0, 20 * (at + 1) / len(steps))
        optimiser.step(
            {name: gradients.get(name, np.zeros_like(v)) for name, v in parameters.items()},
            warm * 0.5 * (1 + np.cos(np.pi * at / len(steps))),
        )
        history.append(loss)
        if path is not None and time.monotonic() - saved > every:
            _save(path, optimiser, at + 1)
            saved = time.monotonic()
        if (at + 1) % 10 == 0 or at + 1 == len(steps):
            value, apart = np.mean(history[-10:], axis=0)
            tell(f"step {at + 1} of {len(steps)}: loss {value:.4f}, hidden states {apart:.4f}")
    net.replace({name: layer.rounded() for name, layer in net.made.items()})


def _steps(task: Task, order: Array, tokens: int, rng: Any) -> Iterator[Array]:
    """Yield the rows of each step: parts of like length, drawn together at random."""
    size = min(tokens, TOKENS)
    parts = list(batches(task.fit, size, order))
    together = max(1, round(tokens / size))
    mixed = rng.permutation(len(parts))
    for start in range(0, len(parts), together):
        yield np.concatenate([parts[i] for i in mixed[start : start + together]])


def _save(path: Path, optimiser: Adam, done: int) -> None:
    arrays = {"done": np.array(done)}
    for name, value in optimiser.parameters.items():
        arrays |= {
            f"{name}/value": value,
            f"{name}/first": optimiser.first[name],
            f"{name}/second": optimiser.second[name],
        }
    write(path, arrays)


def _load(path: Path, optimiser: Adam) -> int:
    with np.load(path, allow_pickle=False) as arrays:
        for name, value in optimiser.parameters.items():
            value[...] = arrays[f"{name}/value"]
            optimiser.first[name][...] = arrays[f"{name}/first"]
            optimiser.second[name][...] = arrays[f"{name}/second"]
        optimiser.steps = int(arrays["done"])
    return optimiser.steps
