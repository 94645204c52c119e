"""`ProcessPool`: processes that make calls, one at a time each, and can be ended at once."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, get_context, parent_process, spawn
from types import ModuleType
from typing import Any, TypeVar

from diba_np.machine.blas import threads_of_children

Item = TypeVar("Item")

_TRIES = 6  # of a call whose process is killed from outside


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Let processes started inside not see the Ctrl-C that reaches all those of a terminal.

    On Windows a process is without that protection until `_serve` begins.
    """
    if sys.platform == "win32":
        yield
        return
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


_main = threading.Lock()


@contextlib.contextmanager
def _main_left_out() -> Iterator[None]:
    """Let processes started inside not run the caller's script.

    A spawned process imports the script that spawns it, which then has to stand under
    ``if __name__ == "__main__":``; what processes call here is in modules of this package.
    """
    # what is changed inside of the process, its environment too, is one thread's at a time
    with _main:
        script = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = script


def _script() -> dict[str, Any]:
    """Return what tells another process which script this is."""
    return {
        name: value
        for name, value in spawn.get_preparation_data("").items()
        if name.startswith("init_main_")
    }


def _end_with_the_parent() -> None:
    """Let this process end with its parent, whatever ended that one."""
    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _portable(error: BaseException) -> BaseException:
    """Return an error that another process can read."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _serve(requests: connection.Connection[Any, Any]) -> None:
    """Make the calls that arrive until the connection ends: all that a process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with_the_parent()
    shared: tuple[Any, ...] | None = None
    while True:
        try:
            if shared is None:
                shared = requests.recv()
            script, call = requests.recv(), requests.recv_bytes()
        except EOFError:
            return
        try:
            if script:
                spawn.prepare(script)
            work, arguments = pickle.loads(call)
            requests.send((True, work(*shared, *arguments)))
        except Exception as error:
            requests.send((False, _portable(error)))


class _Worker:
    """One process and the connection to it."""

    def __init__(self, threads: int, shared: tuple[Any, ...]) -> None:
        self._unsent: tuple[Any, ...] | None = shared
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        with _interrupts_held(), _main_left_out(), threads_of_children(threads):
            self.process.start()
        theirs.close()

    def send(self, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        """Let the process call a function; one of the caller's script runs that there first."""
        call = pickle.dumps((work, arguments))
        if self._unsent is not None:
            self.connection.send(self._unsent)
            self._unsent = None
        self.connection.send(_script() if b"__main__" in call else None)
        self.connection.send_bytes(call)

    def end(self) -> None:
        """End the process at once."""
        self.process.kill()
        self.process.join()
        self.connection.close()


class ProcessPool:
    """Processes that make calls, one at a time each; they are started by the first `run`.

    Parameters
    ----------
    count : int
        Processes.
    threads : int
        Numerical threads of each.
    shared : tuple
        First arguments of every call, sent once to each process.
    tries : int
        How often a call is made, at most, whose process is killed.
    """

    def __init__(
        self, count: int, threads: int, shared: tuple[Any, ...] = (), tries: int = _TRIES
    ) -> None:
        self.count, self.threads, self.shared, self.tries = count, threads, shared, tries
        self._workers: list[_Worker] = []

    def _start(self) -> _Worker:
        return _Worker(self.threads, self.shared)

    def end(self) -> None:
        """End the processes at once; what they work on is lost."""
        while self._workers:
            self._workers.pop().end()

    def run(
        self,
        work: Callable[..., Any],
        items: Sequence[Item],
        arguments: Callable[[Item], tuple[Any, ...]],
        failed: Callable[[Item, Exception], Any] | None = None,
    ) -> Iterator[tuple[Item, Any]]:
        """Yield ``(item, work(*shared, *arguments(item)))`` in the order in which they end.

        Parameters
        ----------
        work : callable
            A function of a module, called in the processes.
        items : sequence
        arguments : callable
            Called here, when the call of its item begins.
        failed : callable, optional
            What it makes of an item and the error of its call is yielded as the result, and the
            others go on.

        Yields
        ------
        (item, result)

        Raises
        ------
        ChildProcessError
            A call's processes were killed again and again.
        Exception
            Whatever a call raises. All processes are ended then, unless there is `failed`.
        """
        waiting, busy = deque(range(len(items))), dict[_Worker, int]()
        killed = Counter[int]()  # how often processes were, by the call
        complete = False
        try:
            while len(self._workers) < min(self.count, len(items)):
                self._workers.append(self._start())
            while waiting or busy:
                for worker in self._workers:
                    if waiting and worker not in busy:
                        number = waiting.popleft()
                        busy[worker] = number
                        # what cannot be sent because the process is gone is seen below
                        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                            worker.send(work, arguments(items[number]))
                ready = set(connection.wait([worker.connection for worker in busy]))
                for worker in [worker for worker in busy if worker.connection in ready]:
                    number = busy.pop(worker)
                    try:
                        well, answer = worker.connection.recv()
                    except (EOFError, ConnectionResetError):  # the process is gone
                        killed[number] += 1
                        worker.process.join()
                        code = worker.process.exitcode
                        worker.end()
                        self._workers[self._workers.index(worker)] = self._start()
                        if killed[number] < self.tries:
                            waiting.appendleft(number)
                            continue
                        well = False
                        answer = ChildProcessError(
                            f"processes ended {self.tries} times, the last with status {code}"
                        )
                    if not well:
                        if failed is None:
                            raise answer
                        answer = failed(items[number], answer)
                    yield items[number], answer
            complete = True
        finally:
            if not complete:
                self.end()
