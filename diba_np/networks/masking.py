"""Tokens that are masked, for a network that tells which they were."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from diba_np.networks.network import Network

Array = NDArray[Any]

SHARE = 0.15  # of the tokens of a row
NONE_TO_MASK = "texts must hold a token that can be masked, got none"

# those that are never masked, nor is a mask: they frame a text or stand for what is not known
_SPECIAL = ("[CLS]", "[SEP]", "[PAD]", "[UNK]", "<s>", "</s>", "<pad>", "<unk>")


def mask_token(net: Network) -> int:
    """Return the token that stands in the place of one to be told.

    Raises
    ------
    ValueError
        The network has no tokenizer, or that has no mask.
    """
    tokenizer = net.tokenizer
    if tokenizer is None:
        raise ValueError("masked tokens need a tokenizer with a mask, the network has no tokenizer")
    hidden = tokenizer.id_of(tokenizer.mask) if tokenizer.mask else None
    if hidden is None:
        raise ValueError("masked tokens need a tokenizer with a mask, this one has none")
    return hidden


def drawn_tokens(net: Network, ids: Array, mask: Array, rng: np.random.Generator) -> Array:
    """Return which tokens (S, T) of rows are to be masked: `SHARE` of each row, at least one.

    Parameters
    ----------
    net : Network
    ids : (S, T) int
    mask : (S, T) bool
        False for padding.
    rng : Generator
    """
    tokenizer = net.need_tokenizer()
    names = [*_SPECIAL, *([tokenizer.mask] if tokenizer.mask else [])]
    special = [number for number in map(tokenizer.id_of, names) if number is not None]
    asked = np.zeros_like(mask)
    for row, may in zip(asked, mask & ~np.isin(ids, special), strict=True):
        at = np.flatnonzero(may)
        if at.size:
            row[rng.choice(at, max(1, round(SHARE * at.size)), replace=False)] = True
    return asked
