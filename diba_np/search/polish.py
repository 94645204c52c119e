"""Exact flips after a relaxation: walks over each row's bits, and scales, in turn."""

from __future__ import annotations

from functools import partial

from diba_np.matrix.diagonals import Widths
from diba_np.search.exact_steps import fit_grids, normal_equations, squared_error, update_d2, walk
from diba_np.search.moves import Walks
from diba_np.search.options import Effort
from diba_np.search.outcome import Outcome
from diba_np.search.progress import Run
from diba_np.search.state import State, pack_loop, unpack_state
from diba_np.search.target import Target

_ROUGH = 1e-3  # share of the energy left over above which float32 tells flips apart
FREE_ROUNDS = 2  # before the diagonals move to their grids


def polish(
    target: Target,
    state: State,
    run: Run,
    tol: float,
    effort: Effort,
    widths: Widths | None = None,
) -> Outcome:
    """Improve a state by walks over each row's bits, row scales and d2 in turn.

    Ends when a round lowers the squared error by less than the share `tol` of it. With `widths`
    the diagonals move to grids after `FREE_ROUNDS` rounds, and bits and diagonals adapt to them.

    Parameters
    ----------
    target : Target
    state : State
        Modified in place; that of the outcome.
    run : Run
    tol : float
    effort : Effort
        Most rounds, and how long a walk is.
    widths : (int, int, int), optional
        Code widths of d1, d2 and d3.

    Notes
    -----
    A round costs ``6 m n k + 5 k^2 (m + n)`` flops in float64 and O(k) for each move of a walk.
    """
    k, energy = len(state.d2), target.energy or 1.0
    saved = run.journal.resume()
    if saved is None:
        done, error = 0, squared_error(target, state)
        history = [error / energy]
        if run.step("polish", 0, effort.rounds, k, history[0]):
            return Outcome(state, history, 0)
    else:
        done, error, history = saved["rounds"], saved["error"], list(saved["history"])
        state.take(unpack_state(saved["state"]))
    walks = Walks(effort.moves, effort.patience, state.shift)
    for round_ in range(done + 1, effort.rounds + 1):
        before, done = error, round_
        target.rough = error > _ROUGH * energy
        if widths is not None and state.grids is None and round_ > FREE_ROUNDS:
            before = fit_grids(target, state, widths)
        for side in state.sides:
            equations = normal_equations(target, side)
            walk(target, side, walks, equations)
            del equations  # the other side's need the room
        error = update_d2(target, state)
        target.rough = False
        history.append(error / energy)
        if run.step("polish", round_, effort.rounds, k, history[-1]):
            return Outcome(state, history, done)
        coded = widths is None or state.grids is not None
        if coded and before - error <= tol * before:
            break
        run.journal.keep(partial(pack_loop, state, rounds=done, error=error, history=history))
    return Outcome(state, history, done, converged=True)
