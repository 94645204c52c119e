"""The ADMM of `diba_np.search.relaxation` for channels that are correlated.

It minimises ``|(A D - X1 X2^T) C^(p/2)|`` where ``H = D C D`` splits the Gram matrix of the inputs
into the root mean squares D of the channels and their correlations C. With ``C^p = V diag(lam)
V^T`` one half regresses on ``sqrt(lam) V^T X2``; the other has to solve ``C^p X (G + ridge) + rho X
= Y + rho P``, which two orthogonal rotations, V and that of G, make diagonal. A Gram matrix of the
outputs does the same to the other side. The power is below 1 because the projection on signs
disturbs all directions alike, and those that are never taken would be left to chance.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from diba_np.search import relaxation as admm
from diba_np.search.halves import Half, Scales, random_halves
from diba_np.search.outcome import Outcome
from diba_np.search.progress import Run
from diba_np.search.state import update_d2
from diba_np.search.target import Target
from diba_np.search.weighted_target import ScaledTarget, WeightedTarget

Array = NDArray[np.float32]

POWER = 0.75  # of the correlations; 0.5 and 1 lose 0.1 dB on inputs not seen, 0 loses 1 dB


class _Axis:
    """A side's correlations ``C^p = V diag(lam) V^T``.

    Attributes
    ----------
    rotation : (n, n) float32
        V.
    lam : (n,) float32
    root : (n, n) float64
        ``V sqrt(lam)``.
    """

    def __init__(self, coupling: NDArray[np.float64]) -> None:
        size = np.sqrt(np.diag(coupling))
        values, V = scipy.linalg.eigh(coupling / np.outer(size, size), driver="evd")
        values = np.maximum(values, 0.0) ** POWER
        self.root = V * np.sqrt(values)
        self.rotation = np.ascontiguousarray(V, np.float32)
        self.lam = values.astype(np.float32)


class _Rotated(ScaledTarget):
    """A plain target whose coupled sides are multiplied by their roots."""

    def __init__(self, plain: ScaledTarget, left: _Axis | None, right: _Axis | None) -> None:
        self._left = None if left is None else np.ascontiguousarray(left.root.T)
        self._right = None if right is None else right.root
        self._made: NDArray[np.float64] | None = None
        super().__init__(plain.A, plain.workers, plain.rows, plain.columns)

    def read(self, rows: slice) -> NDArray[np.float64]:
        if self._left is None:
            return self._read_right(rows)
        if self._made is None:
            self._made = self.workers.matmul(self._left, self._read_right(slice(None)))
        return self._made[rows].copy()

    def _read_right(self, rows: slice) -> NDArray[np.float64]:
        scaled = super().read(rows)
        return scaled if self._right is None else self.workers.matmul(scaled, self._right)


class _Seen:
    """A coupled half as the other regresses on it: its basis in the rotated coordinates."""

    def __init__(self, half: Half, axis: _Axis) -> None:
        self._half = half
        self._root = np.ascontiguousarray(axis.root.T, np.float32)

    @property
    def gauge(self) -> Array:
        return self._half.gauge

    def make_basis(self, softness: float) -> Array:
        basis = self._half.workers.matmul(self._root, self._half.make_basis(softness))
        norm = np.sqrt(np.einsum("ij,ij->j", basis, basis))
        basis /= np.maximum(norm, np.float32(1e-30))
        return basis


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
        self.target = _Rotated(plain, *axes)
        self.halves = halves
        self._axes = axes
        self._seen = [
            half if axis is None else _Seen(half, axis)
            for half, axis in zip(halves, axes, strict=True)
        ]

    def move(self, axis: int, schedule: admm.Schedule, balance: float) -> None:
        """Move one half."""
        half, other, own = self.halves[axis], self._seen[1 - axis], self._axes[axis]
        if own is None:
            admm.half_step(self.target, half, other, schedule, balance)
        else:
            _coupled_half_step(self.target, half, other, own, schedule, balance)


def _coupled_half_step(
    target: Target,
    half: Half,
    other: Any,
    axis: _Axis,
    schedule: admm.Schedule,
    balance: float,
) -> None:
    """Move a half whose rows are coupled: two regressions, each followed by a projection."""
    matmul = target.workers.matmul
    N = other.make_basis(schedule.softness)
    gram = admm.balanced_gram(N, other.gauge, balance, target.workers)
    gamma, basis = (part.astype(np.float32) for part in scipy.linalg.eigh(gram, driver="evd"))
    back = np.ascontiguousarray(basis.T)
    lam = axis.lam[:, None]
    pull = matmul(target.product(half.axis, N) * np.sqrt(lam), basis)
    into = np.ascontiguousarray(axis.rotation.T)
    rows = slice(0, len(half.Q))
    ridge = np.float32(schedule.ridge)
    for rho, last in ((np.float32(schedule.penalties[0]), False), (np.float32(1.0), True)):
        R = matmul(matmul(into, half.point(rows, rho, np.zeros_like(half.Q))), basis)
        R += pull
        R /= lam * (gamma + ridge) + rho
        if last and target.energy:
            fitted = np.einsum("ij,ij->", R, 2.0 * pull - lam * gamma * R)
            share = 1.0 - float(fitted) / target.energy
            schedule.share = min(1.0, max(share, admm.LEAST_SHARE))
        half.X = matmul(axis.rotation, matmul(R, back), out=half.X)
        half.blend(rows, half.X, admm.DAMPING)
        half.project(half.gauge * other.gauge if last and balance else None)


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
        With d2 exact for the bits outcome.

    Notes
    -----
    For a coupled side of n rows or columns an iteration takes ``10 n^2 k + 8 n k^2`` flops and an
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
