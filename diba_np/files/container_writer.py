"""Write HDF5 containers, atomically; see `diba_np.files.container`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
from numpy.typing import NDArray

from diba_np.errors import FormatError
from diba_np.files.atomic import PathLike, as_path, atomic_path, is_stream, reserve, target_of
from diba_np.files.container import (
    FORMAT,
    check_group,
    chunks_of,
    digest_of,
    first_line,
    member,
    open_file,
    plain,
    plain_attributes,
)
from diba_np.files.lock import FileLock

# HDF5 1.10 and later read these files; its structures are compact and checksummed
_LIBVER = ("v110", "v110")
_LIBVER_OF_COPIES = ("v110", "latest")  # what is there may be newer

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
def _created(final: Path, old: Path | None = None) -> Iterator[tuple[h5py.File, list[int]]]:
    """Give a new HDF5 file, or a copy of `old` to the byte, that becomes `final` on success.

    The list gets the file's bytes when it is written. See `_check_space`.
    """
    size: list[int] = []
    with atomic_path(final) as temporary:
        try:
            if old is None:
                with h5py.File(temporary, "w", libver=_LIBVER) as file:
                    yield file, size
            else:
                _copy_bytes(old, temporary, final)
                with h5py.File(temporary, "r+", libver=_LIBVER_OF_COPIES) as file:
                    yield file, size
        except RuntimeError as error:
            raise OSError(f"{final}: not written ({first_line(error)})") from error
        except OSError as error:
            if error.errno is None or error.filename is not None:
                raise
            # HDF5's own text names the address of its buffer and much else
            raise OSError(error.errno, os.strerror(error.errno), str(final)) from error
        size.append(temporary.stat().st_size)


def _copy_bytes(old: Path, temporary: Path, final: Path) -> None:
    """Copy a file that nobody writes to meanwhile."""
    with open_file(old) as file:  # holds the lock that HDF5's writers ask for
        free = file.mode == "r"  # as it was asked for, unless this very process writes to it
        if free:
            reserve(temporary, old.stat().st_size, final)
            shutil.copyfile(old, temporary)
    if not free:
        raise OSError(f"{final}: is in use, this process has it open for writing")


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
    except (ValueError, RecursionError):
        raise ValueError("record must hold what JSON can, got one that contains itself") from None
    if len(text.encode()) > _LARGEST_RECORD:
        raise ValueError(
            f"record takes {len(text.encode())} bytes as JSON, at most {_LARGEST_RECORD} fit"
        )
    size = sum(array.nbytes for array in arrays.values()) + len(text) + _HEADER
    _check_space(final, place.file, size)
    for name, array in arrays.items():
        # a chunk, and with it a checksum, takes at least one entry
        chunks = chunks_of(array.size, array.dtype)
        checked = {"chunks": chunks, "fletcher32": True} if array.size else {}
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
        Replaced if it exists, except that with `group` all else in it is kept to the byte,
        whoever wrote it: the group is added to a copy of the file, which then takes its place.
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
        The record is not JSON or is too large for an attribute; `group` is no name, or holds what
        is not ours; the file is that of a whole model or network.
    FormatError
        With `group`: `path` exists and is not an HDF5 file, or the group is reached by a link.
    OSError
        The folder cannot be written, or the file is in use.
    """
    check_group(group)
    if group is not None and "." in group.split("/"):
        raise ValueError(f"group must have no part '.', got {group!r}")
    final = as_path(path)
    if group is None:
        with _created(final) as (file, size):
            _write(final, file, attributes, arrays, record)
        return size[0]
    if is_stream(final):
        raise OSError(f"{final}: is no file, expected one that a group can be added to")
    final = target_of(final)
    with _one_writer(final.parent):
        old = final if final.exists() and final.stat().st_size else None
        if old is not None:
            _check_group_is_free(final, group, arrays)
        with _created(final, old) as (file, size):
            _write(final, _emptied(file, group), attributes, arrays, record)
    return size[0]


def _check_group_is_free(final: Path, group: str, arrays: Iterable[str]) -> None:
    """Complain unless a group can be written without a change to anything else of the file."""
    with open_file(final) as file:  # in which a ValueError would be one of HDF5
        whole = plain_attributes(file.attrs) if "groups_digest" in file.attrs else None
        trouble = "" if whole is not None else _in_the_way(final, file, group, arrays)
    if whole is not None:  # its digest is over all groups
        raise ValueError(
            f"{final}: holds a whole {whole.get('contents', 'model')}, in which no group can be "
            "added or replaced; save to another file"
        )
    if trouble:
        raise ValueError(f"group {group!r}{trouble}")


def _in_the_way(final: Path, file: h5py.File, group: str, arrays: Iterable[str]) -> str:
    """Return why a group cannot be written; empty if it can."""
    place: h5py.Group = file
    parts = [part for part in group.split("/") if part]
    for end, part in enumerate(parts, start=1):
        name = "/".join(parts[:end])
        link = place.get(part, getlink=True) if part in place or _is_link(place, part) else None
        if link is None:
            return ""
        if not isinstance(link, h5py.HardLink):
            raise FormatError(f"{final}: {name}: found a link, expected a group")
        item = place[part]
        if not isinstance(item, h5py.Group):
            return (
                f": {name!r} is an array of another factorization, or of another program; "
                "name another group"
            )
        place = item
    return _of_others(place, arrays)


def _is_link(place: h5py.Group, part: str) -> bool:
    """Tell whether a name is there, also where it leads nowhere."""
    return bool(place.id.links.exists(part.encode()))


def _of_others(place: h5py.Group, arrays: Iterable[str]) -> str:
    """Return what a group holds beside a factorization and groups below it; empty if nothing."""
    ours = place.attrs.get("format") == FORMAT
    for name in place:
        inside = member(place, name)
        if isinstance(inside, h5py.Group):
            if name in arrays:
                return f": its array {name!r} is a group of the file already"
        elif not ours or not isinstance(inside, h5py.Dataset):
            return f" holds {name!r} of another program; name another group"
    if len(place.attrs) and not ours:
        first = next(iter(place.attrs))
        return f" holds attributes of another program, the first {first!r}; name another group"
    return ""


def _emptied(file: h5py.File, group: str) -> h5py.Group:
    """Return a group without what `_write` writes; groups below it are others, and stay."""
    place = file.require_group(group)
    for name in [name for name in place if not isinstance(member(place, name), h5py.Group)]:
        del place[name]
    for name in list(place.attrs):
        del place.attrs[name]
    return place


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
    final = as_path(path)
    with _created(final) as (file, size):
        digests = {}
        for group, own, arrays, record in items:
            place = file.create_group(group)
            _write(final, place, own, arrays, record)
            digests[group] = place.attrs["digest"]
        for name, value in attributes.items():
            file.attrs[name] = value
        file.attrs["groups_digest"] = digest_of({"root": attributes, "groups": digests}, {})
    return size[0]
