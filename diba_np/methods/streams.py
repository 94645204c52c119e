"""Dense bit streams: fixed-width codes, base-L digits, and sets by their rank.

Everything here turns integers into bytes and back without loss; bits run least
significant first. No layout keeps a padding that its reader does not need.
"""

from __future__ import annotations

from bisect import bisect_right
from math import comb

import numpy as np
from numpy.typing import ArrayLike

from diba_np.matrix.base import Array

MOST_LEVELS = 1 << 16


def _is_power_of_two(levels: int) -> bool:
    return levels & (levels - 1) == 0


def _digits_per_word(levels: int) -> int:
    """How many base-`levels` digits fit 64 bits."""
    digits = 0
    while levels ** (digits + 1) <= 2**64:
        digits += 1
    return digits


def packed_bytes(count: int, levels: int) -> int:
    """Bytes that `pack_digits` needs for `count` codes in ``[0, levels)``.

    A power of two costs log2(levels) bits a code. Any other number of levels is written
    in 64-bit words of base-`levels` digits (3 levels: 1.6 bits a code).

    Raises
    ------
    ValueError
        Either is out of range: the numbers may come from a damaged file.
    """
    if count < 0 or not 1 <= levels <= MOST_LEVELS:
        raise ValueError(
            f"codes must be 0 or more of 1 to {MOST_LEVELS} levels, got {count} of {levels}"
        )
    if levels == 1:
        return 0
    if _is_power_of_two(levels):
        return -(-count * (levels.bit_length() - 1) // 8)
    digits = _digits_per_word(levels)
    words, rest = divmod(count, digits)
    return int(8 * words + -(-(levels**rest - 1).bit_length() // 8))


def pack_digits(codes: ArrayLike, levels: int) -> Array:
    """Pack integers in ``[0, levels)`` into a uint8 stream of base-`levels` digits.

    Parameters
    ----------
    codes : (count,) integer array
    levels : int
        From 1 (no bits at all) to `MOST_LEVELS`.

    Returns
    -------
    (packed_bytes(count, levels),) uint8
    """
    codes = np.asarray(codes).ravel()
    if codes.size and (int(codes.min()) < 0 or int(codes.max()) >= levels):
        raise ValueError(f"codes must lie in [0, {levels}), got [{codes.min()}, {codes.max()}]")
    if levels == 1:
        return np.zeros(0, np.uint8)
    if _is_power_of_two(levels):
        width = levels.bit_length() - 1
        raw = codes.astype("<u2").view(np.uint8).reshape(-1, 2)
        bits = np.unpackbits(raw, axis=1, bitorder="little")[:, :width]
        return np.packbits(bits.ravel(), bitorder="little")
    digits = _digits_per_word(levels)
    padded = np.zeros(-(-codes.size // digits) * digits, np.uint64)
    padded[: codes.size] = codes
    words = np.zeros(padded.size // digits, np.uint64)
    for column in padded.reshape(-1, digits).T[::-1]:
        words = words * np.uint64(levels) + column
    return words.astype("<u8").view(np.uint8)[: packed_bytes(codes.size, levels)].copy()


def unpack_digits(stream: Array, count: int, levels: int) -> Array:
    """Return the `count` codes that `pack_digits` wrote, as (count,) int64."""
    if stream.size != packed_bytes(count, levels):
        raise ValueError(f"stream must have {packed_bytes(count, levels)} bytes, got {stream.size}")
    if levels == 1:
        return np.zeros(count, np.int64)
    if _is_power_of_two(levels):
        width = levels.bit_length() - 1
        bits = np.unpackbits(stream, count=count * width, bitorder="little").reshape(count, width)
        codes = np.zeros(count, np.int64)
        for j in range(width):
            codes |= bits[:, j].astype(np.int64) << j
        return codes
    digits = _digits_per_word(levels)
    raw = np.zeros(-(-count // digits) * 8, np.uint8)
    raw[: stream.size] = stream
    words = raw.view("<u8").astype(np.uint64)
    codes = np.empty((words.size, digits), np.int64)
    for j in range(digits):
        words, digit = np.divmod(words, np.uint64(levels))
        codes[:, j] = digit.astype(np.int64)
    return codes.ravel()[:count]


BLOCK = 32  # sets whose ranks are written as one number


def _rank_bits(total: int, count: int) -> int:
    """Bits of `count` digits of base `total` written as one number."""
    return int((total**count - 1).bit_length())


def sets_bytes(count: int, r: int, s: int) -> int:
    """Bytes that `pack_sets` needs: close to ``count log2 C(r, s) / 8``."""
    total = comb(r, s)
    blocks, rest = divmod(count, BLOCK)
    return -(-(blocks * _rank_bits(total, BLOCK) + _rank_bits(total, rest)) // 8)


def _join(numbers: list[int], widths: list[int]) -> Array:
    """Write integers of the given bit widths one behind the other."""
    value = offset = 0
    pieces = []
    for number, width in zip(numbers, widths, strict=True):
        value |= number << offset
        offset += width
        whole = offset // 8
        if whole > 4096:
            pieces.append((value & ((1 << 8 * whole) - 1)).to_bytes(whole, "little"))
            value >>= 8 * whole
            offset -= 8 * whole
    pieces.append(value.to_bytes(-(-offset // 8), "little"))
    return np.frombuffer(b"".join(pieces), np.uint8).copy()


def pack_sets(sets: Array, r: int) -> Array:
    """Write s-subsets of ``range(r)`` by their rank (enumerative coding).

    Parameters
    ----------
    sets : (count, s) integer array
        Each row strictly increasing.
    r : int

    Returns
    -------
    (sets_bytes(count, r, s),) uint8

    Notes
    -----
    Combinatorial number system, rank = sum_i C(c_i, i + 1); the ranks of 32 sets are the
    digits of one number, so that no bits are lost to rounding up. Python integers,
    O(count s).
    """
    count, s = sets.shape
    total = comb(r, s)
    ranks = np.zeros(count, object)
    for i in range(s):
        ranks += np.array([comb(c, i + 1) for c in range(r)], object)[sets[:, i]]
    numbers, widths = [], []
    for start in range(0, count, BLOCK):
        number = 0
        block = ranks[start : start + BLOCK].tolist()
        for rank in reversed(block):
            number = number * total + rank
        numbers.append(number)
        widths.append(_rank_bits(total, len(block)))
    return _join(numbers, widths)


def unpack_sets(stream: Array, count: int, r: int, s: int) -> Array:
    """Return the (count, s) int64 sets that `pack_sets` wrote, rows increasing."""
    need = sets_bytes(count, r, s)
    if stream.size != need:
        raise ValueError(f"stream must have {need} bytes, got {stream.size}")
    total = comb(r, s)
    table = [[comb(c, i + 1) for c in range(r)] for i in range(s)]
    data = stream.tobytes()
    sets = np.empty((count, s), np.int64)
    offset = 0
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        width = _rank_bits(total, size)
        first, last = offset // 8, -(-(offset + width) // 8)
        number = (int.from_bytes(data[first:last], "little") >> (offset % 8)) & ((1 << width) - 1)
        offset += width
        if number >= total**size:
            raise ValueError(f"ranks of the sets from {start} on are out of range")
        for row in range(start, start + size):
            number, rank = divmod(number, total)
            high = r
            for i in range(s - 1, -1, -1):
                # the largest c < high with C(c, i + 1) <= rank
                low = bisect_right(table[i], rank, 0, high) - 1
                sets[row, i] = low
                rank -= table[i][low]
                high = low
    return sets
