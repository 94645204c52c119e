"""HDF5 containers: attributes, flat arrays and a record; atomic to write, checked to the last byte.

A container is the root of a file or a group of it: attributes, one-dimensional datasets, the
attribute ``record`` (JSON) and the attribute ``digest`` (SHA-256 over the other attributes and the
datasets). Every dataset carries a Fletcher-32 checksum, and HDF5's own structures are checksummed
too, except for the heap of strings, whose sizes are checked before HDF5 reads them.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import mmap
import os
import re
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from diba_np.errors import FormatError

FORMAT = "diba_np"

# HDF5 1.10 and later read these files; its structures are compact and checksummed
_LIBVER = ("v110", "v110")

_LARGEST_RECORD = 60_000  # bytes of JSON; an HDF5 attribute holds 64 KiB
_HEADER = 16 * 1024  # bytes that HDF5's structures of one group may take

_LONGEST_WAIT = 60.0  # seconds for another writer of the same folder

PathLike = str | os.PathLike[str]

# what h5py raises on files that are not as they should be
_UNREADABLE = (
    OSError,
    RuntimeError,
    LookupError,
    TypeError,
    ValueError,
    ArithmeticError,
    MemoryError,
)

# dataset -> (entries, dtype)
Layout = dict[str, tuple[int, np.dtype[Any]]]


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


@contextmanager
def _one_writer(folder: Path) -> Iterator[None]:
    """Hold off other writers of groups in that folder, in this and in other processes.

    A group is added by copying the file: without this the second of two writers would drop what
    the first has added meanwhile.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        end = time.monotonic() + _LONGEST_WAIT
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > end:
                    raise OSError(f"{folder}: another program is writing to it") from None
                time.sleep(0.02)
                continue
            except OSError:  # a file system without locks
                pass
            break
        yield
    finally:
        os.close(handle)


@contextmanager
def _created(final: Path) -> Iterator[h5py.File]:
    """Give a new HDF5 file that becomes `final` on success; see `_check_space`."""
    with atomic_path(final) as temporary:
        try:
            with h5py.File(temporary, "w", libver=_LIBVER) as file:
                yield file
        except RuntimeError as error:
            raise OSError(f"{final}: not written ({_first_line(error)})") from error
        except OSError as error:
            if error.errno is None or error.filename is not None:
                raise
            # HDF5's own tells the address of its buffer and much else
            raise OSError(error.errno, os.strerror(error.errno), str(final)) from error


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


def _check_space(final: Path, file: h5py.File, count: int) -> None:
    """Raise OSError unless the disk has room for `count` more bytes of the file.

    Where space runs out in the middle, HDF5 can neither write a file nor close it.
    """
    size = os.stat(file.filename).st_size
    try:
        reserve(file.filename, max(size, file.id.get_filesize()) + count, final)
    finally:
        os.truncate(file.filename, size)


