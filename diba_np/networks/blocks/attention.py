"""Attention: each token's mix of the values that it may look at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diba_np.kernels import softmax as kernels

Array = NDArray[Any]

_HIDDEN = -1e9  # the score of what is not looked at


def attend(
    q: Array,
    k: Array,
    v: Array,
    heads: int,
    *,
    groups: int | None = None,
    mask: Array | None = None,
    causal: bool = False,
    window: int | None = None,
) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array]]]:
    """Mix values by softmax attention, scores over the root of a head's width.

    Parameters
    ----------
    q : (S, T, heads d) array
    k, v : (S, T, groups d) array
    heads : int
    groups : int, optional
        Heads of keys and values, each of which serves ``heads / groups`` of the queries'; by
        default as many.
    mask : (S, T) bool, optional
        False for padding, which nothing looks at.
    causal : bool
        Whether a token looks at itself and those before it only.
    window : int, optional
        At how many of these, itself included.

    Returns
    -------
    (S, T, heads d) array, and the step back to the gradients of q, k and v.

    Notes
    -----
    Memory ``S heads T^2`` entries, kept for the step back.
    """
    texts, tokens, _ = q.shape
    groups = heads if groups is None else groups
    shared = heads // groups
    dtype = q.dtype

    # the heads that share keys stand below each other: (S, groups, shared T, d)
    def split(x: Array, each: int) -> Array:
        parts = x.reshape(texts, tokens, groups, each, -1).transpose(0, 2, 3, 1, 4)
        return parts.reshape(texts, groups, each * tokens, -1)

    def merge(x: Array, each: int) -> Array:
        parts = x.reshape(texts, groups, each, tokens, -1).transpose(0, 3, 1, 2, 4)
        return parts.reshape(texts, tokens, -1)

    q, k, v = split(q, shared), split(k, 1), split(v, 1)
    unit = dtype.type(1 / np.sqrt(q.shape[-1]))
    hidden = dtype.type(_HIDDEN)
    keys = np.zeros((texts, tokens), dtype)
    if mask is not None:
        keys[~mask] = hidden
    at = np.tile(np.arange(tokens), shared)
    last = at + 1 if causal else np.full_like(at, tokens)
    first = np.maximum(last - window, 0) if causal and window else np.zeros_like(at)
    p = q @ k.swapaxes(-1, -2)
    kernels.below_the_most(p, unit, keys, first, last, hidden)
    np.exp(p, out=p)
    kernels.to_unit_sum(p.reshape(-1, tokens))

    def back(gradient: Array) -> tuple[Array, Array, Array]:
        g = split(gradient, shared)
        gp = g @ v.swapaxes(-1, -2)
        kernels.softmax_back(p.reshape(-1, tokens), unit, gp.reshape(-1, tokens))
        return (
            merge(gp @ k, shared),
            merge(gp.swapaxes(-1, -2) @ q, 1),
            merge(p.swapaxes(-1, -2) @ g, 1),
        )

    return merge(p @ v, shared), back
