"""`Journal`: what is done of a search and where it stands, so that a later run can go on there.

A search is a deterministic program. Its stages are numbered in the order in which they are called;
a later run goes through the same calls, takes the results of finished stages from the journal and
enters the loop that was under way at the step that was kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from diba_np.search.outcome import Outcome
from diba_np.search.state import State, pack_state, unpack_state

Result = TypeVar("Result")


class Store(Protocol):
    """Where a journal is kept; see `diba_np.files.checkpoint.Checkpoint`."""

    def due(self) -> bool: ...
    def write(self, state: Any) -> None: ...


class Clock(Protocol):
    """The time that a run has spent, which a later run goes on from."""

    def clock(self) -> dict[str, Any]: ...
    def set_clock(self, clock: dict[str, Any]) -> None: ...


class Journal:
    """Stages of a search, kept in a store from time to time; without one it keeps nothing.

    Parameters
    ----------
    run : Clock
        Whose time is kept beside every stage.
    """

    def __init__(self, run: Clock) -> None:
        self._run = run
        self._store: Store | None = None
        self._open: list[str] = []  # names of the stages under way, from the outermost
        self._begun = [0]  # stages begun so far in each of these, and at the top
        self._done: dict[str, Any] = {}
        self._loop: dict[str, Any] | None = None  # what an earlier run kept of its last loop

    def keep_in(self, store: Store, saved: Any) -> None:
        """Keep the journal in a store from now on; `saved` is what an earlier run left, or None."""
        self._store = store
        if saved is not None:
            self._done, self._loop = saved["done"], saved["loop"]

    def stage(self, name: str, run: Callable[[], Result]) -> Result:
        """Return ``run()``, or what it returned in an earlier run.

        Parameters
        ----------
        name : str
        run : callable
            Returns an `Outcome`, a `State` or what JSON holds. At most one loop in it, outside of
            further stages, may use `resume` and `keep`.
        """
        if self._store is None:
            return run()
        self._begun[-1] += 1
        self._open.append(f"{self._begun[-1]} {name}")
        self._begun.append(0)
        try:
            key = self._key()
            if key in self._done:
                self._run.set_clock(self._done[key]["clock"])
                result: Result = _unpacked(self._done[key]["result"])
                return result
            result = run()
            inner = f"{key}/"
            self._done = {k: v for k, v in self._done.items() if not k.startswith(inner)}
            self._done[key] = {"result": _packed(result), "clock": self._run.clock()}
            return result
        finally:
            self._open.pop()
            self._begun.pop()

    def resume(self) -> Any:
        """Return what this loop kept in an earlier run that ended within it; else None."""
        loop = self._loop
        if loop is None or loop["stage"] != self._key():
            return None
        self._loop = None
        self._run.set_clock(loop["clock"])
        return loop["position"]

    def keep(self, state: Callable[[], dict[str, Any]]) -> None:
        """Keep where a loop stands, if it is time to: called after every step.

        `state` returns arrays and what JSON holds; `resume` gives them back.
        """
        if self._store is not None and self._store.due():
            loop = {"stage": self._key(), "position": state(), "clock": self._run.clock()}
            self._store.write({"done": self._done, "loop": loop})

    def keep_done(self) -> None:
        """Keep the finished stages now."""
        if self._store is not None:
            self._store.write({"done": self._done, "loop": None})

    def _key(self) -> str:
        return "/".join(self._open)


def _packed(result: Any) -> Any:
    """Return a result as arrays and what JSON holds."""
    if isinstance(result, Outcome):
        others = [pack_state(state) for state in result.others]
        return {"outcome": {**vars(result), "state": pack_state(result.state), "others": others}}
    return {"state": pack_state(result)} if isinstance(result, State) else {"value": result}


def _unpacked(packed: Any) -> Any:
    """Undo `_packed`."""
    if "outcome" in packed:
        facts = dict(packed["outcome"])
        facts["others"] = [unpack_state(state) for state in facts["others"]]
        return Outcome(unpack_state(facts.pop("state")), **facts)
    return unpack_state(packed["state"]) if "state" in packed else packed["value"]
