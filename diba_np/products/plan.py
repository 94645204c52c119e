"""Plans: what the kernels of stacks read of several chains with one input; see ``kernels/_stack``.

Everything that does not depend on x is laid out once: addresses of tiles, diagonals from a cache
line on, places in a room for what lies between the stages. A call then hands over six arrays and
allocates nothing, which for a small matrix is a third of the time. Plans take turns with the rooms:
a network's layers, called one after another, find theirs in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diba_np.kernels import _stack, stack_neon, stack_simd
from diba_np.kernels._stages import BLOCK_UNITS

Tiles = NDArray[np.uint32]
Vector = NDArray[np.float32]

KERNELS: dict[str, Any] = {
    "avx2": stack_simd.stack_avx2,
    "avx512": stack_simd.stack_avx512,
    "neon": stack_neon.stack_neon,
}

# rooms that no call is using, and the size (16 MiB) from which on none is kept
_rooms: list[Vector] = []
_MOST_KEPT = 1 << 22

Turn = tuple[Vector, Vector]  # signs (n,) and odd factor (q, q) of a rotation


class Filter(NamedTuple):
    """What a linear trellis has in place of a second stage; see ``methods/linear_trellis.py``.

    Attributes
    ----------
    taps : (V, width)
        Of V weights a step.
    scales : (V, steps)
        Of the rows.
    few : ((c,) int, (c, m)) or None
        Columns that are decoded: their places and weights.
    turn_in, turn_out : (signs, factor) or None
        Rotations of the inputs, with the transpose of the factor, and back of the outputs.
    """

    taps: NDArray[Any]
    scales: NDArray[Any]
    few: tuple[NDArray[Any], NDArray[Any]] | None = None
    turn_in: Turn | None = None
    turn_out: Turn | None = None


class Chain(NamedTuple):
    """One chain ``D_out (B1 - shift) D_mid (B2 - shift) D_in`` of a plan.

    Neighbours with the same `start` are terms of one matrix: their results are added.
    """

    tiles2: Tiles
    tiles1: Tiles
    d_in: ArrayLike
    d_mid: ArrayLike
    d_out: ArrayLike
    shift: float
    start: int  # the first row of the result
    bias: ArrayLike | None = None  # (m,), of the first term
    filter: Filter | None = None  # then `tiles1` has no units


class Plan:
    """Several chains with one input, ready for a kernel.

    Parameters
    ----------
    chains : sequence of Chain
        At least one; those of one matrix follow each other.

    Attributes
    ----------
    table : (chains, ``_stack.COLUMNS``) int64
    constants : (size,) float32
    """

    def __init__(self, chains: Sequence[Chain]) -> None:
        self._tiles = [(chain.tiles2, chain.tiles1) for chain in chains]  # their addresses stay
        self._starts: dict[bytes, int] = {}  # of the constants, by their bytes
        self._turned: dict[tuple[str, int], int] = {}  # (side, rotation) -> room for its result
        self._size = self._room_size = 0
        self.table = np.zeros((len(chains), _stack.COLUMNS), np.int64)
        starts = [chain.start for chain in chains]
        for i, (row, chain) in enumerate(zip(self.table, chains, strict=True)):
            self._set_chain(row, chain)
            row[_stack.ADDS] = i > 0 and starts[i - 1] == chain.start
            row[_stack.N_TERMS] = starts.count(chain.start)
            self._set_filter(row, chain.filter)
        self._set_room()
        self.constants = _aligned(self._size)
        for values, start in self._starts.items():
            vector = np.frombuffer(values, np.float32)
            self.constants[start : start + vector.size] = vector
        self._starts.clear()

    def _set_chain(self, row: NDArray[np.int64], chain: Chain) -> None:
        """Write what a row says of its chain alone."""
        row[_stack.TILES_1] = chain.tiles2.ctypes.data
        row[_stack.N_TILES_1], row[_stack.N_UNITS_1] = chain.tiles2.shape[:2]
        row[_stack.TILES_2] = chain.tiles1.ctypes.data
        row[_stack.N_TILES_2], row[_stack.N_UNITS_2] = chain.tiles1.shape[:2]
        row[_stack.D3] = self._constant(chain.d_in)
        row[_stack.D2] = self._constant(chain.d_mid)
        row[_stack.D1] = self._constant(chain.d_out)
        row[_stack.SHIFT] = self._constant(chain.shift)
        row[_stack.BIAS] = -1 if chain.bias is None else self._constant(chain.bias)
        row[_stack.K], row[_stack.ROWS] = np.size(chain.d_mid), np.size(chain.d_out)
        row[_stack.OUT] = chain.start

    def _set_filter(self, row: NDArray[np.int64], given: Filter | None) -> None:
        """Write what a row says of the filter that its chain has, or has not."""
        row[[_stack.TAPS, _stack.TURN_IN, _stack.TURN_OUT]] = -1
        if given is None:
            return
        row[_stack.TAPS] = self._constant(given.taps)
        row[_stack.SCALES] = self._constant(given.scales)
        row[_stack.N_WEIGHTS], row[_stack.N_TAPS] = given.taps.shape
        row[_stack.STEPS] = given.scales.shape[1]
        if given.few is not None:
            places, weights = given.few  # places are below 2^24, and so exact in float32
            row[_stack.FEW] = len(places)
            row[_stack.FEW_PLACES] = self._constant(places)
            row[_stack.FEW_WEIGHTS] = self._constant(weights)
            row[_stack.FEW_INPUTS] = self._room(len(places))
        if given.turn_in is not None:
            columns = _stack.TURN_IN, _stack.ODD_IN, _stack.TURNED_IN
            row[[*columns]] = self._turn(given.turn_in, "in")
        if given.turn_out is not None:
            columns = _stack.TURN_OUT, _stack.ODD_OUT, _stack.TURNED_OUT
            row[[*columns]] = self._turn(given.turn_out, "out")

    def _turn(self, turn: Turn, side: str) -> tuple[int, int, int]:
        """Return what a row says of a rotation; equal ones of x are done once, in one place."""
        signs, factor = turn
        start = self._constant(np.concatenate([signs.ravel(), factor.ravel()]))
        if (side, start) not in self._turned:
            self._turned[side, start] = self._room(2 * signs.size)
        return start, len(factor), self._turned[side, start]

    def _set_room(self) -> None:
        """Give what the kernels write its places in the room."""
        table = self.table
        table[:, _stack.INPUTS] = self._room(15 * int(table[0, _stack.N_UNITS_1]))
        units = int(table[:, [_stack.N_UNITS_1, _stack.N_UNITS_2]].max())
        table[:, _stack.TABLES] = self._room(min(units, BLOCK_UNITS) * _stack.UNIT_FLOATS)
        table[:, _stack.TOTALS] = self._room(len(table))
        for row in table:
            row[_stack.SUMS_1] = self._room(32 * int(row[_stack.N_TILES_1]))
            # as many as the second stage reads, or the first one writes
            size = max(15 * int(row[_stack.N_UNITS_2]), int(row[_stack.K]))
            row[_stack.INNER] = self._room(size)
            row[_stack.SUMS_2] = self._room(32 * int(row[_stack.N_TILES_2]))

    def _room(self, size: int) -> int:
        """Return where a part of so many float32 begins in the room."""
        start = self._room_size
        self._room_size += _whole_lines(size)
        return start

    def _constant(self, values: ArrayLike) -> int:
        """Return where some values begin, flat; equal ones lie there once."""
        vector = np.asarray(values, np.float32).ravel()
        key = vector.tobytes()
        if key not in self._starts:
            self._starts[key] = self._size
            self._size += _whole_lines(vector.size)
        return self._starts[key]

    @property
    def nbytes(self) -> int:
        """Bytes of the constants and the table; not those of the tiles, nor of the rooms."""
        return self.table.nbytes + self.constants.nbytes

    def run(self, kernel: Any, x: Vector, added: Vector, out: Vector) -> float:
        """Write the products with x; return a number that is finite only if all sums are."""
        try:
            room = _rooms.pop()
        except IndexError:  # the first call, or one beside another
            room = _aligned(self._room_size)
        if room.size < self._room_size:
            room = _aligned(self._room_size)
        total: float = kernel(x, self.table, self.constants, room, added, out)
        if room.size < _MOST_KEPT:
            _rooms.append(room)
        return total


def _aligned(size: int) -> Vector:
    """Return so many zeros from a cache line on."""
    memory = np.zeros(size + _stack.LANES, np.float32)
    skip = -memory.ctypes.data % 64 // 4
    return memory[skip : skip + size]


def _whole_lines(size: int) -> int:
    """Return how many float32 the cache lines hold that so many need."""
    return -(-size // _stack.LANES) * _stack.LANES
