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
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from diba_np.kernels import magnitudes
from diba_np.machine.lapack import invert_definite
from diba_np.machine.thread_pool import RightOperand, mirror
from diba_np.products.cpu import has_bfloat16
from diba_np.search.exact_steps import update_d2
from diba_np.search.halves import (
    Array,
    Half,
    Scales,
    are_uneven,
    random_halves,
    read_out,
    share_gauges,
)
from diba_np.search.outcome import Outcome
from diba_np.search.progress import Run
from diba_np.search.target import Target

BALANCE = 0.5  # weight of the constraints on u, v and tau; 0.25 ... 2 tie
DAMPING = 0.7  # share of the new regression in the projected point
RAMP_START = 0.1  # the penalty rho of the first inner step is t^3, t from here to 1
RIDGE_START, RIDGE_END = 1.25, 0.05  # on unit-norm columns, times the root of the error's share
SOFTNESS = 0.2  # share of the regression in the other factor, at the start; falls to 0
LEAST_SHARE = 1e-8  # of the error, for the ridge
ROUGH_SHARE = 0.01  # of the error, above which products of operands rounded to bfloat16 do as well
REGAUGE_AT = 0.25  # share of the iterations after which components have found their sizes


def inverse_of(gram: Array, shift: float) -> Array:
    """Return ``(gram + shift I)^-1`` of a symmetric positive definite (k, k) matrix."""
    shifted = gram.copy()
    shifted.reshape(-1)[:: len(gram) + 1] += np.float32(shift)
    if not invert_definite(shifted):
        exact = gram.astype(np.float64) + shift * np.eye(len(gram))
        return np.linalg.inv(exact).astype(np.float32)
    mirror(shifted)
    return shifted


@dataclass
class Schedule:
    """What changes from one iteration to the next; `done` runs from 0 to 1."""

    done: float = 0.0
    share: float = 1.0  # of the squared norm of A that the last regression left over
    fixed_ridge: float | None = None  # instead of one that falls

    damping = DAMPING
    balance = BALANCE

    def at(self, step: float, steps: int, run: Run) -> None:
        """Set `done`; under a time limit the ramp ends in time."""
        self.done = max(step / max(steps - 3, 1), run.window_share())

    def leave(self, share: float) -> None:
        """Set `share`, within its bounds."""
        self.share = min(1.0, max(share, LEAST_SHARE))

    def rounds(self, target: Target, k: int) -> bool:
        """Tell whether products with k columns are made of operands rounded to bfloat16."""
        return self.share > ROUGH_SHARE and target.worth_rounding(k) and has_bfloat16()

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

    def rounds(self, target: Target, k: int) -> bool:
        return False

    @property
    def penalties(self) -> tuple[float, ...]:
        return (min(1.0, self.done) ** 3, *(1.0,) * (self.inner - 1))


def balanced(gram: Array, gauge: Array, balance: float) -> Array:
    """Add the balance penalty's part to a Gram matrix, and return it."""
    if balance:
        weight = np.float32(balance) * gauge
        gram += np.outer(weight, weight)
    return gram


def _regress(
    half: Half,
    Y: Array,
    X: Array,
    block: slice,
    rho: float,
    inverse: RightOperand,
    weight: np.float32,
    fitted: NDArray[np.float64] | None,
    part: slice,
) -> None:
    """Write ``(rho (Z - dual) + Y) inverse`` into a part of a block X, and what it explains."""
    rows = slice(block.start + part.start, block.start + part.stop)
    inverse.multiply(half.point(rows, rho, Y[rows]), slice(0, len(X[part])), X[part])
    if fitted is not None:
        magnitudes.explained(
            X[part], Y[rows], half.Q[rows], half.p[rows], half.q, weight, fitted[rows]
        )


def half_step(target: Target, half: Half, other: Half, schedule: Schedule, balance: float) -> None:
    """Move one factor: regressions on the other, each followed by a projection."""
    N = other.make_basis(schedule.softness)
    rounded = schedule.rounds(target, N.shape[1])
    gram = balanced(target.pool.gram(N, rounded), other.gauge, balance)
    regress(target, half, N, gram, other.gauge, schedule, balance)


