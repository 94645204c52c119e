"""`ProcessPool`: processes that make calls, one at a time each, and can be ended at once."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, get_context, parent_process, spawn
from types import ModuleType
from typing import Any, TypeVar

from diba_np.machine.blas import threads_of_children

Item = TypeVar("Item")

_MOST_RESTARTS = 5  # of processes that are killed from outside


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
def main_left_out() -> Iterator[None]:
    """Let processes started inside not run the caller's script.

    A spawned process imports the script that spawns it, which then has to stand under
    ``if __name__ == "__main__":``; what processes call here is in modules of this package.
    """
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
    while True:
        try:
            script, call = requests.recv(), requests.recv_bytes()
        except EOFError:
            return
        try:
            if script:
                spawn.prepare(script)
            work, arguments = pickle.loads(call)
            requests.send((True, work(*arguments)))
        except Exception as error:
            requests.send((False, _portable(error)))


class _Worker:
    """One process and the connection to it."""

    def __init__(self, threads: int) -> None:
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        with threads_of_children(threads), _interrupts_held(), main_left_out():
            self.process.start()
        theirs.close()

    def send(self, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        """Let the process call a function; one of the caller's script runs that there first."""
        call = pickle.dumps((work, arguments))
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
    """

    def __init__(self, count: int, threads: int) -> None:
        self.count, self.threads = count, threads
        self._workers: list[_Worker] = []

    def end(self) -> None:
        """End the processes at once; what they work on is lost."""
        while self._workers:
            self._workers.pop().end()

    def run(
        self,
        work: Callable[..., Any],
        items: Sequence[Item],
        arguments: Callable[[Item], tuple[Any, ...]],
    ) -> Iterator[tuple[Item, Any]]:
        """Yield ``(item, work(*arguments(item)))`` in the order in which they end.

        Parameters
        ----------
        work : callable
            A function of a module, called in the processes.
        items : sequence
        arguments : callable
            Called here, when the call of its item begins.

        Yields
        ------
        (item, result)

        Raises
        ------
        ChildProcessError
            Processes were killed again and again; the call of one that was killed is made again.
        Exception
            Whatever a call raises; all processes are ended then.
        """
        waiting, busy = deque(items), dict[_Worker, Item]()
        restarts = 0
        complete = False
        try:
            while len(self._workers) < self.count:
                self._workers.append(_Worker(self.threads))
            while waiting or busy:
                for worker in self._workers:
                    if waiting and worker not in busy:
                        item = waiting.popleft()
                        busy[worker] = item
                        # what cannot be sent because the process is gone is seen below
                        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                            worker.send(work, arguments(item))
                ready = set(connection.wait([worker.connection for worker in busy]))
                for worker in [worker for worker in busy if worker.connection in ready]:
                    item = busy.pop(worker)
                    try:
                        well, answer = worker.connection.recv()
                    except (EOFError, ConnectionResetError):  # the process is gone
                        restarts += 1
                        worker.process.join()
                        if restarts > _MOST_RESTARTS:
                            code = worker.process.exitcode
                            raise ChildProcessError(
                                f"processes ended {restarts} times, the last with status {code}"
                            ) from None
                        waiting.appendleft(item)
                        worker.end()
                        self._workers[self._workers.index(worker)] = _Worker(self.threads)
                        continue
                    if not well:
                        raise answer
                    yield item, answer
            complete = True
        finally:
            if not complete:
                self.end()
