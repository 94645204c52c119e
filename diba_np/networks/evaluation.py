"""How good a network is at what it is for, alone and against another on the same rows."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_softmax

from diba_np.checks import as_real, check_count
from diba_np.networks.inputs import Batch, as_arrays, batches, padded
from diba_np.networks.masking import NONE_TO_MASK, drawn_tokens, mask_token
from diba_np.networks.network import Network
from diba_np.networks.tasks import CLASSES, LABELS, NEXT, SCORES, SENTENCES, Task, task_of
from diba_np.networks.texts import BATCH, LENGTH, Texts, following

Array = NDArray[Any]

_IMAGES = 16  # of a batch
_WHOLE_ROWS = (CLASSES, LABELS, SCORES)  # what is told of a row, from texts or arrays


def evaluate(
    net: Network,
    texts: Texts | None = None,
    *,
    against: Network | None = None,
    inputs: ArrayLike | None = None,
    labels: ArrayLike | None = None,
    length: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Judge a network: perplexity of a decoder, accuracy of an encoder, errors of scores, cosines.

    Parameters
    ----------
    net : Network
    texts : str, sequence of str, sequence of sequences of int, or (S, T) int array
        What it is judged on; with `labels` where classes are told.
    against : Network, optional
        Usually the dense network; for the same task, of the same vocabulary or classes. Needed
        where there is no head: vectors of texts (`Network.embed`) are compared with its.
    inputs : array_like, optional
        In the place of texts: token ids; images or spectrograms of a network that reads these.
    labels : (S,) or (S, outputs) array_like, optional
        The classes (int) of `texts` or `inputs`; or their scores (real numbers), which may be left
        out with `against`: (S,) of a head with one output, (S, outputs) where ``problem_type`` of
        the configuration is "regression"; or which labels they have (S, outputs), 0 or 1, where it
        is "multi_label_classification".
    length : int, optional
        Most tokens of a row that is made of texts; default: 128, and of vectors as many as
        `Network.embed` reads.
    seed : int, default 0
        Draws the tokens that are masked: 15 % of each row, at least one.

    Returns
    -------
    dict
        ``task`` ("next tokens", "masked tokens", "classes", "labels", "scores", "sentences"),
        ``targets`` (tokens; rows; of "labels" each label of each row, which is there or not),
        ``tokens_per_second`` (of processor time, rows read side by side, after the first batch
        was read once, untimed); ``accuracy`` of what is most probable,
        ``accuracy_error`` (its standard error, the targets of a row taken together),
        ``perplexity``; with `against` also ``against`` (the same of it), ``agreement``
        (share of targets with the same most probable one) and ``kl`` (mean Kullback-Leibler
        divergence from `against`, nats). Of "scores" instead, with `labels`, ``squared_error``
        (mean over rows and outputs) and ``squared_error_error`` (its standard error); with
        `against` ``against`` and ``squared_difference`` (mean square of what is between the two).
        Of "sentences" ``cosine`` (mean) and ``cosine_error`` (its standard error). Standard errors
        of a single row are not known: NaN.

    Raises
    ------
    TypeError, ValueError
        Something is of the wrong kind or shape, or missing for what the network does; the networks
        do not fit together.
    """
    check_count(seed, "seed", least=0)
    task = _checked_task(net, texts, inputs, labels, against)
    nets = [_Judged(net)]
    if against is not None:
        _check_against(net, against)
        nets.append(_Judged(against))
    usual = net.sentence_length if task is SENTENCES else LENGTH
    rows = _rows(net, task, texts, inputs, labels, usual if length is None else length, seed)
    first = next(rows)
    for one in nets:  # kernels are compiled and weights read before time is taken
        one.outputs(first)
    measures = {SENTENCES: _cosines, SCORES: _errors}.get(task, _probabilities)
    return {"task": task.name, **measures(nets, chain([first], rows))}


class _Judged:
    """A network with the time that it takes."""

    def __init__(self, net: Network) -> None:
        self.net, self.task, self._linear = net, task_of(net), net.frozen()
        self._seconds, self._tokens = 0.0, 0

    def outputs(self, batch: Batch) -> tuple[Array, int]:
        """Return the outputs (N, size) of a batch's targets, and how many tokens were read."""
        x = self.net.last_hidden(batch.inputs, batch.mask, self._linear)
        mask = np.ones(x.shape[:2], bool) if batch.mask is None else batch.mask
        asked = mask if batch.asked is None else batch.asked
        return self.task.outputs(self.net, x, mask, asked, self._linear)[0], int(mask.sum())

    def timed(self, batch: Batch) -> Array:
        """Return the outputs alone; take the time."""
        started = time.process_time()
        y, tokens = self.outputs(batch)
        self._seconds += time.process_time() - started
        self._tokens += tokens
        return y

    def speed(self) -> dict[str, float]:
        """Return the tokens a second of all that was timed."""
        return {"tokens_per_second": self._tokens / max(self._seconds, 1e-9)}


# -- what is measured ------------------------------------------------------------------------------


