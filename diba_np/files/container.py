"""HDF5 containers: attributes, flat arrays and a record; read here, checked to the last byte.

A container is the root of a file or a group of it: attributes, one-dimensional datasets, the
attribute ``record`` (JSON) and the attribute ``digest`` (SHA-256 over the other attributes and the
datasets). Every dataset carries a Fletcher-32 checksum, and HDF5's own structures are checksummed
too, except for the heap of strings, whose sizes are checked before HDF5 reads them.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import mmap
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from diba_np.errors import FormatError
from diba_np.files.atomic import PathLike, as_path
from diba_np.files.signatures import kind_of

FORMAT = "diba_np"

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

# what an operating system tells that has nothing to do with a file's contents
_OF_THE_SYSTEM = (errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM, errno.ESTALE)

_HELD = (errno.EAGAIN, errno.EWOULDBLOCK)  # what it tells of another's lock

# bytes of the largest chunk of ours: HDF5 has none of 4 GiB and more
LARGEST_CHUNK = 2**32 - 2**16

# dataset -> (entries, dtype)
Layout = dict[str, tuple[int, np.dtype[Any]]]


def digest_of(attributes: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> str:
    """Return the SHA-256 over the attributes (sorted, as JSON) and the arrays' bytes."""
    sha = hashlib.sha256(json.dumps(attributes, sort_keys=True, default=plain).encode())
    for name in sorted(arrays):
        array = arrays[name]
        sha.update(f"{name} {array.dtype.str} {array.size} ".encode())
        sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()


