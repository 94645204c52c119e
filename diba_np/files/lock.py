"""`FileLock`: one holder of a file at a time, among the processes and threads of a machine."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import sys
import tempfile
import time
from pathlib import Path

_PAUSE = 0.02  # seconds between two tries


class FileLock:
    """A lock that ends with its process; the file stays as a mark unless it is removed.

    Parameters
    ----------
    path : Path
        A file, made if there is none, or a folder.
    wait : float
        Seconds to wait for another holder.
    needed : bool
        Whether a file system without locks is an error; else the lock is taken for held.

    Raises
    ------
    BlockingIOError
        Another holds the lock.
    OSError
        The file cannot be made, or its file system has no locks.
    """

    def __init__(self, path: Path, wait: float = 0.0, needed: bool = True) -> None:
        self.path = _file_of(path)
        end = time.monotonic() + wait
        while not self._acquire(needed):
            if time.monotonic() >= end:
                raise BlockingIOError(errno.EWOULDBLOCK, "held by another", str(path))
            time.sleep(_PAUSE)

    def _acquire(self, needed: bool) -> bool:
        while True:
            self._handle = _open(self.path)
            try:
                _lock(self._handle)
            except (BlockingIOError, PermissionError):  # the second on Windows
                self.close()
                return False
            except OSError as error:
                if needed:
                    self.close()
                    raise OSError(error.errno, error.strerror, str(self.path)) from error
            if self._is_current():
                return True
            self.close()  # removed by its holder just now

    def _is_current(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._handle), self.path.stat())
        return False

    def close(self) -> None:
        """Give the lock back."""
        os.close(self._handle)

    def remove(self) -> None:
        """Remove the file and give the lock back."""
        if sys.platform == "win32":  # where an open file stays; another may hold it by now
            self.close()
            with contextlib.suppress(OSError):
                self.path.unlink()
        else:
            self.path.unlink(missing_ok=True)
            self.close()

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open(path: Path) -> int:
    if path.is_dir():
        return os.open(path, os.O_RDONLY)
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)


if sys.platform == "win32":
    import msvcrt

    def _file_of(path: Path) -> Path:
        """Return the file that stands for a folder, which Windows does not open."""
        if not path.is_dir():
            return path
        name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"diba_np-{name}.lock"

    def _lock(handle: int) -> None:
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # a PermissionError where it is held

else:
    import fcntl

    def _file_of(path: Path) -> Path:
        return path

    def _lock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
