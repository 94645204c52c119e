"""How good a network is at what it is for, alone and against another on the same rows."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diba_np.checks import check_count
from diba_np.networks.inputs import batches, padded
from diba_np.networks.network import Network
from diba_np.networks.texts import BATCH, LENGTH, Texts

Array = NDArray[Any]

MASKED = 0.15  # share of the tokens that a masked-token network is asked for
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
    """Judge a network: perplexity of a decoder, accuracy of an encoder.

    Parameters
    ----------
    net : Network
    texts : str, sequence of str, sequence of sequences of int, or (S, T) int array
        What a decoder, or an encoder of masked tokens, is judged on.
    against : Network, optional
        Usually the dense network; of the same vocabulary or classes.
    inputs : array_like, optional
        In the place of texts where classes are told: token ids, images or spectrograms.
    labels : (S,) int array_like, optional
        Their classes.
    length : int, default 128
        Tokens of a row that is made of texts.
    seed : int, default 0
        Draws the tokens that are masked: `MASKED` of each row, at least one.

    Returns
    -------
    dict
        ``task`` ("next tokens", "masked tokens", "classes"), ``targets``, ``accuracy`` of the most
        probable token or class, ``perplexity``, ``tokens_per_second`` (of processor time, rows
        read side by side); with `against` also ``against`` (its accuracy, perplexity, tokens a
        second), ``agreement`` (share of targets with the same most probable one) and ``kl`` (mean
        Kullback-Leibler divergence from `against`, nats).

    Raises
    ------
    TypeError, ValueError
        Something is of the wrong kind or shape, or missing for what the network does; the networks
        do not fit together.
    """
    check_count(seed, "seed", least=0)
    task, rows = _rows(net, texts, inputs, labels, length, seed)
    nets = [net] if against is None else [net, against]
    if against is not None and (against.kind.decoder, against.config.vocabulary) != (
        net.kind.decoder,
        net.config.vocabulary,
    ):
        raise ValueError("against must be a network of the same kind and vocabulary")
    linears = [one.frozen() for one in nets]
    sums = [{"loss": 0.0, "right": 0, "seconds": 0.0} for _ in nets]
    targets = tokens = same = 0
    divergence = 0.0
    for batch in rows:
        logs: list[Array] = []
        for one, linear, total in zip(nets, linears, sums, strict=True):
            started = time.process_time()
            shares = _log_shares(_outputs(one, batch, linear))
            total["seconds"] += time.process_time() - started
            if logs and shares.shape != logs[0].shape:
                raise ValueError(f"against must have {logs[0].shape[1]} outputs, as the network")
            total["right"] += int((shares.argmax(axis=1) == batch["targets"]).sum())
            at = np.arange(len(shares)), batch["targets"]
            total["loss"] -= float(shares[at].sum(dtype=np.float64))
            logs.append(shares)
        targets += len(batch["targets"])
        tokens += int(batch["tokens"])
        if against is not None:
            same += int((logs[0].argmax(axis=1) == logs[1].argmax(axis=1)).sum())
            divergence += float((np.exp(logs[1]) * (logs[1] - logs[0])).sum(dtype=np.float64))
    measures = [
        {
            "accuracy": total["right"] / targets,
            "perplexity": math.exp(min(total["loss"] / targets, 700.0)),
            "tokens_per_second": tokens / max(total["seconds"], 1e-9),
        }
        for total in sums
    ]
    report: dict[str, Any] = {"task": task, "targets": targets, **measures[0]}
    if against is not None:
        report |= {"against": measures[1], "agreement": same / targets, "kl": divergence / targets}
    return report


def _log_shares(logits: Array) -> Array:
    """Return the logarithms of the softmax over the last axis."""
    shifted: Array = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _outputs(net: Network, batch: dict[str, Any], linear: Any) -> Array:
    """Return the logits (N, outputs) of a batch's targets."""
    x = net.last_hidden(batch["inputs"], batch.get("mask"), linear)
    asked = batch.get("asked")
    return net.head(x if asked is None else x[asked], linear=linear)[0]


def _rows(
    net: Network,
    texts: Texts | None,
    inputs: ArrayLike | None,
    labels: ArrayLike | None,
    length: int,
    seed: int,
) -> tuple[str, Iterator[dict[str, Any]]]:
    """Return what is judged, and batches of inputs, places that are asked for, and targets."""
    if inputs is not None or labels is not None:
        if inputs is None or labels is None or texts is not None:
            raise TypeError("give texts, or inputs and labels")
        return "classes", _labelled(net, np.asarray(inputs), np.asarray(labels))
    if texts is None:
        raise TypeError("give texts, or inputs and labels")
    if not net.kind.decoder and net.head_name is None:
        raise ValueError("a network that tells classes apart is judged on inputs and labels")
    least = 2 if net.kind.decoder else 1
    rows = [row for row in net.rows_of(texts, length) if len(row) >= least]
    if not rows:
        raise ValueError(f"texts must hold a row of {least} tokens or more, got none")
    if net.kind.decoder:
        return "next tokens", _following(net, rows)
    return "masked tokens", _masked(net, rows, np.random.default_rng(seed))


def _following(net: Network, rows: list[list[int]]) -> Iterator[dict[str, Any]]:
    for places in batches(rows, BATCH):
        ids, mask = padded([rows[i] for i in places], net.config.padding)
        asked = mask.copy()
        asked[:, :-1] &= mask[:, 1:]
        asked[:, -1] = False
        targets = ids[:, 1:][mask[:, 1:]]
        yield {
            "inputs": ids,
            "mask": mask,
            "asked": asked,
            "targets": targets,
            "tokens": mask.sum(),
        }


def _masked(
    net: Network, rows: list[list[int]], rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    tokenizer = net.need_tokenizer()
    hidden = tokenizer.id_of(tokenizer.mask) if tokenizer.mask else None
    if hidden is None:
        raise ValueError("masked tokens need a tokenizer with a mask, this one has none")
    special = {tokenizer.id_of(t) for t in ("[CLS]", "[SEP]", "<s>", "</s>", "[PAD]", "<pad>")}
    for places in batches(rows, BATCH):
        ids, mask = padded([rows[i] for i in places], net.config.padding)
        free = mask & ~np.isin(ids, [i for i in special if i is not None])
        asked = np.zeros_like(mask)
        for row, may in zip(asked, free, strict=True):
            at = np.flatnonzero(may)
            if at.size:
                row[rng.choice(at, max(1, round(MASKED * at.size)), replace=False)] = True
        if asked.any():
            yield {
                "inputs": np.where(asked, hidden, ids),
                "mask": mask,
                "asked": asked,
                "targets": ids[asked],
                "tokens": mask.sum(),
            }


def _labelled(net: Network, inputs: Array, labels: Array) -> Iterator[dict[str, Any]]:
    if labels.dtype.kind not in "iu" or labels.shape != inputs.shape[:1] or not len(labels):
        raise ValueError(
            f"labels must be ints of shape ({len(inputs)},), got {labels.dtype} {labels.shape}"
        )
    classes = net.layers[net.tensors.need("classifier")].shape[0]
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels must lie in [0, {classes - 1}], got {labels.min()}..{labels.max()}"
        )
    for at in range(0, len(inputs), _IMAGES):
        some = inputs[at : at + _IMAGES]
        yield {"inputs": some, "targets": labels[at : at + _IMAGES], "tokens": len(some)}
