"""Compress a `Bert` whole: layer by layer on what the compressed prefix produces, then end to end.

`compress` goes from the first layer to the last. What a layer reads comes from the layers before it
as they are now; what it should give is what the dense network gives, less what its residual branch
already carries, so that a layer also makes good what earlier ones lost. `train` then moves all
diagonals (or scales), layer norms and biases at once, taught by the dense network.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bert import Array, Back, Bert, CodeWeight, DiBAWeight, Weight, batches, finish, padded, softmax

import diba_np as dn
from diba_np import baselines
from diba_np.baselines.random_bits import random_factors
from diba_np.linear import DIAGONALS
from diba_np.losses import cross_entropy
from diba_np.moments import LeastSquares, Moments
from diba_np.optim import Adam
from diba_np.scales import round_diagonals

TOKENS = 2048  # of a batch; larger ones leave the second-level cache
RIDGE = 0.01  # on the regression of what is missing, in means of the Gram matrix's diagonal
SWEEPS = 10  # of the alternating closed forms
STAY = 1e-4  # on the squared relative distance of a diagonal from its start, in squared outputs
EVEN = 0.2  # share of the tokens' weights that is the same for all

# what is fitted one after the other; those of one line read the same inputs
GROUPS = (
    ("attention.self.query", "attention.self.key", "attention.self.value"),
    ("attention.output.dense",),
    ("intermediate.dense",),
    ("output.dense",),
)


# takes a layer's name, the matrix aimed at, moments of inputs and targets, weights of the outputs
Fit = Callable[[str, Array, Moments, Array], Weight]


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


def store(weight: Weight) -> dict[str, Array]:
    """Return a weight as arrays; `restore` is its inverse."""
    if isinstance(weight, DiBAWeight):
        return {"b1": weight.b1.astype(bool), "b2": weight.b2.astype(bool), **weight.parameters}
    if isinstance(weight, CodeWeight):
        return {"codes": weight.codes, "group": weight.group, **weight.parameters}
    raise TypeError(f"no stored form for {type(weight).__name__}")


def restore(arrays: Mapping[str, Array]) -> Weight:
    """Return the weight that `store` made arrays of."""
    if "codes" in arrays:
        return CodeWeight(arrays["codes"], arrays["scales"].copy(), arrays["group"])
    d1, d2, d3 = (arrays[name] for name in DIAGONALS)
    return DiBAWeight(dn.DiBAFactors(d1, arrays["b1"], d2, arrays["b2"], d3))


def round_stored(weight: Weight) -> None:
    """Round what was trained to the 16 bits that are counted."""
    p = weight.parameters
    if isinstance(weight, DiBAWeight):
        for name, value in zip(DIAGONALS, round_diagonals(*map(p.get, DIAGONALS)), strict=True):
            p[name][...] = value
    elif isinstance(weight, CodeWeight):
        unit = float(np.abs(p["scales"]).max()) or 1.0
        p["scales"][...] = (p["scales"] / unit).astype(np.float16).astype(np.float32) * unit
    weight.refresh()


def by_weights(A: Array, bits: float, **how: Any) -> Weight:
    """Bits fitted to the weights alone."""
    return DiBAWeight(dn.factorize(A, bits=bits, **how))


def by_activations(A: Array, bits: float, data: Moments, outputs: Array, **how: Any) -> Weight:
    """Bits fitted to what a layer reads, and to how much its outputs matter."""
    return DiBAWeight(dn.factorize(A, bits=bits, gram=data.xx, output_weight=outputs, **how))


def at_random(A: Array, bits: float, **how: Any) -> Weight:
    """Random bits; the diagonals are as good as they can be for the weights."""
    return DiBAWeight(random_factors(A, bits=bits))


def by_codes(A: Array, bits: float, **how: Any) -> Weight:
    """Integer codes with a scale a row or group: round to nearest at the same stored bits."""
    made: Any = baselines.fit("rtn", A, bits)
    codes = np.zeros(A.shape, np.float32)
    codes[:, made.kept] = np.asarray(made.table, np.float32)[made.codes]
    group = np.zeros(A.shape[1], np.int64)
    if made.group:
        kept = np.flatnonzero(made.kept)
        for number, start in enumerate(range(0, len(kept), made.group)):
            group[kept[start] :] = number
    return CodeWeight(codes, made.scales.astype(np.float32) * np.float32(made.scale), group)


def _set_diagonals(weight: DiBAWeight, data: Moments) -> None:
    f = dn.DiBAFactors(
        weight.parameters["d1"],
        weight.b1.astype(np.uint8),
        weight.parameters["d2"],
        weight.b2.astype(np.uint8),
        weight.parameters["d3"],
    )
    solver = LeastSquares(f, data, STAY * data.yy)
    for _ in range(SWEEPS):
        solver.sweep()
    for name in DIAGONALS:
        weight.parameters[name][...] = solver.d[name]


def refit(weight: Weight, data: Moments) -> Weight:
    """Refit the diagonals, or the scales, to what the layer reads and should give."""
    if isinstance(weight, DiBAWeight):
        _set_diagonals(weight, data)
    elif isinstance(weight, CodeWeight):
        # row i: the groups' parts q_g of the codes, (q_g H q_h) s = q_g y_i
        scales = weight.parameters["scales"]
        parts = weight.group == np.arange(scales.shape[1])[:, None]
        for row, codes in enumerate(weight.codes):
            Q = codes * parts
            normal = Q @ data.xx @ Q.T
            ridge = 1e-6 * np.trace(normal) / len(Q) + np.finfo(np.float64).tiny
            right = Q @ data.yx[row] + ridge * scales[row]
            scales[row] = np.linalg.solve(normal + ridge * np.eye(len(Q)), right)
    round_stored(weight)
    return weight


# -- layer by layer --------------------------------------------------------------------------------


class _Sums:
    """Weighted second moments of one layer's inputs and targets."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        m, n = shape
        self.xx, self.yx = np.zeros((n, n)), np.zeros((m, n))
        self.x, self.y = np.zeros(n), np.zeros(m)
        self.yy = self.count = 0.0

    def add(self, x: Array, y: Array, w: Array) -> None:
        weighed = x * w[:, None].astype(x.dtype)
        self.xx += weighed.T @ x
        self.yx += y.T @ weighed
        self.x += weighed.sum(axis=0)
        self.y += w @ y
        self.yy += float(w @ np.einsum("ij,ij->i", y, y))
        self.count += float(w.sum())

    def moments(self) -> Moments:
        x, y = self.x / self.count, self.y / self.count
        xx = (self.xx + self.xx.T) / (2 * self.count)  # float32 products round both halves apart
        return Moments(
            xx - np.outer(x, x),
            self.yx / self.count - np.outer(y, x),
            self.yy / self.count - float(y @ y),
            x,
            y,
        )


