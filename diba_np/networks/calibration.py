"""What a network is fitted to: rows of tokens, patches of arrays, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diba_np.checks import check_count, digest
from diba_np.networks.inputs import as_ids, as_mask, batches, padded
from diba_np.networks.network import Network

Array = NDArray[Any]
Texts = str | Sequence[str] | Sequence[Sequence[int]] | ArrayLike


class Calibration:
    """Rows that a network reads, in batches of like length.

    Parameters
    ----------
    inputs : (S, T) int array, or (S, ...) float array
        Token ids; or images or spectrograms where the network reads patches.
    mask : (S, T) bool array, optional
        False for padding.
    tokens : int
        Of a batch, about; rows of arrays count as one each.

    Attributes
    ----------
    inputs, mask
    places : list of (B,) int arrays
        Rows of each batch.
    """

    def __init__(self, inputs: Array, mask: Array | None, tokens: int) -> None:
        self.inputs, self.mask, self.tokens = inputs, mask, tokens
        self.places = self.cut(np.arange(len(inputs)))

    def __len__(self) -> int:
        return len(self.inputs)

    def cut(self, rows: Array) -> list[Array]:
        """Return some rows batch by batch, those of like length together."""
        if self.mask is None and self.inputs.dtype.kind == "f":
            size = max(1, self.tokens // 128)
            return [rows[at : at + size] for at in range(0, len(rows), size)]
        lengths = self.lengths[rows]
        return [rows[some] for some in batches([range(n) for n in lengths], self.tokens)]

    @property
    def lengths(self) -> Array:
        """Tokens of each row."""
        if self.mask is None:
            return np.full(len(self.inputs), self.inputs.shape[1] if self.inputs.ndim > 1 else 1)
        found: Array = self.mask.sum(axis=1)
        return found

    def read(self, rows: Array) -> tuple[Array, Array | None]:
        """Return inputs and mask of some rows, cut to the longest of them."""
        if self.mask is None:
            return self.inputs[rows], None
        longest = int(self.lengths[rows].max())
        return self.inputs[rows, :longest], self.mask[rows, :longest]

    def digest(self) -> str:
        """Return the SHA-256 of the rows."""
        flat = self.inputs.reshape(len(self.inputs), -1)
        return digest(flat if self.mask is None else np.where(self.mask, flat, -1))


def calibration(net: Network, texts: Texts, length: int = 128, tokens: int = 1024) -> Calibration:
    """Return what a network is to be fitted to.

    Parameters
    ----------
    net : Network
    texts : str, sequence of str, sequence of sequences of int, or array
        Texts, token ids by rows, ids (S, T), or the arrays that patches are cut from. A decoder
        reads texts joined and cut into rows of `length` tokens, an encoder one text a row, cut off
        there.
    length : int, default 128
        Most tokens of a row that is made of texts.
    tokens : int, default 1024
        Of a batch, about.

    Returns
    -------
    Calibration

    Raises
    ------
    TypeError, ValueError
        `texts` is of another kind, empty, or not what the network reads; texts need a tokenizer.
    """
    check_count(length, "length", least=2)
    if isinstance(texts, str):
        texts = [texts]
    if isinstance(texts, np.ndarray) and texts.dtype.kind == "f":
        net.begin(texts[:1])
        return Calibration(texts, None, tokens)
    if isinstance(texts, np.ndarray):
        ids = as_ids(texts, net.config)
        return Calibration(ids, as_mask(None, ids.shape), tokens)
    rows: list[Sequence[int]] = list(texts)  # type: ignore[arg-type]
    if not rows:
        raise ValueError("texts must hold at least one row, got none")
    if all(isinstance(row, str) for row in rows):
        rows = _rows_of_texts(net, rows, length)  # type: ignore[arg-type]
    elif any(isinstance(row, str) for row in rows):
        raise TypeError("texts must be all strings or all rows of token ids, got both")
    rows = [row for row in rows if len(row)]
    if not rows:
        raise ValueError("texts must hold at least one token, got none")
    ids, mask = padded(rows, net.config.padding)
    return Calibration(as_ids(ids, net.config), mask, tokens)


def _rows_of_texts(net: Network, texts: Sequence[str], length: int) -> list[Sequence[int]]:
    """Return texts as rows of tokens."""
    if net.tokenizer is None:
        raise ValueError("texts need a tokenizer, the network has none; give token ids")
    special = not net.kind.decoder  # joined texts have none between them
    rows: list[Sequence[int]] = [net.tokenizer.encode(text, special) for text in texts]
    most = net.config.positions - net.config.first_position
    length = min(length, most) if net.config.positions else length
    if not net.kind.decoder:
        return [row[:length] for row in rows]
    joined = [token for row in rows for token in row]
    cut: list[Sequence[int]] = [joined[at : at + length] for at in range(0, len(joined), length)]
    return cut[:-1] if len(cut) > 1 and len(cut[-1]) < length else cut


def iterate_batches(
    rows: Calibration,
) -> Iterator[tuple[int, Array, Array | None]]:
    """Yield number, inputs and mask of every batch."""
    for at, some in enumerate(rows.places):
        yield at, *rows.read(some)
