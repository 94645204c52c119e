"""DiBA-Greedy as published: closed-form diagonals and exact one-bit tests (arXiv 2605.05994)."""

from __future__ import annotations

from functools import partial

import numpy as np

from diba_np.search.exact_steps import sweep, update_d2, update_row_scales
from diba_np.search.moves import FixedFlips, JointFlips
from diba_np.search.outcome import Outcome
from diba_np.search.progress import Run
from diba_np.search.state import State, pack_loop, unpack_state
from diba_np.search.target import Target

# passes over a row before its scale and the other side move again
_PASSES = 4

_MOST_SIDES = 2000  # that `settle` goes over

# of the squared norm of A: what an exact step may seem to lose
_ROUNDING = 1e-12

# rounds that may gain nothing but rounding
_STALLED = 8


def random_state(shape: tuple[int, int], k: int, shift: float, rng: np.random.Generator) -> State:
    """Return fair random bits with unit d1 and d3 and random signs in d2."""
    m, n = shape
    return State(
        d1=np.ones(m),
        b1=rng.integers(0, 2, (m, k), dtype=np.uint8),
        d2=rng.choice(np.array([-1.0, 1.0]), k),
        b2=rng.integers(0, 2, (n, k), dtype=np.uint8),
        d3=np.ones(n),
        shift=shift,
    )


def solve_greedy(
    target: Target,
    k: int,
    *,
    shift: float,
    rng: np.random.Generator,
    max_sweeps: int,
    tol: float,
    run: Run,
    start: State | None = None,
) -> Outcome:
    """Alternate [B1 and d1, d2, B2 and d3, d2] until no bit flips.

    The published method leaves the order of the steps, the start and the end open; here a flip is
    judged with its row's scale re-optimised, which is the stronger of the two exact tests.

    Parameters
    ----------
    target : Target
    k : int
        Intermediate dimension.
    shift : float
        A bit b stands for b - shift.
    rng : numpy.random.Generator
        Draws the start, where none is given.
    max_sweeps : int
        Most rounds over both sides.
    tol : float
        Also end when a round lowers the squared error by less than this share of it. With 0 the
        end is a state in which no single flip improves, but for rounding.
    run : Run
    start : State, optional
        Modified in place; random without it.

    Returns
    -------
    Outcome
        Its history has the squared error after every half step.

    Notes
    -----
    A round costs about ``8 m n k`` flops and O((m + n) k) a pass of tests.
    """
    state = random_state(target.shape, k, shift, rng) if start is None else start
    energy = target.energy or 1.0
    saved = run.journal.resume()
    if saved is None:
        done, error = 0, update_d2(target, state)
        history = [error / energy]
        if run.step("greedy", 0, max_sweeps, k, history[0]):
            return Outcome(state, history, 0)
    else:
        done, error, history = saved["rounds"], saved["error"], list(saved["history"])
        state.take(unpack_state(saved["state"]))
    move = JointFlips(_PASSES, shift)
    for round_ in range(done + 1, max_sweeps + 1):
        before, flips, done = error, 0, round_
        for side in state.sides:
            last = state.copy()
            count = sweep(target, side, move)
            update_row_scales(target, side)
            reached = update_d2(target, state)
            if reached > error + _ROUNDING * target.energy:
                # rows that nearly cancel are judged by differences that rounding has eaten
                state.take(last)
                count, reached = 0, error
            flips += count
            error = reached
            history.append(error / energy)
        if run.step("greedy", round_, max_sweeps, k, error / energy):
            return Outcome(state, history, done)
        # flips may go to and fro for ever on rounding alone
        stalled = (
            len(history) > 2 * _STALLED and history[-1 - 2 * _STALLED] - error / energy <= _ROUNDING
        )
        if flips == 0 or stalled or (tol > 0 and before - error <= tol * before):
            return Outcome(state, history, done, converged=True)
        run.journal.keep(partial(pack_loop, state, rounds=done, error=error, history=history))
    return Outcome(state, history, done)


def settle(target: Target, state: State, run: Run) -> bool:
    """Flip single bits at the diagonals as they are until none improves; return whether so.

    Run on rounded diagonals this makes the end condition hold for what is stored.
    """
    done, clean = 0, 0  # clean: sides in a row that needed nothing
    saved = run.journal.resume()
    if saved is not None:
        done, clean = saved["rounds"], saved["clean"]
        state.take(unpack_state(saved["state"]))
    move = FixedFlips(1000)
    for round_ in range(done, _MOST_SIDES):
        clean = clean + 1 if sweep(target, state.sides[round_ % 2], move) == 0 else 0
        if clean == 2:
            return True
        run.journal.keep(partial(pack_loop, state, rounds=round_ + 1, clean=clean))
    return False
