"""DiBARD through a whole network: everything but the bits is trained, taught by the dense one."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diba_np.checks import check_count, check_number
from diba_np.files.atomic import naming
from diba_np.files.checkpoint import Checkpoint
from diba_np.machine.versions import versions
from diba_np.networks.calibration import Calibration
from diba_np.networks.identity import network_digest
from diba_np.networks.network import Network
from diba_np.networks.stages import layer_by_layer, load_state, save_state, states_folder
from diba_np.networks.tasks import task_of
from diba_np.training.optimisers import Adam, check_finite, share_of_rate

Array = NDArray[Any]

PLACES = 8  # hidden states that teach, evenly spaced; what lies on disk is as many a token
WARM = 0.05  # share of the steps over which the rate rises
AHEAD = 16  # steps whose rows the dense network reads in one go
_LARGEST = float(np.finfo(np.float16).max)


class Teacher:
    """Hidden states of the dense network, computed when they are first asked for.

    Parameters
    ----------
    net : Network
    folder : Path, optional
        Where they are kept in half precision, a file a row of ``2 places width`` bytes a token;
        several processes may share it. Without one they are computed each time, rounded alike.
    scratch : Path, optional
        Where a temporary folder for the states between two layers is made; by default `folder`.

    Attributes
    ----------
    places : list of int
        Which hidden states they are: at most `PLACES` after the embeddings, the last among them.
    """

    def __init__(
        self, net: Network, folder: Path | None = None, scratch: Path | None = None
    ) -> None:
        self.net, self.folder, self.scratch = net, folder, scratch or folder
        count = min(PLACES, net.config.layers)
        ends = np.linspace(0, net.config.layers, count + 1).round()[1:]
        self.places = [int(end) for end in ends]
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def states(self, rows: Array, inputs: Array, mask: Array | None) -> dict[int, Array]:
        """Return the hidden states (S, T, width) of a batch by place; zeros for padding."""
        parts = [self._read(int(row)) for row in rows]
        held = [part for part in parts if part is not None]
        if len(held) < len(rows):
            hidden = self.net.hidden(inputs, mask)
            half = np.stack([_halved(hidden[place]) for place in self.places])
            held = self._keep(rows, half, mask)
        longest = max(part.shape[1] for part in held)
        wide = np.zeros((len(self.places), len(rows), longest, held[0].shape[2]), self.net.dtype)
        for i, part in enumerate(held):
            wide[:, i, : part.shape[1]] = part
        return dict(zip(self.places, wide, strict=True))

    def prepare(self, data: Calibration, batches: Sequence[Array]) -> None:
        """Write the states of some batches of rows where they are missing.

        The dense network runs layer after layer over all of them: one layer's weights are held at
        a time, and the states between two layers lie on disk. Without a folder nothing happens.
        """
        if self.folder is None:
            return
        batches = [rows for rows in batches if not all(self._path(int(r)).exists() for r in rows)]
        net = self.net
        with states_folder(self.scratch) as space:
            begun = (net.begin(*data.read(rows)) for rows in batches)
            for layer, at, state in layer_by_layer(net, begun, lambda _, at: space / f"{at}.npy"):
                if layer in self.places:
                    x = net.ended(state["x"])[0] if layer == net.config.layers else state["x"]
                    save_state(space / f"{at}-{layer}.npy", _halved(x))
            for at, rows in enumerate(batches):
                half = [load_state(space / f"{at}-{place}.npy") for place in self.places]
                self._keep(rows, np.stack(half), data.read(rows)[1])

    def _keep(self, rows: Array, half: Array, mask: Array | None) -> list[Array]:
        """Write states (places, S, T, width) of a batch, a file a row; return those of each row."""
        ends = [half.shape[2]] * len(rows) if mask is None else mask.sum(axis=1)
        parts = [half[:, i, :end] for i, end in enumerate(ends)]
        for row, part in zip(rows, parts, strict=True):
            self._write(int(row), part)
        return parts

    def _path(self, row: int) -> Path:
        return Path(str(self.folder)) / f"{row}.npy"

    def _read(self, row: int) -> Array | None:
        if self.folder is None:
            return None
        try:
            states: Array = np.load(self._path(row), allow_pickle=False)
        except (FileNotFoundError, EOFError, ValueError):  # cut short where the machine went down
            return None
        return states

    def _write(self, row: int, states: Array) -> None:
        if self.folder is None:
            return
        part = self._path(row).with_suffix(f".{os.getpid()}.part")
        with naming(part), open(part, "wb") as file:
            np.save(file, states, allow_pickle=False)
        part.replace(self._path(row))


def _halved(x: Array) -> Array:
    """Return hidden states in half precision."""
    half: Array = np.clip(x, -_LARGEST, _LARGEST).astype(np.float16)
    return half


def matched(
    now: Mapping[int, Array], aim: Mapping[int, Array], mask: Array
) -> tuple[float, dict[int, Array]]:
    """Return how far hidden states are from what they should be, and the gradients.

    It is the mean over places and tokens of the squared error relative to the token's own square
    (or the median one where that is more): a token of huge activations counts as one token.
    """
    total, gradients = 0.0, {}
    count = float(mask.sum()) * len(aim)
    for place, target in aim.items():
        gap = (now[place] - target) * mask[..., None]
        squares = np.einsum("stw,stw->st", target, target)
        least = float(np.median(squares[mask])) or 1.0
        share = (1.0 / (count * np.maximum(squares, least))).astype(gap.dtype)
        total += float(np.vdot(share, np.einsum("stw,stw->st", gap, gap)))
        gap *= 2 * share[..., None]
        gradients[place] = gap
    return total, gradients


def taught(
    student: Network,
    teacher: Network,
    x: Array,
    aim: Array,
    mask: Array,
    asked: Array | None = None,
    back: bool = True,
) -> tuple[float, Array | None]:
    """Return how far the student's outputs are from the teacher's, and the gradient at its states.

    Parameters
    ----------
    student, teacher : Network
    x, aim : (S, T, width) arrays
        Last hidden states of the two.
    mask, asked : (S, T) bool arrays
        No padding; tokens that a masked-token network is asked for, by default all.
    back : bool
        Whether to go back through the student's head.

    Returns
    -------
    float
        Mean loss of `diba_np.networks.tasks.task_of`.
    gradient : (S, T, width) array, or None
    """
    task = task_of(teacher)
    asked = mask if asked is None else asked
    count = max(task.count(asked), 1)
    gradient = np.zeros_like(x) if back else None
    total = 0.0
    for some in task.parts(teacher, asked):
        at = mask[some], asked[some]
        y, pull = task.outputs(student, x[some], *at, None if back else student.plain)
        value, g = task.loss(y, task.outputs(teacher, aim[some], *at, teacher.plain)[0])
        total += value
        if gradient is not None:
            gradient[some] = pull(g / g.dtype.type(count))
    return total / count, gradient


class _Lesson:
    """One batch of a training: loss and gradients."""

    def __init__(self, student: Network, teacher: Teacher, hidden: float) -> None:
        self.student, self.teacher, self.hidden = student, teacher, hidden
        self.dense = teacher.net

    def loss(self, rows: Array, data: Calibration, share: float = 0.0) -> tuple[float, float]:
        """Return loss and distance of hidden states; go back with a share of the batch."""
        inputs, mask = data.read(rows)
        aim = self.teacher.states(rows, inputs, mask)
        last = self.teacher.places[-1]
        now, back = self.student.forward(inputs, mask, None if share else self.student.plain)
        at = np.ones(now[-1].shape[:2], bool) if mask is None else mask
        apart, gradients = matched(dict(enumerate(now)), aim, at)
        asked = data.asked(np.asarray(inputs), at)
        value, pull = taught(
            self.student, self.dense, now[-1], aim[last], at, asked, back=bool(share)
        )
        if share:
            kind = now[-1].dtype.type
            weighed = {place: g * kind(self.hidden * share) for place, g in gradients.items()}
            weighed[last] = weighed[last] + pull * kind(share)
            back(weighed)
        return value, apart

    def step(self, parts: Sequence[Array], data: Calibration) -> Array:
        """Go back with the batches of a step; return loss and distance of hidden states, (2,)."""
        self.student.zero_grad()
        size = sum(len(part) for part in parts)
        total = np.zeros(2)
        for part in parts:
            total += len(part) / size * np.array(self.loss(part, data, len(part) / size))
        return total

    def judge(self, data: Calibration, places: Sequence[Array]) -> float:
        """Return the loss of rows that nothing is trained on."""
        losses = [(self.loss(rows, data)[0], len(rows)) for rows in places]
        return sum(value * size for value, size in losses) / sum(size for _, size in losses)


def trained(student: Network, dense: Network) -> dict[str, Array]:
    """Return what of a compressed network is trained: all but tables, and biases that are new."""
    old = {f"{name}.bias" for name in dense.biases}
    layers = student.compressed
    parameters: dict[str, Array] = {}
    for name, value in student.parameters.items():
        owner, _, what = name.rpartition(".")
        if owner in layers:
            trains = what != "bias" or name in old
        else:
            trains = value.ndim == 1
        if trains:
            parameters[name] = value
    return parameters


def distil(
    student: Network,
    teacher: Network,
    data: Calibration,
    *,
    epochs: int = 1,
    rate: float = 2e-3,
    hidden: float = 1.0,
    tokens: int | None = None,
    hold_out: float = 0.05,
    states: Path | None = None,
    scratch: Path | None = None,
    path: Path | None = None,
    seed: int = 0,
    penalty: Callable[[], float] | None = None,
    teacher_digest: str | None = None,
    callback: Callable[[dict[str, Any]], Any] | None = None,
) -> Network:
    """Train diagonals or scales, norms and biases of a compressed network end to end.

    Parameters
    ----------
    student : Network
        Its parameters are changed in place.
    teacher : Network
        The dense network.
    data : Calibration
    epochs : int
    rate : float
        Of Adam, relative to the size of each array; it rises over the first twentieth and falls
        along a half cosine.
    hidden : float
        Weight of the distance of hidden states (`matched`) beside the divergence of predictions.
    tokens : int, optional
        Of a step, which is made of batches of `data` or is a smaller one; by default the task's.
    hold_out : float
        Share of the rows, at least one of two or more, that are not trained on and judge.
    states, scratch : Path, optional
        Folder of the teacher's hidden states and of what is between two layers, see `Teacher`.
    path : Path, optional
        Checkpoint of the training, written once a minute and continued from; one of other
        arguments, rows, teacher or versions is refused.
    seed : int
        Draws the order of the rows.
    penalty : callable, optional
        Called after each way back: adds to the gradients of the student's layers and returns what
        it adds to the loss.
    teacher_digest : str, optional
        The teacher's `diba_np.networks.identity.network_digest`, where it is known already.
    callback : callable, optional
        Called with ``{"step", "steps", "divergence", "hidden"}`` of the last ten steps:
        "divergence" is the loss of `taught`.

    Returns
    -------
    Network
        With layers as they are stored; the student as it was before if it was no worse.

    Raises
    ------
    ValueError
        `path` holds the checkpoint of another training.
    Diverged
        The loss or a gradient is no longer finite: a FloatingPointError.
    """
    epochs, seed = check_count(epochs, "epochs"), check_count(seed, "seed", least=0)
    rate, hidden = check_number(rate, "rate", above=0.0), check_number(hidden, "hidden")
    hold_out = check_number(hold_out, "hold_out")
    tokens = check_count(task_of(teacher).step_tokens if tokens is None else tokens, "tokens")
    data = data.batched(min(tokens, data.tokens))
    lesson = _Lesson(student, Teacher(teacher, states, scratch), hidden)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(data))
    held = min(max(1, round(hold_out * len(data))), len(data) - 1) if hold_out else 0
    judging = data.cut(np.sort(order[:held] if held else order))
    steps = [
        step
        for _ in range(epochs)
        for step in _steps(data, rng.permutation(order[held:]), tokens, rng)
    ]
    parameters = trained(student, teacher)
    optimiser = Adam(parameters, rate)
    lesson.teacher.prepare(data, judging)
    before = lesson.judge(data, judging)
    start = {name: value.copy() for name, value in parameters.items()}
    history: list[tuple[float, float]] = []
    keeper = None if path is None else Checkpoint(path)
    done = 0
    if keeper is not None:
        asked = {
            "epochs": epochs,
            "rate": rate,
            "hidden": hidden,
            "hold_out": hold_out,
            "tokens": tokens,
            "batch": data.tokens,
            "seed": seed,
            "rows": data.digest(),
            "teacher": teacher_digest or network_digest(teacher),
        }
        done = _go_on(keeper, optimiser, asked)
    for at in range(done, len(steps)):
        if at == done or at % AHEAD == 0:
            ahead = steps[at : (at // AHEAD + 1) * AHEAD]
            lesson.teacher.prepare(data, [part for step in ahead for part in step])
        loss = lesson.step(steps[at], data)
        if penalty is not None:
            loss[0] += penalty()
        found = student.gradients  # gathered anew at each access
        gradients = {name: found[name] for name in parameters}
        check_finite(float(loss.sum()), gradients, f"step {at + 1} of {len(steps)}")
        warm = min(1.0, (at + 1) / (WARM * len(steps)))
        optimiser.step(gradients, warm * share_of_rate("cosine", at / len(steps)))
        history.append((float(loss[0]), float(loss[1])))
        if keeper is not None and keeper.due():
            _keep(keeper, optimiser)
        if callback is not None and ((at + 1) % 10 == 0 or at + 1 == len(steps)):
            value, apart = np.mean(history[-10:], axis=0)
            facts = {"step": at + 1, "steps": len(steps)}
            callback(facts | {"divergence": float(value), "hidden": float(apart)})
    if keeper is not None:
        _keep(keeper, optimiser)
    student.zero_grad()
    stored = student.replaced({n: layer.rounded() for n, layer in student.compressed.items()})
    lesson.student = stored
    if lesson.judge(data, judging) <= before:
        return stored
    for name, value in start.items():
        parameters[name][...] = value
    return student


def _steps(data: Calibration, order: Array, tokens: int, rng: Any) -> list[list[Array]]:
    """Return the batches of each step: parts of like length, drawn together at random."""
    parts = data.cut(order)
    together = max(1, math.ceil(tokens / data.tokens))
    mixed = [parts[i] for i in rng.permutation(len(parts))]
    return [mixed[at : at + together] for at in range(0, len(mixed), together)]


def _arrays(optimiser: Adam) -> dict[str, Mapping[str, Array]]:
    """Return what changes while a training runs: parameters and moments."""
    return {
        "parameters": optimiser.parameters,
        "first": optimiser.first,
        "second": optimiser.second,
    }


def _keep(keeper: Checkpoint, optimiser: Adam) -> None:
    """Write the state of a training."""
    keeper.write({"steps": optimiser.steps, **_arrays(optimiser)})


def _go_on(keeper: Checkpoint, optimiser: Adam, asked: Mapping[str, Any]) -> int:
    """Put back what is kept of such a training; return the steps that were taken."""
    shapes = {name: value.shape for name, value in optimiser.parameters.items()}
    state = keeper.open({**asked, "parameters": shapes} | versions())
    if state is None:
        return 0
    for what, arrays in _arrays(optimiser).items():
        for name, array in arrays.items():
            array[...] = state[what][name]
    optimiser.steps = state["steps"]
    return optimiser.steps
