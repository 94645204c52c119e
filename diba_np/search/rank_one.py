"""The rank-one fit, which the format holds exactly: constant, single-row and rank-one matrices.

It is that of least error as the target weighs it: where inputs are correlated and most of their
energy lies in one direction, what the matrix makes of that direction.
"""

from __future__ import annotations

import numpy as np

from diba_np.search.state import State
from diba_np.search.target import Target

_POWER_STEPS = 30

EXACT_DB = 130.0  # a fit this good is exact to the rounding of the matrix's own floats


def rank_one(target: Target, shift: float) -> State:
    """Put the leading pair of vectors into d1, d3 and one component of equal bits: k is 1.

    Costs 60 products with a vector, and with the weights as many more.
    """
    m, n = target.shape
    # the row of largest norm is never orthogonal to everything that A maps
    norms = np.empty(m)
    for rows, part in target.blocks(np.float64):
        norms[rows] = np.einsum("ij,ij->i", part, part)
    pick = int(norms.argmax())
    basis = np.zeros((m, 1))
    basis[pick] = 1.0
    v = target.rmatmul(basis)
    for _ in range(_POWER_STEPS):
        v /= max(float(np.linalg.norm(v)), 1e-300)
        weighed = target.weigh_columns(v)
        u = target.matmul(weighed)
        if weighed is not v:
            u /= float(np.vdot(v, weighed)) or 1.0
        weighed = target.weigh_rows(u)
        v = target.rmatmul(weighed)
        energy = float(np.vdot(u, weighed))
        if energy == 0:
            break
        v /= energy
    bit = np.uint8(shift <= 0.5)
    b1, b2 = np.full((m, 1), bit), np.full((n, 1), bit)
    d2 = np.full(1, 1.0 / (float(bit) - shift) ** 2)
    return State(u[:, 0], b1, d2, b2, v[:, 0], shift)


def widened(state: State, k: int) -> State:
    """Return a state of one component with k, the others alike but switched off: d2 is zero.

    Nothing of it is shared: diagonals are rounded in place, and another k begins with the same fit.
    """
    d2 = np.zeros(k)
    d2[0] = state.d2[0]
    b1, b2 = (np.repeat(bits, k, axis=1) for bits in (state.b1, state.b2))
    return State(state.d1.copy(), b1, d2, b2, state.d3.copy(), state.shift)
