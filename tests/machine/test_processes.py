"""Whether a process is running: here, and by a stand-in for the library of Windows."""

import ctypes
import os
import subprocess
import sys

import pytest

from diba_np.machine import processes
from diba_np.machine.processes import is_running


def test_this_process_runs_and_an_ended_one_does_not():
    assert is_running(os.getpid())
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert not is_running(ended.pid)
    assert not is_running(2**80)  # no number of a process


def test_a_process_of_another_user_is_running(monkeypatch):
    def refuse(process, signal):
        raise PermissionError(1, "not yours")

    monkeypatch.setattr(os, "kill", refuse)
    assert is_running(1)


class Kernel32:
    """What the library does: processes by number, with their exit codes; None is not to be read."""

    def __init__(self, codes):
        self.codes, self.open, self.error = codes, [], 0

    @property
    def OpenProcess(self):
        def open_process(access, inherit, process):
            assert (access, inherit) == (0x1000, False)
            code = self.codes.get(process.value, "none")
            if code in ("none", "denied"):
                self.error = 87 if code == "none" else 5
                return None
            self.open.append(process.value + 1000)
            return self.open[-1]

        return open_process

    def GetExitCodeProcess(self, handle, status):
        assert handle.value in self.open
        code = self.codes[handle.value - 1000]
        if code is None:
            return 0
        ctypes.cast(status, ctypes.POINTER(ctypes.c_uint32))[0] = code
        return 1

    def CloseHandle(self, handle):
        self.open.remove(handle.value)


@pytest.mark.parametrize(
    ("process", "expected"),
    [(4, True), (5, False), (6, False), (7, True), (8, True), (0, False), (2**40, False)],
)
def test_on_windows_no_signal_is_sent(monkeypatch, process, expected):
    def forbidden(*_):
        raise AssertionError("os.kill ends a process on Windows")

    library = Kernel32({4: 259, 5: 0, 7: "denied", 8: None})
    monkeypatch.setattr(os, "kill", forbidden)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "WinDLL", lambda name, use_last_error: library, raising=False)
    monkeypatch.setattr(ctypes, "get_last_error", lambda: library.error, raising=False)
    assert processes.is_running(process) is expected
    assert not library.open  # every handle is given back