def _digest(attributes: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> str:
    """Return the SHA-256 over the attributes (sorted, as JSON) and the arrays' bytes."""
    sha = hashlib.sha256(json.dumps(attributes, sort_keys=True, default=_plain).encode())
    for name in sorted(arrays):
        array = arrays[name]
        sha.update(f"{name} {array.dtype.str} {array.size} ".encode())
        sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()


def _write(
    final: Path,
    place: h5py.Group,
    attributes: dict[str, Any],
    arrays: dict[str, NDArray[Any]],
    record: dict[str, Any],
) -> None:
    try:
        text = json.dumps(record, default=_plain)
    except TypeError as error:
        raise TypeError(f"record must hold what JSON can: {error}") from None
    if len(text.encode()) > _LARGEST_RECORD:
        raise ValueError(
            f"record takes {len(text.encode())} bytes as JSON, at most {_LARGEST_RECORD} fit"
        )
    size = sum(array.nbytes for array in arrays.values()) + len(text) + _HEADER
    _check_space(final, place.file, size)
    for name, array in arrays.items():
        # a chunk, and with it a checksum, takes at least one entry
        checked = {"chunks": array.shape, "fletcher32": True} if array.size else {}
        place.create_dataset(name, data=array, track_times=False, **checked)
    attributes = {
        "format": FORMAT,
        **attributes,
        "record": text,
    }
    for name, value in attributes.items():
        place.attrs[name] = value
    place.attrs["digest"] = _digest(attributes, arrays)


def _plain(value: Any) -> Any:
    """Turn NumPy scalars and arrays into what JSON can hold."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")


def write_container(
    path: PathLike,
    attributes: dict[str, Any],
    arrays: dict[str, NDArray[Any]],
    record: dict[str, Any],
    *,
    group: str | None = None,
) -> int:
    """Write attributes, arrays and a record to an HDF5 file.

    The file is written beside `path` under a temporary name, flushed and renamed, so that `path`
    is at every moment either as before or complete.

    Parameters
    ----------
    path : path-like
        Replaced if it exists, except that with `group` its other groups are kept.
    attributes : dict
        ``format_version``, and strings, numbers, small arrays of numbers.
    arrays : dict
        One-dimensional arrays by dataset name.
    record : dict
        What JSON can hold.
    group : str, optional
        Name of the group to write to, for many in one file.

    Returns
    -------
    int
        The file's bytes: the arrays plus at most 16 KiB, for a record of `factorize`.

    Raises
    ------
    TypeError, ValueError
        The record is not JSON or is too large for an attribute; the group's name is empty.
    FormatError
        With `group`: `path` exists and is not an HDF5 file.
    OSError
        The folder cannot be written.
    """
    if group is not None and not group.strip("/"):
        raise ValueError(f"group must be a name, got {group!r}")
    final = Path(path)
    with _one_writer(final.parent) if group is not None else nullcontext(), _created(final) as file:
        if group is not None and final.exists():
            _check_space(final, file, final.stat().st_size)
            with _open(final) as old:
                for name in old:
                    if _member(old, name) is None:
                        raise FormatError(f"{final}: {name}: found a link, expected a group")
                    _copy(old, name, file)
                for name, value in old.attrs.items():
                    file.attrs[name] = value
        place: h5py.Group = file
        if group is not None:
            if group in file:
                del file[group]
            place = file.create_group(group)
        _write(final, place, attributes, arrays, record)
    return final.stat().st_size


def _copy(source: h5py.Group, name: str, target: h5py.Group) -> None:
    """Copy an object and all below it to another file."""
    # HDF5 before 1.14 crashes on copying an object with more than eight attributes
    source.copy(name, target, without_attrs=True)

    def copy_attributes(path: str, item: h5py.Group | h5py.Dataset) -> None:
        for key, value in item.attrs.items():
            target[path].attrs[key] = value

    copy_attributes(name, source[name])
    if isinstance(source[name], h5py.Group):
        source[name].visititems(lambda path, item: copy_attributes(f"{name}/{path}", item))


def group_key(name: str) -> str:
    """Return the group in which a model's file keeps the matrix of any name, "/" in it included.

    >>> group_key("encoder/dense.weight"), group_key("")
    ('encoder%2Fdense.weight', '%')
    """
    key = re.sub("[%/\x00\ud800-\udfff]", lambda found: f"%{ord(found[0]):02X}", name)
    return {"": "%", ".": "%2E"}.get(key, key)


def write_groups(
    path: PathLike,
    items: Iterable[tuple[str, dict[str, Any], dict[str, NDArray[Any]], dict[str, Any]]],
    attributes: dict[str, Any],
) -> int:
    """Write a file of many groups at once, atomically; it replaces what was there.

    Parameters
    ----------
    path : path-like
    items : iterable of (group, attributes, arrays, record)
        As `write_container` takes them.
    attributes : dict
        Of the root. Their digest, and that of the groups' names and digests, is written with them.

    Returns
    -------
    int
        The file's bytes.
    """
    final = Path(path)
    with _created(final) as file:
        digests = {}
        for group, own, arrays, record in items:
            place = file.create_group(group)
            _write(final, place, own, arrays, record)
            digests[group] = place.attrs["digest"]
        for name, value in attributes.items():
            file.attrs[name] = value
        file.attrs["groups_digest"] = _digest({"root": attributes, "groups": digests}, {})
    return final.stat().st_size


def read_root(path: PathLike) -> dict[str, Any]:
    """Return the attributes of a file's root.

    Raises
    ------
    FileNotFoundError, FormatError
    """
    with _open(Path(path)) as file:
        return _plain_attributes(file)


def read_groups(path: PathLike) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the attributes of the root and of each group of a file that `write_groups` wrote.

    That no group is missing, changed or added is checked, their datasets only when they are read.

    Raises
    ------
    FileNotFoundError, FormatError
    """
    final = Path(path)
    with _open(final) as file:
        root = _plain_attributes(file)
        if "groups_digest" not in root:
            raise FormatError(f"{final}: attribute groups_digest: found none, expected a model")
        found = {
            name: _plain_attributes(file[name])
            for name in file
            if isinstance(file.get(name, getlink=True), h5py.HardLink)
        }
    told = root.pop("groups_digest")
    digests = {name: attributes.get("digest") for name, attributes in found.items()}
    try:
        actual = _digest({"root": root, "groups": digests}, {})
    except TypeError:
        actual = "attributes that are no numbers or strings"
    if told != actual:
        raise FormatError(f"{final}: attribute groups_digest: found {told!r}, expected {actual}")
    return root, found


def _plain_attributes(place: Any) -> dict[str, Any]:
    values = {name: place.attrs[name] for name in place.attrs}
    return {
        name: value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value
        for name, value in values.items()
    }


@contextmanager
def _open(path: Path) -> Iterator[h5py.File]:
    """Open a file for reading; whatever HDF5 finds wrong with it becomes a `FormatError`."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_dir():
        raise FormatError(f"{path}: found a folder, expected an HDF5 file")
    status = path.stat()
    _check_heaps(path, status.st_mtime_ns, status.st_size)
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (FormatError, PermissionError):
        raise
    except _UNREADABLE as error:
        raise FormatError(f"{path}: not readable as HDF5 ({_first_line(error)})") from error


def _member(place: h5py.Group, name: str) -> Any:
    """Return what `name` stands for in this very file; None if it is not there, or a link.

    Soft and external links can lead in circles and to other files.
    """
    for part in name.split("/"):
        if part in ("", "."):
            continue
        if not isinstance(place, h5py.Group):
            return None
        if not isinstance(place.get(part, getlink=True), h5py.HardLink):
            return None
        place = place.get(part)
    return place


@lru_cache(maxsize=32)
def _check_heaps(path: Path, _modified: int, size: int) -> None:
    """Check the sizes in the heaps that hold an HDF5 file's strings.

    They are the one structure of the file without a checksum, and HDF5 itself loops for ever on
    some damaged sizes there. Costs a scan of the file, once for each state of it.
    """
    if size == 0:
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = data.find(b"GCOL\x01\x00\x00\x00")
        while start >= 0:
            end = start + int.from_bytes(data[start + 8 : start + 16], "little")
            at = start + 16
            while at + 16 <= end <= size:
                index = int.from_bytes(data[at : at + 2], "little")
                length = int.from_bytes(data[at + 8 : at + 16], "little")
                step = length if index == 0 else 16 + -(-length // 8) * 8
                if step < 16 or at + step > end:
                    raise FormatError(
                        f"{path}: string heap at byte {start}: found an entry of {length} bytes, "
                        f"expected at most {end - at - 16}"
                    )
                at += step
            start = data.find(b"GCOL\x01\x00\x00\x00", start + 4)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def groups(path: PathLike) -> list[str]:
    """Return the names of all groups of a file that hold a matrix of ours; "" is the root."""
    found: list[str] = []
    seen = set()
    with _open(Path(path)) as file:
        waiting: list[tuple[str, h5py.Group]] = [("", file)]
        while waiting:
            name, place = waiting.pop()
            address = h5py.h5o.get_info(place.id).addr
            if address in seen:  # links can lead in circles
                continue
            seen.add(address)
            if "format" in place.attrs:
                found.append(name)
            inside = [(item, _member(place, item)) for item in place]
            named = [(f"{name}/{item}".lstrip("/"), made) for item, made in inside]
            waiting += [item for item in reversed(named) if isinstance(item[1], h5py.Group)]
    return found


@dataclass(frozen=True)
class Container:
    """What one group of a file holds, its digest checked.

    Attributes
    ----------
    label : str
        The path, and the group's name if it has one: the start of every complaint.
    attributes : dict
        All but format, record and digest.
    arrays : dict
        One-dimensional arrays by dataset name.
    record : dict
    """

    label: str
    attributes: dict[str, Any]
    arrays: dict[str, NDArray[Any]]
    record: dict[str, Any]


class Reader:
    """Reads one group, checking each piece before it is used."""

    def __init__(self, path: Path, place: h5py.Group) -> None:
        self.path, self.place = path, place
        self.label = f"{path}" if place.name in (None, "/") else f"{path}:{place.name}"
        self.length = path.stat().st_size

    def fail(self, what: str, found: Any, expected: Any) -> FormatError:
        """Return the error that names the place, what was found and what was expected."""
        return FormatError(f"{self.label}: {what}: found {found}, expected {expected}")

    def attribute(self, name: str, *kinds: type) -> Any:
        """Return an attribute of one of these kinds."""
        expected = " or ".join(kind.__name__ for kind in kinds)
        if name not in self.place.attrs:
            raise self.fail(f"attribute {name}", "none", expected)
        value = self.place.attrs[name]
        value = value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise self.fail(f"attribute {name}", repr(value), expected)
        return value

    def numbers(self, name: str, shape: tuple[int, ...], kind: str) -> list[Any]:
        """Return an attribute that is an array of that shape and kind of dtype, as lists."""
        value = np.asarray(self.place.attrs.get(name))
        if value.shape != shape or value.dtype.kind != kind:
            raise self.fail(f"attribute {name}", f"{value.shape} of {value.dtype}", f"{shape}")
        numbers: list[Any] = value.tolist()
        return numbers

    def array(self, name: str, size: int | None, dtype: np.dtype[Any] | None) -> NDArray[Any]:
        """Read a dataset; None for a size or dtype that the attributes do not tell."""
        item = _member(self.place, name)
        if not isinstance(item, h5py.Dataset):
            expected = "a dataset" if dtype is None else f"{size} entries of {dtype.str}"
            raise self.fail(f"dataset {name}", "none", expected)
        size = item.size if size is None else size
        dtype = item.dtype if dtype is None else dtype
        if item.shape != (size,) or item.dtype != dtype or dtype.kind not in "uif":
            raise self.fail(
                f"dataset {name}", f"{item.shape} of {item.dtype.str}", f"({size},) of {dtype.str}"
            )
        if size * dtype.itemsize > self.length:
            raise self.fail(
                f"dataset {name}",
                f"a file of {self.length} bytes",
                f"at least {size * dtype.itemsize}",
            )
        # a chunk is read whole, however large, and other files are not ours to read
        if item.chunks not in (None, item.shape) or item.external or item.is_virtual:
            raise self.fail(f"dataset {name}", "another storage", "one chunk in this file")
        values: NDArray[Any] = item[:]
        return values

    def contents(self, layout: Callable[[Reader], Layout | None]) -> Container:
        """Read everything; `FormatError` unless it is whole and of this format.

        `layout` checks the attributes that tell sizes and returns what datasets they call for;
        None stands for all that are there.
        """
        found = self.attribute("format", str)
        if found != FORMAT:
            raise self.fail("attribute format", repr(found), repr(FORMAT))
        self.attribute("format_version", int)
        for name in ("m", "n"):
            if not 1 <= self.attribute(name, int) < 2**31:
                raise self.fail(f"attribute {name}", self.attribute(name, int), "a positive size")
        wanted = layout(self)
        if wanted is None:
            names = [n for n in self.place if isinstance(_member(self.place, n), h5py.Dataset)]
            arrays = {name: self.array(name, None, None) for name in names}
        else:
            arrays = {name: self.array(name, *wanted[name]) for name in wanted}
        # every attribute but the digest itself is under the digest
        attributes = {
            name: self.attribute(name, str, int, float, list)
            for name in self.place.attrs
            if name != "digest"
        }
        digest, actual = self.attribute("digest", str), _digest(attributes, arrays)
        if digest != actual:
            raise self.fail("digest", actual, digest)
        record = json.loads(self.attribute("record", str))
        if not isinstance(record, dict):
            raise self.fail("attribute record", type(record).__name__, "an object")
        for name in ("format", "record"):
            del attributes[name]
        return Container(self.label, attributes, arrays, record)


def read_container(
    path: PathLike, layout: Callable[[Reader], Layout | None], *, group: str | None = None
) -> Container:
    """Read what `write_container` wrote.

    Everything is checked: version, sizes against the file's length, checksums, the digest.

    Parameters
    ----------
    path : path-like
    layout : callable
        What the datasets must be, see `Reader.contents`.
    group : str, optional

    Returns
    -------
    Container

    Raises
    ------
    FileNotFoundError
    FormatError
        The file is not readable as HDF5, has no such group, or is inconsistent; the message names
        the path, the dataset or attribute, what was found and what was expected.
    """
    final = Path(path)
    with _open(final) as file:
        place: Any = file
        if group is not None:
            place = _member(file, group)
            if not isinstance(place, h5py.Group):
                place = _member(file, group_key(group))  # a model's file, a name with "/" in it
            if not isinstance(place, h5py.Group):
                raise FormatError(f"{final}: group {group}: found {_names(file)}, expected it")
        if "format" not in place.attrs:
            hint = "; name one with group=" if len(file) and group is None else ""
            raise FormatError(
                f'{final}: attribute format: found none, expected "{FORMAT}" '
                f"(the file holds {_names(file)}{hint})"
            )
        return Reader(final, place).contents(layout)


def _names(file: h5py.File) -> str:
    names = list(file)
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"groups {shown}" if names else "no groups"
