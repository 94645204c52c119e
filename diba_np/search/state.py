"""`State`: a factorization while it is searched for, its two sides, and its packed form."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diba_np.arrays import RowIndex
from diba_np.matrix.diagonals import Grids, LogGrid

Floats = NDArray[np.float64]


@dataclass
class State:
    """Bits and diagonals of ``A / unit ~ D1 (B1 - shift) D2 (B2 - shift) D3``.

    Attributes
    ----------
    d1 : (m,) float64
    b1 : (m, k) uint8
    d2 : (k,) float64
    b2 : (n, k) uint8
        B2 transposed, so that the two sides are alike.
    d3 : (n,) float64
    shift : float
    grids : (LogGrid, LogGrid, LogGrid), optional
        Where d1, ``d2 * unit`` and d3 must stay, once `fit_grids` has set them.
    """

    d1: Floats
    b1: NDArray[np.uint8]
    d2: Floats
    b2: NDArray[np.uint8]
    d3: Floats
    shift: float
    grids: Grids | None = None

    def copy(self) -> State:
        arrays = {name: getattr(self, name).copy() for name in ("d1", "b1", "d2", "b2", "d3")}
        return replace(self, **arrays)

    def take(self, other: State) -> None:
        """Become what another state is."""
        self.__dict__.update(other.__dict__)

    @property
    def left(self) -> Side:
        """d1 and B1."""
        return Side(self, 0)

    @property
    def right(self) -> Side:
        """d3 and B2."""
        return Side(self, 1)

    @property
    def sides(self) -> tuple[Side, Side]:
        """Left and right."""
        return Side(self, 0), Side(self, 1)


@dataclass(frozen=True)
class Side:
    """One binary factor of a state with its scales: a view, what is written goes to the state.

    Attributes
    ----------
    state : State
    axis : int
        Of the matrix: 0 for the left side, whose rows are those of A; 1 for the right, whose rows
        are its columns.
    """

    state: State
    axis: int

    @property
    def scales(self) -> Floats:
        """d1 (m,) or d3 (n,)."""
        return self.state.d3 if self.axis else self.state.d1

    @property
    def bits(self) -> NDArray[np.uint8]:
        """B1 (m, k) or B2 transposed (n, k)."""
        return self.state.b2 if self.axis else self.state.b1

    @property
    def grid(self) -> LogGrid | None:
        """Where the scales must stay, if anywhere."""
        return None if self.state.grids is None else self.state.grids[2 * self.axis]

    @property
    def other(self) -> Side:
        """The other side of the state."""
        return Side(self.state, 1 - self.axis)

    def values(self, rows: RowIndex = slice(None)) -> Floats:
        """Return rows of ``B - shift`` in float64."""
        values: Floats = self.bits[rows].astype(np.float64)
        values -= self.state.shift
        return values

    def scaled(self, rows: RowIndex = slice(None)) -> Floats:
        """Return rows of ``D1 (B1 - shift)`` (m, k), or of ``D3 (B2 - shift)^T`` (n, k)."""
        values = self.values(rows)
        values *= self.scales[rows, None]
        return values


def pack_state(state: State) -> dict[str, Any]:
    """Return copies of what a state is, as arrays and JSON values, the bits packed."""
    grids = None if state.grids is None else [[g.bits, *g.to_pair()] for g in state.grids]
    return {
        **{name: getattr(state, name).copy() for name in ("d1", "d2", "d3")},
        **{name: np.packbits(getattr(state, name), axis=1) for name in ("b1", "b2")},
        "shift": state.shift,
        "grids": grids,
    }


def pack_loop(state: State, **at: Any) -> dict[str, Any]:
    """Return `pack_state` together with where a loop over the state stands."""
    return {**at, "state": pack_state(state)}


def unpack_state(packed: dict[str, Any]) -> State:
    """Undo `pack_state`."""
    d2 = packed["d2"]
    b1, b2 = (np.unpackbits(packed[name], axis=1, count=len(d2)) for name in ("b1", "b2"))
    grids = packed["grids"] and tuple(LogGrid.from_pair(int(g[0]), g[1:]) for g in packed["grids"])
    # copies: a search changes diagonals in place, and the journal goes on holding these
    d1, d2, d3 = (packed[name].copy() for name in ("d1", "d2", "d3"))
    return State(d1, b1, d2, b2, d3, packed["shift"], grids)


def normalise(state: State) -> None:
    """Fix the gauge: mean |d1| = mean |d3| = 1, the rest moves into d2; zero sides are left."""
    for side in state.sides:
        mean = float(np.abs(side.scales).mean())
        if mean > 0:
            np.divide(side.scales, mean, out=side.scales)
            state.d2 = state.d2 * mean


def in_unit(state: State, unit: float, other: float) -> State:
    """Return a state of a target of one unit as one of the same matrix in another."""
    return state if unit == other else replace(state, d2=state.d2 * (unit / other))
