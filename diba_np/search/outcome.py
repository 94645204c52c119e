"""`Outcome`: what a solver returns."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from diba_np.search.state import State


@dataclass
class Outcome:
    """What a solver returns.

    Attributes
    ----------
    state : State
        The best found.
    history : list of float
        Relative squared errors, from the start of the polish (or the greedy search) on.
    sweeps : int
        Steps done.
    converged : bool
        Whether the solver ended by its own condition.
    stages : list of int
        Components of each stage of the relaxation.
    uneven : bool
        Whether components came out of uneven size, see `halves.are_uneven`.
    settled : bool
        Whether no single flip improves what is stored.
    others : list of State
        The further terms of a sum of which `state` is the first, see `diba_np.search.terms`.
    """

    state: State
    history: list[float] = field(default_factory=list)
    sweeps: int = 0
    converged: bool = False
    stages: list[int] = field(default_factory=list)
    uneven: bool = False
    settled: bool = False
    others: list[State] = field(default_factory=list)

    @property
    def terms(self) -> list[State]:
        """All terms; mostly one."""
        return [self.state, *self.others]

    def missing(self) -> str:
        """Tell of terms, or of components of stages, that an ended search did not come to."""
        found = sum(int(np.count_nonzero(term.d2)) for term in self.terms)
        asked = sum(self.stages)
        return f"; {found} of its {asked} components were begun" if found < asked else ""

    def followed_by(self, later: Outcome) -> Outcome:
        """Return what the two solvers did, one after the other."""
        return Outcome(
            later.state,
            [*self.history, *later.history],
            self.sweeps + later.sweeps,
            later.converged,
            self.stages or later.stages,
            self.uneven or later.uneven,
            later.settled,
        )
