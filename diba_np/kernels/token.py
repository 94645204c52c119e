"""What a language model does with one token between its products, each step in one call.

Arrays are all float32 or all float64 and C-ordered; those that are written are given.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diba_np.kernels._jit import njit

Array = NDArray[Any]


@njit(fastmath={"reassoc", "contract", "nsz", "arcp"})
def attend_token(
    joined: Array,
    cos: Array,
    sin: Array,
    keys: Array,
    values: Array,
    first: int,
    at: int,
    heads: int,
    scores: Array,
    mixed: Array,
) -> None:
    """Turn query and key of the token at place `at`, keep key and value, write the mixed values.

    ``joined`` (heads d + 2 groups d,) holds query, key and value; cos and sin (d / 2,) turn them,
    of size 0 where nothing is turned; keys and values (groups, capacity, d); the token looks at the
    places from `first` to its own; scores (capacity,) is scratch; mixed (heads d,).
    """
    groups, _, d = keys.shape
    half = d // 2
    size = heads * d
    if cos.size:
        for h in range(heads + groups):
            for j in range(half):
                one, other = joined[h * d + j], joined[h * d + half + j]
                joined[h * d + j] = one * cos[j] - other * sin[j]
                joined[h * d + half + j] = other * cos[j] + one * sin[j]
    for g in range(groups):
        for j in range(d):
            keys[g, at, j] = joined[size + g * d + j]
            values[g, at, j] = joined[size + groups * d + g * d + j]
    unit = joined.dtype.type(1.0 / math.sqrt(d))
    shared = heads // groups
    for h in range(heads):
        g = h // shared
        query = joined[h * d : (h + 1) * d]
        out = mixed[h * d : (h + 1) * d]
        most = joined.dtype.type(-np.inf)
        for t in range(first, at + 1):
            total = joined.dtype.type(0)
            for j in range(d):
                total += query[j] * keys[g, t, j]
            scores[t] = total * unit
            most = max(most, scores[t])
        total = joined.dtype.type(0)
        for t in range(first, at + 1):
            scores[t] = math.exp(scores[t] - most)
            total += scores[t]
        for j in range(d):
            out[j] = 0
        for t in range(first, at + 1):
            share = scores[t] / total
            for j in range(d):
                out[j] += share * values[g, t, j]


@njit(fastmath={"reassoc", "contract", "nsz", "arcp"})
def gate_token(both: Array, out: Array) -> None:
    """Write ``silu(gate) value`` (n,), of gate and value joined in ``both`` (2 n,)."""
    n = out.size
    one = both.dtype.type(1)
    for i in range(n):
        gate = both[i]
        out[i] = gate / (one + math.exp(-gate)) * both[n + i]
