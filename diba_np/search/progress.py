"""`Run`: a search while it runs, with what looks on, keeps the time and may end it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from diba_np.machine.display import Display
from diba_np.search.journal import Journal

# objective values kept in a record; more are thinned out evenly
HISTORY = 64

# the share of a time limit that relaxations may take; the rest is for the polish
RELAXING = 0.8

_SECONDS_BETWEEN_LINES = 3.0


@dataclass(frozen=True)
class SearchState:
    """What a callback is given.

    Attributes
    ----------
    phase : str
        Name of the stage: "greedy", "relaxation", "polish".
    step, steps : int
        Steps done and the most that may follow, in this phase.
    k : int
        Intermediate dimension searched at.
    relative_error : float or None
        ``|A - A_hat|_F^2 / |A|_F^2``, where the stage knows it.
    seconds : float
        Since the search began.
    """

    phase: str
    step: int
    steps: int
    k: int
    relative_error: float | None
    seconds: float


class Run:
    """One call of `factorize` as its solvers see it: looks on, keeps time, may say stop.

    Parameters
    ----------
    progress : bool
        Show a tqdm bar where tqdm is installed, else a line every few seconds, on standard error.
    callback : callable, optional
        Called with a `SearchState` after every step; a true return value ends the search.
    time_limit : float, optional
        Seconds after which the search ends with the best found so far; those of earlier runs that
        the journal tells of are counted.

    Attributes
    ----------
    journal : Journal
        What is done, for a later run.
    stopped : str
        Why the search was ended early: "time_limit", "callback" or nothing.
    """

    def __init__(
        self,
        progress: bool = False,
        callback: Callable[[SearchState], Any] | None = None,
        time_limit: float | None = None,
    ) -> None:
        self.journal = Journal(self)
        self.started = time.monotonic()
        self.callback = callback
        self.time_limit = time_limit
        self.stopped = ""
        self._window = (0.0, RELAXING)
        self._display = Display(pause=_SECONDS_BETWEEN_LINES) if progress else None

    # -- time --------------------------------------------------------------------------------------

    @property
    def seconds(self) -> float:
        """Seconds since the call began."""
        return time.monotonic() - self.started

    def set_window(self, begin: float, end: float) -> None:
        """Set what the relaxation under way may take, as shares of the time limit."""
        self._window = (begin, end)

    def window_share(self) -> float:
        """Return the share of the window that is used; 0 without a limit."""
        if not self.time_limit:
            return 0.0
        begin, end = self._window
        return max(0.0, (self.seconds / self.time_limit - begin) / (end - begin))

    # -- steps -------------------------------------------------------------------------------------

    def step(self, phase: str, step: int, steps: int, k: int, error: float | None = None) -> bool:
        """Report a step and the relative squared error after it; return whether to end now."""
        if self._display is not None:
            reached = "" if error is None else f", relative error {error:.4g}"
            self._display.show(step, steps, f"{phase} k={k}", f"{self.seconds:.0f} s{reached}")
        if self.callback is not None:
            if self.callback(SearchState(phase, step, steps, k, error, self.seconds)):
                self.stopped = "callback"
        if self.time_limit is not None and self.seconds >= self.time_limit:
            self.stopped = self.stopped or "time_limit"
        return bool(self.stopped)

    def close(self) -> None:
        """End the progress display."""
        if self._display is not None:
            self._display.close()

    # -- for the journal ---------------------------------------------------------------------------

    def clock(self) -> dict[str, Any]:
        """Return the time spent and why the run was ended, for a later run."""
        return {"seconds": self.seconds, "stopped": self.stopped}

    def set_clock(self, clock: dict[str, Any]) -> None:
        """Go on from what `clock` returned."""
        self.started = time.monotonic() - clock["seconds"]
        self.stopped = clock["stopped"]


def thinned(history: Sequence[float]) -> list[float]:
    """Return at most `HISTORY` values, first and last kept: what a record has room for."""
    count = len(history)
    chosen = list(range(count))
    if count > HISTORY:
        chosen = sorted({round(i * (count - 1) / (HISTORY - 1)) for i in range(HISTORY)})
    return [float(f"{history[i]:.9g}") for i in chosen]
