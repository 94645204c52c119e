"""What products of several terms share: each term's inputs, and room for what lies between.

A sum of T terms ``D1_t (B1_t - shift) D2_t (B2_t - shift) D3_t`` is handed to a kernel as ``d3``
(T, n), ``d2`` (k,) and ``d1`` (T, m) with k the sum of all k_t, the tiles of all B2_t one after the
other (their rows are whole tiles of each term), those of all B1_t likewise but flat, (units, 16),
for their rows are of unequal length, and ``starts`` (T + 1, 4) int64: where each term begins in d2,
in the tiles of the first stage, in those of the second, and in the vector between the stages, whose
terms are whole units.

Compiled into the kernels of other files, which carry a digest of this one, as of ``_ir.py``.
"""

from __future__ import annotations

import numpy as np

from diba_np.kernels._jit import njit


@njit(fastmath=False)
def term_inputs(x, d3, n_units):
    """Return ``d3_t * x`` of each term followed by zeros, (T, 15 n_units)."""
    out = np.empty((d3.shape[0], 15 * n_units), dtype=x.dtype)
    for t in range(d3.shape[0]):
        row, scale = out[t], d3[t]
        for j in range(x.size):
            row[j] = scale[j] * x[j]
        row[x.size :] = 0
    return out


@njit(fastmath=False)
def term_inner(starts, dtype):
    """Return the vector between the stages, zero behind each term's entries, to be filled."""
    n_terms = starts.shape[0] - 1
    out = np.empty(starts[n_terms, 3], dtype=dtype)
    for t in range(n_terms):
        out[starts[t, 3] + starts[t + 1, 0] - starts[t, 0] : starts[t + 1, 3]] = 0
    return out


@njit(fastmath=False)
def first_tiles(tiles2, starts, t):
    """Return the tiles of B2_t."""
    return tiles2[starts[t, 1] : starts[t + 1, 1]]


@njit(fastmath=False)
def second_tiles(tiles1, starts, t):
    """Return the tiles of B1_t as (tiles, units, 16)."""
    n_units = (starts[t + 1, 3] - starts[t, 3]) // 15
    flat = tiles1[starts[t, 2] : starts[t + 1, 2]]
    return flat.reshape(flat.shape[0] // n_units, n_units, 16)
