"""How good a network is at what it is for, alone and against another on the same rows."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_softmax

from diba_np.checks import check_count
from diba_np.networks.inputs import batches, padded
from diba_np.networks.masking import drawn_tokens, mask_token
from diba_np.networks.network import Network
from diba_np.networks.tasks import CLASSES, SENTENCES, Task, task_of
from diba_np.networks.texts import BATCH, LENGTH, Texts, following, target_logits

Array = NDArray[Any]

_IMAGES = 16  # of a batch


def evaluate(
    net: Network,
    texts: Texts | None = None,
    *,
    against: Network | None = None,
    inputs: ArrayLike | None = None,
    labels: ArrayLike | None = None,
    length: int = LENGTH,
    seed: int = 0,
) -> dict[str, Any]:
    """Judge a network: perplexity of a decoder, accuracy of an encoder, cosines without a head.

    Parameters
    ----------
    net : Network
    texts : str, sequence of str, sequence of sequences of int, or (S, T) int array
        What it is judged on; with `labels` where classes are told.
    against : Network, optional
        Usually the dense network; of the same vocabulary or classes. Needed where there is no head:
        vectors of texts (`Network.embed`) are compared with its.
    inputs : array_like, optional
        In the place of texts where classes are told: token ids, images or spectrograms.
    labels : (S,) int array_like, optional
        The classes of `texts` or `inputs`.
    length : int, default 128
        Tokens of a row that is made of texts.
    seed : int, default 0
        Draws the tokens that are masked: 15 % of each row, at least one.

    Returns
    -------
    dict
        ``task`` ("next tokens", "masked tokens", "classes", "sentences"), ``targets``,
        ``tokens_per_second`` (of processor time, rows read side by side); ``accuracy`` of the most
        probable token or class, ``accuracy_error`` (its standard error, the targets of a row taken
        together), ``perplexity``; with `against` also ``against`` (the same of it), ``agreement``
        (share of targets with the same most probable one) and ``kl`` (mean Kullback-Leibler
        divergence from `against`, nats). Of "sentences" instead ``cosine`` (mean) and
        ``cosine_error`` (its standard error).

    Raises
    ------
    TypeError, ValueError
        Something is of the wrong kind or shape, or missing for what the network does; the networks
        do not fit together.
    """
    check_count(seed, "seed", least=0)
    if against is not None and (against.kind.decoder, against.config.vocabulary) != (
        net.kind.decoder,
        net.config.vocabulary,
    ):
        raise ValueError("against must be a network of the same kind and vocabulary")
    task = _checked_task(net, texts, inputs, labels)
    if task is SENTENCES:
        return _vectors(net, against, texts, length)
    rows = _rows(net, texts, inputs, labels, length, seed)
    nets = [net] if against is None else [net, against]
    sums = [_Sums(one) for one in nets]
    same, divergence = 0, 0.0
    for batch in rows:
        logs: list[Array] = []
        for total in sums:
            shares = total.add(batch)
            if logs and shares.shape != logs[0].shape:
                raise ValueError(f"against must have {logs[0].shape[1]} outputs, as the network")
            logs.append(shares)
        if against is not None:
            same += int((logs[0].argmax(axis=1) == logs[1].argmax(axis=1)).sum())
            divergence += float((np.exp(logs[1]) * (logs[1] - logs[0])).sum(dtype=np.float64))
    targets = sums[0].targets
    report: dict[str, Any] = {"task": task.name, "targets": targets, **sums[0].measures()}
    if against is not None:
        other = sums[1].measures()
        divergence = max(divergence, 0.0)  # of equal networks rounding may leave less
        report |= {"against": other, "agreement": same / targets, "kl": divergence / targets}
    return report


class _Sums:
    """What is summed up of one network, batch by batch."""

    def __init__(self, net: Network) -> None:
        self.net, self._linear = net, net.frozen()
        self.loss = self.seconds = 0.0
        self.tokens = 0
        self._rows: list[Array] = []  # right answers and targets of each row, (2, rows)

    @property
    def targets(self) -> int:
        return int(sum(part[1].sum() for part in self._rows))

    def add(self, batch: dict[str, Any]) -> Array:
        """Take in a batch; return the logarithms of the probabilities (N, outputs)."""
        started = time.process_time()
        shares: Array = log_softmax(target_logits(self.net, batch, self._linear), axis=-1)
        self.seconds += time.process_time() - started
        wanted = batch["targets"]
        right = shares.argmax(axis=1) == wanted
        asked = batch.get("asked")
        row = np.arange(len(wanted)) if asked is None else np.nonzero(asked)[0]
        self._rows.append(np.stack([np.bincount(row, right), np.bincount(row)]))
        self.loss -= float(shares[np.arange(len(shares)), wanted].sum(dtype=np.float64))
        self.tokens += int(batch["tokens"])
        return shares

    def measures(self) -> dict[str, float]:
        """Return accuracy with its standard error, perplexity, tokens a second."""
        right, count = np.concatenate(self._rows, axis=1)
        accuracy = right.sum() / count.sum()
        return {
            "accuracy": float(accuracy),
            "accuracy_error": float(np.linalg.norm(right - accuracy * count) / count.sum()),
            "perplexity": math.exp(min(self.loss / count.sum(), 700.0)),
            "tokens_per_second": self.tokens / max(self.seconds, 1e-9),
        }


def _vectors(net: Network, against: Network | None, texts: Any, length: int) -> dict[str, Any]:
    """Return how near the vectors of texts are to those of another network."""
    if against is None:
        raise TypeError("a network without a head is judged against another: give against=")
    rows = net.rows_of(texts, length)
    started = time.process_time()
    vectors = net.embed(rows)
    seconds = time.process_time() - started
    cosines = np.einsum("sw,sw->s", vectors, against.embed(rows), dtype=np.float64)
    return {
        "task": SENTENCES.name,
        "targets": len(rows),
        "cosine": float(cosines.mean()),
        "cosine_error": float(cosines.std() / math.sqrt(len(rows))),
        "tokens_per_second": sum(map(len, rows)) / max(seconds, 1e-9),
    }


def _checked_task(
    net: Network, texts: Texts | None, inputs: ArrayLike | None, labels: ArrayLike | None
) -> Task:
    """Return what a network is judged by; what that takes must be given, and no more."""
    task = task_of(net)
    given = texts is not None, inputs is not None, labels is not None
    if task is CLASSES and given not in ((True, False, True), (False, True, True)):
        raise TypeError("to judge classes give labels, with texts or inputs")
    if task is not CLASSES and given != (True, False, False):
        raise TypeError(f"to judge {task.name} give texts alone")
    return task


def _rows(
    net: Network,
    texts: Texts | None,
    inputs: ArrayLike | None,
    labels: ArrayLike | None,
    length: int,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Return batches of inputs, places that are asked for, and targets."""
    if labels is not None:
        data = np.asarray(inputs) if texts is None else net.rows_of(texts, length)
        return _labelled(net, data, np.asarray(labels))
    least = 2 if net.kind.decoder else 1
    rows = [row for row in net.rows_of(texts, length) if len(row) >= least]  # type: ignore[arg-type]
    if not rows:
        raise ValueError(f"texts must hold a row of {least} tokens or more, got none")
    if net.kind.decoder:
        return following(rows, net.config.padding)
    return _masked(net, rows, np.random.default_rng(seed))


