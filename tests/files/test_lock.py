"""One holder at a time: of files, of folders, in other processes."""

import errno
import subprocess
import sys
import threading
import time

import pytest

from diba_np.files import lock as module
from diba_np.files.lock import FileLock

HOLD = """
import sys
from pathlib import Path
from diba_np.files.lock import FileLock
lock = FileLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_one_holder_at_a_time(tmp_path, kind):
    path = tmp_path if kind == "folder" else tmp_path / "lock"
    with FileLock(path):
        with pytest.raises(BlockingIOError, match="held by another"):
            FileLock(path)
    with FileLock(path):
        pass


def test_a_lock_ends_with_its_process(tmp_path):
    path = tmp_path / "lock"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(BlockingIOError):
        FileLock(path)
    process.kill()
    process.communicate()
    FileLock(path).close()


def test_another_holder_is_waited_for(tmp_path):
    path = tmp_path / "lock"
    first = FileLock(path)
    threading.Timer(0.1, first.close).start()
    start = time.monotonic()
    FileLock(path, wait=60.0).close()
    assert time.monotonic() - start < 50


def test_a_file_removed_by_its_holder_is_made_again(tmp_path):
    path = tmp_path / "lock"
    FileLock(path).remove()
    assert not path.exists()
    with FileLock(path):
        assert path.exists()


def test_a_file_removed_between_opening_and_locking_is_made_again(tmp_path, monkeypatch):
    path, calls, lock = tmp_path / "lock", [], module._lock

    def removed_first(handle):
        if not calls:
            path.unlink()
        calls.append(handle)
        lock(handle)

    monkeypatch.setattr(module, "_lock", removed_first)
    with FileLock(path):
        assert path.exists() and len(calls) == 2
        with pytest.raises(BlockingIOError):
            FileLock(path)


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def no_locks(handle):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module, "_lock", no_locks)
    with pytest.raises(OSError, match="No locks available") as raised:
        FileLock(tmp_path / "lock")
    assert raised.value.filename == str(tmp_path / "lock")  # no fault of standard output
    FileLock(tmp_path / "lock", needed=False).close()


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        FileLock(tmp_path / "none" / "lock")
