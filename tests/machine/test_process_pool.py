"""Calls in processes of our own: results, errors, killed processes, Ctrl-C."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import diba_np
from diba_np.machine import process_pool
from diba_np.machine.process_pool import ProcessPool


@pytest.fixture
def pool():
    both = ProcessPool(2, 1)
    yield both
    both.end()
    assert multiprocessing.active_children() == []


def square(x):
    return x * x, os.getpid(), os.environ["NUMBA_NUM_THREADS"]


def test_calls_run_elsewhere_with_their_threads(pool):
    arguments = range(7)
    answers = dict(pool.run(square, arguments, lambda x: (x,)))
    assert {x: answer[0] for x, answer in answers.items()} == {x: x * x for x in arguments}
    processes = {answer[1] for answer in answers.values()}
    assert os.getpid() not in processes and len(processes) <= 2
    assert {answer[2] for answer in answers.values()} == {"1"}
    # the same processes serve the next run
    assert {answer[1] for _, answer in pool.run(square, [1, 2], lambda x: (x,))} <= processes


def test_threads_that_start_processes_take_turns_with_the_environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with process_pool._main:
        starting = threading.Thread(target=lambda: workers.append(process_pool._Worker(1, ())))
        workers = []
        starting.start()
        starting.join(0.5)
        assert starting.is_alive() and not workers  # it waits
        assert os.environ["OMP_NUM_THREADS"] == "7"
    starting.join()
    workers[0].end()
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_no_more_processes_start_than_there_are_calls():
    many = ProcessPool(8, 1)
    assert len(list(many.run(square, [3], lambda x: (x,)))) == 1
    assert len(multiprocessing.active_children()) == 1
    many.end()


class Unreadable(Exception):
    def __init__(self, first, second):
        super().__init__(first)


def fail(how):
    if how == "error":
        raise ValueError("no such thing")
    if how == "unreadable":
        raise Unreadable("half", "a")
    return threading.Lock()  # cannot be sent


@pytest.mark.parametrize(
    ("how", "error", "sentence"),
    [
        ("error", ValueError, "no such thing"),
        ("unreadable", RuntimeError, "Unreadable: half"),
        ("result", TypeError, "cannot pickle"),
    ],
)
def test_an_error_arrives_and_ends_the_processes(pool, how, error, sentence):
    with pytest.raises(error, match=sentence):
        list(pool.run(fail, [how], lambda how: (how,)))
    assert multiprocessing.active_children() == []
    assert next(pool.run(square, [3], lambda x: (x,)))[1][0] == 9


def end_once(mark):
    if not os.path.exists(mark):
        open(mark, "w").close()
        os._exit(9)
    return "done"


def test_the_call_of_a_killed_process_is_made_again(pool, tmp_path):
    marks = [str(tmp_path / name) for name in "abc"]
    assert dict(pool.run(end_once, marks, lambda mark: (mark,))) == dict.fromkeys(marks, "done")


def test_processes_that_always_end_are_an_error(pool):
    with pytest.raises(ChildProcessError, match="processes ended 6 times, the last with status 7"):
        list(pool.run(os._exit, [7], lambda status: (status,)))


def share(first, how):
    if how == "end":
        os._exit(7)
    if how == "error":
        raise ValueError("no such thing")
    return first


def test_calls_that_fail_may_be_results_and_what_calls_share_is_sent_once():
    class Shared:
        sent = 0

        def __reduce__(self):
            Shared.sent += 1
            return str, ("shared",)

    pool = ProcessPool(1, 1, (Shared(),), tries=2)
    answers = dict(
        pool.run(share, ["a", "end", "error", "b"], lambda how: (how,), lambda how, e: (how, e))
    )
    pool.end()
    assert (answers["a"], answers["b"]) == ("shared", "shared")
    assert Shared.sent == 3  # once for each process
    assert answers["end"][0] == "end" and isinstance(answers["end"][1], ChildProcessError)
    assert str(answers["end"][1]) == "processes ended 2 times, the last with status 7"
    assert answers["error"][0] == "error" and str(answers["error"][1]) == "no such thing"


CODE = """
import os, signal, time
from diba_np.machine.process_pool import ProcessPool

def sleep(): os.write(1, f"{os.getpid()}\\n".encode()); time.sleep(60)  # one write a line

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
    list(ProcessPool(2, 1).run(sleep, [0, 1], lambda item: ()))
"""


BARE = """
import sys
import numpy as np
import diba_np as dn

print("once")
A = np.random.default_rng(0).normal(size=(2, 40, 30))
model = dn.factorize_model({"a": A[0], "b": A[1]}, bits=3.0, jobs=2, effort="fast", min_size=1)
rows = dn.compare(A[0], bits=[3.0, 4.0], methods=["rtn", "sign"], jobs=2)
print(sorted(model), len(rows), [row.error for row in rows], sys.modules["__main__"].A.shape)
"""


def run_script(folder, code):
    (folder / "program.py").write_text(code)
    return subprocess.run(
        [sys.executable, folder / "program.py"],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(diba_np.__file__).parents[1])},
    )


def test_a_script_needs_no_guard(tmp_path):
    found = run_script(tmp_path, BARE)
    assert found.stdout == "once\n['a', 'b'] 4 ['', '', '', ''] (2, 40, 30)\n"
    assert found.stderr == ""


OWN = """
import os
from diba_np.machine.process_pool import ProcessPool

def square(x): return x * x, os.getpid() != parent

parent = os.getppid() if __name__ != "__main__" else os.getpid()
if __name__ == "__main__":
    both = ProcessPool(2, 1)
    for _ in range(2):
        print(sorted(both.run(square, [1, 2], lambda x: (x,))))
    both.end()
"""


def test_a_function_of_the_script_runs_in_processes(tmp_path):
    found = run_script(tmp_path, OWN)
    assert found.stdout == 2 * "[(1, (1, True)), (2, (4, True))]\n", found.stderr


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_processes_end_with_their_parent_and_say_nothing(tmp_path, number):
    (tmp_path / "program.py").write_text(CODE)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "program.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(Path(diba_np.__file__).parents[1])},
    )
    children = [int(process.stdout.readline()) for _ in range(2)]
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal sends it
    else:
        process.kill()
    _, err = process.communicate(timeout=60)  # the children hold the pipes too
    assert err.count("Traceback") == (number == signal.SIGINT)
    end = time.monotonic() + 60
    for child in children:
        while os.path.exists(f"/proc/{child}"):
            assert time.monotonic() < end
            time.sleep(0.01)
