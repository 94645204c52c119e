"""Between `State` and `DiBAFactors`: one as the other, diagonals rounded to what is stored."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from diba_np.matrix.diagonals import SINGLE, ScaleBits, Widths, half_scale, half_shift, round_half
from diba_np.matrix.factors import DiBAFactors
from diba_np.matrix.packed_bits import PackedBits
from diba_np.search.exact_steps import fit_grids, update_d2
from diba_np.search.state import State, normalise
from diba_np.search.target import Target


def state_of(factors: DiBAFactors, unit: float, widths: Widths | None) -> State:
    """Return the state that a factorization stands for, on its grids if they have these widths."""
    return State(
        d1=factors.d1.astype(np.float64),
        b1=factors.b1.to_dense(),
        d2=factors.d2.astype(np.float64) / unit,
        b2=factors.b2.T.to_dense(),
        d3=factors.d3.astype(np.float64),
        shift=factors.shift,
        grids=factors.grids if factors.scale_bits == widths else None,
    )


def round_diagonals(
    target: Target,
    state: State,
    scale_bits: ScaleBits,
    columns: NDArray[np.float64] | float = 1.0,
) -> None:
    """Round the diagonals to what a file holds; d2 is solved again for the rounded d1 and d3.

    Components that are switched off, of a zero in d2, stay so.

    Parameters
    ----------
    target : Target
    state : State
        Its diagonals are replaced.
    scale_bits : int or tuple of int
    columns : (n,) float64, optional
        16 bits: what d3 is multiplied with in the target; the file holds it without.
    """
    lit = np.flatnonzero(state.d2)
    on = lit if 0 < len(lit) < len(state.d2) else None
    if isinstance(scale_bits, tuple):
        if state.grids is None:
            fit_grids(target, state, scale_bits, on)
        return
    normalise(state)
    if scale_bits == SINGLE:
        state.d1 = state.d1.astype(np.float32).astype(np.float64)
        state.d3 = state.d3.astype(np.float32).astype(np.float64)
        update_d2(target, state, on)
        state.d2 = (state.d2 * target.unit).astype(np.float32).astype(np.float64) / target.unit
        return
    up1, up3 = 2.0 ** half_shift(state.d1), 2.0 ** half_shift(state.d3 / columns)
    state.d1 = round_half(state.d1 * up1).astype(np.float64)
    state.d3 = round_half(state.d3 * up3 / columns).astype(np.float64) * columns
    state.d2 = state.d2 / (up1 * up3)
    update_d2(target, state, on)
    d2 = state.d2 * target.unit
    state.d2 = round_half(d2, half_scale(d2)).astype(np.float64) / target.unit


def sum_of(states: list[State], unit: float, record: dict[str, Any]) -> DiBAFactors:
    """Return the sum of terms in the same unit; of one state what `factors_of` returns."""
    if len(states) == 1:
        return factors_of(states[0], unit, record)
    return DiBAFactors.from_terms([factors_of(s, unit, {}) for s in states], record)


def factors_of(state: State, unit: float, record: dict[str, Any]) -> DiBAFactors:
    """Return the factorization of ``A = unit * target`` that a rounded state stands for."""
    return DiBAFactors(
        state.d1,
        PackedBits(state.b1),
        state.d2 * unit,
        PackedBits(np.ascontiguousarray(state.b2.T)),
        state.d3,
        state.shift,
        record,
        grids=state.grids,
    )
