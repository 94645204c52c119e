"""Signals end the work, also those whose exception is lost in a finalizer."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from diba_np.cli.signals import Terminated, interruptible


@pytest.fixture(autouse=True)
def ctrl_c_counts():
    """A shell's background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


SIGNALS = [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]


def work():
    end = time.monotonic() + 30
    while time.monotonic() < end:
        time.sleep(0.001)


class Finalized:
    def __init__(self, number):
        self.number = number

    def __del__(self):
        signal.raise_signal(self.number)
        work()


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(("number", "error"), SIGNALS)
@pytest.mark.parametrize("where", ["work", "finalizer"])
def test_a_signal_ends_the_work(number, error, where):
    before = signal.getsignal(number), sys.unraisablehook
    start = time.monotonic()
    with pytest.raises(error), interruptible():
        if where == "work":
            threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
        else:
            Finalized(number)
        work()
    assert time.monotonic() - start < 20
    assert (signal.getsignal(number), sys.unraisablehook) == before


def test_handlers_of_the_caller_stay():
    seen = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        with interruptible():
            signal.raise_signal(signal.SIGINT)
        assert seen == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_nothing_is_touched():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def other():
        with interruptible():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_the_status_is_ours_where_generated_code_is_interrupted(tmp_path):
    (tmp_path / "interrupted.py").write_text(
        "from diba_np.cli import installation, main\n"
        "def work(args):\n"
        "    exec('raise KeyboardInterrupt')\n"
        "installation.run_doctor = work\n"
        "raise SystemExit(main.main(['doctor']))\n"
    )
    command = [sys.executable, "-m", "interrupted"]
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": paths}
    )
    assert (ended.returncode, ended.stderr) == (1, "diba-np: interrupted, nothing written\n")
