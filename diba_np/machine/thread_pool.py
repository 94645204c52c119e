"""Threads for a search: how many, and results that do not depend on the answer.

BLAS splits a product by its number of threads, and the last digits of the result follow. A search
decides about bits on those digits. So here BLAS runs on one thread, and products are cut into
blocks of rows, which go to as many threads as were asked for. Sums within a row are the same
wherever the cuts are; where they are not (Gram matrices), the cuts depend on the shapes alone.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diba_np.kernels import bfloat16
from diba_np.kernels.threads import load_threading_layer
from diba_np.machine.blas import single_threaded_blas
from diba_np.machine.processors import resolve_threads, threads_for

BLOCK_ENTRIES = 1 << 21  # entries of what is worked on at a time: 16 MiB in float64

# flops under which a block is not worth a thread's start
_BLOCK_FLOPS = 2e7
_MOST_BLOCKS = 16  # of a Gram matrix
_BLOCKS_A_THREAD = 2
_TILE = 96  # rows: a multiple of the tiles of every BLAS kernel and of those of bfloat16

_CHUNK_ENTRIES = 1 << 17  # entries under which a pass is not worth a thread's start


class ThreadPool:
    """A pool whose products are bitwise the same for every number of threads.

    In a ``with`` block, BLAS is held at one thread meanwhile.

    Parameters
    ----------
    threads : int, optional
        By default as many as the work is worth, of those that this process may use.
    entries : int, optional
        Entries of a row block; matrices are then read block by block.
    flops : float
        Of the largest product: threads that wait for each other cost more than small ones save.

    Attributes
    ----------
    threads : int
    entries : int
        Entries of the row blocks in which large arrays are worked on.
    streamed : bool
        Whether matrices in memory are read in row blocks as well, instead of being converted whole.
    """

    def __init__(
        self, threads: int | None = None, entries: int | None = None, flops: float = math.inf
    ) -> None:
        self.threads = threads_for(flops) if threads is None else resolve_threads(threads)
        self.entries = entries or BLOCK_ENTRIES
        self.streamed = entries is not None
        self._pool = ThreadPoolExecutor(self.threads - 1) if self.threads > 1 else None
        self._blas = single_threaded_blas()

    def __enter__(self) -> ThreadPool:
        self._blas.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self._blas.__exit__(*error)
        finally:
            if self._pool is not None:
                self._pool.shutdown()

    def row_blocks(self, rows: int, columns: int) -> list[slice]:
        """Cut rows into slices of at most `entries` entries, each of a multiple of 64 rows."""
        step = max(1, self.entries // max(1, columns) // 64) * 64
        return [slice(at, min(at + step, rows)) for at in range(0, rows, step)]

    def run(self, work: Callable[[Any], Any], items: list[Any]) -> list[Any]:
        """Return ``[work(item) for item in items]``, computed side by side.

        The calling thread works too: a thread that only waits is woken for nothing, on a core
        that another one has.
        """
        if self._pool is None or len(items) < 2:
            return [work(item) for item in items]
        left = deque(enumerate(items))
        results: list[Any] = [None] * len(items)

        def drain() -> None:
            while True:
                try:
                    at, item = left.popleft()
                except IndexError:
                    return
                try:
                    results[at] = work(item)
                except BaseException:
                    left.clear()
                    raise

        others = [self._pool.submit(drain) for _ in range(min(self.threads, len(items)) - 1)]
        try:
            drain()
        finally:
            # one that has not begun has nothing to do any more
            begun = [other for other in others if not other.cancel()]
            wait(begun)
        for other in begun:
            other.result()
        return results

    def _cut(self, rows: slice, flops: float) -> list[slice]:
        """Cut rows, on which work takes so many flops in all, into blocks of like size.

        A product's right operand is packed anew for each block, so there are few. Rows of a product
        do not depend on where it is cut, as long as the cuts are at whole tiles of BLAS and every
        block is worth more than BLAS's own paths for small products.
        """
        most = _BLOCKS_A_THREAD * self.threads if self.threads > 1 else 1
        tiles = max(1, (rows.stop - rows.start) // _TILE)  # the last block takes what is left over
        blocks = int(min(most, max(1, flops // _BLOCK_FLOPS), tiles))
        cuts = [rows.start + _TILE * round(at * tiles / blocks) for at in range(blocks)]
        return [slice(*ends) for ends in pairwise([*cuts, rows.stop])]

    def by_rows(self, shape: tuple[int, int], work: Callable[[slice], None]) -> None:
        """Call ``work(rows)`` for blocks of the rows of a (rows, k) array, side by side.

        `work` takes about ``2 k^2`` flops a row and writes to its own rows alone; the blocks follow
        from the shape alone.
        """
        rows, k = shape
        for block in self.row_blocks(rows, k):
            size = block.stop - block.start
            self.run(work, self._cut(block, 2.0 * size * k * k))

    def by_chunks(self, shape: tuple[int, int], chunk: int, work: Callable[[slice], None]) -> None:
        """Call ``work(rows)`` for runs of whole chunks of `chunk` rows, side by side.

        For passes over a (rows, k) array whose results do not depend on where the runs are cut.
        """
        rows, k = shape
        chunks = -(-rows // chunk)
        runs = min(self.threads, chunks, max(1, rows * k // _CHUNK_ENTRIES))
        step = -(-chunks // runs) * chunk
        self.run(work, [slice(at, min(at + step, rows)) for at in range(0, rows, step)])

    def right(self, B: NDArray[Any], rounded: bool = False) -> RightOperand:
        """Return B as the right operand of several products, rounded to bfloat16 if told to."""
        if not rounded:
            return RightOperand(B)
        B = np.ascontiguousarray(B)
        panels = _panels_of(B)
        pairs = (panels.shape[0], panels.shape[1] * bfloat16.WIDTH)
        self.by_chunks(pairs, 1, lambda at: bfloat16.pack_bfloat16(B, at.start, at.stop, panels))
        return RightOperand(panels, rounded=True)

    def matmul(
        self,
        A: NDArray[Any],
        B: NDArray[Any],
        out: NDArray[Any] | None = None,
        rounded: bool = False,
    ) -> NDArray[Any]:
        """Return ``A @ B`` of two matrices; the blocks follow from the shapes alone.

        With `rounded`, of float32, both are rounded to bfloat16 (`RightOperand`).
        """
        m, p = A.shape
        n = B.shape[1]
        if out is None:
            out = np.empty((m, n), np.result_type(A, B))
        cuts = self._cut(slice(0, m), 2.0 * m * n * p)
        right = self.right(B, rounded)
        self.run(lambda rows: right.multiply(A, rows, out), cuts)
        return out

    def gram(self, A: NDArray[Any], rounded: bool = False) -> NDArray[Any]:
        """Return ``A.T @ A``, exactly symmetric; the blocks follow from the shape alone."""
        m, k = A.shape
        blocks = int(min(_MOST_BLOCKS, max(1, m * k * k // _BLOCK_FLOPS)))
        if blocks == 1 and not rounded:
            result: NDArray[Any] = A.T @ A
            return result
        out = np.empty((k, k), A.dtype)
        step = -(-k // blocks)
        if rounded:
            step = -(-step // _TILE) * _TILE  # whole tiles, and whole panels
        right = self.right(A, rounded)
        self.run(
            lambda at: right.multiply(A.T, slice(at, min(at + step, k)), out, at),
            list(range(0, k, step)),
        )
        mirror(out)
        return out


def _panels_of(B: NDArray[Any]) -> NDArray[np.uint32]:
    """Return uninitialized panels for a right operand (n, k), from a cache line on."""
    n, k = B.shape
    shape = (-(-k // bfloat16.WIDTH), -(-n // 2), bfloat16.WIDTH)
    words = np.empty(math.prod(shape) + 16, np.uint32)
    skip = -words.ctypes.data % 64 // 4
    return words[skip : skip + math.prod(shape)].reshape(shape)


class RightOperand:
    """What matrices are multiplied with from the left, block by block of their rows.

    Parameters
    ----------
    held : array
        It, (n, k); or its panels, as of `diba_np.kernels.bfloat16.pack_bfloat16`.
    rounded : bool
        Whether it is panels: then products, of float32, are of both operands rounded to bfloat16
        (8 bits of mantissa), with sums in float32. That takes a little over half of the time, on a
        CPU that `diba_np.products.cpu.has_bfloat16` knows.
    """

    def __init__(self, held: NDArray[Any], rounded: bool = False) -> None:
        self._held, self._rounded = held, rounded

    def multiply(self, A: NDArray[Any], rows: slice, out: NDArray[Any], first: int = 0) -> None:
        """Write some rows of ``A @ B`` to those of `out`, from the column `first` on.

        Rounded, `out` is C-ordered and `first` at a panel; an A of other strides is copied.
        """
        if not self._rounded:
            np.matmul(A[rows], self._held[:, first:], out=out[rows, first:])
            return
        turned = A.flags.f_contiguous and not A.flags.c_contiguous
        own = A.T if turned else np.ascontiguousarray(A)
        panel = first // bfloat16.WIDTH
        bfloat16.product_bfloat16(own, turned, self._held, panel, rows.start, rows.stop, out)


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
def product_threads(threads: int | None) -> Iterator[None]:
    """Let packed products use so many threads meanwhile, and BLAS one."""
    import numba

    load_threading_layer()
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(min(resolve_threads(threads), numba.config.NUMBA_NUM_THREADS))
        with single_threaded_blas():
            yield
    finally:
        numba.set_num_threads(before)