def importance(
    net: Bert, task: Task, places: Sequence[Array]
) -> tuple[dict[str, list[Array]], dict[str, Array]]:
    """Return how much the outputs of each layer matter: weights of tokens (a batch each), channels.

    They are squared gradients of random combinations of the network's outputs: the diagonal blocks
    of its Gauss-Newton matrix, taken as products of one part of the token and one of the channel.
    Both have mean 1, `EVEN` included; padding has 0.
    """
    rng = np.random.default_rng(0)
    names = net.encoder_names()
    tokens: dict[str, list[Array]] = {name: [] for name in names}
    channels = {name: np.zeros(len(net.weights[name].matrix)) for name in names}

    def watch(name: str, gradient: Array) -> None:
        if name in tokens:
            squares = gradient * gradient
            tokens[name].append(squares.sum(axis=1))
            channels[name] += squares.sum(axis=0)

    masks = []
    net.watch = watch
    for rows in places:
        ids, mask, known = task.read("fit", rows)
        masks.append(mask.ravel())
        hidden, back = net.encode(ids, mask)
        y, back_head = task.head(net, hidden[-1], mask, known)
        back({-1: back_head(rng.choice([-1.0, 1.0], y.shape).astype(y.dtype))})
    net.watch = None
    net.zero_grad()
    count = sum(int(mask.sum()) for mask in masks)
    for name, parts in tokens.items():
        unit = (1 - EVEN) * count / sum(float(part.sum()) for part in parts)
        tokens[name] = [
            (unit * part + EVEN) * mask for part, mask in zip(parts, masks, strict=True)
        ]
        channels[name] *= (1 - EVEN) / channels[name].mean()
        channels[name] += EVEN
    return tokens, channels