class _Sums:
    """What is summed up of one network that tells tokens, classes or labels, batch by batch."""

    def __init__(self) -> None:
        self.loss = 0.0
        self._rows: list[Array] = []  # right answers and targets of each row, (2, rows)

    def add(self, batch: Batch, logs: Array) -> None:
        """Take in the logarithms of the probabilities (N, kinds) of a batch."""
        wanted = np.reshape(batch.targets, -1)  # type: ignore[arg-type]
        right = logs.argmax(axis=1) == wanted
        if batch.asked is None:
            rows = len(batch.inputs)
            row = np.repeat(np.arange(rows), len(wanted) // rows)
        else:
            row = np.nonzero(batch.asked)[0]
        self._rows.append(np.stack([np.bincount(row, right), np.bincount(row)]))
        self.loss -= float(logs[np.arange(len(logs)), wanted].sum(dtype=np.float64))

    def measures(self) -> dict[str, float]:
        """Return accuracy with its standard error, perplexity."""
        right, count = np.concatenate(self._rows, axis=1)
        accuracy = right.sum() / count.sum()
        return {
            "accuracy": float(accuracy),
            "accuracy_error": _of_several(
                np.linalg.norm(right - accuracy * count) / count.sum(), len(count)
            ),
            "perplexity": math.exp(min(self.loss / count.sum(), 700.0)),
        }


def _probabilities(nets: Sequence[_Judged], rows: Iterable[Batch]) -> dict[str, Any]:
    """Return how well each target is told, and how far two networks' probabilities are."""
    sums = [_Sums() for _ in nets]
    targets = same = 0
    divergence = 0.0
    for batch in rows:
        logs: list[Array] = []
        for net, total in zip(nets, sums, strict=True):
            logs.append(log_softmax(net.task.choices(net.timed(batch)), axis=-1))
            total.add(batch, logs[-1])
        targets += len(logs[0])
        if len(nets) > 1:
            same += int((logs[0].argmax(axis=1) == logs[1].argmax(axis=1)).sum())
            divergence += float((np.exp(logs[1]) * (logs[1] - logs[0])).sum(dtype=np.float64))
    own, *other = (total.measures() | net.speed() for net, total in zip(nets, sums, strict=True))
    report: dict[str, Any] = {"targets": targets, **own}
    if other:
        divergence = max(divergence, 0.0)  # of equal networks rounding may leave less
        report |= {"against": other[0], "agreement": same / targets, "kl": divergence / targets}
    return report


def _of_several(error: Any, rows: int) -> float:
    """Return the standard error of a mean over rows; of one row it is not known."""
    return float(error) if rows > 1 else math.nan


def _errors(nets: Sequence[_Judged], rows: Iterable[Batch]) -> dict[str, Any]:
    """Return how far scores are from those that were given, and from another network's."""
    found: list[list[Array]] = [[] for _ in nets]
    given: list[Array] = []
    for batch in rows:
        for net, part in zip(nets, found, strict=True):
            part.append(net.timed(batch).astype(np.float64))
        if batch.targets is not None:
            given.append(batch.targets)
    scores = [np.concatenate(part) for part in found]

    def measures(net: _Judged, y: Array) -> dict[str, float]:
        if not given:
            return net.speed()
        squares = np.square(y - np.concatenate(given)).mean(axis=1)
        error = _of_several(squares.std() / math.sqrt(len(squares)), len(squares))
        told = {"squared_error": float(squares.mean()), "squared_error_error": error}
        return told | net.speed()

    own, *other = (measures(net, y) for net, y in zip(nets, scores, strict=True))
    report: dict[str, Any] = {"targets": len(scores[0]), **own}
    if other:
        apart = float(np.square(scores[0] - scores[1]).mean())
        report |= {"against": other[0], "squared_difference": apart}
    return report


def _cosines(nets: Sequence[_Judged], rows: Iterable[Batch]) -> dict[str, Any]:
    """Return how near the vectors of texts are to those of another network."""
    parts = []
    for batch in rows:
        one, other = (net.timed(batch) for net in nets)
        parts.append(np.einsum("sw,sw->s", one, other, dtype=np.float64))
    cosines = np.concatenate(parts)
    return {
        "targets": len(cosines),
        "cosine": float(cosines.mean()),
        "cosine_error": _of_several(cosines.std() / math.sqrt(len(cosines)), len(cosines)),
        **nets[0].speed(),
    }


# -- what is asked ---------------------------------------------------------------------------------


def _checked_task(
    net: Network,
    texts: Texts | None,
    inputs: ArrayLike | None,
    labels: ArrayLike | None,
    against: Network | None,
) -> Task:
    """Return what a network is judged by; what that takes must be given, and no more."""
    task = task_of(net)
    given = texts is not None, inputs is not None
    if texts is not None and not net.config.vocabulary:
        raise TypeError("the network reads arrays: give inputs= in the place of texts")
    if task in _WHOLE_ROWS:
        bare = task is SCORES and against is not None
        if sum(given) != 1 or (labels is None and not bare):
            more = "; against= alone will do too" if task is SCORES else ""
            raise TypeError(f"to judge {task.name} give labels=, with texts= or inputs={more}")
    elif sum(given) != 1 or labels is not None:
        own = "texts= or inputs=" if net.config.vocabulary else "inputs="
        if not any(given) and labels is None:
            raise TypeError(f"{task.name} are judged on {own}, which is missing")
        rest = "give one of both" if all(given) else "leave labels= out"
        raise TypeError(f"{task.name} are judged on {own}; {rest}")
    if task is SENTENCES and against is None:
        raise TypeError("a network without a head is judged against another: give against=")
    return task


def _check_against(net: Network, against: Network) -> None:
    """Refuse a network that cannot be compared with the one that is judged."""
    one, other = net.config, against.config
    if (against.kind.decoder, other.vocabulary) != (net.kind.decoder, one.vocabulary):
        raise ValueError("against must be a network of the same kind and vocabulary")
    if (one.channels, one.image) != (other.channels, other.image):
        raise ValueError(
            f"against must read arrays of {one.channels} channels of {one.image}, as the network, "
            f"got {other.channels} of {other.image}"
        )
    task, its = task_of(net), task_of(against)
    if its is not task:
        raise ValueError(f"against must be a network for {task.name}, got one for {its.name}")
    if task.size(against) != task.size(net):
        raise ValueError(
            f"against must have {task.size(net)} outputs, as the network, got {task.size(against)}"
        )


def _rows(
    net: Network,
    task: Task,
    texts: Texts | None,
    inputs: ArrayLike | None,
    labels: ArrayLike | None,
    length: int,
    seed: int,
) -> Iterator[Batch]:
    """Return batches of inputs, places that are asked for, and targets."""
    read: Any = inputs if texts is None else texts
    if task in _WHOLE_ROWS:
        data: Any = net.rows_of(read, length) if net.config.vocabulary else as_arrays(read)
        if [] in (data if isinstance(data, list) else ()):
            raise ValueError(
                f"texts must hold at least one token each, got none in text {data.index([])}"
            )
        given = (
            None if labels is None else _checked_labels(net, task, np.asarray(labels), len(data))
        )
        return _labelled(net, data, given)
    if not net.config.vocabulary:  # vectors of arrays
        return _labelled(net, as_arrays(read), None)
    least = 2 if task is NEXT else 1
    rows = [row for row in net.rows_of(read, length) if len(row) >= least]
    if not rows:
        raise ValueError(f"texts must hold a row of {least} tokens or more, got none")
    if task is SENTENCES:
        return _labelled(net, rows, None)
    if task is NEXT:
        return following(rows, net.config)
    return _masked(net, rows, np.random.default_rng(seed))


def _masked(net: Network, rows: list[list[int]], rng: np.random.Generator) -> Iterator[Batch]:
    hidden, some = mask_token(net), False
    for places in batches(rows, BATCH):
        ids, mask = padded([rows[i] for i in places], net.config.padding)
        asked = drawn_tokens(net, ids, mask, rng)
        if asked.any():
            some = True
            yield Batch(np.where(asked, hidden, ids), mask, asked, ids[asked])
    if not some:
        raise ValueError(NONE_TO_MASK)


def _checked_labels(net: Network, task: Task, labels: Array, count: int) -> Array:
    """Return the classes (S,) of so many rows, or their scores or labels (S, outputs)."""
    outputs = task.size(net)
    if task is not CLASSES:
        labels = as_real(labels, "labels").astype(np.float64)
        shape = (count, outputs) if outputs > 1 else (count,)
        rule = "finite numbers" if task is SCORES else "0 or 1"
        fit = np.isfinite(labels) if task is SCORES else np.isin(labels, (0, 1))
        if labels.shape != shape or not fit.all():
            wrong = f"shape {labels.shape}" if fit.all() else f"{labels[~fit][0]:g}"
            raise ValueError(f"labels must be {rule} of shape {shape}, got {wrong}")
        return labels.reshape(count, outputs).astype(np.float64 if task is SCORES else np.int64)
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise ValueError(
            f"labels must be ints of shape ({count},), got {labels.dtype} {labels.shape}"
        )
    if labels.min() < 0 or labels.max() >= outputs:
        raise ValueError(
            f"labels must lie in [0, {outputs - 1}], got {labels.min()}..{labels.max()}"
        )
    return labels


def _labelled(net: Network, data: Any, labels: Array | None) -> Iterator[Batch]:
    """Yield whole rows of tokens, or arrays, with their labels if there are any."""
    if isinstance(data, list):
        for places in batches(data, BATCH):
            ids, mask = padded([data[i] for i in places], net.config.padding)
            yield Batch(ids, mask, targets=None if labels is None else labels[places])
        return
    for at in range(0, len(data), _IMAGES):
        some = slice(at, at + _IMAGES)
        yield Batch(data[some], targets=None if labels is None else labels[some])
