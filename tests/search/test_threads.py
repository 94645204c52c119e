"""A search runs wherever Python does: after a fork, in several threads, without OpenMP."""

import os
import subprocess
import sys

import numpy as np
import pytest

import diba_np as dn
from diba_np.machine import processors
from diba_np.machine.thread_pool import ThreadPool

SEARCH = """
import hashlib, sys, threading
import numpy as np, diba_np
A = np.random.default_rng(0).normal(size=(150, 200))
def search(seed=0):
    f = diba_np.factorize(A, k=70, max_sweeps=8, seed=seed, threads=2)
    return hashlib.sha256(f.b1.words.tobytes()).hexdigest()
"""


def run(code, **environment):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SEARCH + code],
        check=False, capture_output=True, text=True, timeout=300, env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_children_of_a_fork_search_too():
    code = """
import os
before = search()
child = os.fork()
if not child:
    os._exit(0 if search() == before else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(code) == "0\n"


def test_several_threads_search_at_once_under_the_workqueue_layer():
    code = """
seen = {}
def work(seed):
    seen[seed] = search(seed)
threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
[t.start() for t in threads]; [t.join() for t in threads]
print(seen == {seed: search(seed) for seed in range(3)})
"""
    assert run(code, NUMBA_THREADING_LAYER="workqueue") == "True\n"


def test_a_search_starts_no_threading_layer():
    code = """
import numba
search()
try:
    print(numba.threading_layer())
except ValueError:
    print("none")
"""
    assert run(code) == "none\n"


def test_small_problems_get_one_thread(monkeypatch):
    monkeypatch.setattr(processors, "processors", lambda: 8)
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    assert processors.threads_for(2.0 * 64 * 48 * 20) == 1
    assert processors.threads_for(2.0 * 200 * 300 * 240) == 1
    assert processors.threads_for(2.0 * 2048 * 2048 * 1024) == 8


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "max 100000"}, 8),
        ({"quota": "50000", "period": "100000"}, 1),
        ({"quota": "-1", "period": "100000"}, 8),
        ({"cpu.max": "nonsense"}, 8),
        ({}, 8),
    ],
)
def test_a_container_s_quota_counts(tmp_path, monkeypatch, files, count):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    places = ((tmp_path / "cpu.max", None), (tmp_path / "quota", tmp_path / "period"))
    monkeypatch.setattr(processors, "_QUOTAS", places)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert processors.processors() == count


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_blocks_cover_all_rows_once(threads):
    with ThreadPool(threads) as pool:
        for shape in ((1, 5), (64, 64), (1000, 300), (3, 100000), (130, 40000)):
            for walk in (
                lambda work, shape=shape: pool.by_rows(shape, work),
                lambda work, shape=shape: pool.by_chunks(shape, 64, work),
            ):
                count = np.zeros(shape[0], int)

                def work(rows, count=count):
                    count[rows] += 1

                walk(work)
                assert (count == 1).all()


def test_an_interrupt_ends_a_search_on_several_threads():
    def stop(state):
        if state.step == 3:
            raise KeyboardInterrupt

    A = np.random.default_rng(1).normal(size=(200, 300))
    with pytest.raises(KeyboardInterrupt):
        dn.factorize(A, k=100, threads=2, callback=stop)
