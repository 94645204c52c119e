"""Products in fresh interpreters: arrays between guard pages, two at one cache, a fork."""

import os
import subprocess
import sys

import pytest

PROLOGUE = """
import os, sys
import numpy as np
from diba_np import DiBAFactors
from diba_np.products import cpu
rng = np.random.default_rng(0)
def operator(m, n, k):
    d1, d2, d3 = (rng.normal(size=s) for s in (m, k, n))
    return DiBAFactors(d1, rng.integers(0, 2, (m, k)), d2, rng.integers(0, 2, (k, n)), d3)
"""

GUARDED = """
import ctypes, mmap
libc = ctypes.CDLL(None, use_errno=True)
PAGE = mmap.PAGESIZE
kept = []
def guarded(array, at_end):
    # a copy whose last (or first) byte touches a page that may not be read or written
    size = max(1, -(-array.nbytes // PAGE)) * PAGE
    memory = mmap.mmap(-1, size + 2 * PAGE)
    kept.append(memory)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (base, base + PAGE + size):
        assert libc.mprotect(ctypes.c_void_p(page), PAGE, 0) == 0, ctypes.get_errno()
    offset = PAGE + (size - array.nbytes if at_end else 0)
    copy = np.frombuffer(memory, array.dtype, array.size, offset).reshape(array.shape)
    copy[...] = array
    return copy
from diba_np import PackedBits
from diba_np.kernels import columns, columns_simd, layout
from diba_np.kernels import lookup_int16, lookup_neon, lookup_portable, lookup_simd, lookup_words
K = [("portable", lookup_portable.product_portable, np.float32, 0),
     ("portable", lookup_portable.product_portable, np.float64, 0),
     ("portable", columns.product_columns, np.float32, 0),
     ("portable", columns.product_columns, np.float64, 0),
     ("avx2", lookup_simd.product_avx2, np.float32, 0),
     ("avx512", lookup_simd.product_avx512, np.float32, 0),
     ("avx512", columns_simd.product_columns_avx512, np.float32, 0),
     ("avx2", lookup_words.product_avx2_rounded, np.float32, 1),
     ("neon", lookup_neon.product_neon, np.float32, 0),
     ("neon", lookup_neon.product_neon_rounded, np.float32, 1),
     ("avx512", lookup_int16.product_int16, np.float32, 1)]
paths = cpu.available_paths()
K = [k for k in K if k[0] in paths and (not k[3] or cpu.has_rounded())]
for m, n, k in [(1, 1, 1), (33, 16, 31), (161, 47, 130), (97, 700, 45), (64, 1920, 480)]:
    b1, b2 = PackedBits(rng.integers(0, 2, (m, k))), PackedBits(rng.integers(0, 2, (k, n)))
    for at_end in (True, False):
        for b in (b1, b2):
            for kernel, source in ((layout.tile_rows, b), (layout.tile_columns, b.T)):
                tiles = guarded(np.zeros_like(b.tiles), at_end)
                words = guarded(source.words, at_end)
                kernel(words, tiles)
                assert (tiles == b.tiles).all()
        for path, kernel, dtype, rounded in K:
            g = lambda a: guarded(a, at_end)
            d1, d2, d3, mixed = (g(rng.normal(size=s).astype(dtype)) for s in (m, k, n, m))
            extra = (mixed,) if rounded else ()
            for tail in ((16,), (35,)) if "columns" in kernel.__name__ else ((),):
                x = g(rng.normal(size=(n, *tail)).astype(dtype))
                out = g(np.zeros((m, *tail), dtype))
                kernel(x, d3, g(b2.tiles), d2, g(b1.tiles), d1, dtype(0.5), *extra, 1, out)
                assert np.isfinite(out).all()
print("untouched", len(K))
"""


HEAP = """
for path in cpu.available_paths():
    os.environ["DIBA_NP_KERNEL"] = path
    cpu.kernel_path.cache_clear(), cpu.has_rounded.cache_clear()
    for m, n, k in rng.integers(1, 150, (60, 3)).tolist():
        f, x = operator(m, n, k), rng.normal(size=n).astype(np.float32)
        f @ x, f.matvec_rounded(x)
        for b in (7, 16):
            f @ rng.normal(size=(n, b)).astype(np.float32)
print("intact")
"""


def run_fresh(code, **environment):
    command = [sys.executable, "-c", PROLOGUE + code]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect through libc")
def test_nothing_is_read_or_written_beside_an_array():
    # one process for all paths: a step beyond an array would end it with a signal
    process = run_fresh(GUARDED)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.startswith("untouched")


def test_the_heap_stays_intact():
    # glibc's own checks find arrays written beyond their end or after they were freed
    check = {"LD_PRELOAD": "libc_malloc_debug.so.0", "GLIBC_TUNABLES": "glibc.malloc.check=3"}
    process = run_fresh(HEAP, **check)
    out, err = process.communicate()
    if "cannot be preloaded" in err:
        pytest.skip("needs the checks of glibc 2.34 and later")
    assert (process.returncode, out) == (0, "intact\n"), err


def test_two_processes_fill_one_cache_at_once(tmp_path):
    code = (
        "from diba_np.kernels.hadamard import hadamard\n"
        "x = np.arange(64.0); hadamard(x, 1); print(float(x @ np.cos(np.arange(64))))"
    )
    cache = {"NUMBA_CACHE_DIR": str(tmp_path), "DIBA_NP_CACHE": "1"}
    started = [run_fresh(code, **cache) for _ in range(2)]
    ended = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0, 0], ended
    third = run_fresh(code, **cache)
    ended.append(third.communicate())
    assert len({out for out, _ in ended}) == 1
    kernels = [path.name for path in tmp_path.rglob("*.nbc")]
    assert any("hadamard" in name for name in kernels), kernels


def test_a_product_after_a_fork():
    code = (
        "f = operator(1500, 1400, 1500); x = np.ones(1400, np.float32); y = f @ x\n"
        "pid = os.fork()\n"
        "if pid == 0: os._exit(0 if (f @ x == y).all() else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    process = run_fresh(code)
    out, err = process.communicate(timeout=120)
    assert out == "0\n", err
