"""`State`: a factorization while it is searched for, and the exact steps that improve it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diba_np.search.target import Target

Floats = NDArray[np.float64]

# a flip must lower a row's error by more than this share of the row's mean energy
_SLACK = 1e-12

# relative to the mean diagonal of the system for d2: keeps components that nearly cancel from
# taking huge scales, which rounding to 16 bits would turn into error
_RIDGE = 1e-7


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
    """

    d1: Floats
    b1: NDArray[np.uint8]
    d2: Floats
    b2: NDArray[np.uint8]
    d3: Floats
    shift: float

    def copy(self) -> State:
        arrays = {name: getattr(self, name).copy() for name in ("d1", "b1", "d2", "b2", "d3")}
        return replace(self, **arrays)

    def side(self, left: bool) -> tuple[Floats, NDArray[np.uint8]]:
        """Return (scales, bits) of one side: (d1, b1) or (d3, b2)."""
        return (self.d1, self.b1) if left else (self.d3, self.b2)

    def scaled(self, left: bool) -> Floats:
        """Return ``D1 (B1 - shift)`` (m, k), or ``D3 (B2 - shift)^T`` (n, k)."""
        scales, bits = self.side(left)
        return (bits - self.shift) * scales[:, None]


def normal_equations(target: Target, state: State, left: bool) -> tuple[Floats, Floats]:
    """Return ``G = M M^T`` (k, k) and ``C = A M^T`` of the rows of one side, in float64.

    M is everything on the other side of that side's bits: D2 (B2 - shift) D3 for the left.
    Cost: ``2 m n k + 2 k^2 n`` flops.
    """
    other = state.scaled(not left) * state.d2
    product = target.matmul if left else target.rmatmul
    return target.workers.gram(other), product(other)


def sweep(
    target: Target,
    state: State,
    left: bool,
    kernels: tuple[Any, Any],
    passes: int,
    *extra: Any,
    equations: tuple[Floats, Floats] | None = None,
) -> int:
    """Run a flip kernel over the rows of one side; return the number of flips.

    `kernels` is a (serial, parallel) pair of `diba_np.kernels.flips`. Kernels that move the scale
    write it into the state. `equations` are the side's `normal_equations`, where they are at hand.
    """
    scales, bits = state.side(left)
    gram, cross = equations or normal_equations(target, state, left)
    h = target.workers.matmul(bits - state.shift, gram)
    slack = np.full(len(bits), _SLACK * target.energy / len(bits))
    flips = np.zeros(len(bits), np.int64)
    kernel = kernels[0] if target.workers.threads == 1 else kernels[1]
    kernel(bits, h, gram, cross, scales, slack, passes, flips, *extra)
    return int(flips.sum())


def update_row_scales(
    target: Target, state: State, left: bool, equations: tuple[Floats, Floats] | None = None
) -> None:
    """Set d1 (or d3) to its least-squares value, row by row; kept where the row is empty."""
    scales, bits = state.side(left)
    gram, cross = equations or normal_equations(target, state, left)
    values = bits - state.shift
    p = np.einsum("ik,ik->i", values, cross)
    q = np.einsum("ik,ik->i", values, target.workers.matmul(values, gram))
    np.divide(p, q, out=scales, where=q > 1e-12 * np.diag(gram).max(initial=0.0))


def update_d2(target: Target, state: State) -> float:
    """Set d2 to its least-squares value; return the squared error, in units of the target.

    ``((U^T U) * (V V^T)) d2 = diag(U^T A V^T)`` with U = D1 (B1 - shift), V = (B2 - shift) D3.
    The old d2 stays if rounding makes the new one worse. Cost: ``2 m n k`` flops and a (k, k)
    solve.
    """
    U, V = state.scaled(True), state.scaled(False)
    normal = target.workers.gram(U) * target.workers.gram(V)
    right = np.einsum("ik,ik->k", U, target.matmul(V))

    def error(d2: Floats) -> float:
        return float(target.energy - 2.0 * (d2 @ right) + d2 @ (normal @ d2))

    ridge = _RIDGE * max(float(np.trace(normal)) / len(normal), np.finfo(np.float64).tiny)
    solved = np.linalg.solve(normal + ridge * np.eye(len(normal)), right)
    before, after = error(state.d2), error(solved)
    if np.isfinite(after) and after <= before:
        state.d2 = solved
        return max(after, 0.0)
    return max(before, 0.0)


def squared_error(target: Target, state: State) -> float:
    """Return ``|A / unit - D1 B1 D2 B2 D3|_F^2`` from the residual itself, block by block."""
    right = np.ascontiguousarray((state.scaled(False) * state.d2).T)
    left = state.scaled(True)
    total = 0.0
    for rows, part in target.blocks(np.float64):
        residual = part - target.workers.matmul(left[rows], right)
        total += float(np.vdot(residual, residual))
    return total


def normalise(state: State) -> None:
    """Fix the gauge: mean |d1| = mean |d3| = 1, the rest moves into d2; zero sides are left."""
    for left in (True, False):
        scales, _ = state.side(left)
        mean = float(np.abs(scales).mean())
        if mean > 0:
            np.divide(scales, mean, out=scales)
            state.d2 = state.d2 * mean
