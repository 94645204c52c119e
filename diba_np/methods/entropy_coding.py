"""Entropy coders for small alphabets: canonical Huffman, and rANS for under 1 bit a symbol.

A coded stream never carries its symbol count: the caller knows it. A Huffman book is
its code lengths, a rANS book its 12-bit frequencies; both are counted as "codebook".
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from diba_np.kernels.entropy import decode_huffman, decode_rans, encode_rans
from diba_np.matrix.base import Array
from diba_np.methods.streams import pack_digits, packed_bytes, unpack_digits

LIMIT = 15  # longest Huffman code: a length fits 4 bits
PRECISION = 4096  # sum of the rANS frequencies
CODERS = ("huffman", "rans")


def entropy(symbols: ArrayLike) -> float:
    """Return the empirical entropy of integer symbols, in bits a symbol; O(N + their range)."""
    found = np.asarray(symbols).ravel()
    counts = np.bincount(found - found.min()) if found.size else np.zeros(0, np.int64)
    counts = counts[counts > 0]
    p = counts / max(int(counts.sum()), 1)
    return float(-(p * np.log2(p)).sum()) + 0.0


def at_least(symbols: ArrayLike) -> float:
    """Return bits that no coder of here goes below: quickly told, by their entropy."""
    # rANS keeps some symbols in the bits of its first state, and rounds that state at each symbol
    return 0.99 * np.size(symbols) * entropy(symbols) - 32.0


def code_lengths(counts: ArrayLike, limit: int = LIMIT) -> Array:
    """Return the optimal code lengths under `limit` bits (package-merge).

    Parameters
    ----------
    counts : (r,) array of int, >= 0
        How often each symbol occurs; a symbol that never occurs gets length 0.
    limit : int

    Returns
    -------
    (r,) uint8
        A single symbol in use gets length 1: Huffman cannot spend less.

    Notes
    -----
    O(limit r log r). L. L. Larmore, D. S. Hirschberg, J. ACM 37 (1990).
    """
    counts = np.asarray(counts)
    used = np.flatnonzero(counts)
    lengths = np.zeros(counts.size, np.uint8)
    if used.size > 2**limit:
        raise ValueError(f"limit must allow {used.size} codes, got {limit}")
    if used.size <= 1:
        lengths[used] = 1
        return lengths
    coins: list[tuple[int, tuple[int, ...]]] = sorted((int(counts[i]), (int(i),)) for i in used)
    packages: list[tuple[int, tuple[int, ...]]] = list(coins)
    for _ in range(limit - 1):
        pairs = [
            (packages[j][0] + packages[j + 1][0], packages[j][1] + packages[j + 1][1])
            for j in range(0, len(packages) - 1, 2)
        ]
        packages = sorted(coins + pairs)
    for _, members in packages[: 2 * used.size - 2]:
        for i in members:
            lengths[i] += 1
    return lengths


def _tables(lengths: Array) -> tuple[Array, Array, Array, Array]:
    """Return (order, first_code, first_index, length_count) of a canonical book."""
    lengths = np.asarray(lengths, np.int64)
    used = np.flatnonzero(lengths)
    order = used[np.lexsort((used, lengths[used]))]
    limit = int(lengths.max()) if lengths.size else 0
    length_count = np.bincount(lengths[used], minlength=limit + 1).astype(np.int64)
    first_code = np.zeros(limit + 1, np.int64)
    first_index = np.zeros(limit + 1, np.int64)
    code = 0
    for length in range(1, limit + 1):
        code = 2 * (code + (int(length_count[length - 1]) if length > 1 else 0))
        first_code[length] = code
        first_index[length] = first_index[length - 1] + (
            length_count[length - 1] if length > 1 else 0
        )
        if code + length_count[length] > 2**length:
            raise ValueError("lengths must satisfy the Kraft inequality")
    return order.astype(np.int64), first_code, first_index, length_count


def canonical_codes(lengths: Array) -> Array:
    """Return the canonical codes, (r,) int64; symbols in order of (length, value)."""
    order, first_code, first_index, _ = _tables(lengths)
    codes = np.zeros(len(lengths), np.int64)
    for position, symbol in enumerate(order):
        length = int(lengths[symbol])
        codes[symbol] = first_code[length] + position - first_index[length]
    return codes


def _frequencies(counts: Array) -> Array:
    """Scale counts to integers that sum to `PRECISION`, at least 1 where in use.

    A symbol alone leaves 1 to a neighbour: 4096 would not fit the 12 bits of the book.
    """
    counts = np.asarray(counts, np.float64)
    if np.count_nonzero(counts) == 1:
        counts = (
            counts + (np.arange(counts.size) == (int(np.argmax(counts)) + 1) % counts.size) * 1e-9
        )
    used = counts > 0
    total = counts.sum()
    exact = counts * (PRECISION / total)
    freq = np.where(used, np.maximum(np.floor(exact), 1.0), 0.0).astype(np.int64)
    while freq.sum() > PRECISION:
        candidates = np.where(freq > 1, freq - exact, -np.inf)
        freq[int(np.argmax(candidates))] -= 1
    while freq.sum() < PRECISION:
        freq[int(np.argmax(np.where(used, exact - freq, -np.inf)))] += 1
    return freq


def encode(symbols: ArrayLike, r: int, coder: str = "huffman") -> tuple[Array, Array]:
    """Code symbols of ``range(r)`` with their own book.

    Parameters
    ----------
    symbols : (count,) integer array
    r : int
        Size of the alphabet, at most 4096.
    coder : {"huffman", "rans"}

    Returns
    -------
    stream, book : uint8 arrays
        `book` has ``ceil(r / 2)`` bytes for Huffman (4-bit lengths) and
        ``ceil(3 r / 2)`` for rANS (12-bit frequencies).
        Both are empty where there is nothing to say: no symbol, or ``r = 1``.
    """
    symbols = np.ascontiguousarray(symbols, dtype=np.int64).ravel()
    empty = np.zeros(0, np.uint8)
    if symbols.size == 0 or (r == 1 and not symbols.any()):
        return empty, empty
    if symbols.min() < 0 or symbols.max() >= r:
        raise ValueError(f"symbols must lie in [0, {r}), got [{symbols.min()}, {symbols.max()}]")
    counts = np.bincount(symbols, minlength=r)
    if coder == "huffman":
        lengths = code_lengths(counts)
        codes = canonical_codes(lengths)
        length = lengths[symbols].astype(np.int64)
        end = np.cumsum(length)
        bits = np.zeros(int(end[-1]), np.uint8)
        value = codes[symbols]
        for back in range(int(lengths.max())):
            has = length > back
            bits[end[has] - 1 - back] = (value[has] >> back) & 1
        return np.packbits(bits), pack_digits(lengths, LIMIT + 1)
    if coder == "rans":
        if r > PRECISION:
            raise ValueError(f"r must be at most {PRECISION} for coder='rans', got {r}")
        freq = _frequencies(counts)
        cumulative = np.cumsum(freq) - freq
        out = np.empty(symbols.size + 2, np.uint16)
        words = encode_rans(symbols, freq, cumulative, out)
        return out[:words].astype("<u2").view(np.uint8), pack_digits(freq, PRECISION)
    raise ValueError(f"coder must be 'huffman' or 'rans', got {coder!r}")


def smallest(symbols: Array, r: int, coder: str) -> tuple[Array, Array, str]:
    """Encode with `coder`, or with whichever is shorter for "auto"; (stream, book, coder)."""
    if coder == "auto":
        return min(
            (smallest(symbols, r, one) for one in CODERS),
            key=lambda pair: pair[0].size + pair[1].size,
        )
    return (*encode(symbols, r, coder), coder)


def decode(stream: Array, book: Array, count: int, r: int, coder: str = "huffman") -> Array:
    """Return the `count` symbols that `encode` wrote, as (count,) int64.

    Raises
    ------
    ValueError
        If stream or book cannot be what `encode` writes.
    """
    if count == 0 or r == 1:
        return np.zeros(count, np.int64)
    levels = LIMIT + 1 if coder == "huffman" else PRECISION
    if book.size != packed_bytes(r, levels):
        raise ValueError(f"book must have {packed_bytes(r, levels)} bytes, got {book.size}")
    table = unpack_digits(book, r, levels)
    if coder == "huffman":
        if not table.any():
            raise ValueError("book must hold at least one code")
        _check_count(count, 1.0, stream)
        order, first_code, first_index, length_count = _tables(table)
        out = np.empty(count, np.int64)
        read = decode_huffman(
            np.ascontiguousarray(stream),
            8 * stream.size,
            first_code,
            first_index,
            length_count,
            order,
            out,
        )
        if read < 0 or -(-read // 8) != stream.size:
            raise ValueError("stream does not decode with its book")
        return out
    if coder != "rans":
        raise ValueError(f"coder must be 'huffman' or 'rans', got {coder!r}")
    if stream.size % 2:
        raise ValueError(f"stream must have an even number of bytes, got {stream.size}")
    if table.sum() != PRECISION:
        raise ValueError(f"frequencies must sum to {PRECISION}, got {table.sum()}")
    _check_count(count, float(np.log2(PRECISION / table.max())), stream)
    cumulative = np.cumsum(table) - table
    slots = np.repeat(np.arange(r, dtype=np.int64), table)
    words = np.ascontiguousarray(stream).view("<u2").astype(np.uint16)
    out = np.empty(count, np.int64)
    if decode_rans(words, table, cumulative, slots, out) != 0:
        raise ValueError("stream does not decode with its book")
    return out


def _check_count(count: int, least_bits: float, stream: Array) -> None:
    """Refuse a count that the stream cannot hold, before memory and time are spent on it."""
    if count * least_bits > 8 * stream.size + 64:
        raise ValueError(f"stream of {stream.size} bytes cannot hold {count} symbols")
