"""Running a model's tasks: executors, kept parts, events."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

from diba_np.machine.blas import threads_of_children

Item = TypeVar("Item")

_MOST_RESTARTS = 5  # of our own processes, when one of them is killed
_IN_FLIGHT = 32  # tasks handed to a foreign executor at a time: what bounds the memory


# -- executors -------------------------------------------------------------------------------------


def _begin_process() -> None:
    """Let a process of ours end with its parent, whatever ended that one."""
    from multiprocessing import connection, parent_process

    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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
        self._given = executor
        self._own: futures.ProcessPoolExecutor | None = None

    @property
    def foreign(self) -> bool:
        """Whether calls run on an executor that was given."""
        return self._given is not None

    def start(self) -> None:
        """Start the processes, if they are our own."""
        if self._given is not None or self.jobs == 1:
            return
        import multiprocessing

        with threads_of_children(self.threads):
            self._own = futures.ProcessPoolExecutor(
                self.jobs, multiprocessing.get_context("spawn"), _begin_process
            )
            # Ctrl-C reaches every process of a terminal: ours are ended by `stop`, silently
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                # all processes are made by the first call
                for ready in [self._own.submit(os.getpid) for _ in range(self.jobs)]:
                    ready.result()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def stop(self) -> None:
        """End the processes at once, what they work on is lost."""
        if self._own is not None:
            for process in list((getattr(self._own, "_processes", None) or {}).values()):
                process.kill()
            self._own.shutdown(wait=True, cancel_futures=True)
            self._own = None

    def __enter__(self) -> Runner:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

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
        executor = self._given or self._own
        if executor is None:
            for item in items:
                yield item, work(*arguments(item))
            return
        waiting, running = deque(items), dict[Any, Any]()
        restarts = 0
        most = _IN_FLIGHT if self._own is None else self.jobs + 1
        try:
            while waiting or running:
                broken: BaseException | None = None
                try:
                    while waiting and len(running) < most:
                        with warnings.catch_warnings():
                            # of Dask, about arrays of some MB: they are what is to be sent
                            warnings.filterwarnings("ignore", "Sending large graph")
                            future = executor.submit(work, *arguments(waiting[0]))
                        running[future] = waiting.popleft()
                except futures.BrokenExecutor as error:
                    broken = error
                done, _ = futures.wait(running, return_when=futures.FIRST_COMPLETED)
                for future in done:
                    item = running.pop(future)
                    try:
                        result = future.result()
                    except futures.BrokenExecutor as error:
                        broken = error
                        waiting.append(item)
                        continue
                    yield item, result
                if broken is not None:
                    restarts += 1
                    if self._own is None or restarts > _MOST_RESTARTS:
                        times = f" {restarts} times" if restarts > 1 else ""
                        raise ChildProcessError(f"processes ended{times} ({broken})") from broken
                    waiting.extend(running.values())
                    running.clear()
                    self.stop()
                    self.start()
                    executor = self._own or executor
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


# -- parts -----------------------------------------------------------------------------------------


# -- events ----------------------------------------------------------------------------------------


class Events:
    """Tells what happens: lines on standard error, a log of JSON lines, a callback.

    Parameters
    ----------
    progress : bool
        Show a tqdm bar where tqdm is installed, else a line for each matrix, on standard error.
    log : Path, optional
        One JSON object a line is appended to it.
    callback : callable, optional
        Called with each event, a dict; its ``event`` is "start", "curve", "budget", "part",
        "matrix", "done", "interrupted" or "failed".
    """

    def __init__(
        self,
        progress: bool = False,
        log: Path | None = None,
        callback: Callable[[dict[str, Any]], Any] | None = None,
    ) -> None:
        self._progress, self._callback = progress, callback
        self._log = None if log is None else open(log, "a", encoding="utf-8")
        self._bar: Any = None
        self._started = time.monotonic()
        self._work = self._work_done = 0.0
        self._work_started = self._started

    def tell(self, event: str, **facts: Any) -> None:
        """Report one event."""
        told = {"event": event, **facts, "seconds": round(time.monotonic() - self._started, 3)}
        if self._log is not None:
            now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
            self._log.write(json.dumps({"time": now, **told}) + "\n")
            self._log.flush()
        if self._callback is not None:
            self._callback(told)

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
        if not self._progress:
            return
        if importlib.util.find_spec("tqdm") is not None:
            from tqdm import tqdm

            if self._bar is None:
                self._bar = tqdm(total=total, unit="matrix", file=sys.stderr)
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._bar.n)
        else:
            sys.stderr.write(f"{done}/{total} matrices, {text}\n")
            sys.stderr.flush()

    def close(self) -> None:
        """End the display and the log."""
        if self._bar is not None:
            self._bar.close()
        if self._log is not None:
            self._log.close()
