"""`Monitor`: what a search reports while it runs, and what may end it."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

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


class Monitor(Journal):
    """Progress, history, callback, time limit and journal of one call of `factorize`.

    Parameters
    ----------
    progress : bool
        Show a tqdm bar where tqdm is installed, else a line every few seconds, on standard error.
    callback : callable, optional
        Called with a `SearchState` after every step; a true return value ends the search.
    time_limit : float, optional
        Seconds after which the search ends with the best found so far; those of earlier runs that
        the journal tells of are counted.
    """

    def __init__(
        self,
        progress: bool = False,
        callback: Callable[[SearchState], Any] | None = None,
        time_limit: float | None = None,
    ) -> None:
        super().__init__()
        self.started = time.monotonic()
        self.callback = callback
        self.time_limit = time_limit
        self.k = 0
        self.energy = 1.0
        self.history: list[float] = []
        self.sweeps = 0
        self.converged = False
        self.uneven = False  # components of uneven size, see `relaxation.are_uneven`
        self.stages: list[int] = []  # components of each stage of the relaxation
        self.settled = False  # no single flip improves what is stored
        self.window = (0.0, RELAXING)  # of the time limit, as shares, for the relaxation under way
        self.rng: np.random.Generator | None = None
        self.stopped = ""  # why the search was ended early: "time_limit", "callback" or nothing
        self._progress = progress
        self._bar: Any = None
        self._phase = ""
        self._last_line = self.started

    def begin(self, k: int, energy: float, rng: np.random.Generator | None = None) -> None:
        """Start a search at `k` on a target of that squared norm; forget an earlier one."""
        self.k, self.energy, self.rng = k, energy or 1.0, rng
        self.history, self.sweeps, self.converged, self.uneven = [], 0, False, False
        self.stages = []

    def facts(self) -> dict[str, Any]:
        names = (
            "k", "energy", "history", "sweeps", "converged", "uneven", "stages", "settled",
            "stopped", "seconds",
        )  # fmt: skip
        generator = self.rng and self.rng.bit_generator.state
        return {**{name: getattr(self, name) for name in names}, "rng": generator}

    def recall(self, facts: dict[str, Any]) -> None:
        seconds, generator = facts["seconds"], facts["rng"]
        for name in facts.keys() - {"seconds", "rng"}:
            setattr(self, name, facts[name])
        self.history, self.stages = list(self.history), list(self.stages)
        self.started = time.monotonic() - seconds
        if self.rng is not None and generator:
            self.rng.bit_generator.state = generator

    @property
    def seconds(self) -> float:
        """Seconds since the call began."""
        return time.monotonic() - self.started

    def time_share(self) -> float:
        """Return the share of the time limit that is used; 0 without a limit."""
        return self.seconds / self.time_limit if self.time_limit else 0.0

    def window_share(self) -> float:
        """Return the share of the `window` that is used; 0 without a limit."""
        begin, end = self.window
        return max(0.0, (self.time_share() - begin) / (end - begin)) if self.time_limit else 0.0

    def half_step(self, error: float) -> None:
        """Take the squared error after half a step into the history."""
        self.history.append(error / self.energy)

    def step(self, phase: str, step: int, steps: int, error: float | None = None) -> bool:
        """Report a step; return whether the search must end now."""
        relative = None if error is None else error / self.energy
        if step == 0 and relative is not None:
            self.history.append(relative)
        self.sweeps += step > 0
        self._show(phase, step, steps, relative)
        if self.callback is not None:
            seen = SearchState(phase, step, steps, self.k, relative, self.seconds)
            if self.callback(seen):
                self.stopped = "callback"
        if self.time_limit is not None and self.seconds >= self.time_limit:
            self.stopped = self.stopped or "time_limit"
        return bool(self.stopped)

    def _show(self, phase: str, step: int, steps: int, relative: float | None) -> None:
        if not self._progress:
            return
        if importlib.util.find_spec("tqdm") is not None:
            from tqdm import tqdm

            if phase != self._phase or self._bar is None:
                self.close()
                self._bar = tqdm(total=steps, desc=f"{phase} k={self.k}", file=sys.stderr)
            self._bar.update(step - self._bar.n)
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            error = "" if relative is None else f", relative error {relative:.4g}"
            sys.stderr.write(f"{phase} k={self.k}: {step}/{steps}, {self.seconds:.0f} s{error}\n")
        self._phase = phase

    def close(self) -> None:
        """End the progress display."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def thinned_history(self) -> list[float]:
        """Return the history as a record holds it."""
        return thinned(self.history)


def thinned(history: Sequence[float]) -> list[float]:
    """Return at most `HISTORY` values, first and last kept: what a record has room for."""
    count = len(history)
    chosen = list(range(count))
    if count > HISTORY:
        chosen = sorted({round(i * (count - 1) / (HISTORY - 1)) for i in range(HISTORY)})
    return [float(f"{history[i]:.9g}") for i in chosen]
