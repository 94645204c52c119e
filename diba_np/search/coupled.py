"""The ADMM of `diba_np.search.relaxation` for channels that are correlated.

It minimises ``tr((A D - X1 X2^T) C^p (A D - X1 X2^T)^T)`` where ``H = D C D`` splits the Gram
matrix of the inputs into the root mean squares D of the channels and their correlations C. The half
that C does not couple regresses on ``C^p X2``, made once an iteration. The other would have to
solve ``C^p X (G + ridge) + rho X = Y + rho P``: two rotations of order n, twice. It takes the step
of a quadratic that has the same gradient where the half is: ``C^p`` is exact in its largest
directions V, ``V diag(lam) V^T + tail (1 - V V^T)``, and one number in all the others. This needs
half of the flops and, with a quarter of the directions, loses little. A Gram matrix of the outputs
does the same to the other side. The power is below 1 because the projection on signs disturbs all
directions alike, and those that are never taken would be left to chance.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from diba_np.search import relaxation as admm
from diba_np.search.exact_steps import update_d2
from diba_np.search.halves import Half, Scales, random_halves
from diba_np.search.outcome import Outcome
from diba_np.search.progress import Run
from diba_np.search.target import Target
from diba_np.search.weighted_target import ScaledTarget, WeightedTarget

Array = NDArray[np.float32]

POWER = 0.75  # of the correlations; 0.5 and 1 lose 0.1 dB on inputs not seen, 0 loses 1 dB
# share of the directions in which a half step is exact; 1/8 and all of them tie within 0.05 dB on
# drawn inputs: scripts/bench_solver.py --ranks 0.125 0.25 1 --bits 1 2 --efforts fast --only 384
RANK = 0.25
TAIL = 0.55  # least that stands for the others, over the largest of them: over 1/2 it is stable


class _Axis:
    """A side's correlations ``C^p = V diag(lam) V^T``, and what stands near them.

    Attributes
    ----------
    power : (n, n) float32
        ``C^p``.
    top, lam : (n, r) float32, (r,) float32
        Its largest eigenvalues and their vectors.
    tail : float
        What stands for all the others.
    """

    def __init__(self, coupling: NDArray[np.float64]) -> None:
        size = np.sqrt(np.diag(coupling))
        even = (coupling / np.outer(size, size)).astype(np.float32)
        values, V = scipy.linalg.eigh(even, driver="evd", overwrite_a=True)
        values = np.maximum(values, 0.0) ** POWER
        self.power = (V * values) @ V.T
        rest = len(values) - max(1, round(RANK * len(values)))
        self.top = np.ascontiguousarray(V[:, rest:])
        self.lam = values[rest:]
        others = values[:rest]
        self.tail = np.float32(max(others.mean(), TAIL * others[-1]) if rest else self.lam[0])


class _Weighed(Target):
    """``C_L^p A C_R^p`` of a plain target A; its energy is that of A under both."""

    def __init__(self, plain: ScaledTarget, left: _Axis | None, right: _Axis | None) -> None:
        A = np.empty(plain.shape, np.float32)
        for rows, part in plain.blocks(np.float32):
            A[rows] = part
        weighed = A if right is None else plain.pool.matmul(A, right.power)
        if left is not None:
            weighed = plain.pool.matmul(left.power, weighed)
        super().__init__(weighed, plain.pool)
        energy = float(np.einsum("ij,ij->", A, weighed, dtype=np.float64))
        self.energy = float(A.size) if energy > 0 else 0.0
        self.unit = float(np.sqrt(energy / A.size)) if energy > 0 else 1.0


class _Basis:
    """A half as the other regresses on it.

    Attributes
    ----------
    half : Half
    axis : _Axis or None
        Its correlations, where its rows are coupled.
    norm : (k,) float32
        What the columns of that basis were divided by: then ``N^T C^p N`` has a diagonal of ones.
    """

    def __init__(self, half: Half, axis: _Axis | None) -> None:
        self.half, self.axis = half, axis
        self.norm = half.norm

    def make_basis(self, softness: float, rounded: bool = False) -> tuple[Array, Array]:
        """Return the basis N and its Gram matrix ``N^T C^p N``."""
        half = self.half
        N = half.make_basis(softness)
        matmul = partial(half.pool.matmul, rounded=rounded)
        if self.axis is None:
            self.norm = half.norm
            return N, half.pool.gram(N, rounded)
        weighed = matmul(self.axis.power, N)
        own = np.sqrt(np.maximum(np.einsum("ij,ij->j", N, weighed), np.float32(1e-30)))
        N /= own
        weighed /= own
        half.weighed, self.norm = weighed, half.norm * own
        gram = matmul(N.T, weighed)
        return N, (gram + gram.T) / np.float32(2.0)


class CoupledSides:
    """Halves of which weights couple the rows of one or both.

    Parameters
    ----------
    plain : ScaledTarget
        The problem without the correlations.
    axes : (_Axis or None, _Axis or None)
        Of each side, where its rows are coupled.
    halves : (Half, Half)
    """

    def __init__(
        self,
        plain: ScaledTarget,
        axes: tuple[_Axis | None, _Axis | None],
        halves: tuple[Half, Half],
    ) -> None:
        self.target = _Weighed(plain, *axes)
        self.halves = halves
        self._seen = [_Basis(half, axis) for half, axis in zip(halves, axes, strict=True)]
        if axes[0] is not None:
            self._seen[0].make_basis(0.0)
            halves[0].lasting = ("X", "weighed")  # the right one's are made anew before they count

    def move(self, axis: int, schedule: admm.Schedule, balance: float) -> None:
        """Move one half."""
        own, other = self._seen[axis], self._seen[1 - axis]
        rounded = schedule.rounds(self.target, other.half.q.size)
        N, gram = other.make_basis(schedule.softness, rounded)
        gauge = other.half.gauge
        gram = admm.balanced(gram, gauge, balance)
        correlations = own.axis
        if correlations is None:
            admm.regress(self.target, own.half, N, gram, gauge, schedule, balance)
        else:
            _coupled_step(self.target, own.half, correlations, N, gram, other, schedule, balance)


def _coupled_step(
    target: Target,
    half: Half,
    axis: _Axis,
    N: Array,
    gram: Array,
    other: _Basis,
    schedule: admm.Schedule,
    balance: float,
) -> None:
    """Move a half whose rows are coupled: two regressions, each followed by a projection.

    Each minimises the objective with `_Axis`'s stand-in for ``C^p`` on the way from where it is,
    the basis of before, whose gradient is exact: ``C~ X G + rho X = Y + rho P``.
    """
    rounded = schedule.rounds(target, N.shape[1])
    matmul = partial(target.pool.matmul, rounded=rounded)
    gram[np.diag_indices_from(gram)] += np.float32(schedule.ridge)
    values, Q = scipy.linalg.eigh(gram, driver="evd")
    back = np.ascontiguousarray(Q.T)
    up = np.ascontiguousarray(axis.top.T)
    lam, tail = axis.lam[:, None], axis.tail

    # (tail - C) of where it is, times G; what that lacks of C~ - C lies in V: `lack`, rotated
    start = half.X
    start *= other.norm
    near = half.weighed * -other.norm
    near += tail * start
    ahead = matmul(near, gram)
    low = matmul(matmul(up, start), Q)
    lack = low * values * (tail - lam)
    known = _dot(start, ahead) - _dot(low, lack)
    Y = target.product(half.axis, N, rounded=rounded)
    ahead += Y  # what all points have in common
    rows = slice(0, len(half.Q))
    for rho, last in ((np.float32(schedule.penalties[0]), False), (np.float32(1.0), True)):
        S = half.point(rows, rho, ahead)
        plain = 1.0 / (tail * values + rho)
        X = matmul(S, matmul(Q * plain, back))
        rotated = matmul(matmul(up, S), Q)
        inside = (rotated - lack) / (lam * values + rho)
        rotated *= plain
        X += matmul(axis.top, matmul(inside - rotated, back))
        if last and target.energy:
            pulled = _dot(X, Y)
            stand_in = _dot(X, S) - float(rho) * _dot(X, X) + _dot(inside, lack)
            quadratic = stand_in + known - 2.0 * (_dot(X, ahead) - pulled)
            schedule.leave(1.0 - (2.0 * pulled - quadratic) / target.energy)
        half.blend(rows, X, admm.DAMPING)
        half.project(half.gauge * other.half.gauge if last and balance else None)
    half.X = X


def _dot(a: Array, b: Array) -> float:
    return float(np.vdot(a, b))


def relax_coupled(
    target: WeightedTarget,
    k: int,
    *,
    shift: float,
    rng: np.random.Generator,
    iterations: int,
    run: Run,
    held: Scales | None = None,
) -> Outcome:
    """Find signs by ADMM under the weights of a target and read them out as bits.

    Parameters
    ----------
    target : WeightedTarget
    k : int
        Intermediate dimension.
    shift, iterations, run
        As of `relaxation.iterate`.
    rng : numpy.random.Generator
        Draws the start.
    held : ((m,), (n,)) of float64, optional
        As of `relaxation.relax`.

    Returns
    -------
    Outcome
        With d2 exact for the bits found.

    Notes
    -----
    For a coupled side of n rows or columns an iteration takes ``5 n^2 k + 4 n k^2`` flops and an
    eigendecomposition of order k beside what `relax` costs, the start one of order n.
    """
    plain = target.surrogate()
    coupling = target.coupling(0), target.coupling(1)
    if held is not None:
        held = (held[0] * plain.rows, held[1] * plain.columns)
    sides: admm.Sides
    if target.is_coupled:
        left, right = (None if C is None else _Axis(C) for C in coupling)
        sides = CoupledSides(plain, (left, right), random_halves(target, k, rng, held))
    else:
        sides = admm.PlainSides(plain, random_halves(plain, k, rng, held))
    outcome = admm.iterate(
        sides, shift=shift, iterations=iterations, run=run, schedule=admm.Schedule()
    )
    del sides
    plain.restore(outcome.state, target.unit)
    update_d2(target, outcome.state)
    return outcome
