"""Files that are at every moment as before or complete: written beside, flushed and renamed."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PathLike = str | os.PathLike[str]

_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_PROCESS = os.urandom(4).hex()  # tells this process from an earlier one of the same number


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def remove_leftovers(path: PathLike) -> None:
    """Remove the temporary files of `path` whose writers, processes of this host, were killed."""
    final = Path(path)
    pattern = re.compile(rf"\.{re.escape(final.name)}\.{_HOST}-(\d+)-([0-9a-f]+)\..*\.part")
    for name in os.listdir(final.parent):
        found = pattern.fullmatch(name)
        if found is None:
            continue
        process = int(found[1])
        alive = found[2] == _PROCESS if process == os.getpid() else _is_running(process)
        if not alive:
            (final.parent / name).unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_path(path: PathLike) -> Iterator[Path]:
    """Give a temporary path in the same folder; on success flush it and rename it to `path`.

    On an exception, Ctrl-C included, the temporary file is removed and `path` is as it was. What a
    killed writer has left is removed by the next one.
    """
    final = Path(path)
    remove_leftovers(final)
    prefix = f".{final.name}.{_HOST}-{os.getpid()}-{_PROCESS}."
    try:
        handle, name = tempfile.mkstemp(dir=final.parent, prefix=prefix, suffix=".part")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(final)) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _flush(temporary)
        # mkstemp makes private files; a result is as readable as any new file of the user's
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, final)
        with suppress(OSError):  # not every file system lets a folder be flushed
            _flush(final.parent)
    finally:
        temporary.unlink(missing_ok=True)


def reserve(path: PathLike, size: int, final: PathLike) -> None:
    """Give a file `size` bytes of the disk; OSError that names `final` where it is full.

    For files that are then written through a map, where a full disk would end the process.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    handle = os.open(path, os.O_WRONLY)
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise OSError(error.errno, error.strerror, str(final)) from error
    finally:
        os.close(handle)
