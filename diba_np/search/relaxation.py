"""Signs by ADMM with a balance penalty, read out as 0/1, then polished by exact flips.

With ``B = (S + 1) / 2`` and signs S,

    4 D1 B1 D2 B2 D3 = D1 [S1 D2 S2 + u 1^T + 1 v^T + tau 1 1^T] D3,

``u = S1 d2``, ``v = S2^T d2``, ``tau = sum(d2)``. So 0/1 factors are sign factors plus a constant
part of rank two that does no harm where u, v and tau vanish: one linear constraint for each row of
S1 and each column of S2. It enters a double binary factorization (arXiv 2505.11076) as a quadratic
penalty from the first step on. For a shift in between the constant part is ``1 - 2 shift`` times as
large, and so is the penalty; at ``shift = 1/2`` it is gone.

Each half of the ADMM splits into a ridge regression and a projection on signs times a rank-one
magnitude. Steps are in float32; what decides about single bits at the end is in float64.

What pays (384 x 384 weights, 1 bit): a ridge that falls with the iterations and with the error
(+0.07 dB; +0.27 at 2 bits), the other factor blended with its regression while signs still move
(+0.02), walks instead of pair flips in the polish (+0.01 in a quarter of the time). What does not:
one inner step instead of two, 0/1 projections or the exact shift inside the ADMM, a rising
alphabet or balance, starts from the singular vectors, restarts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from diba_np.kernels import magnitudes
from diba_np.kernels.flips import sweep_tabu, sweep_tabu_par
from diba_np.scales import Widths
from diba_np.search.monitor import Monitor
from diba_np.search.state import (
    State,
    fit_grids,
    normal_equations,
    pack_loop,
    squared_error,
    sweep,
    unpack_state,
    update_d2,
    update_row_scales,
)
from diba_np.search.target import Target
from diba_np.threads import Workers, mirror

Array = NDArray[np.float32]

_TABU = (sweep_tabu, sweep_tabu_par)

BALANCE = 0.5  # weight of the constraints on u, v and tau; 0.25 ... 2 tie
DAMPING = 0.7  # share of the new regression in the projected point
RAMP_START = 0.1  # the penalty rho of the first inner step is t^3, t from here to 1
RIDGE_START, RIDGE_END = 1.25, 0.05  # on unit-norm columns, times the root of the error's share
SOFTNESS = 0.2  # share of the regression in the other factor, at the start; falls to 0
FREE_ROUNDS = 2  # of the polish, before the diagonals move to their grids
LEAST_SHARE = 1e-8  # of the error, for the ridge


@dataclass(frozen=True)
class Effort:
    """How much work a search may do.

    Attributes
    ----------
    iterations : int
        Of the ADMM.
    rounds : int
        Most rounds of the polish.
    moves, patience : int
        Of the walk over one row's bits in a round, see `sweep_tabu`.
    """

    iterations: int
    rounds: int
    moves: int
    patience: int


EFFORTS = {
    "fast": Effort(65, 8, 200, 50),
    "balanced": Effort(160, 12, 200, 50),
    "best": Effort(1000, 20, 1000, 300),
}


class _Half:
    """One binary factor in the ADMM: ``Z = signs * outer(p, q)``, its dual and its regression.

    Attributes
    ----------
    Z, dual, X, basis : (rows, k) float32
        `basis` is what the other half regresses on, with columns of norm one.
    p : (rows,) float32, unit norm
    q : (k,) float32
    gauge : (k,) float32
        Signs by which the component enters the balance constraint.
    """

    def __init__(self, rows: int, gauge: Array, rng: np.random.Generator, workers: Workers) -> None:
        k = gauge.size
        self.workers = workers
        self.gauge = gauge
        self.p, self.q = np.empty(rows, np.float32), np.ones(k, np.float32)
        self.dual = rng.standard_normal((rows, k), dtype=np.float32)
        self.X = self.Z = np.zeros((rows, k), np.float32)
        self._parts = np.empty((-(-rows // magnitudes.BLOCK), k), np.float32)
        self.project(0.0, None)
        self.dual[:] = 0
        self.X = self.Z.copy()
        self.basis = np.empty_like(self.Z)

    def pack(self) -> dict[str, Array]:
        """Return what the next iteration needs of this half."""
        return {name: getattr(self, name) for name in ("Z", "dual", "X", "p", "q", "gauge")}

    def unpack(self, kept: dict[str, Array]) -> None:
        """Undo `pack`."""
        for name, array in kept.items():
            setattr(self, name, array)

    def run(self, kernel: str, *arguments: object) -> None:
        """Run a kernel, or its twin for several threads."""
        suffix = "" if self.workers.threads == 1 else "_par"
        getattr(magnitudes, kernel + suffix)(*arguments)

    def project(self, damping: float, pin: Array | None) -> None:
        """Blend X and Z into Q, set ``Z = sign(Q) * outer(p, q)`` and the dual to the rest.

        (p, q) is the leading singular pair of ``|Q|``, by two warm-started power steps. With `pin`
        (gauge products), q is rescaled on the two gauge classes so that tau vanishes.
        """
        theta = np.float32(damping)
        self.run("blend_magnitudes", self.X, self.Z, theta, self.dual, self.q, self.p, self._parts)
        self._normalise()
        self.run("power_magnitudes", self.dual, self.q, self.p, self._parts)
        self._normalise()
        if pin is not None:
            plus, minus = float(self.q[pin > 0].sum()), float(self.q[pin < 0].sum())
            if plus > 0 and minus > 0:
                ratio = np.float32(np.sqrt(minus / plus))
                self.q = np.where(pin > 0, self.q * ratio, self.q / ratio)
        self.run("project_signs", self.dual, self.p, self.q, self.Z)

    def _normalise(self) -> None:
        norm = max(float(np.linalg.norm(self.p)), 1e-30)
        self.p /= np.float32(norm)
        self.q = self._parts.sum(axis=0) / np.float32(norm)

    def make_basis(self, softness: float) -> Array:
        """Return Z, blended with X, with its columns brought to norm one."""
        self.run("soften", self.Z, self.X, np.float32(softness), self.basis, self._parts)
        norm = np.sqrt(self._parts.sum(axis=0))
        self.basis *= np.float32(1.0) / np.maximum(norm, np.float32(1e-30))
        return self.basis


def _gauges(k: int) -> tuple[Array, Array]:
    """Two sign vectors, each half -1 and their product half -1 (as nearly as k allows)."""
    index = np.arange(k)
    first = np.where(index % 4 < 2, 1.0, -1.0)
    second = np.where(index % 2 < 1, 1.0, -1.0)
    return first.astype(np.float32), second.astype(np.float32)


def _inverse(gram: Array, shift: float) -> Array:
    """Return ``(gram + shift I)^-1`` of a symmetric positive definite (k, k) matrix."""
    shifted = gram.copy()
    shifted[np.diag_indices_from(shifted)] += np.float32(shift)
    # the transposed view is in LAPACK's order, so that nothing is copied
    factor, info = scipy.linalg.lapack.spotrf(shifted.T, lower=1, clean=0, overwrite_a=1)
    if info == 0:
        inverse, info = scipy.linalg.lapack.spotri(factor, lower=1, overwrite_c=1)
    if info != 0:
        exact = gram.astype(np.float64) + shift * np.eye(len(gram))
        return np.linalg.inv(exact).astype(np.float32)
    upper: Array = inverse.T
    mirror(upper)
    return upper


@dataclass
class Schedule:
    """What changes from one iteration to the next; `done` runs from 0 to 1."""

    done: float = 0.0
    share: float = 1.0  # of the squared norm of A that the last regression left over
    fixed_ridge: float | None = None  # instead of one that falls

    damping = DAMPING
    balance = BALANCE

    def at(self, step: int, steps: int, monitor: Monitor) -> None:
        """Set `done`; under a time limit the ramp ends in time."""
        self.done = max(step / max(steps - 3, 1), monitor.time_share() / 0.8)

    @property
    def penalties(self) -> tuple[float, ...]:
        """The penalty rho of each inner step."""
        return (min(1.0, RAMP_START + (1 - RAMP_START) * self.done) ** 3, 1.0)

    @property
    def ridge(self) -> float:
        """On unit-norm columns."""
        if self.fixed_ridge is not None:
            return self.fixed_ridge
        fall = (1.0 - min(1.0, self.done)) ** 3
        return float((RIDGE_END + (RIDGE_START - RIDGE_END) * fall) * np.sqrt(self.share))

    @property
    def softness(self) -> float:
        """Share of the regression in the basis."""
        return SOFTNESS * (1.0 - min(1.0, self.done))


class Published(Schedule):
    """Double binary factorization as published: one ridge, no balance, no blending."""

    damping = 1.0
    balance = 0.0
    softness = 0.0

    def __init__(self, ridge: float, inner: int) -> None:
        super().__init__(fixed_ridge=ridge)
        self.inner = inner

    @property
    def penalties(self) -> tuple[float, ...]:
        return (min(1.0, self.done) ** 3, *(1.0,) * (self.inner - 1))


def _half_step(
    target: Target,
    half: _Half,
    other: _Half,
    left: bool,
    schedule: Schedule,
    balance: Array | None,
) -> None:
    """Move one factor: two regressions on the other, each followed by a projection.

    `balance` (k, k) is the balance penalty's part of the Gram matrix.
    """
    workers = target.workers
    ridge = schedule.ridge
    N = other.make_basis(schedule.softness)
    Y = target.matmul(N) if left else target.rmatmul(N)
    gram = workers.gram(N)
    if balance is not None:
        gram += balance
    penalties = schedule.penalties
    distinct = sorted(set(penalties))
    inverses = workers.run(lambda rho: _inverse(gram, ridge + rho), distinct)
    point = np.empty_like(Y)
    for step, rho in enumerate(penalties):
        inverse, last = inverses[distinct.index(rho)], step == len(penalties) - 1
        np.subtract(half.Z, half.dual, out=point)
        point *= np.float32(rho)
        point += Y
        half.X = workers.matmul(point, inverse, out=half.X)
        if last and target.energy:
            rows = np.empty(len(Y))
            half.run("explained", half.X, Y, half.Z, half.dual, np.float32(ridge + rho), rows)
            share = 1.0 - float(rows.sum()) / target.energy
            schedule.share = min(1.0, max(share, LEAST_SHARE))
        pin = half.gauge * other.gauge if last and balance is not None else None
        half.project(schedule.damping, pin)


def enter(monitor: Monitor, first: _Half, second: _Half, schedule: Schedule) -> int:
    """Take up the iterations where an earlier run kept them; return the iterations done."""
    kept = monitor.resume()
    if kept is None:
        return 0
    first.unpack(kept["first"])
    second.unpack(kept["second"])
    schedule.share = kept["share"]
    return int(kept["iterations"])


def leave(
    monitor: Monitor, first: _Half, second: _Half, schedule: Schedule, iterations: int
) -> None:
    """Keep where the iterations stand, if it is time to."""
    monitor.keep(
        lambda: {
            "iterations": iterations,
            "first": first.pack(),
            "second": second.pack(),
            "share": schedule.share,
        }
    )


def _read_out(target: Target, first: _Half, second: _Half, shift: float) -> State:
    """Turn signs into bits: ``S1 = sign(Z1) diag(ga)``, likewise S2; scales by least squares."""
    bits1 = np.signbit(first.Z) == (first.gauge < 0)
    bits2 = np.signbit(second.Z) == (second.gauge < 0)
    state = State(
        d1=first.p.astype(np.float64),
        b1=bits1.astype(np.uint8),
        d2=4.0 * (first.gauge * second.gauge * second.q).astype(np.float64),
        b2=bits2.astype(np.uint8),
        d3=second.p.astype(np.float64),
        shift=shift,
    )
    update_d2(target, state)
    return state


def relax(
    target: Target,
    k: int,
    *,
    shift: float,
    rng: np.random.Generator,
    iterations: int,
    monitor: Monitor,
    schedule: Schedule | None = None,
) -> State:
    """Find signs by ADMM and read them out as bits.

    Parameters
    ----------
    target : Target
    k : int
        Intermediate dimension.
    shift : float
        Alphabet shift; the balance penalty is proportional to ``1 - 2 shift``.
    iterations : int
        Outer iterations; the ramps are spread over them (or over the time limit).
    schedule : Schedule, optional
        Penalties, ridge and blending.

    Returns
    -------
    State
        With d2 exact for the bits found.

    Notes
    -----
    An iteration costs about ``4 m n k + 5 k^2 (m + n)`` flops and 4 inverses of order k.
    Memory: 5 arrays of (m + n) k float32 beside the target.
    """
    ga, gb = _gauges(k)
    schedule = schedule or Schedule()
    balance = schedule.balance * abs(1.0 - 2.0 * shift)
    first = _Half(target.shape[0], ga, rng, target.workers)
    second = _Half(target.shape[1], gb, rng, target.workers)
    penalties: list[Array | None] = [None, None]
    if balance:
        penalties = [np.float32(balance**2) * np.outer(g, g) for g in (gb, ga)]
    for i in range(enter(monitor, first, second, schedule), iterations):
        schedule.at(i, iterations, monitor)
        _half_step(target, first, second, True, schedule, penalties[0])
        _half_step(target, second, first, False, schedule, penalties[1])
        if monitor.step("relaxation", i + 1, iterations) or monitor.time_share() >= 0.8:
            break
        leave(monitor, first, second, schedule, i + 1)
    return _read_out(target, first, second, shift)


def polish(
    target: Target,
    state: State,
    monitor: Monitor,
    tol: float,
    effort: Effort,
    widths: Widths | None = None,
) -> None:
    """Improve a state by walks over each row's bits, row scales and d2 in turn.

    Ends when a round lowers the squared error by less than the share `tol` of it. With `widths`
    the diagonals move to grids after `FREE_ROUNDS` rounds, and bits and diagonals adapt to them.

    A round costs ``6 m n k + 4 k^2 (m + n)`` flops in float64 and O(k) for each move of a walk.
    """
    kept = monitor.resume()
    if kept is None:
        done, error = 0, squared_error(target, state)
        monitor.step("polish", 0, effort.rounds, error)
    else:
        done, error = kept["rounds"], kept["error"]
        state.take(unpack_state(kept["state"]))
    for round_ in range(done + 1, effort.rounds + 1):
        before = error
        if widths is not None and state.grids is None and round_ > FREE_ROUNDS:
            before = fit_grids(target, state, widths)
        for left in (True, False):
            equations = normal_equations(target, state, left)
            update_row_scales(target, state, left, equations)
            walk = (effort.moves, effort.patience)
            sweep(target, state, left, _TABU, *walk, equations=equations)
            update_row_scales(target, state, left, equations)
        error = update_d2(target, state)
        monitor.half_step(error)
        if monitor.step("polish", round_, effort.rounds, error):
            return
        coded = widths is None or state.grids is not None
        if coded and before - error <= tol * before:
            break
        monitor.keep(partial(pack_loop, state, rounds=round_, error=error))
    monitor.converged = True
