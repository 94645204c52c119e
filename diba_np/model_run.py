"""Running a model's tasks: executors, kept parts, events."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO, TypeVar

from diba_np.atomic import atomic_path
from diba_np.errors import FormatError
from diba_np.factors import DiBAFactors
from diba_np.store import load
from diba_np.threads import threads_of_children

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


class Parts:
    """What is finished of a run, in a folder beside its output; locked while the run lasts.

    Parameters
    ----------
    output : Path
    fingerprint : dict
        Of the source and the settings; anything that JSON can hold.
    restart : bool
        Drop parts of a run that had another fingerprint.

    Raises
    ------
    ValueError
        The parts are of a run with another fingerprint.
    OSError
        Another run writes to this output now; the folder cannot be written.
    """

    def __init__(self, output: Path, fingerprint: dict[str, Any], restart: bool = False) -> None:
        self.folder = output.with_name(output.name + ".parts")
        self._lock = self._acquire(output)
        try:
            self._check(json.loads(json.dumps(fingerprint)), restart)
        except BaseException:
            self._lock.close()
            raise

    def _acquire(self, output: Path) -> TextIO:
        while True:
            self.folder.mkdir(exist_ok=True)
            path = self.folder / "lock"
            try:
                lock = open(path, "a", encoding="ascii")
            except FileNotFoundError:  # removed by a run that ended just now
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(lock.fileno()).st_ino == path.stat().st_ino:
                    return lock
            except BlockingIOError:
                lock.close()
                raise OSError(f"{output}: another run writes to it now") from None
            except FileNotFoundError:
                pass
            lock.close()

    def _check(self, fingerprint: dict[str, Any], restart: bool) -> None:
        path = self.folder / "run.json"
        found = self.read("run")
        if found is not None and found != fingerprint:
            if not restart:
                differ = [key for key in fingerprint if found.get(key) != fingerprint[key]]
                told = ", ".join(
                    f"{key}: {_short(found.get(key))} there, {_short(fingerprint[key])} here"
                    for key in differ
                )
                raise ValueError(
                    f"{self.folder} holds parts of another run ({told}); finish that one, delete "
                    "the folder, or ask for a restart"
                )
            found = None
        if found is None:
            for old in self.folder.iterdir():
                if old.name != "lock":
                    old.unlink()
            _write_json(path, fingerprint)

    def read(self, name: str) -> Any:
        """Return what `write` kept under a name; None if there is nothing readable."""
        try:
            return json.loads((self.folder / f"{name}.json").read_text("utf-8"))
        except (OSError, ValueError):
            return None

    def write(self, name: str, value: Any) -> None:
        """Keep what JSON can hold."""
        _write_json(self.folder / f"{name}.json", value)

    def path(self, number: int, suffix: str = "h5") -> Path:
        """Return where a task's part lies."""
        return self.folder / f"{number}.{suffix}"

    def load(self, number: int) -> DiBAFactors | None:
        """Return a finished part; None if there is none, or none that is whole."""
        try:
            found = load(self.path(number))
        except (FileNotFoundError, FormatError):
            return None
        return found if isinstance(found, DiBAFactors) else None

    def finish(self) -> None:
        """Remove the folder."""
        with suppress(FileNotFoundError):
            shutil.rmtree(self.folder)

    def close(self) -> None:
        """Let others write; remove the folder if nothing is kept in it."""
        kept = {item.name for item in self.folder.glob("*")} - {"lock", "run.json"}
        if not kept:
            self.finish()
        self._lock.close()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else "other"


def _write_json(path: Path, value: Any) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value), "utf-8")


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
