"""What a network reads, checked; rows of tokens padded and put together."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diba_np.checks import as_real
from diba_np.networks.kind import Config

Array = NDArray[Any]


@dataclass
class Batch:
    """Rows that are read side by side, and what is asked of them.

    Attributes
    ----------
    inputs : (S, T) int, or (S, ...) array
    mask : (S, T) bool array, or None
        False for padding.
    asked : (S, T) bool array, or None
        At which tokens something is to be told; None where of whole rows.
    targets : (N,) array, or None
        What that is.
    """

    inputs: Array
    mask: Array | None = None
    asked: Array | None = None
    targets: Array | None = None


def as_ids(inputs: ArrayLike, config: Config) -> Array:
    """Return token ids as (S, T) int64; one row may be given as (T,).

    Raises
    ------
    TypeError
        They are no ints.
    ValueError
        The shape is another, there are more tokens than positions, or one is no token.
    """
    try:
        ids = np.asarray(inputs)
    except ValueError:  # NumPy's own words are of sequences in elements
        raise ValueError(
            "rows of ids must have one length; fill them up, mask= tells what was filled"
        ) from None
    if ids.dtype.kind not in "iu":
        raise TypeError(f"ids must be ints, got dtype {ids.dtype}")
    if ids.ndim == 1:
        ids = ids[None]
    if ids.ndim != 2 or not ids.size:
        raise ValueError(f"ids must have shape (S, T), got {ids.shape}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= config.vocabulary:
        wrong = low if low < 0 else f"{high}; a tokenizer that gives it disagrees with vocab_size"
        raise ValueError(f"ids must lie in [0, {config.vocabulary - 1}], got {wrong}")
    most = config.most_tokens
    if most is not None and ids.shape[1] > most:
        raise ValueError(f"rows must have at most {most} tokens, got {ids.shape[1]}")
    return ids.astype(np.int64, copy=False)


def as_arrays(inputs: ArrayLike) -> Array:
    """Return images or spectrograms (S, ...) as an array of finite real numbers.

    Raises
    ------
    TypeError
        They are no real numbers.
    ValueError
        There is none, or one holds NaN or infinity.

    Warns
    -----
    UserWarning
        They are ints, as pixels are before they are scaled.
    """
    arrays = np.asarray(as_real(inputs, "inputs", "be real numbers"))
    if arrays.dtype.kind in "iu":
        warnings.warn(
            f"inputs are {arrays.dtype}: networks read arrays that are scaled and normalized as "
            "their preprocessor_config.json says, which is not done here",
            stacklevel=2,
        )
    if not arrays.ndim or not arrays.size:
        raise ValueError(f"inputs must hold at least one array, got shape {arrays.shape}")
    for at, one in enumerate(arrays if arrays.dtype.kind == "f" else ()):
        if not np.isfinite(one).all():
            kind = "NaN" if np.isnan(one).any() else "infinity"
            raise ValueError(f"inputs must be finite, got {kind} in row {at}")
    return arrays


def as_mask(mask: ArrayLike | None, shape: tuple[int, int]) -> Array:
    """Return a mask (S, T), all true by default.

    Raises
    ------
    ValueError
        The shape is another, or a row has no token.
    """
    if mask is None:
        return np.ones(shape, bool)
    flags = np.asarray(mask).astype(bool)
    if flags.ndim == 1:
        flags = flags[None]
    if flags.shape != shape:
        raise ValueError(f"mask must have shape {shape}, got {flags.shape}")
    if not flags.any(axis=1).all():
        raise ValueError("mask must keep at least one token of each row")
    return flags


def padded(rows: Sequence[Sequence[int]], padding: int = 0) -> tuple[Array, Array]:
    """Return ids (S, T) and mask (S, T) of rows of tokens, filled up to the longest."""
    longest = max(len(tokens) for tokens in rows)
    ids = np.full((len(rows), longest), padding, np.int64)
    mask = np.zeros(ids.shape, bool)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = True
    return ids, mask


def unpadded(ids: Array, config: Config, padding: int) -> list[Array]:
    """Return the rows of token ids (S, T) without the padding at their ends.

    That is as it is where a text may end in the token too, or only the default names it.

    Raises
    ------
    ValueError
        A row holds nothing else.
    """
    named = padding != config.padding or padding == config.source.get("pad_token_id")
    if not named or padding in config.ends:
        return list(ids)
    own = ids != padding
    empty = np.flatnonzero(~own.any(axis=1))
    if empty.size:
        raise ValueError(f"rows of ids must hold more than padding, row {empty[0]} does not")
    return [
        row[: len(row) - int(flags[::-1].argmax())] for row, flags in zip(ids, own, strict=True)
    ]


def batches(rows: Sequence[Sequence[int]], tokens: int) -> Iterator[Array]:
    """Yield places in `rows`, rows of like length together, about so many tokens a batch."""
    batch: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        if batch and len(rows[i]) * (len(batch) + 1) > tokens:
            yield np.array(batch)
            batch = []
        batch.append(i)
    if batch:
        yield np.array(batch)
