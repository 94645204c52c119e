"""`interruptible`: Ctrl-C and SIGTERM end the work, wherever they come."""

from __future__ import annotations

import _thread
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

_SOON = 0.01  # seconds


class Terminated(KeyboardInterrupt):
    """SIGTERM came; ends the work as Ctrl-C does."""


def _end(number: int, frame: FrameType | None) -> None:
    """Raise what a signal stands for."""
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _end_again(unraisable: Any) -> None:
    """Send the signal once more whose exception came in a finalizer, where it is lost."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    number = signal.SIGTERM if issubclass(unraisable.exc_type, Terminated) else signal.SIGINT
    threading.Timer(_SOON, _signal_main, (number,)).start()


def _signal_main(number: signal.Signals) -> None:
    """Send a signal to the main thread, which also ends what it waits for."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(int(threading.main_thread().ident or 0), number)
    else:  # Windows
        _thread.interrupt_main(number)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGINT and SIGTERM end the work in the main thread, unless the caller handles them.

    Raises
    ------
    KeyboardInterrupt
        Inside, when SIGINT comes; `Terminated` when SIGTERM comes.
    """
    defaults: dict[signal.Signals, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
    }
    if threading.current_thread() is not threading.main_thread():
        defaults = {}
    ours = [number for number, usual in defaults.items() if signal.getsignal(number) is usual]
    hook = sys.unraisablehook
    for number in ours:
        signal.signal(number, _end)
    if ours:
        sys.unraisablehook = _end_again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number in ours:
            signal.signal(number, defaults[number])
