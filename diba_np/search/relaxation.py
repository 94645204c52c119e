"""Signs by ADMM with a balance penalty, read out as 0/1.

With ``B = (S + 1) / 2`` and signs S,

    4 D1 B1 D2 B2 D3 = D1 [S1 D2 S2 + u 1^T + 1 v^T + tau 1 1^T] D3,

``u = S1 d2``, ``v = S2^T d2``, ``tau = sum(d2)``. So 0/1 factors are sign factors plus a constant
part of rank two that does no harm where u, v and tau vanish: one linear constraint for each row of
S1 and each column of S2. It enters a double binary factorization (arXiv 2505.11076) as a quadratic
penalty from the first step on. For a shift in between the constant part is ``1 - 2 shift`` times as
large, and so is the penalty; at ``shift = 1/2`` it is gone.

Each half of the ADMM splits into a ridge regression and a projection on signs times a rank-one
magnitude. Steps are in float32; what decides about single bits at the end is in float64
(`diba_np.search.polish`).

What pays (384 x 384 weights, 1 bit): a ridge that falls with the iterations and with the error
(+0.07 dB; +0.27 at 2 bits), the other factor blended with its regression while signs still move
(+0.02), walks instead of pair flips in the polish (+0.01 in a quarter of the time); on smooth
matrices gauges shared out by size (+1 to +2 at 2 bits). What does not: one inner step instead of
two, 0/1 projections or the exact shift inside the ADMM, a rising alphabet or balance, starts from
the singular vectors, restarts, components set aside for the constant part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from diba_np.kernels import magnitudes
from diba_np.machine.pool import Workers, mirror
from diba_np.search.progress import Monitor
from diba_np.search.state import State, update_d2
from diba_np.search.target import Target

Array = NDArray[np.float32]
Scales = tuple[NDArray[np.float64], NDArray[np.float64]]

BALANCE = 0.5  # weight of the constraints on u, v and tau; 0.25 ... 2 tie
DAMPING = 0.7  # share of the new regression in the projected point
RAMP_START = 0.1  # the penalty rho of the first inner step is t^3, t from here to 1
RIDGE_START, RIDGE_END = 1.25, 0.05  # on unit-norm columns, times the root of the error's share
SOFTNESS = 0.2  # share of the regression in the other factor, at the start; falls to 0
LEAST_SHARE = 1e-8  # of the error, for the ridge
REGAUGE_AT = 0.25  # share of the iterations after which components have found their sizes
FEWEST = 16  # components that can balance
UNEVEN = 1.3  # largest size over their mean from which gauges are shared out anew


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
    uneven : int
        Iterations where the components are of uneven size, see `are_uneven`.
    also : str
        The effort whose iterations a second search then has; the better of both is taken. Such
        components grow apart in a long search, and balance badly at its end.
    """

    iterations: int
    rounds: int
    moves: int
    patience: int
    uneven: int
    also: str = ""


EFFORTS = {
    "fast": Effort(65, 8, 200, 50, 65),
    "balanced": Effort(128, 12, 200, 50, 320),
    "best": Effort(1000, 20, 1000, 300, 1000, "balanced"),
}