def regress(
    target: Target,
    half: Half,
    N: Array,
    gram: Array,
    gauge: Array,
    schedule: Schedule,
    balance: float,
) -> None:
    """Move one factor, given the other's basis N (rows, k), its balanced Gram matrix and gauge."""
    pool = target.pool
    ridge = schedule.ridge
    # the old regression is not needed any more: its place serves Y, and at last the new one
    rounded = schedule.rounds(target, N.shape[1])
    Y = target.product(half.axis, N, half.X, rounded)
    penalties = schedule.penalties
    distinct = sorted(set(penalties))
    inverses = pool.run(lambda rho: inverse_of(gram, ridge + rho), distinct)
    operands = [pool.right(inverse, rounded) for inverse in inverses]
    del inverses  # of which rounded ones take half the room
    fitted = np.zeros(len(Y))
    for step, rho in enumerate(penalties):
        last = step == len(penalties) - 1
        inverse = operands[distinct.index(rho)]
        weight = np.float32(ridge + rho)
        judged = last and bool(target.energy)
        for block in half.row_blocks():
            X = np.empty_like(Y[block])

            regression = partial(_regress, half, Y, X, block, rho, inverse)
            pool.by_rows(X.shape, partial(regression, weight, fitted if judged else None))
            half.blend(block, X, schedule.damping)
            if last:
                half.X[block] = X
        half.project(half.gauge * gauge if last and balance else None)
    if target.energy:
        schedule.leave(1.0 - float(fitted.sum()) / target.energy)


class Sides(Protocol):
    """What the ADMM moves: two halves, and how each regresses on the other."""

    halves: tuple[Half, Half]

    def move(self, axis: int, schedule: Schedule, balance: float) -> None:
        """Move one half."""


class PlainSides:
    """Halves whose rows are independent.

    Parameters
    ----------
    target : Target
    halves : (Half, Half)
    """

    def __init__(self, target: Target, halves: tuple[Half, Half]) -> None:
        self.target, self.halves = target, halves

    def move(self, axis: int, schedule: Schedule, balance: float) -> None:
        half_step(self.target, self.halves[axis], self.halves[1 - axis], schedule, balance)


def _position(first: Half, second: Half, at: dict[str, Any]) -> dict[str, Any]:
    """Return where the iterations stand, for a later run."""
    return {**at, "first": first.pack(), "second": second.pack()}


def iterate(
    sides: Sides, *, shift: float, iterations: int, run: Run, schedule: Schedule, uneven: int = 0
) -> Outcome:
    """Run the ADMM and read its signs out as bits; d2 is not exact for them.

    Parameters
    ----------
    sides : Sides
        Used up: the halves are dropped at the end, for what follows needs the room.
    shift : float
        Alphabet shift; the balance penalty is proportional to ``1 - 2 shift``.
    iterations : int
        Outer iterations; the ramps are spread over them (or over the time limit).
    run : Run
    schedule : Schedule
        Penalties, ridge and blending.
    uneven : int
        Iterations where the components turn out to be of uneven size, if that is more.
    """
    first, second = sides.halves
    second.lasting = ("X",)
    k = first.q.size
    balance = schedule.balance * abs(1.0 - 2.0 * shift)
    turn = int(REGAUGE_AT * iterations)
    i, due, are = 0, iterations, False
    saved = run.journal.resume()
    if saved is not None:
        first.unpack(saved["first"])
        second.unpack(saved["second"])
        schedule.share, are = saved["share"], bool(saved["uneven"])
        i, due = int(saved["iterations"]), int(saved["due"])
    while i < due:
        if balance and i == turn and are_uneven(first, second):
            are = True
            due = max(due, uneven)
            share_gauges(first, second)
        # what is left of the ramps is spread over what is left to do
        ahead = max(i - turn, 0)
        pace = i - ahead + ahead * ((iterations - turn) / (due - turn))
        schedule.at(pace, iterations, run)
        for axis in (0, 1):
            sides.move(axis, schedule, balance)
        i += 1
        if run.step("relaxation", i, due, k) or run.window_share() >= 1.0:
            break
        at = {"iterations": i, "due": due, "uneven": are, "share": schedule.share}
        run.journal.keep(partial(_position, first, second, at))
    return Outcome(read_out(first, second, shift), sweeps=i, uneven=are)


def relax(
    target: Target,
    k: int,
    *,
    shift: float,
    rng: np.random.Generator,
    iterations: int,
    run: Run,
    schedule: Schedule | None = None,
    uneven: int = 0,
    held: Scales | None = None,
) -> Outcome:
    """Find signs by ADMM and read them out as bits.

    Parameters
    ----------
    target : Target
    k : int
        Intermediate dimension.
    shift, iterations, run, schedule, uneven
        As of `iterate`.
    rng : numpy.random.Generator
        Draws the start.
    held : ((m,), (n,)) of float64, optional
        What d1 and d3 stay proportional to; by magnitude.

    Returns
    -------
    Outcome
        With d2 exact for the bits found.

    Notes
    -----
    An iteration costs about ``4 m n k + 5 k^2 (m + n)`` flops and 4 inverses of order k.
    Memory: 2 arrays of (m + n) k float32 beside the target, 4 of order k, and blocks of rows.
    """
    outcome = iterate(
        PlainSides(target, random_halves(target, k, rng, held)),
        shift=shift,
        iterations=iterations,
        run=run,
        schedule=schedule or Schedule(),
        uneven=uneven,
    )
    update_d2(target, outcome.state)
    return outcome
