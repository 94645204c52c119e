"""`Journal`: what is done of a search and where it stands, so that a later run can go on there.

A search is a deterministic program. Its stages are numbered in the order in which they are called;
a later run goes through the same calls, takes the results of finished stages from the journal and
enters the loop that was under way at the step that was kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from diba_np.search.state import State, pack_state, unpack_state

Result = TypeVar("Result")


class Store(Protocol):
    """Where a journal is kept; see `diba_np.files.checkpoint.Checkpoint`."""

    def due(self) -> bool: ...
    def write(self, state: Any) -> None: ...


class Journal:
    """Stages of a search, kept in a store from time to time; without one it keeps nothing.

    A subclass says what else belongs to a state: `facts`, and `recall` for its counterpart.
    """

    def __init__(self) -> None:
        self._store: Store | None = None
        self._open: list[str] = []  # names of the stages under way, from the outermost
        self._begun = [0]  # stages begun so far in each of these, and at the top
        self._done: dict[str, Any] = {}
        self._loop: dict[str, Any] | None = None  # what an earlier run kept of its last loop

    def facts(self) -> dict[str, Any]:
        """Return what else must be as it was when a search goes on."""
        return {}

    def recall(self, facts: dict[str, Any]) -> None:
        """Set what `facts` returned."""

    def keep_in(self, store: Store, kept: Any) -> None:
        """Keep the journal in a store from now on; `kept` is what an earlier run left, or None."""
        self._store = store
        if kept is not None:
            self._done, self._loop = kept["done"], kept["loop"]

    def stage(self, name: str, run: Callable[[], Result]) -> Result:
        """Return ``run()``, or what it returned in an earlier run.

        Parameters
        ----------
        name : str
        run : callable
            Returns a `State` or what JSON holds. At most one loop in it, outside of further
            stages, may use `resume` and `keep`.
        """
        if self._store is None:
            return run()
        self._begun[-1] += 1
        self._open.append(f"{self._begun[-1]} {name}")
        self._begun.append(0)
        try:
            key = self._key()
            if key in self._done:
                self.recall(self._done[key]["facts"])
                kept: Result = _unpacked(self._done[key]["result"])
                return kept
            result = run()
            inner = f"{key}/"
            self._done = {k: v for k, v in self._done.items() if not k.startswith(inner)}
            self._done[key] = {"result": _packed(result), "facts": self.facts()}
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
        self.recall(loop["facts"])
        return loop["kept"]

    def keep(self, state: Callable[[], dict[str, Any]]) -> None:
        """Keep where a loop stands, if it is time to: called after every step.

        `state` returns arrays and what JSON holds; `resume` gives them back.
        """
        if self._store is not None and self._store.due():
            loop = {"stage": self._key(), "kept": state(), "facts": self.facts()}
            self._store.write({"done": self._done, "loop": loop})

    def keep_done(self) -> None:
        """Keep the finished stages now."""
        if self._store is not None:
            self._store.write({"done": self._done, "loop": None})

    def _key(self) -> str:
        return "/".join(self._open)


def _packed(result: Any) -> Any:
    return {"state": pack_state(result)} if isinstance(result, State) else {"value": result}


def _unpacked(kept: Any) -> Any:
    return unpack_state(kept["state"]) if "state" in kept else kept["value"]
