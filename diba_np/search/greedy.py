"""DiBA-Greedy as published: closed-form diagonals and exact one-bit tests (arXiv 2605.05994)."""

from __future__ import annotations

from functools import partial

import numpy as np

from diba_np.kernels.flips import sweep_fixed, sweep_fixed_par, sweep_joint, sweep_joint_par
from diba_np.search.progress import Monitor
from diba_np.search.state import (
    State,
    pack_loop,
    sweep,
    unpack_state,
    update_d2,
    update_row_scales,
)
from diba_np.search.target import Target

_JOINT = (sweep_joint, sweep_joint_par)
_FIXED = (sweep_fixed, sweep_fixed_par)

# passes over a row before its scale and the other side move again
_PASSES = 4

# of the squared norm of A: what an exact step may seem to lose
_ROUNDING = 1e-12


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
    monitor: Monitor,
    start: State | None = None,
) -> State:
    """Alternate [B1 and d1, d2, B2 and d3, d2] until no bit flips.

    The published method leaves the order of the steps, the start and the end open; here a flip is
    judged with its row's scale re-optimised, which is the stronger of the two exact tests.

    Parameters
    ----------
    target : Target
    k : int
        Intermediate dimension.
    max_sweeps : int
        Most rounds over both sides.
    tol : float
        Also end when a round lowers the squared error by less than this share of it. With 0 the
        end is a state in which no single flip improves.
    monitor : Monitor
        Takes the squared error after every half step; may end the search.
    start : State, optional
        Modified in place; random without it.

    Returns
    -------
    State
        ``monitor.converged`` tells whether the end condition was met.

    Notes
    -----
    A round costs about ``8 m n k`` flops and O((m + n) k) a pass of tests.
    """
    state = random_state(target.shape, k, shift, rng) if start is None else start
    kept_before = monitor.resume()
    if kept_before is None:
        done, error = 0, update_d2(target, state)
        monitor.step("greedy", 0, max_sweeps, error)
    else:
        done, error = kept_before["rounds"], kept_before["error"]
        state.take(unpack_state(kept_before["state"]))
    for round_ in range(done + 1, max_sweeps + 1):
        before, flips = error, 0
        for left in (True, False):
            kept = state.copy()
            found = sweep(target, state, left, _JOINT, _PASSES, shift)
            update_row_scales(target, state, left)
            reached = update_d2(target, state)
            if reached > error + _ROUNDING * target.energy:
                # rows that nearly cancel are judged by differences that rounding has eaten
                for name in ("d1", "b1", "d2", "b2", "d3"):
                    setattr(state, name, getattr(kept, name))
                found, reached = 0, error
            flips += found
            error = reached
            monitor.half_step(error)
        if monitor.step("greedy", round_, max_sweeps, error):
            return state
        if flips == 0 or (tol > 0 and before - error <= tol * before):
            monitor.converged = True
            return state
        monitor.keep(partial(pack_loop, state, rounds=round_, error=error))
    return state


def settle(target: Target, state: State, monitor: Monitor, most_rounds: int = 1000) -> bool:
    """Flip single bits at the diagonals as they are until none improves; return whether so.

    Run on rounded diagonals this makes the end condition hold for what is stored.
    """
    done, clean = 0, 0  # clean: sides in a row that needed nothing
    kept = monitor.resume()
    if kept is not None:
        done, clean = kept["rounds"], kept["clean"]
        state.take(unpack_state(kept["state"]))
    for round_ in range(done, 2 * most_rounds):
        clean = clean + 1 if sweep(target, state, round_ % 2 == 0, _FIXED, 1000) == 0 else 0
        if clean == 2:
            return True
        monitor.keep(partial(pack_loop, state, rounds=round_ + 1, clean=clean))
    return False
