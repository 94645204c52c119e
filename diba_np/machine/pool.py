"""Threads for a search: how many, and results that do not depend on the answer.

BLAS splits a product by its number of threads, and the last digits of the result follow. A search
decides about bits on those digits. So here BLAS runs on one thread, and products are cut into row
blocks whose size depends on the shapes alone; the blocks go to as many threads as were asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diba_np.machine.blas import single_threaded_blas
from diba_np.machine.processors import resolve_threads

BLOCK_ENTRIES = 1 << 21  # entries of what is worked on at a time: 16 MiB in float64

# flops under which a block is not worth a thread's start
_BLOCK_FLOPS = 2e7
_MOST_BLOCKS = 16


class Workers:
    """A pool whose products are bitwise the same for every number of threads.

    Use through `workers`, which holds BLAS at one thread meanwhile.

    Attributes
    ----------
    threads : int
    entries : int
        Entries of the row blocks in which large arrays are worked on.
    streamed : bool
        Whether matrices in memory are read in row blocks as well, instead of being converted whole.
    """

    def __init__(self, threads: int, entries: int | None = None) -> None:
        self.threads = threads
        self.entries = entries or BLOCK_ENTRIES
        self.streamed = entries is not None
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def row_blocks(self, rows: int, columns: int) -> list[slice]:
        """Cut rows into slices of at most `entries` entries, each of a multiple of 64 rows."""
        step = max(1, self.entries // max(1, columns) // 64) * 64
        return [slice(at, min(at + step, rows)) for at in range(0, rows, step)]

    def run(self, work: Callable[[Any], Any], items: list[Any]) -> list[Any]:
        """Return ``[work(item) for item in items]``, computed side by side."""
        if self._pool is None or len(items) < 2:
            return [work(item) for item in items]
        return list(self._pool.map(work, items))

    def matmul(
        self, A: NDArray[Any], B: NDArray[Any], out: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        """Return ``A @ B`` of two matrices; the blocks follow from the shapes alone."""
        m, p = A.shape
        n = B.shape[1]
        if out is None:
            out = np.empty((m, n), np.result_type(A, B))
        blocks = int(min(_MOST_BLOCKS, max(1, 2.0 * m * n * p // _BLOCK_FLOPS)))
        step = max(16, -(-m // blocks))
        self.run(
            lambda start: np.matmul(A[start : start + step], B, out=out[start : start + step]),
            list(range(0, m, step)),
        )
        return out

    def gram(self, A: NDArray[Any]) -> NDArray[Any]:
        """Return ``A.T @ A``, exactly symmetric; the blocks follow from the shape alone."""
        m, k = A.shape
        blocks = int(min(_MOST_BLOCKS, max(1, m * k * k // _BLOCK_FLOPS)))
        if blocks == 1:
            result: NDArray[Any] = A.T @ A
            return result
        out = np.empty((k, k), A.dtype)
        step = -(-k // blocks)
        self.run(
            lambda at: np.matmul(A[:, at : at + step].T, A[:, at:], out=out[at : at + step, at:]),
            list(range(0, k, step)),
        )
        mirror(out)
        return out


_PANEL = 64
_BELOW = np.tri(_PANEL, k=-1, dtype=bool)


def mirror(upper: NDArray[Any]) -> None:
    """Copy the upper triangle of a square matrix onto the lower one, in place."""
    for start in range(0, len(upper), _PANEL):
        rows = slice(start, start + _PANEL)
        corner = upper[rows, rows]
        np.copyto(corner, corner.T.copy(), where=_BELOW[: len(corner), : len(corner)])
        upper[start + _PANEL :, rows] = upper[rows, start + _PANEL :].T


@contextmanager
def workers(threads: int | None = None, entries: int | None = None) -> Iterator[Workers]:
    """Provide `Workers`; Numba's own number of threads is set for the time and restored."""
    import numba

    count = resolve_threads(threads)
    numba_before = numba.get_num_threads()
    pool = Workers(count, entries)
    try:
        numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
        with single_threaded_blas():
            yield pool
    finally:
        numba.set_num_threads(numba_before)
        pool.close()
