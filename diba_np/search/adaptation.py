"""`adapt`: a factorization that is near a matrix, such as a truncated one, made to fit it."""

from __future__ import annotations

from numpy.typing import ArrayLike

from diba_np.checks import as_matrix, check_largest
from diba_np.machine.thread_pool import ThreadPool
from diba_np.matrix.factors import DiBAFactors
from diba_np.search.conversion import round_diagonals, state_of, sum_of
from diba_np.search.exact_steps import sort_components, update_d2, update_row_scales
from diba_np.search.options import SearchOptions
from diba_np.search.polish import polish
from diba_np.search.progress import Run
from diba_np.search.state import State
from diba_np.search.target import Target
from diba_np.search.terms import TermSum

_HOW = SearchOptions(effort="fast", tol=1e-3)
_ROUNDS = 4  # of the diagonals alone, before the bits of a single term move


def adapt(factors: DiBAFactors, A: ArrayLike) -> DiBAFactors:
    """Fit the diagonals to `A` again, then polish bits and diagonals; same `scale_bits`, no bias.

    Several terms one after another, each to what the others leave over. Costs a few rounds of the
    polish of "fast".
    """
    matrix = as_matrix(A)
    if matrix.shape != factors.shape:
        raise ValueError(f"A must have shape {factors.shape}, got {matrix.shape}")
    with ThreadPool() as pool:
        target = Target(matrix, pool)
        check_largest(target.largest, "A")
        fit = _adapt_terms if len(factors.terms) > 1 else _adapt_single
        return sum_of(fit(target, factors), target.unit, factors.record)


def _adapt_single(target: Target, factors: DiBAFactors) -> list[State]:
    bits = factors.scale_bits
    state = state_of(factors, target.unit, None)
    for _ in range(_ROUNDS):
        update_d2(target, state)
        for side in state.sides:
            update_row_scales(target, side)
    widths = bits if isinstance(bits, tuple) else None
    polish(target, state, Run(), _HOW.tolerance, _HOW.work, widths)
    round_diagonals(target, state, bits)
    sort_components(target, state)
    return [state]


def _adapt_terms(target: Target, factors: DiBAFactors) -> list[State]:
    widths = [term.scale_bits for term in factors.terms]
    terms = TermSum(target, widths, _HOW, Run())
    terms.states = [
        state_of(term, target.unit, own if isinstance(own, tuple) else None)
        for term, own in zip(factors.terms, widths, strict=True)
    ]
    for term in range(len(widths)):
        terms.again(term, terms.rest(term))
    return terms.states
