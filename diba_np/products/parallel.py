"""Parallel regions of products: one at a time, none after a fork, a back-off on busy processors."""

from __future__ import annotations

import math
import os
import threading
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

Real = NDArray[np.floating]

# Parallel kernels run one at a time: some of Numba's threading layers allow no more, and two at
# once would be slower. After a fork none runs: OpenMP does not survive it.
_parallel = threading.Lock()


_forked = False


def _after_fork() -> None:
    global _parallel, _forked  # noqa: PLW0603
    _parallel = threading.Lock()  # a thread that did not come along may have held the old one
    _forked = True


class _Backoff:
    """Lets parallel kernels lose no more than a share of the time to waiting.

    OpenMP's threads wait for each other by spinning. Where other programs, or the threads of BLAS
    that spin on for a while after a product, keep the processors busy, one of them loses its time
    slice and a product of 0.1 ms takes 10 to 100 ms. What is lost beyond an allowance is paid for
    in time on one thread.
    """

    SHARE = 0.05  # of the time that may be lost for good
    ALLOWANCE = 0.03  # seconds that may be lost at once; it comes back at the rate of the share
    HELD_UP = 2e-3  # seconds more than five times what the slowest kernel takes on one thread
    SLOWEST = 3e10  # weights a second

    def __init__(self) -> None:
        self.until = -math.inf  # when parallel kernels may run again

    def note(self, seconds: float, work: float) -> None:
        lost = seconds - 5 * work / self.SLOWEST
        if lost >= self.HELD_UP:
            full = time.perf_counter() - self.ALLOWANCE / self.SHARE
            self.until = max(self.until, full) + lost / self.SHARE


_backoff = _Backoff()


def run_kernel(
    kernels: tuple[Any, ...],
    parts: int,
    work: float,
    x: Real,
    arguments: tuple[Any, ...],
    out: Real,
) -> Any:
    """Call a kernel, or its parallel twin if it is to run in parts and may; the same result.

    `work` is the number of weights times columns.
    """
    # after a product the caches are empty, and every step here counts twice
    if parts > 1 and not _forked and _parallel.acquire(False):
        try:
            start = time.perf_counter()
            if start >= _backoff.until:
                kernel = kernels[1]
                compiled = len(kernel.overloads)
                result = kernel(x, *arguments, parts, out)
                seconds = time.perf_counter() - start
                if seconds >= _Backoff.HELD_UP and len(kernel.overloads) == compiled:
                    _backoff.note(seconds, work)
                return result
        finally:
            _parallel.release()
    return kernels[0](x, *arguments, 1, out)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
