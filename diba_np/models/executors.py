"""Running a model's tasks: where they run, and the events that are reported of them."""

from __future__ import annotations

import importlib.util
import json
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO, TypeVar

from diba_np.machine.display import Display
from diba_np.machine.process_pool import ProcessPool

Item = TypeVar("Item")

_IN_FLIGHT = 32  # tasks handed to a foreign executor at a time: what bounds the memory


# -- executors -------------------------------------------------------------------------------------


class Runner:
    """Runs calls one after another, in processes of its own, or on a given executor.

    Parameters
    ----------
    jobs : int
        Processes to start; 1 runs the calls here. Without meaning for an executor.
    threads : int
        Threads of each process.
    executor : concurrent.futures.Executor, optional
    """

    def __init__(self, jobs: int, threads: int, executor: futures.Executor | None = None) -> None:
        self.jobs, self.threads = jobs, threads
        self._executor = executor
        self._pool: ProcessPool | None = None

    @property
    def foreign(self) -> bool:
        """Whether calls run on an executor that was given."""
        return self._executor is not None

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.end()
            self._pool = None

    def run(
        self,
        work: Callable[..., Any],
        items: Sequence[Item],
        arguments: Callable[[Item], tuple[Any, ...]],
    ) -> Iterator[tuple[Item, Any]]:
        """Yield ``(item, work(*arguments(item)))`` in the order in which they end.

        Arguments are made when their call begins. Calls that one of our own processes took with
        it when it was killed are made again.
        """
        if self._executor is not None:
            yield from _run_on(self._executor, work, items, arguments)
        elif self.jobs == 1:
            for item in items:
                yield item, work(*arguments(item))
        else:
            if self._pool is None:
                self._pool = ProcessPool(self.jobs, self.threads)
            yield from self._pool.run(work, items, arguments)


def _run_on(
    executor: futures.Executor,
    work: Callable[..., Any],
    items: Sequence[Item],
    arguments: Callable[[Item], tuple[Any, ...]],
) -> Iterator[tuple[Item, Any]]:
    """Yield ``(item, work(*arguments(item)))`` in the order in which an executor ends them."""
    waiting, running = deque(items), dict[Any, Item]()
    try:
        while waiting or running:
            while waiting and len(running) < _IN_FLIGHT:
                with warnings.catch_warnings():
                    # of Dask, about arrays of some MB: they are what is to be sent
                    warnings.filterwarnings("ignore", "Sending large graph")
                    future = executor.submit(work, *arguments(waiting[0]))
                running[future] = waiting.popleft()
            done, _ = futures.wait(running, return_when=futures.FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), future.result()
    except futures.BrokenExecutor as error:
        raise ChildProcessError(f"processes ended ({error})") from error
    finally:
        for future in running:
            future.cancel()


@contextmanager
def dask_executor(address: str) -> Iterator[futures.Executor]:
    """Give the executor of a running Dask scheduler.

    Raises
    ------
    ImportError, OSError
        Dask is not installed; there is no scheduler.
    """
    if importlib.util.find_spec("distributed") is None:
        raise ImportError("a scheduler needs Dask: pip install 'diba-np[distributed]'")
    from distributed import Client

    try:
        client = Client(address, timeout=10, set_as_default=False)
    except (OSError, ValueError) as error:
        raise OSError(f"{address}: no Dask scheduler answers ({error})") from error
    with client:
        executor: futures.Executor = client.get_executor()
        yield executor


# -- events ----------------------------------------------------------------------------------------


class Events:
    """Tells what happens: lines on standard error, a log of JSON lines, a callback.

    Parameters
    ----------
    progress : bool
        Show a tqdm bar where tqdm is installed, else a line for each matrix, on standard error.
    log : Path, optional
        One JSON object a line is appended to it; a disk that is full ends the log with a warning.
    callback : callable, optional
        Called with each event, a dict; its ``event`` is "start", "curve", "budget", "part",
        "matrix", "training" (of networks), "done", "interrupted" or "failed".
    """

    def __init__(
        self,
        progress: bool = False,
        log: Path | None = None,
        callback: Callable[[dict[str, Any]], Any] | None = None,
    ) -> None:
        self._display = Display("matrices") if progress else None
        self._callback = callback
        self._log = None if log is None else open(log, "a", encoding="utf-8")
        self._started = time.monotonic()
        self._work = self._work_done = 0.0
        self._work_started = self._started

    def tell(self, event: str, **facts: Any) -> None:
        """Report one event."""
        report = {"event": event, **facts, "seconds": round(time.monotonic() - self._started, 3)}
        if self._log is not None:
            self._append(self._log, report)
        if self._callback is not None:
            self._callback(report)

    def _append(self, log: TextIO, report: dict[str, Any]) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        try:
            log.write(json.dumps({"time": now, **report}) + "\n")
            log.flush()
        except OSError as error:  # the run is worth more than its log
            warnings.warn(f"{log.name}: log not written: {error.strerror}", stacklevel=3)
            with suppress(OSError):  # which tries to write once more
                log.close()
            self._log = None

    def expect(self, work: float) -> None:
        """Set how much work there is, in any unit."""
        self._work, self._work_started = work, time.monotonic()

    def advance(self, work: float) -> float | None:
        """Count work as done; return about how many seconds are left."""
        self._work_done += work
        if not self._work_done:
            return None
        spent = time.monotonic() - self._work_started
        return spent * max(self._work - self._work_done, 0.0) / self._work_done

    def show(self, done: int, total: int, text: str) -> None:
        """Show how far the run is."""
        if self._display is not None:
            self._display.show(done, total, text=text)

    def close(self) -> None:
        """End the display and the log."""
        if self._display is not None:
            self._display.close()
        if self._log is not None:
            self._log.close()