class Half:
    """One binary factor in the ADMM: its projection, its dual and its regression.

    Attributes
    ----------
    Q : (rows, k) float32
        Stands for the projection ``Z = sign(Q) * outer(p, q)`` and the scaled dual ``Q - Z``.
    X : (rows, k) float32
        The regression; from `make_basis` on what the other half regresses on, with columns of norm
        one, until it is made anew.
    p : (rows,) float32, unit norm
    q : (k,) float32
    gauge : (k,) float32
        Signs by which the component enters the balance constraint.
    held : (rows,) float32, unit norm, or None
        What p stays at.
    """

    def __init__(
        self,
        rows: int,
        gauge: Array,
        rng: np.random.Generator,
        workers: Workers,
        held: NDArray[np.float64] | None = None,
    ) -> None:
        k = gauge.size
        self.workers = workers
        self.gauge = gauge
        self.held = None
        if held is not None:
            self.held = (np.abs(held) / np.linalg.norm(held)).astype(np.float32)
        self.p, self.q = np.zeros(rows, np.float32), np.ones(k, np.float32)
        self.Q = rng.standard_normal((rows, k), dtype=np.float32)
        self.X = np.zeros((rows, k), np.float32)
        self._parts = np.empty((-(-rows // magnitudes.BLOCK), k), np.float32)
        self.blend(slice(0, rows), self.X, 1.0)
        self.project(None)
        for part in self.row_blocks():
            self.Q[part] = self.X[part] = np.copysign(np.outer(self.p[part], self.q), self.Q[part])

    @property
    def Z(self) -> Array:
        """The projection, (rows, k) float32; made anew."""
        signed: Array = np.copysign(np.outer(self.p, self.q), self.Q)
        return signed

    def pack(self, *names: str) -> dict[str, Array]:
        """Return what the next iteration needs of this half."""
        return {name: getattr(self, name) for name in ("Q", "p", "q", "gauge", *names)}

    def unpack(self, kept: dict[str, Array]) -> None:
        """Undo `pack`."""
        for name, array in kept.items():
            setattr(self, name, array)

    def run(self, kernel: str, *arguments: object) -> None:
        """Run a kernel, or its twin for several threads."""
        suffix = "" if self.workers.threads == 1 else "_par"
        getattr(magnitudes, kernel + suffix)(*arguments)

    def row_blocks(self) -> list[slice]:
        """Return the rows in blocks that kernels take one after another."""
        return self.workers.row_blocks(*self.Q.shape)

    def point(self, rows: slice, rho: float | np.float32, Y: Array) -> Array:
        """Return ``rho (Z - dual) + Y`` for a block of rows."""
        out = np.empty_like(Y)
        self.run("regression_point", self.Q[rows], self.p[rows], self.q, np.float32(rho), Y, out)
        return out

    def blend(self, rows: slice, X: Array, damping: float) -> None:
        """Blend a block of a regression and of Z into Q; p and q then await `project`."""
        parts = self._parts[rows.start // magnitudes.BLOCK : -(-rows.stop // magnitudes.BLOCK)]
        theta = np.float32(damping)
        self.run("blend_magnitudes", X, self.Q[rows], theta, self.q, self.p[rows], parts)

    def project(self, pin: Array | None) -> None:
        """Make (p, q) the leading singular pair of ``|Q|``, by two warm-started power steps.

        The first is done by `blend`. Where p is held, q is the best for it. With `pin` (gauge
        products), q is rescaled on the two gauge classes so that tau vanishes.
        """
        if self.held is None:
            self._normalise()
            self.run("power_magnitudes", self.Q, self.q, self.p, self._parts)
            self._normalise()
        else:
            self.p[:] = self.held
            self.q = self.workers.matmul(np.abs(self.Q).T, self.held[:, None])[:, 0]
        if pin is not None:
            plus, minus = float(self.q[pin > 0].sum()), float(self.q[pin < 0].sum())
            if plus > 0 and minus > 0:
                ratio = np.float32(np.sqrt(minus / plus))
                self.q = np.where(pin > 0, self.q * ratio, self.q / ratio)

    def _normalise(self) -> None:
        norm = max(float(np.sqrt(self.p @ self.p)), 1e-30)
        self.p /= np.float32(norm)
        self.q = self._parts.sum(axis=0) / np.float32(norm)

    def make_basis(self, softness: float) -> Array:
        """Turn X into Z blended with X, its columns brought to norm one, and return it."""
        share = np.float32(softness)
        self.run("soften", self.Q, self.p, self.q, share, self.X, self._parts)
        norm = np.sqrt(self._parts.sum(axis=0))
        self.X *= np.float32(1.0) / np.maximum(norm, np.float32(1e-30))
        return self.X


def gauges(k: int) -> tuple[Array, Array]:
    """Return two sign vectors, each half -1 and their product half -1 (as nearly as k allows)."""
    index = np.arange(k)
    first = np.where(index % 4 < 2, 1.0, -1.0)
    second = np.where(index % 2 < 1, 1.0, -1.0)
    return first.astype(np.float32), second.astype(np.float32)


def are_uneven(first: Half, second: Half) -> bool:
    """Whether the sizes of the components are uneven, and there are enough that can balance.

    On weights of networks they are even (largest 1.1 to 1.2 times the mean, a quarter of the way
    into the search), on smooth matrices they are not.
    """
    size = first.q * second.q
    return size.size >= FEWEST and bool(size.max() > UNEVEN * size.mean())


def share_gauges(first: Half, second: Half) -> None:
    """Give neighbours in size opposite gauges, where the sizes of the components are uneven.

    Rows balance only if large components stand against others as large; by chance the largest of
    a smooth matrix fall on one side (-2 dB). An eighth of the way into the ramps is too early:
    while the ridge is high, one component may outgrow all others on its side (-1.5 dB).
    """
    if not are_uneven(first, second):
        return
    size = first.q * second.q
    order = np.argsort(-size, kind="stable")
    for half, pattern in ((first, (1, -1, -1, 1)), (second, (1, -1, 1, -1))):
        half.gauge = np.empty_like(half.gauge)
        half.gauge[order] = np.resize(np.array(pattern, np.float32), size.size)


def _inverse(gram: Array, shift: float) -> Array:
    """Return ``(gram + shift I)^-1`` of a symmetric positive definite (k, k) matrix."""
    shifted = gram.copy()
    shifted.reshape(-1)[:: len(gram) + 1] += np.float32(shift)
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

    def at(self, step: float, steps: int, monitor: Monitor) -> None:
        """Set `done`; under a time limit the ramp ends in time."""
        self.done = max(step / max(steps - 3, 1), monitor.window_share())

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


def balanced_gram(N: Array, gauge: Array, balance: float, workers: Workers) -> Array:
    """Return ``N^T N`` plus the balance penalty's part."""
    gram: Array = workers.gram(N)
    if balance:
        weight = np.float32(balance) * gauge
        gram += np.outer(weight, weight)
    return gram


def half_step(
    target: Target, half: Half, other: Any, left: bool, schedule: Schedule, balance: float
) -> None:
    """Move one factor: regressions on the other, each followed by a projection."""
    workers = target.workers
    ridge = schedule.ridge
    N = other.make_basis(schedule.softness)
    # the old regression is not needed any more: its place serves Y, and at last the new one
    Y = target.matmul(N, out=half.X) if left else target.rmatmul(N, out=half.X)
    gram = balanced_gram(N, other.gauge, balance, workers)
    penalties = schedule.penalties
    distinct = sorted(set(penalties))
    inverses = workers.run(lambda rho: _inverse(gram, ridge + rho), distinct)
    fitted = np.zeros(len(Y))
    for step, rho in enumerate(penalties):
        inverse, last = inverses[distinct.index(rho)], step == len(penalties) - 1
        for rows in half.row_blocks():
            X = workers.matmul(half.point(rows, rho, Y[rows]), inverse)
            if last and target.energy:
                weight = np.float32(ridge + rho)
                half.run(
                    "explained", X, Y[rows], half.Q[rows], half.p[rows], half.q, weight,
                    fitted[rows],
                )  # fmt: skip
            half.blend(rows, X, schedule.damping)
            if last:
                half.X[rows] = X
        half.project(half.gauge * other.gauge if last and balance else None)
    if target.energy:
        share = 1.0 - float(fitted.sum()) / target.energy
        schedule.share = min(1.0, max(share, LEAST_SHARE))


def read_out(first: Half, second: Half, shift: float) -> State:
    """Turn signs into bits: ``S1 = sign(Z1) diag(ga)``, likewise S2; d2 is not exact for them."""
    bits1 = np.signbit(first.Q) == (first.gauge < 0)
    bits2 = np.signbit(second.Q) == (second.gauge < 0)
    return State(
        d1=first.p.astype(np.float64),
        b1=bits1.view(np.uint8),
        d2=4.0 * (first.gauge * second.gauge * second.q).astype(np.float64),
        b2=bits2.view(np.uint8),
        d3=second.p.astype(np.float64),
        shift=shift,
    )


def enter(
    monitor: Monitor, first: Half, second: Half, schedule: Schedule, iterations: int
) -> tuple[int, int]:
    """Take up the iterations where an earlier run kept them; return those done and those due."""
    kept = monitor.resume()
    if kept is None:
        return 0, iterations
    first.unpack(kept["first"])
    second.unpack(kept["second"])
    schedule.share = kept["share"]
    return int(kept["iterations"]), int(kept["due"])


def leave(
    monitor: Monitor, first: Half, second: Half, schedule: Schedule, iterations: int, due: int
) -> None:
    """Keep where the iterations stand, if it is time to."""
    monitor.keep(
        lambda: {
            "iterations": iterations,
            "due": due,
            "first": first.pack(),
            "second": second.pack("X"),
            "share": schedule.share,
        }
    )


def relax(
    target: Target,
    k: int,
    *,
    shift: float,
    rng: np.random.Generator,
    iterations: int,
    monitor: Monitor,
    schedule: Schedule | None = None,
    uneven: int = 0,
    held: Scales | None = None,
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
    uneven : int
        Iterations where the components turn out to be of uneven size, if that is more;
        ``monitor.uneven`` tells whether they did.
    held : ((m,), (n,)) of float64, optional
        What d1 and d3 stay proportional to; by magnitude.

    Returns
    -------
    State
        With d2 exact for the bits found.

    Notes
    -----
    An iteration costs about ``4 m n k + 5 k^2 (m + n)`` flops and 4 inverses of order k.
    Memory: 2 arrays of (m + n) k float32 beside the target, 4 of order k, and blocks of rows.
    """
    ga, gb = gauges(k)
    schedule = schedule or Schedule()
    balance = schedule.balance * abs(1.0 - 2.0 * shift)
    d1, d3 = held or (None, None)
    first = Half(target.shape[0], ga, rng, target.workers, d1)
    second = Half(target.shape[1], gb, rng, target.workers, d3)
    turn = int(REGAUGE_AT * iterations)
    i, due = enter(monitor, first, second, schedule, iterations)
    while i < due:
        if balance and i == turn and are_uneven(first, second):
            monitor.uneven = True
            due = max(due, uneven)
            share_gauges(first, second)
        # what is left of the ramps is spread over what is left to do
        ahead = max(i - turn, 0)
        pace = i - ahead + ahead * ((iterations - turn) / (due - turn))
        schedule.at(pace, iterations, monitor)
        half_step(target, first, second, True, schedule, balance)
        half_step(target, second, first, False, schedule, balance)
        i += 1
        if monitor.step("relaxation", i, due) or monitor.window_share() >= 1.0:
            break
        leave(monitor, first, second, schedule, i, due)
    state = read_out(first, second, shift)
    del first, second  # what follows needs the room
    update_d2(target, state)
    return state
