"""Files that are at every moment as before or complete: written beside, flushed and renamed.

A link is written through: the file that it leads to is replaced, the link stays. The mode, owner
and extended attributes of a replaced file are kept. What is no file (a pipe, a terminal, a null
device) cannot be replaced: it gets the finished bytes.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import socket
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from diba_np.machine.processes import is_running

PathLike = str | os.PathLike[str]

_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_PROCESS = os.urandom(4).hex()  # tells this process from an earlier one of the same number

_LONGEST_NAME = 64  # bytes of a name that its temporary files repeat; file systems allow 255 or 143

_TRIES, _PAUSE = 50, 0.02  # to rename over a file that another program has open: for a second

_STREAMS = (stat.S_ISCHR, stat.S_ISFIFO)


def as_path(path: PathLike, name: str = "path") -> Path:
    """Return a path; TypeError of what is none."""
    try:
        return Path(path)
    except TypeError:
        raise TypeError(f"{name} must be a path, got {type(path).__name__}") from None


def beside(path: PathLike, suffix: str) -> Path:
    """Return the path of a file that goes with another: its name and a suffix.

    A name at the file system's limit is cut and ends with a digest of itself.
    """
    final = Path(path)
    name = os.fsencode(final.name)
    if len(name) + len(os.fsencode(suffix)) > 255:
        cut = name[: 200 - len(os.fsencode(suffix))].decode("utf-8", "ignore")
        return final.with_name(f"{cut}.{hashlib.sha256(name).hexdigest()[:16]}{suffix}")
    return final.with_name(final.name + suffix)


def _stem(final: Path) -> str:
    name = os.fsencode(final.name)
    return final.name if len(name) <= _LONGEST_NAME else hashlib.sha256(name).hexdigest()[:32]


def remove_leftovers(path: PathLike) -> None:
    """Remove temporary files and folders of `path` whose writers, of this host, were killed."""
    final = Path(path)
    pattern = re.compile(rf"\.{re.escape(_stem(final))}\.{_HOST}-(\d+)-([0-9a-f]+)\..*\.part")
    for name in os.listdir(final.parent):
        match = pattern.fullmatch(name)
        if match is None:
            continue
        process = int(match[1])
        alive = match[2] == _PROCESS if process == os.getpid() else is_running(process)
        if not alive:
            left = final.parent / name
            with suppress(PermissionError):  # another user's, or open in a program on Windows
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Flush a file or folder to the disk."""
    # Windows flushes no file that is open for reading alone, and opens no folder
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _status(path: Path) -> os.stat_result | None:
    """Return what a path leads to; None if there is nothing yet."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def target_of(path: PathLike) -> Path:
    """Return the file that writing to a path writes: links are followed, also to no file yet.

    Raises
    ------
    OSError
        It can be written neither as a file nor as a stream: a folder, a disk, a socket, links in a
        circle; or the folder that it lies in is not there, or cannot be written to.
    """
    given = Path(path)
    try:
        status = _status(given)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(given)) from error
    if status is not None and any(kind(status.st_mode) for kind in _STREAMS):
        return given
    if status is not None and not stat.S_ISREG(status.st_mode):
        what = {stat.S_IFDIR: "a folder", stat.S_IFBLK: "a disk", stat.S_IFSOCK: "a socket"}
        kind = what.get(stat.S_IFMT(status.st_mode), "no file")
        raise OSError(f"{given}: is {kind}, expected the name of a file")
    final = Path(os.path.realpath(given)) if given.is_symlink() else given
    if not final.parent.is_dir():
        raise OSError(f"{final.parent}: no such folder")
    if not os.access(final.parent, os.W_OK | os.X_OK):
        raise OSError(f"{final.parent}: this folder cannot be written to")
    return final


def is_stream(path: PathLike) -> bool:
    """Tell whether a path leads to a pipe or a device, which get bytes and keep none."""
    status = _status(Path(path))
    return status is not None and any(kind(status.st_mode) for kind in _STREAMS)


def _temporary_name(final: Path) -> Path:
    """Return a name beside `final` that tells whose it is: see `remove_leftovers`."""
    owner = f"{_HOST}-{os.getpid()}-{_PROCESS}"
    return final.with_name(f".{_stem(final)}.{owner}.{os.urandom(4).hex()}.part")


def _create(final: Path, old: os.stat_result | None) -> Path:
    """Create an empty temporary file beside `final`; as private as the file that it replaces."""
    mode = 0o666 if old is None else 0o600  # a new file is as readable as any of the user's
    while True:
        name = _temporary_name(final)
        try:
            os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
        except FileExistsError:
            continue
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(final)) from error
        return name


def _replace(temporary: Path, final: Path) -> None:
    """Rename a file over another one.

    Windows refuses while a program has the other one open, and programs that look through new files
    have it open for a moment.
    """
    tries = _TRIES if sys.platform == "win32" else 1
    for left in reversed(range(tries)):
        try:
            os.replace(temporary, final)
        except PermissionError:
            if not left:
                raise
            time.sleep(_PAUSE)
        else:
            return


def _remove(temporary: Path) -> None:
    """Remove a file if it is there, also a read-only one, which stays on Windows."""
    try:
        temporary.unlink(missing_ok=True)
    except PermissionError:
        os.chmod(temporary, 0o600)
        temporary.unlink(missing_ok=True)


def _keep_attributes(final: Path, old: os.stat_result, temporary: Path) -> None:
    """Give a file owner, extended attributes and mode of the one that it replaces."""
    for owner, group in ((old.st_uid, -1), (-1, old.st_gid)):
        with suppress(OSError, AttributeError):  # only root may give files away
            os.chown(temporary, owner, group)
    with suppress(OSError, AttributeError):
        for name in os.listxattr(final):
            with suppress(OSError):
                os.setxattr(temporary, name, os.getxattr(final, name))
    os.chmod(temporary, stat.S_IMODE(old.st_mode))


def _short(error: OSError) -> bool:
    """Tell whether NumPy could write a part of an array only; it says no more than that."""
    return re.fullmatch(r"\d+ requested and \d+ written", str(error)) is not None


def _names_no_file(error: OSError) -> bool:
    return error.filename is None and (error.errno is not None or _short(error))


def _named(error: OSError, path: PathLike) -> OSError:
    """Return an error that names no file as one that does."""
    if _short(error):
        return OSError(f"{path}: could be written in part only; is the disk full?")
    return OSError(error.errno, error.strerror, str(path))


@contextmanager
def naming(path: PathLike, temporary: PathLike | None = None) -> Iterator[None]:
    """Name a file in the errors of what is written to it, or to what stands for it meanwhile."""
    try:
        yield
    except OSError as error:
        stands = temporary is not None and error.filename == str(temporary)
        if stands or _names_no_file(error):
            raise _named(error, path) from error
        raise


@contextmanager
def temporary_file() -> Iterator[Path]:
    """Give the path of an empty file for bytes that then go to a stream; removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / "stream"
        temporary.touch()
        yield temporary


