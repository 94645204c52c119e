"""Exact flips after a relaxation: walks over each row's bits, and scales, in turn."""

from __future__ import annotations

from functools import partial

from diba_np.kernels.flips import sweep_tabu, sweep_tabu_par
from diba_np.matrix.diagonals import Widths
from diba_np.search.progress import Monitor
from diba_np.search.relaxation import Effort
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

_TABU = (sweep_tabu, sweep_tabu_par)

FREE_ROUNDS = 2  # before the diagonals move to their grids


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
            del equations  # the other side's need the room
        error = update_d2(target, state)
        monitor.half_step(error)
        if monitor.step("polish", round_, effort.rounds, error):
            return
        coded = widths is None or state.grids is not None
        if coded and before - error <= tol * before:
            break
        monitor.keep(partial(pack_loop, state, rounds=round_, error=error))
    monitor.converged = True