def chunks_of(size: int, dtype: np.dtype[Any]) -> tuple[int]:
    """Return the chunks of a dataset: one, or as few even ones as HDF5 can have."""
    count = max(1, -(-size * dtype.itemsize // LARGEST_CHUNK))
    return (-(-size // count),)


def plain(value: Any) -> Any:
    """Turn NumPy scalars and arrays into what JSON can hold."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")


def group_key(name: str) -> str:
    """Return the group in which a model's file keeps the matrix of any name, "/" in it included.

    >>> group_key("encoder/dense.weight"), group_key("")
    ('encoder%2Fdense.weight', '%')
    """
    key = re.sub("[%/\x00\ud800-\udfff]", lambda match: f"%{ord(match[0]):02X}", name)
    return {"": "%", ".": "%2E"}.get(key, key)


def check_group(group: Any) -> None:
    """Complain about a group that is no name: TypeError, ValueError."""
    if group is None:
        return
    if not isinstance(group, str):
        raise TypeError(f"group must be a str, got {type(group).__name__}")
    if not _is_path(group):
        raise ValueError(f"group must be a name, got {group!r}")


def _is_path(group: str) -> bool:
    """Tell whether HDF5 can have a group of that name."""
    return bool(group.strip("/")) and not re.search("[\0\ud800-\udfff]", group)


def _find_group(file: h5py.File, group: str) -> h5py.Group | None:
    """Return a group by its path, or by the name of a model's array; None if there is none."""
    # "." is no name to HDF5, but may be one of a matrix
    paths = [group] if _is_path(group) and "." not in group.split("/") else []
    if "contents" in file.attrs:  # a model's file, whose names are taken as they are
        paths.insert(0, group_key(group))
    found = (member(file, path) for path in paths)
    return next((place for place in found if isinstance(place, h5py.Group)), None)


def read_root(path: PathLike) -> dict[str, Any]:
    """Return the attributes of a file's root.

    Raises
    ------
    FileNotFoundError, FormatError
    """
    with open_file(as_path(path)) as file:
        return plain_attributes(file.attrs)


def read_groups(path: PathLike) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the attributes of the root and of each group of a file that `write_groups` wrote.

    That no group is missing, changed or added is checked, their datasets only when they are read.

    Raises
    ------
    FileNotFoundError, FormatError
    """
    final = as_path(path)
    with open_file(final) as file:
        root = plain_attributes(file.attrs)
        if "groups_digest" not in root:
            holds = "one matrix" if _is_ours(file) else _names(file)
            raise FormatError(f"{final}: is no file of a model or network; it holds {holds}")
        members = {
            name: plain_attributes(file[name].attrs)
            for name in file
            if isinstance(file.get(name, getlink=True), h5py.HardLink)
        }
    stored = root.pop("groups_digest")
    digests = {name: attributes.get("digest") for name, attributes in members.items()}
    try:
        actual = digest_of({"root": root, "groups": digests}, {})
    except TypeError:
        actual = "attributes that are no numbers or strings"
    if stored != actual:
        raise FormatError(f"{final}: attribute groups_digest: found {stored!r}, expected {actual}")
    return root, members


def plain_attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return attributes as they are read: Python's numbers and lists in the place of NumPy's."""
    return {
        name: value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value
        for name, value in attributes.items()
    }


@contextmanager
def open_file(path: Path) -> Iterator[h5py.File]:
    """Open a file for reading; whatever HDF5 finds wrong with it becomes a `FormatError`."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_dir():
        raise FormatError(f"{path}: found a folder, expected an HDF5 file")
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise FormatError(f"{path}: found a pipe or a device, expected an HDF5 file")
    _check_heaps(path, status.st_mtime_ns, status.st_size)
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (FormatError, PermissionError):
        raise
    except _UNREADABLE as error:
        _pass_on(path, error)
        raise FormatError(
            f"{path}: {_dense(path) or f'not readable as HDF5 ({first_line(error)})'}"
        ) from error


def _dense(path: Path) -> str:
    """Tell what a file holds that is dense, and what makes a file of ours of it; "" of others."""
    kind = kind_of(path)
    if kind == "npy":
        return "is a dense array (.npy), nothing compressed; `diba-np factorize` compresses it"
    known = {"zip": "an archive (.npz or of torch)", "gguf": "GGUF", "safetensors": "safetensors"}
    if kind not in known:
        return ""
    return f"is {known[kind]}, nothing compressed; `diba-np model` compresses its arrays"


def _pass_on(path: Path, error: Exception) -> None:
    """Raise OSError where it is not the file's contents that are wrong."""
    text = str(error)
    number = re.search(r"unable to lock file, errno = (\d+)", text)
    if number and int(number[1]) not in _HELD:
        raise OSError(
            f"{path}: cannot be locked ({os.strerror(int(number[1]))}), its file system may have "
            "no locks; HDF5_USE_FILE_LOCKING=FALSE in the environment does without"
        ) from error
    if "unable to lock file" in text or "already open for" in text:
        hint = ""
        if "consistency flags" in text:
            hint = f", or was when a program crashed (h5clear -s {path} tells HDF5 that it is not)"
        raise OSError(
            f"{path}: is in use, another program has it open for writing{hint}"
        ) from error
    if isinstance(error, OSError) and error.filename is not None:
        raise error  # not of HDF5
    code = getattr(error, "errno", None)
    if code in _OF_THE_SYSTEM:
        raise OSError(code, os.strerror(code), str(path)) from error


def member(place: h5py.Group, name: str) -> Any:
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


def first_line(error: Exception) -> str:
    """Return the first line of an error's text: h5py's tell much that helps nobody."""
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def _is_ours(place: h5py.Group) -> bool:
    """Tell whether a group is, or was before it was damaged, a factorization."""
    if "format" not in place.attrs:
        return False
    named = place.attrs["format"]
    return (isinstance(named, str) and named == FORMAT) or "digest" in place.attrs


def groups(path: PathLike) -> list[str]:
    """Return the names of all groups of a file that hold a matrix of ours; "" is the root."""
    with open_file(as_path(path)) as file:
        return list(_ours(file))


def _ours(file: h5py.File) -> Iterator[str]:
    """Yield the names of all groups that hold a matrix of ours."""
    seen = set()
    waiting: list[tuple[str, h5py.Group]] = [("", file)]
    while waiting:
        name, place = waiting.pop()
        address = h5py.h5o.get_info(place.id).addr
        if address in seen:  # links can lead in circles
            continue
        seen.add(address)
        if _is_ours(place):
            yield name
        inside = [(item, member(place, item)) for item in place]
        named = [(f"{name}/{item}".lstrip("/"), ours) for item, ours in inside]
        waiting += [item for item in reversed(named) if isinstance(item[1], h5py.Group)]


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
    digest : str
        As stored; empty of what is a part of a group.
    """

    label: str
    attributes: dict[str, Any]
    arrays: dict[str, NDArray[Any]]
    record: dict[str, Any]
    digest: str = ""


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
        item = member(self.place, name)
        if not isinstance(item, h5py.Dataset):
            expected = "a dataset" if dtype is None else f"{size} entries of {dtype.str}"
            raise self.fail(f"dataset {name}", "none", expected)
        size = item.size if size is None else size
        dtype = item.dtype.newbyteorder("<") if dtype is None else dtype
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
        chunks = chunks_of(size, dtype)
        if item.chunks not in (None, chunks) or item.external or item.is_virtual:
            expected = "one chunk" if chunks == item.shape else f"chunks of {chunks[0]} entries"
            raise self.fail(f"dataset {name}", "another storage", f"{expected} in this file")
        values: NDArray[Any] = item[:]
        return values

    def contents(self, layout: Callable[[Reader], Layout | None]) -> Container:
        """Read everything; `FormatError` unless it is whole and of this format.

        `layout` checks the attributes that tell sizes and returns what datasets they call for;
        None stands for all that are there.
        """
        format_name = self.attribute("format", str)
        if format_name != FORMAT:
            raise self.fail("attribute format", repr(format_name), repr(FORMAT))
        self.attribute("format_version", int)
        for name in ("m", "n"):
            if not 1 <= self.attribute(name, int) < 2**31:
                raise self.fail(f"attribute {name}", self.attribute(name, int), "a positive size")
        wanted = layout(self)
        if wanted is None:
            names = [n for n in self.place if isinstance(member(self.place, n), h5py.Dataset)]
            arrays = {name: self.array(name, None, None) for name in names}
        else:
            arrays = {name: self.array(name, *wanted[name]) for name in wanted}
        # every attribute but the digest itself is under the digest
        attributes = {
            name: self.attribute(name, str, int, float, list)
            for name in self.place.attrs
            if name != "digest"
        }
        digest, actual = self.attribute("digest", str), digest_of(attributes, arrays)
        if digest != actual:
            raise self.fail("digest", actual, digest)
        record = json.loads(self.attribute("record", str))
        if not isinstance(record, dict):
            raise self.fail("attribute record", type(record).__name__, "an object")
        for name in ("format", "record"):
            del attributes[name]
        return Container(self.label, attributes, arrays, record, digest)


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
    TypeError
        `group` is no str.
    FileNotFoundError
    FormatError
        The file is not readable as HDF5, has no such group, or is inconsistent; the message names
        the path, the dataset or attribute, what was found and what was expected.
    """
    if group is not None and not isinstance(group, str):
        raise TypeError(f"group must be a str, got {type(group).__name__}")
    final = as_path(path)
    with open_file(final) as file:
        place: Any = file
        if group is not None:
            place = _find_group(file, group)
            if place is None:
                there = _names(file)
                if _is_ours(file):
                    there = "one matrix, at its root; leave group= out"
                raise FormatError(f"{final}: has no group {group or repr(group)}; it holds {there}")
        if not _is_ours(place):
            names = _names(file)
            if group is None and "contents" in file.attrs:
                whole = f"found a whole {file.attrs['contents']} with {names}"
                raise FormatError(f"{final}: {whole}, expected one matrix; name one with group=")
            many = group is None and names != _NONE
            if many and "format" not in file.attrs:
                raise FormatError(f"{final}: holds factorizations in {names}; name one with group=")
            format_name = "none"
            if "format" in place.attrs:
                format_name = f"{place.attrs['format']!r} of another program"
            hint = "; name one with group=" if many else ""
            raise FormatError(
                f'{final}: attribute format: found {format_name}, expected "{FORMAT}" '
                f"(the file holds {names}{hint})"
            )
        return Reader(final, place).contents(layout)


_NONE = "no factorization"


def _names(file: h5py.File) -> str:
    """Tell in a few words which groups below the root hold a matrix of ours."""
    names = list(itertools.islice((name for name in _ours(file) if name), 6))
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"groups {shown}" if names else _NONE
