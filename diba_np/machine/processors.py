"""How many processors, and how much memory, this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

from diba_np.checks import check_count
from diba_np.environment import numba_threads

# flops of a product from which a second thread saves more than waiting for each other costs
_WORTH_A_THREAD = 5e7

_QUOTAS = (
    ("/sys/fs/cgroup/cpu.max", None),
    ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
)

_MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def processors() -> int:
    """Return how many processors this process may use; a container's quota counts as they do."""
    try:
        available = len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        available = os.cpu_count() or 1
    return max(1, min(available, _quota(available)))


def _quota(available: int) -> int:
    """Return the processors that a control group grants, rounded up; `available` without one."""
    for limit, period in _QUOTAS:
        try:
            words = Path(limit).read_text("ascii").split()
            if period is not None:
                words.append(Path(period).read_text("ascii").strip())
            return available if words[0] in ("max", "-1") else -(-int(words[0]) // int(words[1]))
        except (OSError, ValueError, IndexError, ZeroDivisionError):
            continue
    return available


def memory() -> float:
    """Return the bytes of memory that this process may use, a container's limit included.

    Infinity where they are not told.
    """
    known = [math.inf]
    if hasattr(os, "sysconf"):
        known.append(float(os.sysconf("SC_PAGE_SIZE")) * os.sysconf("SC_PHYS_PAGES"))
    for limit in _MEMORY_LIMITS:
        try:
            known.append(float(int(Path(limit).read_text("ascii"))))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return min(known)


def threads_for(flops: float) -> int:
    """Return the threads that a search is worth whose largest product takes so many flops."""
    return int(min(resolve_threads(None), max(1.0, flops // _WORTH_A_THREAD)))


def resolve_threads(threads: int | None) -> int:
    """Return the number of threads to use: `threads`, or the processors this process may use.

    Raises
    ------
    TypeError, ValueError
        `threads`, or ``NUMBA_NUM_THREADS``, is not a positive int.
    """
    if threads is None:
        available = processors()
        return min(available, numba_threads() or available)
    return check_count(threads, "threads")
