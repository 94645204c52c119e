"""Components in stages, where there are more of them than one relaxation can tell apart.

The ADMM decides all signs at once, so its components come out of about equal size. Such a code
gains ever less from more of them: k = 384 components of 384 x 384 normal entries give 9.2 dB, 768
give 14.7. Components of falling size, each stage fitted to what the earlier ones leave over, gain
as much from the fourth bit as from the first: 18.9 dB, in half the time. All have one d1 and one
d3; the polish then moves all bits. With few components stages lose, 0.1 to 0.6 dB at 1 bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from diba_np.arrays import RowIndex
from diba_np.search import relaxation as admm
from diba_np.search.coupled import relax_coupled
from diba_np.search.exact_steps import residuals, update_d2
from diba_np.search.halves import FEWEST, Scales
from diba_np.search.outcome import Outcome
from diba_np.search.progress import RELAXING, Run
from diba_np.search.state import State
from diba_np.search.target import Target
from diba_np.search.weighted_target import WeightedTarget

# components up to which there is one stage, in means sqrt(m n) of the sides: from 1:1 to 4:1;
# flatter matrices change over at 2.7 to 2.9 bits a weight
ONCE, ONCE_COUPLED = 0.88, 0.72
FIRST, MOST_FIRST = 0.7, 1.75  # share of the first of several stages, and its most bits a weight
MOST_NEXT = 0.75  # of each of the others, in sqrt(m n)
MOST_BITS = 2.75  # a weight, of any stage
LEAST = 2 * FEWEST  # components that are more than one stage


def _most(share: float, shape: tuple[int, int]) -> float:
    m, n = shape
    return min(share * float(np.sqrt(m * n)), MOST_BITS * m * n / (m + n))


def stage_sizes(k: int, shape: tuple[int, int], once: float = ONCE) -> list[int]:
    """Return how many of k components each stage has.

    Parameters
    ----------
    k : int
        At least 1.
    shape : (int, int)
    once : float
        `ONCE`, or `ONCE_COUPLED` where weights couple rows or columns.

    Examples
    --------
    >>> stage_sizes(192, (384, 384)), stage_sizes(768, (384, 384))
    ([192], [336, 216, 216])
    """
    if k <= max(_most(once, shape), LEAST):
        return [k]
    m, n = shape
    first = round(min(FIRST * k, MOST_FIRST * m * n / (m + n)))
    # no stage has fewer components than can balance
    first = min(max(first, FEWEST), k - FEWEST)
    rest = k - first
    count = min(int(np.ceil(rest / _most(MOST_NEXT, shape))), max(1, rest // FEWEST))
    return [first, *(rest // count + (i < rest % count) for i in range(count))]


class _Rest(Target):
    """What the sum of some states leaves over of a plain target."""

    def __init__(self, target: Target, *states: State) -> None:
        self._target, self._states = target, states
        self._rights = []
        for state in states:
            other = state.right.scaled()
            other *= state.d2 * target.unit
            self._rights.append(np.ascontiguousarray(other.T))
        super().__init__(target.A, target.pool)

    def read(self, rows: RowIndex) -> Any:
        block = self._target.read(rows)
        for state, right in zip(self._states, self._rights, strict=True):
            block = block - self.pool.matmul(state.left.scaled(rows), right)
        return block


def rest_of(target: Target, *states: State) -> Target:
    """Return what the sum of some states leaves over of a target, as a target of the same kind.

    With weights the residual is held whole, ``8 m n`` bytes.
    """
    if not isinstance(target, WeightedTarget):
        return _Rest(target, *states)
    left_over = np.empty(target.shape)
    for rows, _, E in residuals(target, *states):
        left_over[rows] = E
    left_over *= target.unit
    return WeightedTarget(left_over, target.pool, target.weights)


def _joined(target: Target, state: State, rest: Target, stage: State) -> State:
    """Return a state with the components of what was found for its rest; d2 is solved anew."""
    ratio = rest.unit / target.unit
    for own, new in zip(state.sides, stage.sides, strict=True):
        ratio *= float(np.linalg.norm(new.scales) / np.linalg.norm(own.scales))
        # magnitudes were held: signs of scales go into the bits
        new.bits[own.scales < 0] ^= 1
    joined = replace(
        state,
        b1=np.ascontiguousarray(np.hstack([state.b1, stage.b1])),
        b2=np.ascontiguousarray(np.hstack([state.b2, stage.b2])),
        d2=np.concatenate([state.d2, stage.d2 * ratio]),
    )
    update_d2(target, joined)
    return joined


def _padded(state: State, k: int) -> State:
    """Return a state with components up to k that are switched off."""
    more = k - len(state.d2)
    if not more:
        return state
    b1, b2 = (np.pad(bits, ((0, 0), (0, more))) for bits in (state.b1, state.b2))
    return replace(state, b1=b1, b2=b2, d2=np.pad(state.d2, (0, more)))


def relax_part(
    target: Target,
    k: int,
    *,
    shift: float,
    seed: int,
    part: int,
    iterations: int,
    uneven: int,
    run: Run,
    held: Scales | None = None,
) -> Outcome:
    """Find one of several parts by the ADMM, a stage or a term: that of the target's kind.

    Parameters
    ----------
    target : Target
        What the parts before leave over.
    k, shift, iterations, uneven, run, held
        As of `relaxation.relax`; with weights `uneven` has no meaning.
    seed : int
    part : int
        Its number, from 0: each draws a start of its own.
    """
    how: dict[str, Any] = {
        "shift": shift,
        "rng": np.random.default_rng([seed, part] if part else seed),
        "iterations": iterations,
        "run": run,
        "held": held,
    }
    if isinstance(target, WeightedTarget):
        return run.journal.stage("relaxation", partial(relax_coupled, target, k, **how))
    return run.journal.stage("relaxation", partial(admm.relax, target, k, uneven=uneven, **how))


def relax_staged(
    target: Target,
    k: int,
    *,
    shift: float,
    seed: int,
    iterations: int,
    uneven: int,
    run: Run,
    polish: Callable[[State], Outcome] | None = None,
) -> Outcome:
    """Find signs by the ADMM, in as many stages as k asks for, and read them out as bits.

    Parameters
    ----------
    target : Target
    k : int
        Intermediate dimension.
    shift : float
        Alphabet shift.
    seed : int
    iterations, uneven : int
        Of each stage, as in `relaxation.relax`; with weights `uneven` has no meaning.
    run : Run
    polish : callable, optional
        Improves a state in place, between two stages.

    Returns
    -------
    Outcome
        With d2 exact for the bits found. If the run was stopped, components of stages not begun are
        switched off.

    Notes
    -----
    A stage of k' components costs what `relaxation.relax` or `coupled.relax_coupled` cost for k',
    and from the second on ``12 m n`` bytes and ``2 m n k`` flops; where A is read in blocks no
    bytes, but the flops at every pass over it.
    """
    sizes = stage_sizes(k, target.shape, ONCE_COUPLED if target.is_coupled else ONCE)
    stage = run.journal.stage

    def relaxed(i: int, rest: Target, held: Scales | None) -> Outcome:
        begin, end = (RELAXING * sum(sizes[:j]) / k for j in (i, i + 1))
        run.set_window(begin, end)
        return relax_part(
            rest,
            sizes[i],
            shift=shift,
            seed=seed,
            part=i,
            iterations=iterations,
            uneven=uneven,
            run=run,
            held=held,
        )

    whole = replace(relaxed(0, target, None), stages=sizes)
    for i in range(1, len(sizes)):
        if run.stopped:
            break
        if polish is not None:
            whole = whole.followed_by(stage("polish between", partial(polish, whole.state)))
        rest = rest_of(target, whole.state)
        if rest.energy == 0 or run.stopped:
            break
        later = relaxed(i, rest, (whole.state.d1, whole.state.d3))
        joined = _joined(target, whole.state, rest, later.state)
        whole = whole.followed_by(replace(later, state=joined))
    return replace(whole, state=_padded(whole.state, k))