def naming_temporary(temporary: Path) -> AbstractContextManager[None]:
    """Name the system's temporary folder in the errors of what is written to a file in it."""
    return naming(f"temporary folder {tempfile.gettempdir()} (TMPDIR names another)", temporary)


@contextmanager
def atomic_path(path: PathLike) -> Iterator[Path]:
    """Give a temporary path in the same folder; on success flush it and rename it to `path`.

    On an exception, Ctrl-C included, the temporary file is removed and `path` is as it was. What a
    killed writer has left is removed by the next one. A pipe or a device gets the bytes of a
    temporary file that lies elsewhere.

    Raises
    ------
    OSError
        As `target_of`; or writing fails.

    Warns
    -----
    UserWarning
        The file has other names (hard links), which keep the old contents.
    """
    if is_stream(path):
        with _streamed(Path(path)) as temporary:
            yield temporary
        return
    final = target_of(path)
    remove_leftovers(final)
    old = _status(final)
    temporary = _create(final, old)
    try:
        with naming(final, temporary):
            yield temporary
            _flush(temporary)
            if old is not None:
                _keep_attributes(final, old, temporary)
            _replace(temporary, final)
            with suppress(OSError):  # not every file system lets a folder be flushed
                _flush(final.parent)
    finally:
        _remove(temporary)
    if old is not None and old.st_nlink > 1:
        warnings.warn(
            f"{final}: other names of this file (hard links) keep what it was",
            UserWarning,
            stacklevel=4,
        )


@contextmanager
def atomic_folder(path: PathLike) -> Iterator[Path]:
    """Give a temporary folder that on success becomes `path`, which is not there yet.

    On an exception it is removed; what a killed writer has left is removed by the next one.

    Raises
    ------
    OSError
        As `target_of`; or writing fails.
    """
    final = target_of(path)
    remove_leftovers(final)
    temporary = _temporary_name(final)
    temporary.mkdir()
    try:
        yield temporary
        os.rename(temporary, final)
        with suppress(OSError):  # not every file system lets a folder be flushed
            _flush(final.parent)
    except OSError as error:
        if error.filename is None or not str(error.filename).startswith(str(temporary)):
            raise
        named = str(final) + str(error.filename).removeprefix(str(temporary))
        raise OSError(error.errno, error.strerror, named) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _streamed(path: Path) -> Iterator[Path]:
    """Give a temporary path whose finished bytes are then written to a pipe or a device."""
    with temporary_file() as temporary:
        with naming_temporary(temporary):
            yield temporary
        try:
            with temporary.open("rb") as source, path.open("wb", buffering=0) as target:
                shutil.copyfileobj(source, target)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error


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
