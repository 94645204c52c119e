"""Several terms: stages with diagonals of their own, from about 1.7 bits a weight on.

``A ~ sum_t D1_t B1_t D2_t B2_t D3_t``. Each term is found on what the *coded* terms before it leave
over, its diagonals on coarse grids, so that each takes up the rounding of those before; then every
term is polished once more on A less all the others. Where stages share d1 and d3
(`diba_np.search.stages`) bits are saved on diagonals, but residuals have rows and columns of other
sizes than the matrix had: at 384 x 384 (attention) and 4 bits terms reach 21.1 dB, stages 19.9.

Smooth matrices, whose components are of uneven size, are the exception: one set of diagonals fits
all of their components. They are recognised by the first term, searched both ways, and the better
is kept. So are small matrices, where diagonals take much of the bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from diba_np.errors import BudgetError
from diba_np.matrix.budgets import bits_within, storage_bits
from diba_np.matrix.diagonals import ScaleBits, Widths
from diba_np.search.conversion import round_diagonals
from diba_np.search.exact_steps import sort_components
from diba_np.search.greedy import settle
from diba_np.search.halves import FEWEST
from diba_np.search.options import SearchOptions
from diba_np.search.outcome import Outcome
from diba_np.search.polish import polish
from diba_np.search.progress import Run
from diba_np.search.stages import relax_part, rest_of
from diba_np.search.state import State, in_unit
from diba_np.search.target import Target

# bits a weight from which terms pay: of square matrices, and how it rises with the sides' ratio
FROM_SQUARE, FROM_SLOPE = 1.7, 0.5  # from + slope log2(ratio): 2.7 at 4:1
# where rows, and columns, are of about the size that chance gives them
FROM_EVEN, FROM_EVEN_SLOPE = 2.25, 0.25
EVEN, CHANCE = 0.06, 1.3  # spread of the logarithms of their norms: at most, and over chance's
# spread along the shorter side from which the other's length is of no matter: what rows of unlike
# size leave over has rows of other sizes, and a few rows cost few diagonals (+3 dB at 24x400)
ROUGH = 1.0
ORTHOGONAL = 0.9  # share of chance's spread under which terms do not pay: norms are too equal
FROM_COUPLED = 3.3  # where inputs couple the columns
MOST_BITS = 1.35  # a weight, of any term; where components are even, and sides of unlike length or
# short, diagonals take more of the bits and fewer terms are better (0.3 to 0.5 dB at 384x96)
MORE_SLOPE, MORE_SHORT = 0.33, 18.0  # times log2(ratio), and times (m + n) / (m n)
WIDTHS: Widths = (3, 3, 3)
# under inputs a term's rounding is not undone by the next, whose errors are weighed otherwise
WIDTHS_COUPLED: Widths = (8, 3, 8)

_RELAXING = 0.7  # share of a term's time for its relaxation, under a time limit
_TERMS = 0.9  # share of a time limit for finding the terms, before they are polished again
_SETTLING = 20  # most passes over all terms


def spread_of(target: Target) -> tuple[float, float, float]:
    """Return how far rows or columns differ in size, the larger of the two, and the shorter side's.

    As the standard deviation of the logarithms of their norms, and over what normal entries alike
    would give; that of the shorter side, rows of a wide matrix, as the first. Reads A once.
    """
    m, n = target.shape
    rows, columns = np.zeros(m), np.zeros(n)
    for at, part in target.blocks(np.float64):
        squares = part * part
        rows[at] = squares.sum(axis=1)
        columns += squares.sum(axis=0)
    spreads = []
    for norms, size in ((rows, n), (columns, m)):
        own = norms[norms > 0]
        spread = float(np.std(np.log(own))) / 2 if own.size else 0.0
        spreads.append((spread, spread * float(np.sqrt(2 * size))))
    return max(s for s, _ in spreads), max(c for _, c in spreads), spreads[m > n][0]


def count_terms(
    bits: float,
    shape: tuple[int, int],
    spread: tuple[float, float, float],
    coupled: bool,
    uneven: bool = False,
) -> int:
    """Return how many terms a matrix is worth at a rate.

    Parameters
    ----------
    bits : float
        Stored bits per weight.
    shape : (int, int)
    spread : (float, float, float)
        As of `spread_of`.
    coupled : bool
        Whether weights couple rows or columns.
    uneven : bool
        Whether the components are known to be of uneven size: then terms are smaller.

    Examples
    --------
    >>> [count_terms(bits, (384, 384), (0.4, 8.0, 0.4), False) for bits in (1, 2, 3, 4)]
    [1, 2, 3, 3]
    >>> [count_terms(bits, (384, 384), (0.04, 1.0, 0.04), False) for bits in (2, 3, 4)]
    [1, 3, 3]
    >>> [count_terms(4, (1536, 384), (0.4, 8.0, 0.4), False, uneven) for uneven in (False, True)]
    [2, 3]
    """
    m, n = shape
    even = spread[0] < EVEN or spread[1] < CHANCE
    least, slope = (FROM_EVEN, FROM_EVEN_SLOPE) if even else (FROM_SQUARE, FROM_SLOPE)
    rough = spread[2] > ROUGH
    ratio = abs(float(np.log2(m / n)))
    least += 0.0 if rough else slope * ratio
    if coupled:
        least = max(least, FROM_COUPLED)
    few = bits * m * n / (m + n) < (2 if rough and not coupled else 4) * FEWEST
    if bits < least or few or spread[1] < ORTHOGONAL:
        return 1
    most = MOST_BITS
    if not (uneven or rough or coupled):
        most += MORE_SLOPE * ratio + MORE_SHORT * (m + n) / (m * n)
    return max(2, int(np.ceil(bits / most)))


def widths_of_terms(count: int, coupled: bool) -> list[ScaleBits]:
    """Return the code widths of each term, where none are given."""
    return [WIDTHS_COUPLED if coupled and not i else WIDTHS for i in range(count)]


def term_sizes(k: int, count: int) -> list[int]:
    """Return equal sizes of `count` terms with the sum k.

    Examples
    --------
    >>> term_sizes(8, 3)
    [3, 3, 2]
    """
    return [k // count + (i < k % count) for i in range(count)]


def _least(shape: tuple[int, int], widths: Sequence[ScaleBits]) -> int:
    """Return the stored bits of terms of one component each."""
    return sum(storage_bits(*shape, 1, own) for own in widths)


def sum_within(stored: int, shape: tuple[int, int], widths: Sequence[ScaleBits]) -> list[int]:
    """Return the sizes of terms with these widths that fit into so many stored bits.

    Raises
    ------
    BudgetError
        Not even one component a term does.
    """
    least = _least(shape, widths)
    if stored < least:
        raise BudgetError(f"{len(widths)} terms take {least} bits at least, the budget is {stored}")
    middle = max(own[1] if isinstance(own, tuple) else own for own in widths)
    k = len(widths) + (stored - least) // (sum(shape) + middle)
    return term_sizes(k, len(widths))


def terms_within(
    count: int, bits: float, shape: tuple[int, int], scale_bits: ScaleBits | str, coupled: bool
) -> int:
    """Return how many of `count` terms fit into so many bits a weight; at least one."""
    for fewer in range(count, 1, -1):
        if isinstance(scale_bits, str):  # "auto"
            widths = widths_of_terms(fewer, coupled)
        else:
            widths = [scale_bits] * fewer
        if _least(shape, widths) <= bits_within(*shape, bits):
            return fewer
    return 1


class TermSum:
    """The terms found so far, each a state in units of the target."""

    def __init__(
        self, target: Target, widths: Sequence[ScaleBits], how: SearchOptions, run: Run
    ) -> None:
        self.target, self.widths, self.how, self.run = target, widths, how, run
        self.states: list[State] = []

    def rest(self, term: int) -> Target:
        """Return what all other terms leave over."""
        others = [s for i, s in enumerate(self.states) if i != term]
        return rest_of(self.target, *others) if others else self.target

    def fit(self, rest: Target, state: State, term: int) -> Outcome:
        """Polish a term on what the others leave over, and bring its diagonals to their grids."""
        own = self.widths[term]
        coded = own if isinstance(own, tuple) else None
        outcome = polish(rest, state, self.run, self.how.tolerance, self.how.work, coded)
        round_diagonals(rest, state, own)  # when stopped too: the bits are for these widths
        return outcome

    def add(self, k: int, rest: Target) -> Outcome:
        """Find one more term on what the others leave over; the outcome of its two stages."""
        term, how, run = len(self.states), self.how, self.run
        share = _TERMS / len(self.widths)
        run.set_window(share * term, share * (term + _RELAXING))
        outcome = relax_part(
            rest,
            k,
            shift=how.shift,
            seed=how.seed,
            part=term,
            iterations=how.iterations(rest.is_coupled),
            uneven=0 if how.max_sweeps is not None else how.work.iterations,
            run=run,
        )
        if run.stopped:
            round_diagonals(rest, outcome.state, self.widths[term])
        else:
            later = run.journal.stage("polish", lambda: self.fit(rest, outcome.state, term))
            outcome = outcome.followed_by(later)
        self.states.append(in_unit(outcome.state, rest.unit, self.target.unit))
        return outcome

    def again(self, term: int, rest: Target) -> Outcome:
        """Polish a term on the matrix less all the others."""
        state = in_unit(self.states[term], self.target.unit, rest.unit)
        outcome = self.run.journal.stage("polish", lambda: self.fit(rest, state, term))
        self.states[term] = in_unit(outcome.state, rest.unit, self.target.unit)
        return outcome


def search_terms(
    target: Target,
    sizes: Sequence[int],
    widths: Sequence[ScaleBits],
    how: SearchOptions,
    run: Run,
) -> Outcome:
    """Find a sum of several terms.

    Parameters
    ----------
    target : Target
    sizes : sequence of int
        Components of each term.
    widths : sequence of int or (int, int, int)
        Bits of the diagonals of each term.
    how : SearchOptions
    run : Run

    Returns
    -------
    Outcome
        With `state` the first term and `others` the rest, all in units of `target`. If the run was
        stopped, terms not begun are left out. `uneven` tells of the first term.

    Notes
    -----
    Costs what a relaxation and a polish of each term cost, and ``2 m n k`` flops a term.
    """
    found = TermSum(target, widths, how, run)
    total = replace(found.add(sizes[0], target), stages=list(sizes))
    uneven, first = total.uneven, target.energy or 1.0
    for k in sizes[1:]:
        rest = found.rest(len(found.states))
        if run.stopped or rest.energy == 0:
            break
        # a term's history is relative to what it was found on
        scale = rest.energy * (rest.unit / target.unit) ** 2 / first
        total = _continued(total, found.add(k, rest), scale)
    for term in range(len(found.states)):
        if run.stopped or len(found.states) == 1:
            break
        rest = found.rest(term)
        scale = rest.energy * (rest.unit / target.unit) ** 2 / first
        total = _continued(total, found.again(term, rest), scale)
    return replace(total, state=found.states[0], others=found.states[1:], uneven=uneven)


def _continued(total: Outcome, later: Outcome, scale: float) -> Outcome:
    """Return both outcomes as one, the history of the later brought to the scale of the first."""
    return total.followed_by(replace(later, history=[scale * error for error in later.history]))


def _settled(rest: Target, state: State, run: Run) -> Outcome:
    settled = settle(rest, state, run)
    return Outcome(state, settled=settled)


def finish_terms(target: Target, outcome: Outcome, run: Run) -> Outcome:
    """Flip single bits of all terms until none improves, unless the time is up; order components.

    Parameters
    ----------
    target : Target
    outcome : Outcome
        Its diagonals rounded to what is stored.
    run : Run
    """
    states = [outcome.state, *outcome.others]
    clean, settled = 0, False
    for step in range(_SETTLING * len(states)):
        if run.stopped or settled:
            break
        term = step % len(states)
        others = [s for i, s in enumerate(states) if i != term]
        rest = rest_of(target, *others)
        state = in_unit(states[term], target.unit, rest.unit)
        before = state.copy()
        ended = run.journal.stage("settle", partial(_settled, rest, state, run))
        state = ended.state
        same = np.array_equal(before.b1, state.b1) and np.array_equal(before.b2, state.b2)
        clean = clean + 1 if same and ended.settled else 0
        settled = clean == len(states)
        states[term] = in_unit(state, rest.unit, target.unit)
    for term in range(len(states)):
        rest = rest_of(target, *(s for i, s in enumerate(states) if i != term))
        state = in_unit(states[term], target.unit, rest.unit)
        sort_components(rest, state)
        states[term] = in_unit(state, rest.unit, target.unit)
    return replace(outcome, state=states[0], others=states[1:], settled=settled)
