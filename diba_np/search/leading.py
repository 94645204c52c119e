"""Leading terms: what one component holds most of a matrix is a term of its own.

A mean, an outlier, one strong direction: components of one search come out of about equal size, and
a large one among them takes up what the others could have told. Coded apart, of a single component,
it leaves the rest to a search of its own (``scripts/bench_terms.py --kinds --bits 1 2 4``).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from diba_np.matrix.budgets import storage_bits
from diba_np.matrix.diagonals import HALF, MOST_CODE, SINGLE, ScaleBits
from diba_np.matrix.quality import decibels
from diba_np.search.conversion import round_diagonals
from diba_np.search.exact_steps import squared_error
from diba_np.search.outcome import Outcome
from diba_np.search.pilot import SLOPE, row_losses
from diba_np.search.rank_one import EXACT_DB, rank_one
from diba_np.search.stages import rest_of
from diba_np.search.state import State, in_unit
from diba_np.search.target import Target
from diba_np.search.weighted_target import reached_db

# dB that a term gains beyond what its bits would gain elsewhere; with less, some matrices lose 0.2
_LEAST_DB = 2.8
# dB from which a search without it is not better, and needs no trial. Where inputs couple the
# columns a trial is dear: a layer's keys, whose term holds 6 to 8 dB, would gain 0.1 to 0.3
_CLEAR_DB = 10.0
_MOST_TERMS = 4
_MOST_BITS = 0.5  # share of the bits that a term may take of those that are left


@dataclass
class Leading:
    """The leading terms of a matrix, and what is left to search.

    Attributes
    ----------
    states : list of State
        In units of the matrix, on what is stored of them.
    widths : list of int or (int, int, int)
        Bits of their diagonals.
    rest : Target
        What they leave over.
    bits : int
        What they take.
    reached : float
        Their SNR in dB, as a goal counts it.
    simple : State or None
        The rank-one fit of the rest, if it was made.
    enough : bool
        Whether nothing is left to search: the fit is exact, the goal reached, or no bits are left.
    """

    rest: Target
    states: list[State] = field(default_factory=list)
    widths: list[ScaleBits] = field(default_factory=list)
    bits: int = 0
    reached: float = 0.0
    simple: State | None = None
    enough: bool = False

    @property
    def is_doubtful(self) -> bool:
        """Whether a search of all at once may be better: each of them is not far above the rest."""
        alone = self.enough and len(self.states) == 1
        return 0 < self.reached < _CLEAR_DB * len(self.states) and not alone

    def outcome(self) -> Outcome:
        """Return the leading terms as what a search has found."""
        return Outcome(self.states[0], sweeps=1, converged=True, others=self.states[1:])

    def followed_by(self, later: Outcome, target: Target) -> Outcome:
        """Return them and the terms that were found for the rest, in units of the matrix."""
        own = [in_unit(state, self.rest.unit, target.unit) for state in later.terms]
        share = 10 ** (-self.reached / 10)  # which the later errors are relative to
        history = [share * error for error in later.history]
        others = [*self.states[1:], *own]
        stages = [*(1 for _ in self.states), *later.stages]
        return replace(later, state=self.states[0], others=others, history=history, stages=stages)


def leading_terms(target: Target, shift: float, stored: float, goal: float, least: int) -> Leading:
    """Find the leading terms of a matrix; most have none.

    Parameters
    ----------
    target : Target
    shift : float
    stored : float
        Bits for all of the factorization; infinite if an SNR is to be reached.
    goal : float
        That SNR, in dB; infinite if there is none.
    least : int
        Bits that the search for the rest needs.
    """
    found = Leading(target)
    while len(found.states) < _MOST_TERMS and found.rest.energy and not found.enough:
        rest = found.rest
        found.simple = simple = rank_one(rest, shift)
        error = squared_error(rest, simple)
        if decibels(rest.energy, error) < _least_db(target):
            break
        left = stored - found.bits
        exact = decibels(rest.energy, error) >= EXACT_DB
        most = left if exact else min(_MOST_BITS * left, left - least)
        coded = _coded(rest, simple, error, most, goal - found.reached)
        if coded is None:
            break
        state, widths = coded
        found.states.append(in_unit(state, rest.unit, target.unit))
        found.widths.append(widths)
        found.bits += storage_bits(*target.shape, 1, widths)
        found.rest, found.simple = rest_of(target, *found.states), None
        found.reached = reached_db(target, *found.states)
        found.enough = found.reached >= min(goal, EXACT_DB) or stored - found.bits < least
    return found


def _least_db(target: Target) -> float:
    return _CLEAR_DB if target.is_coupled else _LEAST_DB


def _coded(
    rest: Target, simple: State, error: float, most: float, goal: float
) -> tuple[State, ScaleBits] | None:
    """Return a component as it is stored, in the widths that pay most; None if none does."""
    m, n = rest.shape
    floor = max(error, 10 ** (-EXACT_DB / 10) * rest.energy)
    own = []
    for side, size in zip(simple.sides, (m, n), strict=True):
        cost = {
            width: 10 * float(np.log10(1 + loss / floor)) + SLOPE * width * size / (m * n)
            for width, loss in row_losses(rest, side).items()
        }
        own.append(min(cost, key=lambda width: cost[width]))
    best: tuple[float, State, ScaleBits] | None = None
    for widths in ((own[0], MOST_CODE, own[1]), HALF, SINGLE):
        bits = storage_bits(m, n, 1, widths)
        if bits > most:
            continue
        state = simple.copy()
        round_diagonals(rest, state, widths)
        reached = decibels(rest.energy, max(squared_error(rest, state), floor))
        worth = reached - SLOPE * bits / (m * n)
        if reached >= goal:  # widths rise
            return state, widths
        if worth >= (_least_db(rest) if best is None else best[0]):
            best = worth, state, widths
    return None if best is None else (best[1], best[2])
