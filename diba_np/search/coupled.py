"""The ADMM of `diba_np.search.relaxation` for inputs whose channels are correlated.

It minimises ``|(A D - X1 X2^T) C^(p/2)|`` where ``H = D C D`` splits the Gram matrix into the root
mean squares D of the channels and their correlations C. With ``C^p = V diag(lam) V^T`` one half
regresses on ``V^T X2``; the other has to solve ``C^p X (G + ridge) + rho X = Y + rho P``, which two
orthogonal rotations, V and that of G, make diagonal. The power is below 1 because the projection on
signs disturbs all directions alike, and those that inputs never take would be left to chance.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from diba_np.search import relaxation as admm
from diba_np.search.activations import ScaledTarget, WeightedTarget
from diba_np.search.monitor import Monitor
from diba_np.search.state import State, update_d2
from diba_np.search.target import Target

Array = NDArray[np.float32]

POWER = 0.75  # of the correlations; 0.5 and 1 lose 0.1 dB on inputs not seen, 0 loses 1 dB


class _Rotated(ScaledTarget):
    """``sqrt(W) A D V sqrt(lam)``: a plain target for the half that is independent."""

    def __init__(self, plain: ScaledTarget, root: NDArray[np.float64]) -> None:
        self._root = root
        super().__init__(plain.A, plain.workers, plain.rows, plain.columns)

    def read(self, rows: slice) -> NDArray[np.float64]:
        return super().read(rows) @ self._root


class _Seen:
    """The second half as the first regresses on it: its basis in the rotated coordinates."""

    def __init__(self, half: admm._Half, root: Array) -> None:
        self._half, self._root = half, root

    @property
    def gauge(self) -> Array:
        return self._half.gauge

    def make_basis(self, softness: float) -> Array:
        basis = self._half.workers.matmul(self._root, self._half.make_basis(softness))
        norm = np.sqrt(np.einsum("ij,ij->j", basis, basis))
        basis /= np.maximum(norm, np.float32(1e-30))
        return basis


def _coupled_half_step(
    target: Target,
    half: admm._Half,
    other: admm._Half,
    rotation: Array,
    lam: Array,
    schedule: admm.Schedule,
    balance: float,
) -> None:
    """Move the half whose rows are coupled: two regressions, each followed by a projection."""
    matmul = target.workers.matmul
    N = other.make_basis(schedule.softness)
    gram = admm.balanced_gram(N, other.gauge, balance, target.workers)
    gamma, basis = (part.astype(np.float32) for part in scipy.linalg.eigh(gram, driver="evd"))
    back = np.ascontiguousarray(basis.T)
    pull = matmul(target.rmatmul(N) * np.sqrt(lam)[:, None], basis)
    into = np.ascontiguousarray(rotation.T)
    rows = slice(0, len(half.Q))
    ridge = np.float32(schedule.ridge)
    for rho, last in ((np.float32(schedule.penalties[0]), False), (np.float32(1.0), True)):
        R = matmul(matmul(into, half.point(rows, rho, np.zeros_like(half.Q))), basis)
        R += pull
        R /= lam[:, None] * (gamma + ridge) + rho
        if last and target.energy:
            fitted = np.einsum("ij,ij->", R, 2.0 * pull - lam[:, None] * gamma * R)
            share = 1.0 - float(fitted) / target.energy
            schedule.share = min(1.0, max(share, admm.LEAST_SHARE))
        half.X = matmul(rotation, matmul(R, back), out=half.X)
        half.blend(rows, half.X, admm.DAMPING)
        half.project(half.gauge * other.gauge if last and balance else None)


def relax_coupled(
    target: WeightedTarget,
    k: int,
    *,
    shift: float,
    rng: np.random.Generator,
    iterations: int,
    monitor: Monitor,
) -> State:
    """Find signs by ADMM under the weights of a target and read them out as bits.

    Parameters
    ----------
    target : WeightedTarget
    k : int
        Intermediate dimension.
    shift : float
        Alphabet shift; the balance penalty is proportional to ``1 - 2 shift``.
    iterations : int
        Outer iterations; the ramps are spread over them (or over the time limit).

    Returns
    -------
    State
        With d2 exact for the bits found.

    Notes
    -----
    Beside what `relax` costs, an iteration takes ``10 n^2 k + 8 n k^2`` flops and an
    eigendecomposition of order k, the start one of order n.
    """
    plain = target.surrogate()
    if target.H is None:
        state = admm.relax(plain, k, shift=shift, rng=rng, iterations=iterations, monitor=monitor)
        plain.restore(state, target.unit)
        update_d2(target, state)
        return state
    size = np.sqrt(np.diag(target.H))
    values, V = scipy.linalg.eigh(target.H / np.outer(size, size), driver="evd")
    values = np.maximum(values, 0.0) ** POWER
    rotated = _Rotated(plain, V * np.sqrt(values))
    rotation, lam = np.ascontiguousarray(V, np.float32), values.astype(np.float32)
    root = np.ascontiguousarray((V * np.sqrt(values)).T, np.float32)

    ga, gb = admm._gauges(k)
    balance = admm.BALANCE * abs(1.0 - 2.0 * shift)
    first = admm._Half(target.shape[0], ga, rng, target.workers)
    second = admm._Half(target.shape[1], gb, rng, target.workers)
    seen: Any = _Seen(second, root)
    schedule = admm.Schedule()
    done, _ = admm.enter(monitor, first, second, schedule, iterations)
    for i in range(done, iterations):
        if balance and i == int(admm.REGAUGE_AT * iterations):
            monitor.uneven |= admm.are_uneven(first, second)
            admm.share_gauges(first, second)
        schedule.at(i, iterations, monitor)
        admm._half_step(rotated, first, seen, True, schedule, balance)
        _coupled_half_step(rotated, second, first, rotation, lam, schedule, balance)
        if monitor.step("relaxation", i + 1, iterations) or monitor.time_share() >= 0.8:
            break
        admm.leave(monitor, first, second, schedule, i + 1, iterations)
    state = admm._read_out(first, second, shift)
    plain.restore(state, target.unit)
    update_d2(target, state)
    return state
