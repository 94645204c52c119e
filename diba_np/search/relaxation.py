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
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from diba_np.kernels.flips import sweep_pairs, sweep_pairs_par
from diba_np.search.monitor import Monitor
from diba_np.search.state import State, squared_error, sweep, update_d2, update_row_scales
from diba_np.search.target import Target
from diba_np.threads import Workers

Array = NDArray[np.float32]

_PAIRS = (sweep_pairs, sweep_pairs_par)

RIDGE = 0.03  # on unit-norm columns of the other factor
BALANCE = 0.5  # weight of the constraints on u, v and tau; 0.25 ... 2 tie
DAMPING = 0.8  # share of the new regression in the projected point
RAMP_START = 0.2  # the penalty rho of the first inner step is t^3, t from here to 1
POWER_STEPS = 2  # per projection, warm-started
POLISH_ROUNDS = 12


@dataclass
class _Half:
    """One binary factor in the ADMM: ``Z = signs * outer(p, q)``, its dual and its gauge.

    Attributes
    ----------
    Z, dual : (rows, k) float32
    p : (rows,) float32
    q : (k,) float32
    gauge : (k,) float32
        Signs by which the component enters the balance constraint.
    """

    Z: Array
    dual: Array
    p: Array
    q: Array
    gauge: Array


def _gauges(k: int) -> tuple[Array, Array]:
    """Two sign vectors, each half -1 and their product half -1 (as nearly as k allows)."""
    index = np.arange(k)
    first = np.where(index % 4 < 2, 1.0, -1.0)
    second = np.where(index % 2 < 1, 1.0, -1.0)
    return first.astype(np.float32), second.astype(np.float32)


def _project(half: _Half, Q: Array, pin: Array | None) -> None:
    """Set ``Z = sign(Q) * outer(p, q)`` with (p, q) the leading singular pair of ``|Q|``.

    With `pin` (gauge products), q is rescaled on the two gauge classes so that tau vanishes.
    """
    size = np.abs(Q)
    p, q = half.p, half.q
    for _ in range(POWER_STEPS):
        p = size @ (q / max(float(np.linalg.norm(q)), 1e-30))
        p /= max(float(np.linalg.norm(p)), 1e-30)
        q = p @ size
    if pin is not None:
        plus, minus = float(q[pin > 0].sum()), float(q[pin < 0].sum())
        if plus > 0 and minus > 0:
            ratio = np.sqrt(minus / plus)
            q = np.where(pin > 0, q * ratio, q / ratio).astype(np.float32)
    half.p, half.q = p, q
    np.multiply(p[:, None], q, out=half.Z)
    np.copysign(half.Z, Q, out=half.Z)


def _inverse(workers: Workers, gram: Array) -> Array:
    """Inverse of a symmetric positive definite (k, k) matrix, by Cholesky."""
    factor, info = scipy.linalg.lapack.spotrf(gram, lower=1)
    if info == 0:
        inverse, info = scipy.linalg.lapack.spotri(factor, lower=1)
    if info != 0:
        return np.linalg.inv(gram.astype(np.float64)).astype(np.float32)
    lower = np.tril(inverse, -1)
    return np.ascontiguousarray(lower + lower.T + np.diag(np.diag(inverse)))


def _half_step(
    target: Target, half: _Half, other: _Half, left: bool, penalty: float, balance: float
) -> None:
    """Move one factor: two regressions on the other, each followed by a projection."""
    workers = target.workers
    norm = other.q * float(np.linalg.norm(other.p))
    N = other.Z / np.maximum(norm, 1e-30)
    Y = target.matmul(N) if left else target.rmatmul(N)
    gram = workers.matmul(np.ascontiguousarray(N.T), N)
    gram[np.diag_indices_from(gram)] += RIDGE
    if balance:
        gram += np.float32(balance**2) * np.outer(other.gauge, other.gauge)
    grams = []
    for rho in (penalty, 1.0):
        shifted = gram.copy()
        shifted[np.diag_indices_from(shifted)] += rho
        grams.append(shifted)
    inverses = workers.run(lambda g: _inverse(workers, g), grams)
    for rho, inverse, last in zip((penalty, 1.0), inverses, (False, True), strict=True):
        X = workers.matmul(Y + np.float32(rho) * (half.Z - half.dual), inverse)
        Q = np.float32(DAMPING) * X + np.float32(1 - DAMPING) * half.Z + half.dual
        pin = half.gauge * other.gauge if last and balance else None
        _project(half, Q, pin)
        half.dual = Q - half.Z


def _start(rows: int, k: int, gauge: Array, rng: np.random.Generator) -> _Half:
    normal = rng.standard_normal((rows, k), dtype=np.float32)
    half = _Half(
        Z=np.empty((rows, k), np.float32),
        dual=np.zeros((rows, k), np.float32),
        p=np.ones(rows, np.float32),
        q=np.ones(k, np.float32),
        gauge=gauge,
    )
    _project(half, normal, None)
    return half


def _read_out(target: Target, first: _Half, second: _Half, shift: float) -> State:
    """Turn signs into bits: ``S1 = sign(Z1) diag(ga)``, likewise S2; scales by least squares."""
    bits1 = (first.Z * first.gauge > 0).astype(np.uint8)
    bits2 = (second.Z * second.gauge > 0).astype(np.uint8)
    scale = second.q / max(float(np.linalg.norm(first.p)), 1e-30)
    state = State(
        d1=first.p.astype(np.float64),
        b1=bits1,
        d2=4.0 * (first.gauge * second.gauge * scale).astype(np.float64),
        b2=bits2,
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
        Outer iterations; the penalty's ramp is spread over them (or over the time limit).

    Returns
    -------
    State
        With d2 exact for the bits found.

    Notes
    -----
    An iteration costs about ``4 m n k + 6 k^2 (m + n)`` flops and 4 inverses of order k.
    Memory: 6 arrays of (m + n) k float32 beside the target.
    """
    ga, gb = _gauges(k)
    balance = BALANCE * abs(1.0 - 2.0 * shift)
    first = _start(target.shape[0], k, ga, rng)
    second = _start(target.shape[1], k, gb, rng)
    for i in range(iterations):
        # under a time limit the ramp ends in time; without one this is i / (iterations - 3)
        done = max(i / max(iterations - 3, 1), monitor.time_share() / 0.8)
        t = min(1.0, RAMP_START + (1 - RAMP_START) * done)
        _half_step(target, first, second, True, t**3, balance)
        _half_step(target, second, first, False, t**3, balance)
        if monitor.step("relaxation", i + 1, iterations) or monitor.time_share() >= 0.8:
            break
    return _read_out(target, first, second, shift)


def polish(target: Target, state: State, monitor: Monitor, tol: float) -> None:
    """Improve a state by exact single and pair flips, row scales and d2 in turn.

    Ends when a round lowers the squared error by less than the share `tol` of it.

    A round costs ``8 m n k`` flops in float64 and O((m + n) k^2) for the search for partners.
    """
    error = squared_error(target, state)
    monitor.step("polish", 0, POLISH_ROUNDS, error)
    for round_ in range(1, POLISH_ROUNDS + 1):
        before = error
        for left in (True, False):
            sweep(target, state, left, _PAIRS, 1)
            update_row_scales(target, state, left)
            error = update_d2(target, state)
            monitor.half_step(error)
        if monitor.step("polish", round_, POLISH_ROUNDS, error):
            return
        if before - error <= tol * before:
            break
    monitor.converged = True
