"""`warm_up`: compile now what the first product and the first factorization would wait for."""

from __future__ import annotations

import time
from itertools import chain
from typing import Any

import numpy as np

from diba_np.machine.processors import resolve_threads
from diba_np.machine.thread_pool import ThreadPool
from diba_np.matrix.factors import DiBAFactors
from diba_np.matrix.packed_bits import PackedBits, joined_tiles
from diba_np.methods.linear_trellis import run_each_kernel_of_trellis
from diba_np.products.cpu import cache_folder, has_bfloat16, has_rounded, kernel_path
from diba_np.products.product import Product, run_each_kernel
from diba_np.products.stack import Stack
from diba_np.products.terms import run_each_kernel_of_sums
from diba_np.search.factorization import factorize
from diba_np.search.options import SOLVERS


def warm_up() -> dict[str, Any]:
    """Compile every kernel of products and fits that "best" takes, and keep it in Numba's cache.

    Returns
    -------
    dict
        ``path`` (kernel path in use), ``rounded`` (whether `matvec_rounded` has a kernel here),
        ``kernels`` (name to seconds), ``seconds`` in all, ``cache`` (folder, or None if nothing is
        kept).

    Raises
    ------
    ValueError
        ``DIBA_NP_KERNEL`` is no path of this CPU.

    Notes
    -----
    Compiling takes a minute or less, loading from a warm cache a second or two. The cache lies in
    the user's cache folder (``NUMBA_CACHE_DIR`` moves it) and is bound to the CPU and to the place
    and content of the installed files.
    """
    report: dict[str, Any] = {"path": kernel_path(), "rounded": has_rounded()}
    seconds: dict[str, float] = {}
    start = last = time.perf_counter()

    def end(name: str) -> None:
        """Take the time since the last end as that of a kernel."""
        nonlocal last
        now = time.perf_counter()
        seconds[name] = round(now - last, 3)
        last = now

    bits = PackedBits(np.ones((1, 1)))
    tiles = joined_tiles([bits])
    sums = run_each_kernel_of_sums(Product(bits, bits), tiles, tiles)
    for name in chain(run_each_kernel(bits), sums):
        end(name)
    one = np.ones(1, np.float32)
    Stack([DiBAFactors(one, bits, one, bits, one)])(one)
    end("stack")
    run_each_kernel_of_trellis()
    end("linear trellis")
    if has_bfloat16():
        with ThreadPool(1) as pool:
            pool.gram(np.ones((1, 1), np.float32), rounded=True)
        end("products of bfloat16")
    A = np.random.default_rng(0).normal(size=(12, 10))
    for solver in SOLVERS:
        for threads in sorted({1, resolve_threads(None)}):
            factorize(A, k=4, solver=solver, threads=threads)
        end(f"factorize {solver}")
    report["kernels"] = seconds
    report["seconds"] = round(last - start, 3)
    report["cache"] = cache_folder()
    return report