def compress(
    net: Bert,
    dense: Bert,
    task: Task,
    rows: Array,
    names: Sequence[str],
    fit: Fit,
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Fit the layers `names` of `net` one after the other, in place.

    Parameters
    ----------
    net : Bert
        Its other layers stay as they are.
    dense : Bert
        What it should do.
    task : Task
    rows : (R,) int
        Rows of ``task.fit`` that are read.
    names : sequence of str
    fit : callable
        Takes the name, the matrix aimed at (m, n), the moments of inputs and targets and the
        weights of the outputs (m,); gives the new weight. The bias follows from the means.
    """
    places = list(batches(task.fit, TOKENS, rows))
    tokens, channels = importance(dense, task, places)
    read = [task.read("fit", some)[:2] for some in places]
    masks = [mask for _, mask in read]
    now = [net.embed(ids)[0] for ids, _ in read]
    aims = [dense.embed(ids)[0] for ids, _ in read]
    for i in range(net.layers):
        goals = []
        for b, mask in enumerate(masks):
            aims[b], goal = _goals(dense, i, aims[b], mask)
            goals.append(goal)
        runs = [net.steps(i, x, mask) for x, mask in zip(now, masks, strict=True)]
        for group in GROUPS:
            chosen = [f"encoder.layer.{i}.{name}" for name in group]
            sums = {name: _Sums(net.weights[name].matrix.shape) for name in chosen if name in names}
            for b, run in enumerate(runs):
                x, added = next(run)
                for name, total in sums.items():
                    goal = goals[b][name] if added is None else goals[b][name] - added
                    total.add(x, goal, tokens[name][b])
            for name, total in sums.items():
                started = time.monotonic()
                data = total.moments()
                weight = fit(name, aimed(dense.weights[name].matrix, data), data, channels[name])
                net.replace({name: weight})
                net.own[f"{name}.bias"][...] = data.y_mean - weight.matrix @ data.x_mean
                error, seconds = missed(weight.matrix, data), time.monotonic() - started
                tell(f"{name}: relative error of the outputs {error:.3f}, {seconds:.1f} s")
        now = [finish(run)[0] for run in runs]


def _goals(dense: Bert, i: int, x: Array, mask: Array) -> tuple[Array, dict[str, Array]]:
    """Return what layer i of the encoder gives, and what its linear layers and residuals give."""
    goals = {}

    def keep(name: str, x: Array, y: Array, added: Array | None) -> None:
        goals[name] = y if added is None else y + added

    return dense.layer(i, x, mask, keep)[0], goals


def aimed(A: Array, data: Moments) -> Array:
    """Return the matrix (m, n) that gives the targets best, with a ridge towards A."""
    H = data.xx.copy()
    H[np.diag_indices_from(H)] += RIDGE * np.trace(H) / len(H)
    made: Array = A + np.linalg.solve(H, (data.yx - A @ data.xx).T).T
    return made


def missed(matrix: Array, data: Moments) -> float:
    """Return the relative error of the outputs: root of the squared error's share."""
    return float(np.sqrt(max(data.error(matrix), 0.0) / data.yy)) if data.yy else 0.0


# -- end to end ------------------------------------------------------------------------------------


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
    path: Path | None = None,
    every: float = 60.0,
    seed: int = 0,
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
    path : Path, optional
        Where the state is kept every so many seconds, and continued from.
    """
    steps: list[Array] = []
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        made = list(_steps(task, rng.permutation(rows), tokens, rng))
        steps += [made[i] for i in rng.permutation(len(made))]
    parameters = net.parameters
    optimiser = Adam(parameters, rate)
    done, history = 0, []
    if path is not None and path.exists():
        done = _load(path, optimiser)
        net.refresh()
    saved = time.monotonic()
    for at in range(done, len(steps)):
        net.zero_grad()
        loss = np.zeros(2)
        parts = list(batches(task.fit, min(tokens, TOKENS), steps[at]))
        for part in parts:
            ids, mask, known = task.read("fit", part)
            share = np.float32(len(part) / len(steps[at]))
            aims, _ = dense.encode(ids, mask)
            taught, _ = task.head(dense, aims[-1], mask, known)
            states, back = net.encode(ids, mask)
            y, back_head = task.head(net, states[-1], mask, known)
            value, gradient = task.loss(y, taught, known)
            apart, gradients = matched(states, aims, mask)
            gradients = {k: g * np.float32(hidden * share) for k, g in gradients.items()}
            last = len(states) - 1
            gradients[last] = gradients[last] + back_head(gradient * share)
            back(gradients)
            loss += float(share) * np.array([value, apart])
        gradients = net.settle()
        warm = min(1.0, 20 * (at + 1) / len(steps))
        optimiser.step(
            {name: gradients.get(name, np.zeros_like(v)) for name, v in parameters.items()},
            warm * 0.5 * (1 + np.cos(np.pi * at / len(steps))),
        )
        net.refresh()
        history.append(loss)
        if path is not None and time.monotonic() - saved > every:
            _save(path, optimiser, at + 1)
            saved = time.monotonic()
        if (at + 1) % 10 == 0 or at + 1 == len(steps):
            value, apart = np.mean(history[-10:], axis=0)
            tell(f"step {at + 1} of {len(steps)}: loss {value:.4f}, hidden states {apart:.4f}")
    for weight in net.weights.values():
        round_stored(weight)


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
            f"{name}/first": optimiser._first[name],
            f"{name}/second": optimiser._second[name],
        }
    write(path, arrays)


def _load(path: Path, optimiser: Adam) -> int:
    with np.load(path, allow_pickle=False) as arrays:
        for name, value in optimiser.parameters.items():
            value[...] = arrays[f"{name}/value"]
            optimiser._first[name][...] = arrays[f"{name}/first"]
            optimiser._second[name][...] = arrays[f"{name}/second"]
        optimiser.steps = int(arrays["done"])
    return optimiser.steps


def write(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write arrays to an .npz that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part.npz")
    np.savez(part, **arrays)
    part.replace(path)


def save(path: Path, net: Bert, names: Sequence[str]) -> None:
    """Keep what was fitted of a network."""
    arrays = {f"own/{name}": value for name, value in net.own.items()}
    for name in names:
        arrays |= {f"{name}/{key}": v for key, v in store(net.weights[name]).items()}
    write(path, arrays)


def load(path: Path, net: Bert, names: Sequence[str]) -> None:
    """Put what `save` kept into a network."""
    with np.load(path, allow_pickle=False) as arrays:
        held = {key: arrays[key] for key in arrays.files}
    for name, value in net.own.items():
        value[...] = held[f"own/{name}"]
    for name in names:
        mine = {key[len(name) + 1 :]: v for key, v in held.items() if key.startswith(f"{name}/")}
        net.replace({name: restore(mine)})


def evaluate(net: Bert, task: Task) -> list[tuple[Array, Array, Any]]:
    """Return (rows, outputs, what is known of them) of the rows that judge, batch by batch."""
    found = []
    for rows in batches(task.judge, TOKENS):
        ids, mask, known = task.read("judge", rows)
        hidden, _ = net.encode(ids, mask)
        found.append((rows, task.head(net, hidden[-1], mask, known)[0], known))
    return found
