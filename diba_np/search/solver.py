"""`Solver`: the chosen solver on one target, at one k or at the smallest that is good enough."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from diba_np.errors import BudgetError
from diba_np.matrix import budgets
from diba_np.matrix.budgets import bits_within, rate_of, storage_bits
from diba_np.matrix.diagonals import ScaleBits
from diba_np.matrix.factors import DiBAFactors
from diba_np.matrix.quality import decibels
from diba_np.search.conversion import round_diagonals, state_of
from diba_np.search.exact_steps import sort_components, squared_error
from diba_np.search.greedy import settle, solve_greedy
from diba_np.search.leading import Leading
from diba_np.search.options import SearchOptions
from diba_np.search.outcome import Outcome
from diba_np.search.pilot import choose_widths, estimate_k
from diba_np.search.polish import polish
from diba_np.search.progress import Run
from diba_np.search.rank_one import EXACT_DB, rank_one, widened
from diba_np.search.stages import relax_staged
from diba_np.search.state import State
from diba_np.search.target import Target
from diba_np.search.terms import finish_terms, search_terms, sum_within, term_sizes, widths_of_terms
from diba_np.search.weighted_target import reached_db

# components a term under which one term may be better, by 7 dB at 24x24 and 8 bits, 0.7 dB at 96x96
# and 3 bits; and where inputs couple the columns, 0.1 dB at 128x128 and 4 bits
_FEW, _FEW_COUPLED = 64, 96


class Solver:
    """The chosen solver on one target.

    Parameters
    ----------
    target : Target
    how : SearchOptions
    scale_bits : int or (int, int, int)
        Of the diagonals, "auto" settled.
    init : DiBAFactors or None
        Where to start.
    run : Run
    leading : Leading, optional
        The terms that leave the target over.
    """

    def __init__(
        self,
        target: Target,
        how: SearchOptions,
        scale_bits: ScaleBits,
        init: DiBAFactors | None,
        run: Run,
        leading: Leading | None = None,
    ) -> None:
        self.target, self.how, self.init, self.run = target, how, init, run
        self._before = leading.reached if leading else 0.0  # dB, of a goal
        self._known = leading.simple if leading else None
        self._given = scale_bits
        self._take(scale_bits)
        self._terms: list[ScaleBits] = []  # bits of the diagonals of each, where there are several
        self._more: list[ScaleBits] = []  # the same of more of them, for uneven components
        self._auto = False
        self._budget: tuple[str, Any] = ("", None)

    def set_terms(self, count: int, auto: bool, name: str, value: Any, more: int) -> None:
        """Search for so many terms from now on, with `auto` in code widths of their own.

        `name` and `value` are the budget: where it counts bits, all terms together take no more.
        Where components come out of uneven size, `more` terms are tried too.
        """
        coupled = self.target.is_coupled
        self._terms, self._more = (
            widths_of_terms(size, coupled) if auto else [self.scale_bits] * size
            for size in (count, more)
        )
        self._auto, self._budget = auto, (name, value)

    @functools.cached_property
    def _simple(self) -> State:
        """The rank-one fit."""
        return self._known or rank_one(self.target, self.how.shift)

    def _take(self, scale_bits: ScaleBits) -> None:
        """Search for a single term with diagonals of these bits from now on."""
        self.scale_bits = scale_bits
        self.widths = scale_bits if isinstance(scale_bits, tuple) else None

    def at(self, k: int) -> Outcome:
        """Run the solver at one k."""
        self._take(self._given)  # a later run may not go through the k tried before
        target, how = self.target, self.how
        if not self._terms or (k < len(self._terms) and how.terms == "auto"):
            return self._single(k)
        simple = self._simple
        # widths that are left open will be such that hold it
        error = squared_error(target, simple) if self._auto else self._stored_error(simple)
        if decibels(target.energy, error) >= EXACT_DB:
            return self._alone(k)
        try:
            sizes = self._sizes(k, self._terms)
        except BudgetError:
            if how.terms != "auto":
                raise
            return self._alone(k)
        best = search_terms(target, sizes, self._terms, how, self.run)
        # one set of diagonals may fit uneven components better, and takes fewer of few bits
        few = _FEW_COUPLED if target.is_coupled else _FEW
        doubtful = best.uneven or max(sizes) < few
        if not doubtful or how.terms != "auto":
            return best
        more: list[int] = []
        with suppress(BudgetError):  # an SNR's k may hold no more terms
            more = self._sizes(k, self._more)
        if best.uneven and len(more) > len(sizes) and not self.run.time_limit:
            best = self._better(best, lambda: search_terms(target, more, self._more, how, self.run))
        return self._better(best, lambda: self._alone(k))

    def _better(self, best: Outcome, search: Callable[[], Outcome]) -> Outcome:
        """Return the better of an outcome and that of one more search, unless time is up."""
        if self.run.stopped:
            return best
        other = search()
        sweeps = best.sweeps + other.sweeps
        if squared_error(self.target, *other.terms) < squared_error(self.target, *best.terms):
            best = other
        return replace(best, sweeps=sweeps)

    def _sizes(self, k: int, terms: Sequence[ScaleBits]) -> list[int]:
        """Return the sizes of terms for the budget, or in the bits of a single term of k."""
        name, value = self._budget
        m, n = self.target.shape
        if name == "k":
            return term_sizes(k, len(terms))
        if name == "snr":
            stored = storage_bits(m, n, k, self.scale_bits)
        else:
            stored = bits_within(m, n, rate_of(name, value))
        return sum_within(stored, (m, n), terms)

    def _least(self) -> int:
        """Return the smallest k whose bits hold a component of each term."""
        if self.how.terms == "auto" or not self._terms:
            return 1
        m, n = self.target.shape
        empty, one = (storage_bits(m, n, k, self.scale_bits) for k in (0, 1))
        needed = sum(storage_bits(m, n, 1, own) for own in self._terms)
        return max(1, -((empty - needed) // (one - empty)))

    def _alone(self, k: int) -> Outcome:
        """Run the solver for a single term instead, rounded to the widths that its k is for."""
        outcome = self._single(self._single_size(k))
        round_diagonals(self.target, outcome.state, self.scale_bits)
        return outcome

    def _single_size(self, k: int) -> int:
        """Choose the code widths of a single term instead; return its k."""
        if self._auto:
            self._take(choose_widths(self.target, k, self.how.shift, self.how.seed))
        name, value = self._budget
        if name == "snr":
            return k
        return budgets.intermediate_dimension(name, value, self.target.shape, self.scale_bits)

    def _single(self, k: int) -> Outcome:
        """Run the solver for a single term."""
        target, how, run = self.target, self.how, self.run
        start = None if self.init is None else state_of(self.init, target.unit, self.widths)
        if how.greedy:
            return solve_greedy(
                target,
                k,
                shift=how.shift,
                rng=np.random.default_rng(how.seed),
                max_sweeps=how.sweeps,
                tol=how.tolerance,
                run=run,
                start=start,
            )
        if start is not None:
            return run.journal.stage("polish", lambda: self._polished(start))
        simple = self._simple
        floor = self._stored_error(simple)
        if decibels(target.energy, floor) >= EXACT_DB:
            run.step("rank one", 1, 1, k, floor / (target.energy or 1.0))
            return Outcome(widened(simple, k), sweeps=1, converged=True)
        capped = how.max_sweeps is not None
        best = self._relaxed(k, how.iterations(target.is_coupled), 0 if capped else how.work.uneven)
        if best.uneven and how.work.also and not (capped or run.stopped or run.time_limit):
            also = replace(how, effort=how.work.also)
            other = self._relaxed(k, also.iterations(target.is_coupled), also.work.uneven)
            sweeps = best.sweeps + other.sweeps
            if squared_error(target, other.state) < squared_error(target, best.state):
                best = other
            best = replace(best, sweeps=sweeps)
        if floor < squared_error(target, best.state):  # which lies on its grids, if it has some
            best = replace(best, state=widened(simple, k))
        return best

    def _stored_error(self, state: State) -> float:
        """Return the squared error of a state once its diagonals are codes, if they are to be."""
        if self.widths is None:  # floats of 16 bits hold 70 dB
            return squared_error(self.target, state)
        stored = state.copy()
        round_diagonals(self.target, stored, self.scale_bits)
        return squared_error(self.target, stored)

    def _polished(self, state: State) -> Outcome:
        how = self.how
        return polish(self.target, state, self.run, how.tolerance, how.work, self.widths)

    def _polished_once(self, state: State) -> Outcome:
        """Polish between two stages: one round, diagonals free."""
        once = replace(self.how.work, rounds=1)
        return polish(self.target, state, self.run, self.how.tolerance, once)

    def _relaxed(self, k: int, iterations: int, uneven: int) -> Outcome:
        """Find signs by the ADMM and polish the bits that they are read out as."""
        relaxed = relax_staged(
            self.target,
            k,
            shift=self.how.shift,
            seed=self.how.seed,
            iterations=iterations,
            uneven=uneven,
            run=self.run,
            polish=self._polished_once,
        )
        if self.run.stopped:
            return relaxed
        return relaxed.followed_by(
            self.run.journal.stage("polish", lambda: self._polished(relaxed.state))
        )

    def reaching(self, goal: float) -> Outcome:
        """Run the solver at the smallest k that reaches `goal` dB."""
        best: dict[int, Outcome] = {}

        def rounded(k: int) -> Outcome:
            outcome = self.at(k)
            if not outcome.others:
                round_diagonals(self.target, outcome.state, self.scale_bits)
            return outcome

        def reach(k: int) -> float:
            best[k] = self.run.journal.stage(f"k={k}", lambda: rounded(k))
            if self.run.stopped:
                raise _Ended
            return self._before + reached_db(self.target, *best[k].terms)

        shape, how = self.target.shape, self.how
        first, slope = estimate_k(self.target, goal - self._before, how.shift, how.seed)
        least = self._least()
        try:
            return best[budgets.smallest_k(reach, goal, shape, first, slope, least)]
        except _Ended:
            reached = {
                k: self._before + reached_db(self.target, *outcome.terms)
                for k, outcome in best.items()
            }
            enough = [k for k in best if reached[k] >= goal]
            return best[min(enough) if enough else max(best, key=lambda k: reached[k])]


class _Ended(Exception):
    """The time limit or the callback has ended the search for the smallest k."""


def finish(target: Target, outcome: Outcome, run: Run, scale_bits: ScaleBits) -> Outcome:
    """Round what will be stored and flip what still improves, unless the time is up."""
    if outcome.others:
        return finish_terms(target, outcome, run)
    state = outcome.state
    round_diagonals(target, state, scale_bits)
    settled = not run.stopped and settle(target, state, run)
    sort_components(target, state)
    return replace(outcome, settled=settled)
