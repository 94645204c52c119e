"""Write HDF5 containers, atomically; see `diba_np.files.container`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import h5py
from numpy.typing import NDArray

from diba_np.errors import FormatError
from diba_np.files.atomic import PathLike, atomic_path, reserve
from diba_np.files.container import (
    FORMAT,
    check_group,
    digest_of,
    first_line,
    member,
    open_file,
    plain,
)
from diba_np.files.lock import FileLock

# HDF5 1.10 and later read these files; its structures are compact and checksummed
_LIBVER = ("v110", "v110")

_LARGEST_RECORD = 60_000  # bytes of JSON; an HDF5 attribute holds 64 KiB
_HEADER = 16 * 1024  # bytes that HDF5's structures of one group may take

_LONGEST_WAIT = 60.0  # seconds for another writer of the same folder


@contextmanager
def _one_writer(folder: Path) -> Iterator[None]:
    """Hold off other writers of groups in that folder, in this and in other processes.

    A group is added by copying the file: without this the second of two writers would drop what
    the first has added meanwhile.
    """
    try:
        lock = FileLock(folder, wait=_LONGEST_WAIT, needed=False)
    except BlockingIOError:
        raise OSError(f"{folder}: another program is writing to it") from None
    with lock:
        yield


@contextmanager
def _created(final: Path) -> Iterator[h5py.File]:
    """Give a new HDF5 file that becomes `final` on success; see `_check_space`."""
    with atomic_path(final) as temporary:
        try:
            with h5py.File(temporary, "w", libver=_LIBVER) as file:
                yield file
        except RuntimeError as error:
            raise OSError(f"{final}: not written ({first_line(error)})") from error
        except OSError as error:
            if error.errno is None or error.filename is not None:
                raise
            # HDF5's own tells the address of its buffer and much else
            raise OSError(error.errno, os.strerror(error.errno), str(final)) from error


def _check_space(final: Path, file: h5py.File, count: int) -> None:
    """Raise OSError unless the disk has room for `count` more bytes of the file.

    Where space runs out in the middle, HDF5 can neither write a file nor close it.
    """
    size = os.stat(file.filename).st_size
    try:
        reserve(file.filename, max(size, file.id.get_filesize()) + count, final)
    finally:
        os.truncate(file.filename, size)


def _write(
    final: Path,
    place: h5py.Group,
    attributes: dict[str, Any],
    arrays: dict[str, NDArray[Any]],
    record: dict[str, Any],
) -> None:
    try:
        text = json.dumps(record, default=plain)
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
    place.attrs["digest"] = digest_of(attributes, arrays)


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
        The record is not JSON or is too large for an attribute; `group` is no name.
    FormatError
        With `group`: `path` exists and is not an HDF5 file.
    OSError
        The folder cannot be written.
    """
    check_group(group)
    final = Path(path)
    with _one_writer(final.parent) if group is not None else nullcontext(), _created(final) as file:
        if group is not None and final.exists():
            _check_space(final, file, final.stat().st_size)
            with open_file(final) as old:
                for name in old:
                    if member(old, name) is None:
                        raise FormatError(f"{final}: {name}: found a link, expected a group")
                    _copy(old, name, file)
                for name, value in old.attrs.items():
                    file.attrs[name] = value
        place: h5py.Group = file
        if group is not None:
            place = _emptied(file, group, arrays)
        _write(final, place, attributes, arrays, record)
    return final.stat().st_size


def _emptied(file: h5py.File, group: str, arrays: Iterable[str]) -> h5py.Group:
    """Return a group without what `_write` writes; groups below it are others, and stay."""
    parts = [part for part in group.split("/") if part]
    for end in range(1, len(parts) + 1):
        name = "/".join(parts[:end])
        if name in file and not isinstance(file[name], h5py.Group):
            raise ValueError(f"group {group!r}: {name!r} is an array of another factorization")
    place = file.require_group(group)
    for name in [name for name in place if not isinstance(place[name], h5py.Group)]:
        del place[name]
    for name in list(place.attrs):
        del place.attrs[name]
    for name in arrays:
        if name in place:
            raise ValueError(f"group {group!r}: its array {name!r} is a group of the file already")
    return place


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
        file.attrs["groups_digest"] = digest_of({"root": attributes, "groups": digests}, {})
    return final.stat().st_size
