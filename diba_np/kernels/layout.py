"""Packed 0/1 matrices rearranged into tiles: the layout that every product kernel reads.

``tiles`` is ``(n_tiles, n_units, 16)`` uint32. Tile t covers rows ``32 t ... 32 t + 31``, unit u
covers columns ``15 u ... 15 u + 14``. Lane l holds 15 bits of row ``32 t + l`` in its low half and
15 bits of row ``32 t + 16 + l`` in its high half, the lowest column in the lowest bit; bits 15 and
31 and everything outside the matrix are zero. 15 = 3 x 5 = 5 x 3 = 8 + 7: one layout serves 5-bit
register tables, 3-bit register tables and byte tables, and a 512-bit register of it is 32 rows of
16-bit lanes. It takes 16/15 of the packed bits.
"""

from __future__ import annotations

import numpy as np

from diba_np.kernels._jit import njit

TILE_ROWS = 32
UNIT_COLUMNS = 15


def empty_tiles(n_rows, n_columns):
    """Return zeroed tiles for a matrix of this shape, starting on a cache line."""
    shape = (-(-n_rows // TILE_ROWS), -(-n_columns // UNIT_COLUMNS), 16)
    size = shape[0] * shape[1] * 16
    raw = np.zeros(size + 16, dtype=np.uint32)
    start = (-raw.ctypes.data // 4) % 16
    return raw[start : start + size].reshape(shape)


@njit(fastmath=False)
def tile_rows(words, tiles):
    """Write the tiles of a packed matrix.

    Parameters
    ----------
    words : (n_rows, n_words) uint64, C-order
        Bit j of row i at ``words[i, j // 64] >> (j % 64) & 1``; bits past the end are zero.
    tiles : (n_tiles, n_units, 16) uint32, C-order, zeroed by the caller, written

    Notes
    -----
    Time O(n_rows n_columns / 15). naive: ``tests/naive.py::tile_rows``.
    """
    n_rows, n_words = words.shape
    n_units = tiles.shape[1]
    for i in range(n_rows):
        tile = i // 32
        lane = i % 16
        half = np.uint64(i % 32 // 16 * 16)
        for u in range(n_units):
            j = 15 * u
            word = j // 64
            shift = np.uint64(j % 64)
            bits = words[i, word] >> shift
            if j % 64 > 49 and word + 1 < n_words:
                bits |= words[i, word + 1] << (np.uint64(64) - shift)
            tiles[tile, u, lane] |= np.uint32((bits & np.uint64(0x7FFF)) << half)


@njit(fastmath=False)
def tile_columns(words, tiles):
    """Write the tiles of the transpose of a packed matrix.

    Parameters
    ----------
    words : (n_rows, n_words) uint64, C-order
        As in `tile_rows`; its columns become the rows of `tiles`.
    tiles : (ceil(n_columns / 32), ceil(n_rows / 15), 16) uint32, C-order, zeroed, written

    Notes
    -----
    Time O(n_rows n_columns / 8), vectorized. naive: ``tests/naive.py::tile_columns``.
    """
    n_rows = words.shape[0]
    for tile in range(tiles.shape[0]):
        word = tile // 2
        half = np.uint64(tile % 2 * 32)
        for u in range(tiles.shape[1]):
            for b in range(min(15, n_rows - 15 * u)):
                # 32 columns of one row: bit l and bit l + 16 go to lane l
                row = np.uint32((words[15 * u + b, word] >> half) & np.uint64(0xFFFFFFFF))
                for lane in range(16):
                    low = (row >> np.uint32(lane)) & np.uint32(0x10001)
                    tiles[tile, u, lane] |= low << np.uint32(b)
