"""ThreadPool: products that do not depend on the number of threads, and nothing left changed."""

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import scipy
from hypothesis import given
from hypothesis import strategies as st

from diba_np.machine.processors import resolve_threads
from diba_np.machine.thread_pool import _TILE, ThreadPool


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_come_in_order_and_the_caller_works_too(threads):
    both = threading.Barrier(threads, timeout=60)
    seen = set()

    def work(item):
        if item < threads:
            both.wait()  # each of the first items has a thread of its own
        seen.add(threading.current_thread())
        return item * item

    with ThreadPool(threads) as pool:
        assert pool.run(work, list(range(20))) == [item * item for item in range(20)]
        assert threading.current_thread() in seen
        assert len(seen) == threads
        within = pool.run(lambda item: pool.run(lambda other: item + other, [1, 2, 3]), [10, 20])
    assert within == [[11, 12, 13], [21, 22, 23]]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_an_error_ends_the_work_and_is_passed_on(threads):
    done = []

    def work(item):
        if item == 1:
            raise IndexError("of the work")
        time.sleep(1e-4)
        done.append(item)

    with ThreadPool(threads) as pool, pytest.raises(IndexError, match="of the work"):
        pool.run(work, [0, 1, *range(100, 10_000)])
    assert len(done) < 9_000


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (384, 384, 172), (1000, 777, 301), (7, 3000, 3), (97, 4000, 300)]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_matmul_is_bitwise_the_same(shape, dtype, rng):
    m, p, n = shape
    A, B = rng.normal(size=(m, p)).astype(dtype), rng.normal(size=(p, n)).astype(dtype)
    results = []
    for threads in (1, 2, 3):
        with ThreadPool(threads) as pool:
            results.append(pool.matmul(A, B))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
    np.testing.assert_allclose(results[0], A @ B, atol=1e-3)


@given(st.integers(1, 5000), st.integers(1, 2000), st.integers(1, 9))
def test_blocks_of_rows_are_of_like_size_and_whole_tiles(rows, k, threads):
    seen = []
    with ThreadPool(threads) as pool:
        for block in pool.row_blocks(rows, k):
            seen.append(pool._cut(block, 2.0 * (block.stop - block.start) * k * k))
    cuts = [part for parts in seen for part in parts]
    assert [row for part in cuts for row in range(rows)[part]] == list(range(rows))
    for parts in seen:
        assert len(parts) <= 2 * threads
        sizes = [part.stop - part.start for part in parts]
        assert all(size % _TILE == 0 for size in sizes[:-1])
        assert max(sizes) - min(sizes) < 2 * _TILE
        assert len(parts) == 1 or min(sizes) >= _TILE


def wheels_with_openblas():
    """How many of NumPy and SciPy carry the OpenBLAS of their wheels."""
    found = (p.show_config(mode="dicts")["Build Dependencies"]["blas"] for p in (np, scipy))
    return sum(blas["name"].startswith("scipy-openblas") for blas in found)


def test_settings_are_restored_also_after_an_error():
    # in a process of its own: another search in this one may hold BLAS
    code = (
        "from diba_np.machine.blas import _blas_controls\n"
        "from diba_np.machine.thread_pool import ThreadPool\n"
        "blas, _ = _blas_controls()\n"
        "for set_threads, _ in blas:\n"
        "    set_threads(2)\n"
        "try:\n"
        "    with ThreadPool(1):\n"
        "        with ThreadPool(1):\n"  # whose end restores nothing yet
        "            pass\n"
        "        inside = [get() for _, get in blas]\n"
        "        raise KeyError\n"
        "except KeyError:\n"
        "    pass\n"
        "after = [get() for _, get in blas]\n"
        "print(len(blas), inside, after)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count = int(out.stdout.split()[0])
    assert count >= wheels_with_openblas()
    assert out.stdout == f"{count} {[1] * count} {[2] * count}\n"


@pytest.mark.parametrize(
    ("threads", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError)]
)
def test_bad_number_of_threads(threads, error):
    with pytest.raises(error, match="threads must be"):
        resolve_threads(threads)


def test_same_bits_whatever_blas_was_told(tmp_path):
    code = (
        "import numpy as np, diba_np, hashlib\n"
        "A = np.random.default_rng(0).normal(size=(150, 200))\n"
        "f = diba_np.factorize(A, k=70, max_sweeps=20)\n"
        "print(hashlib.sha256(f.b1.words.tobytes() + f.b2.words.tobytes()).hexdigest())"
    )
    seen = set()
    for threads in ("1", "2"):
        environment = os.environ | {"OPENBLAS_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads}
        out = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        seen.add(out.stdout)
    assert len(seen) == 1
