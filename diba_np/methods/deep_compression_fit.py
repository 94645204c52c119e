"""Entropy-coded centroids within a budget: how many of them, where, and how many entries are kept.

Under an entropy coder many levels that are rarely used cost little, and k-means, which evens out
their use, costs bits as it lowers the error: so it is looked at on its way from an even start.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from diba_np.matrix.base import Array
from diba_np.methods.entropy_coding import code_lengths
from diba_np.methods.mesa_layer import member_means

_DENSITIES = (
    *(0.01, 0.02, 0.03, 0.045, 0.06, 0.08, 0.1, 0.125, 0.15, 0.175, 0.2, 0.25, 0.3, 0.35, 0.4),
    *(0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0),
)
_GAP_BITS = (1, 2, 3, 4, 5, 6, 8)  # with one bit gaps are the pattern itself

# numbers of levels that k-means begins with; those without a member are not stored
_LEVELS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128, 192, 256)
_RANS_LEVELS = (*_LEVELS, 384, 512, 768, 1024, 1536, 2048)  # a book of rANS holds up to 4096
_TRIED = 5  # of these, from the most that fit downwards
_ROUNDS = (0, 1, 2, 5, 10, 20)  # after which k-means is looked at

_MOST_STEPS = 511  # of an even grid
_STEPS = 16  # tried of a grid that cuts off entries


class _Levels(NamedTuple):
    """Levels on the way of k-means: the edges between those in use, their means, what they cost."""

    edges: Array
    means: Array
    explained: float  # the sum of squares that the means hold
    bits: float


def coded_bits(codes: Array, r: int, rans: bool) -> float:
    """Estimate the bits of coded symbols and their book (an upper bound, near enough)."""
    counts = np.bincount(codes.ravel(), minlength=r)
    used = counts[counts > 0]
    huffman = float(np.sum(counts * code_lengths(counts).astype(float))) + 4 * r + 16
    if not rans or r > 512:
        return huffman
    return min(huffman, _rans_bits(used, r))


def _rans_bits(used: Array, r: int) -> float:
    """Estimate the bits of r symbols, of which some occur so often, by rANS, and of their book."""
    shares = np.maximum(used / used.sum(), 1.0 / 4096)
    return float(-(used * np.log2(shares)).sum()) * 1.001 + 12 * r + 64


def gap_symbols(positions: Array, gap_bits: int) -> Array:
    """Return the gaps before sorted positions as symbols of so many bits; see `DeepCompression`."""
    most = 2**gap_bits - 1
    gap = np.diff(positions, prepend=-1) - 1
    skips = gap // most
    ends = np.cumsum(skips + 1) - 1
    symbols = np.full(int(ends[-1]) + 1 if len(ends) else 0, most, np.int64)
    symbols[ends] = gap - skips * most
    return symbols


def _grid_codes(W: Array, step: Array, most: int) -> tuple[Array, Array]:
    """Code W on ``step * integers``, at most `most` of them; (codes, centroids)."""
    half = (most - 1) // 2
    codes = np.clip(np.rint(W / step), -half, half).astype(np.int64)
    low = int(codes.min())
    codes -= low
    r = int(codes.max()) + 1
    return codes, (np.arange(r) + low) * step


def choose_codes(W: Array, budget: int, rans: bool) -> Iterator[tuple[Array, Array]]:
    """Yield ``(codes, centroids)`` for all of W, least error first: an even grid, or k-means.

    The even grid is mostly the better one under an entropy coder; its step is found by bisection
    on the coded bits. With `rans` false a symbol costs at least one bit.
    """
    options = []
    low, high = np.log(1e-3), np.log(8.0)
    for _ in range(24):
        middle = 0.5 * (low + high)
        codes, centroids = _grid_codes(W, np.exp(middle), _MOST_STEPS)
        if 16 * len(centroids) + coded_bits(codes, len(centroids), rans) <= budget:
            high = middle
        else:
            low = middle
    steps = [np.exp(high + slack) for slack in (0.0, 0.01, 0.03, 0.1, 0.3)]
    # where entries are cut off a finer grid is not always better
    whole = float(np.abs(W).max()) / ((_MOST_STEPS - 1) // 2)
    if steps[0] < whole:
        steps += np.geomspace(max(steps[0], whole / 16), whole, _STEPS).tolist()
    for step in steps:
        codes, centroids = _grid_codes(W, step, _MOST_STEPS)
        centroids = np.sort(member_means(W, codes, centroids))
        options.append((float(np.sum((W - centroids[codes]) ** 2)), codes, centroids))
    total = float(np.sum(W**2))
    for levels in _on_their_way(np.sort(W, axis=None), budget, rans):
        codes = np.searchsorted(levels.edges, W, side="right")
        options.append((total - levels.explained, codes, levels.means))
    options.sort(key=lambda option: option[0])
    for _, codes, centroids in options:
        yield codes, centroids


def choose_sparse(W: Array, budget: int, rans: bool) -> Iterator[tuple[Array, Array, Array, int]]:
    """Yield ``(positions, codes, centroids, gap_bits)``, least error first.

    Parameters
    ----------
    W : (m, n) float64
    budget : int
        In bits; what is yielded meets it by an estimate.
    rans : bool
        Whether rANS may code symbols, beside Huffman's codes.

    Notes
    -----
    For each of 27 densities some hundred rounds of ``O(r log N)``, and seven ways to code gaps.
    """
    flat = W.ravel()
    sizes = np.sort(np.abs(flat))[::-1]
    total, last = float(np.sum(flat**2)), 0
    found: list[tuple[float, float, int, _Levels]] = []
    for density in _DENSITIES:
        kept = min(max(int(density * flat.size), 1), max(int(np.count_nonzero(flat)), 1))
        if kept == last:
            continue
        last, least = kept, float(sizes[kept - 1])
        positions = np.flatnonzero(np.abs(flat) >= least)
        index, gap_bits = min(
            (coded_bits(gap_symbols(positions, bits), 2**bits, rans), bits) for bits in _GAP_BITS
        )
        values = np.sort(flat[positions])
        for levels in _on_their_way(values, budget - index, rans):
            found.append((total - levels.explained, least, gap_bits, levels))
    found.sort(key=lambda one: one[0])
    for _, least, gap_bits, levels in found:
        positions = np.flatnonzero(np.abs(flat) >= least)
        codes = np.searchsorted(levels.edges, flat[positions], side="right")
        yield positions, codes, levels.means, gap_bits


def _on_their_way(values: Array, budget: float, rans: bool) -> Iterator[_Levels]:
    """Yield levels of increasing values that fit a budget, the best for each number of them."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    tried = 0
    for r in reversed(_RANS_LEVELS if rans else _LEVELS):
        best: _Levels | None = None
        centroids = np.linspace(values[0], values[-1], r)
        for done in range(_ROUNDS[-1] + 1):
            edges = 0.5 * (centroids[1:] + centroids[:-1])
            ends = np.concatenate([[0], np.searchsorted(values, edges), [values.size]])
            counts, within = np.diff(ends), np.diff(sums[ends])
            used = counts > 0
            means = np.where(used, within / np.maximum(counts, 1), centroids)
            if done in _ROUNDS:
                bits = _bits_of(counts[used], rans)
                explained = float(np.sum(within[used] * means[used]))
                if bits <= budget and (best is None or explained > best.explained):
                    # an edge between two levels in use, wherever it lies between them
                    own = edges[np.flatnonzero(used)[:-1]]
                    best = _Levels(own, means[used], explained, bits)
                if bits > 1.3 * budget and done == 0:
                    break  # by far too many levels
            centroids = np.sort(means)
        if best is not None:
            tried += 1
            yield best
            if tried == _TRIED:
                return


def _bits_of(counts: Array, rans: bool) -> float:
    """Estimate the bits of symbols that occur so often, of their book and their centroids."""
    r = counts.size
    coded = _rans_bits(counts, r) if rans else coded_bits(np.repeat(np.arange(r), counts), r, False)
    return coded + 16 * r