def _masked(
    net: Network, rows: list[list[int]], rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    hidden = mask_token(net)
    for places in batches(rows, BATCH):
        ids, mask = padded([rows[i] for i in places], net.config.padding)
        asked = drawn_tokens(net, ids, mask, rng)
        if asked.any():
            yield {
                "inputs": np.where(asked, hidden, ids),
                "mask": mask,
                "asked": asked,
                "targets": ids[asked],
                "tokens": mask.sum(),
            }


def _labelled(net: Network, data: Any, labels: Array) -> Iterator[dict[str, Any]]:
    if labels.dtype.kind not in "iu" or labels.shape != (len(data),) or not len(labels):
        raise ValueError(
            f"labels must be ints of shape ({len(data)},), got {labels.dtype} {labels.shape}"
        )
    classes = net.layers[net.tensors.need("classifier")].shape[0]
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels must lie in [0, {classes - 1}], got {labels.min()}..{labels.max()}"
        )
    if isinstance(data, list):
        for places in batches(data, BATCH):
            ids, mask = padded([data[i] for i in places], net.config.padding)
            yield {"inputs": ids, "mask": mask, "targets": labels[places], "tokens": mask.sum()}
        return
    for at in range(0, len(data), _IMAGES):
        some = data[at : at + _IMAGES]
        yield {"inputs": some, "targets": labels[at : at + _IMAGES], "tokens": len(some)}
