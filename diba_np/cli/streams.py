"""Standard output and error where they are closed, full, plain ASCII, or nobody reads them."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from diba_np.cli.output import FAILED, has_standard_output
from diba_np.machine.display import shown

BROKEN_PIPE = 128 + 13  # SIGPIPE: what a shell says of a tool that nobody reads any more


@contextlib.contextmanager
def any_text() -> Iterator[None]:
    """Make standard output and error fit for any text, also where there are none.

    Characters that an encoding lacks become escapes. A closed descriptor is led to the null device,
    lest a file that is opened later gets its number and what is printed.
    """
    changed = []
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and not stream.closed:
            changed.append((stream, stream.errors))
            stream.reconfigure(errors="backslashreplace")
    errors = sys.stderr
    if errors is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")
    try:
        yield
    finally:
        if errors is None:
            sys.stderr.close()
            sys.stderr = errors
        for stream, how in changed:
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(errors=how)


def drop(stream: TextIO) -> None:
    """Forget what a stream holds and cannot write, which Python would try again at its end."""
    with contextlib.suppress(OSError, ValueError, io.UnsupportedOperation):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def complain(text: str) -> None:
    """Write a line to standard error, if anybody reads it."""
    try:
        sys.stderr.write(f"diba-np: {shown(text)}\n")
        sys.stderr.flush()
    except OSError:
        drop(sys.stderr)


def flushed(status: Any) -> Any:
    """Return an exit status, another one where standard output takes no more."""
    if not has_standard_output():
        return status
    try:
        sys.stdout.flush()
    except OSError as error:
        return lost(error)
    return status


def lost(error: OSError) -> int:
    """Return the exit status of a standard output that takes no more; tell of it."""
    if not isinstance(error, BrokenPipeError):
        complain(f"error: standard output: {error.strerror}")
    drop(sys.stdout)
    return BROKEN_PIPE if isinstance(error, BrokenPipeError) else FAILED
