"""How many processors this process may use."""

from __future__ import annotations

import os

from diba_np.checks import check_count


def processors() -> int:
    """Return how many processors this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def resolve_threads(threads: int | None) -> int:
    """Return the number of threads to use: `threads`, or the processors this process may use.

    Raises
    ------
    TypeError, ValueError
        `threads` is not a positive int.
    """
    if threads is None:
        available = processors()
        return min(available, int(os.environ.get("NUMBA_NUM_THREADS", available)))
    return check_count(threads, "threads")
