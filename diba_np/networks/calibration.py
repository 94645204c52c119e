"""What a network is fitted to: rows of tokens, patches of arrays, batch by batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diba_np.checks import digest
from diba_np.networks.inputs import as_arrays, as_ids, batches, padded
from diba_np.networks.masking import NONE_TO_MASK, drawn_tokens, mask_token
from diba_np.networks.network import Network
from diba_np.networks.tasks import MASKED, task_of
from diba_np.networks.texts import BATCH, LENGTH, Texts

Array = NDArray[Any]


class Calibration:
    """Rows that a network reads, in batches of like length.

    Parameters
    ----------
    inputs : (S, T) int array, or (S, ...) array
        Token ids; or images or spectrograms where the network reads patches.
    mask : (S, T) bool array, optional
        False for padding; none where patches are read.
    tokens : int
        Of a batch, about.
    hidden : int, optional
        Token in the place of those that a masked-token network is asked for.
    patches : int, default 0
        Tokens that the network makes of a row, where it reads patches.

    Attributes
    ----------
    inputs, mask, hidden, patches
    places : list of (B,) int arrays
        Rows of each batch.
    """

    def __init__(
        self,
        inputs: Array,
        mask: Array | None,
        tokens: int,
        hidden: int | None = None,
        patches: int = 0,
    ) -> None:
        self.inputs, self.mask, self.tokens, self.hidden = inputs, mask, tokens, hidden
        self.patches = patches
        self.places = self.cut(np.arange(len(inputs)))

    def __len__(self) -> int:
        return len(self.inputs)

    def cut(self, rows: Array) -> list[Array]:
        """Return some rows batch by batch, those of like length together."""
        lengths = self.lengths[rows]
        return [rows[some] for some in batches([range(n) for n in lengths], self.tokens)]

    @property
    def lengths(self) -> Array:
        """Tokens of each row."""
        if self.mask is None:
            return np.full(len(self.inputs), self.patches or self.inputs.shape[1])
        sizes: Array = self.mask.sum(axis=1)
        return sizes

    def read(self, rows: Array) -> tuple[Array, Array | None]:
        """Return inputs and mask of some rows, cut to the longest of them."""
        if self.mask is None:
            return self.inputs[rows], None
        longest = int(self.lengths[rows].max())
        return self.inputs[rows, :longest], self.mask[rows, :longest]

    def drawn(self, tokens: int | None, seed: int) -> Calibration:
        """Return rows drawn from all, of so many tokens about; None for all."""
        lengths = self.lengths
        if tokens is None or lengths.sum() <= tokens:
            return self
        order = np.random.default_rng(seed).permutation(len(self))
        count = max(2, int(np.searchsorted(np.cumsum(lengths[order]), tokens)))
        rows = np.sort(order[:count])
        mask = None if self.mask is None else self.mask[rows]
        return Calibration(self.inputs[rows], mask, self.tokens, self.hidden, self.patches)

    def batched(self, tokens: int) -> Calibration:
        """Return the same rows in batches of so many tokens about."""
        return Calibration(self.inputs, self.mask, tokens, self.hidden, self.patches)

    def asked(self, inputs: Array, mask: Array) -> Array:
        """Return which tokens (S, T) of rows that were read predictions are asked of."""
        return mask if self.hidden is None else mask & (inputs == self.hidden)

    def digest(self) -> str:
        """Return the SHA-256 of the rows, and of the token that is asked for where one is."""
        flat = self.inputs.reshape(len(self.inputs), -1)
        rows = digest(flat if self.mask is None else np.where(self.mask, flat, -1))
        if self.hidden is None:
            return rows
        return hashlib.sha256(f"{rows} {self.hidden}".encode()).hexdigest()


def calibration(
    net: Network, texts: Texts, length: int = LENGTH, tokens: int = BATCH, seed: int = 0
) -> Calibration:
    """Return what a network is to be fitted to.

    Of a masked-token network with a tokenizer, `diba_np.networks.masking.SHARE` of each row's
    tokens are masked, and predictions are asked of these alone; rows that hold masks stay, rows in
    which nothing can be masked are left out, as are texts without a token.

    Parameters
    ----------
    net : Network
    texts : str, sequence of str, sequence of sequences of int, or array
        As `Network.rows_of` takes them; or the arrays that patches are cut from, (S, ...).
    length : int, default 128
        Most tokens of a row that is made of texts.
    tokens : int, default 1024
        Of a batch, about.
    seed : int, default 0
        Draws the tokens that are masked.

    Returns
    -------
    Calibration

    Raises
    ------
    TypeError, ValueError
        `texts` is of another kind, empty, or not what the network reads; texts need a tokenizer.
    """
    if not net.config.vocabulary:
        arrays = as_arrays(texts)
        patches = net.begin(arrays[:1])["mask"].shape[1]
        return Calibration(arrays, None, tokens, patches=patches)
    rows = [row for row in net.rows_of(texts, length) if row]
    ids, mask = padded(rows, net.config.padding)
    ids = as_ids(ids, net.config)
    hidden = None
    if task_of(net) is MASKED and net.tokenizer is not None:
        hidden = mask_token(net)
        whole = ~(mask & (ids == hidden)).any(axis=1)
        asked = drawn_tokens(net, ids[whole], mask[whole], np.random.default_rng(seed))
        ids[whole] = np.where(asked, hidden, ids[whole])
        masked = (mask & (ids == hidden)).any(axis=1)
        if not masked.any():
            raise ValueError(NONE_TO_MASK)
        ids, mask = ids[masked], mask[masked]  # nothing is asked of the others
    return Calibration(ids, mask, tokens, hidden)


def iterate_batches(
    rows: Calibration,
) -> Iterator[tuple[int, Array, Array | None]]:
    """Yield number, inputs and mask of every batch."""
    for at, some in enumerate(rows.places):
        yield at, *rows.read(some)
