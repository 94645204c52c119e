"""NumPy's own files as sources: .npy, .npz, mappings of arrays."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from diba_np.arrays import in_float64
from diba_np.checks import check_dense
from diba_np.errors import FormatError
from diba_np.matrix.small_floats import SMALL_FLOATS, word_type
from diba_np.sources.entry import (
    Entry,
    as_format_error,
    check_unique,
    member_bytes,
    of_steady_file,
    of_words,
    steady,
    type_of_values,
    unchanged,
    unfit_reason,
)

_LONGEST_HEADER = 1 << 17  # bytes of a .npy

_PICKLED = "it holds Python objects, which are never loaded; leave it out by its name (exclude)"


def _header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any], bool]:
    """Read the magic bytes and the header of a .npy; the last is whether columns come first."""
    magic = file.read(6)
    if magic != b"\x93NUMPY":
        raise ValueError(f"it begins with {magic!r} instead of b'\\x93NUMPY'")
    major, _ = file.read(2)
    if major == 1:
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    elif major == 2:
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    else:  # NumPy writes these for records whose names are not in Latin-1
        shape, dtype, fortran = (), np.dtype("V1"), False
    return tuple(shape), np.dtype(dtype), bool(fortran)


def _entry(name: str, label: str, open_file: Callable[[], BinaryIO], read: Any) -> Entry:
    """Return the entry of a .npy; what is wrong with its header is told when it is read."""
    try:
        with as_format_error(label, ".npy"), open_file() as file:
            shape, dtype, _ = _header(file)
    except (FormatError, OSError):
        return Entry(name, read)
    unfit = "" if dtype.hasobject else unfit_reason(dtype)
    return Entry(name, read, "" if dtype.hasobject else type_of_values(dtype), shape, unfit)


def npy_entry(path: Path, name: str) -> Entry:
    """Return the entry of one .npy, which is mapped when it is read."""

    def read() -> NDArray[Any]:
        with as_format_error(str(path), ".npy"):
            with _open_regular(path) as file:
                if _header(file)[1].hasobject:
                    raise ValueError(_PICKLED)
            return in_float64(np.load(path, mmap_mode="r", allow_pickle=False))

    entry = _entry(name, str(path), lambda: _open_regular(path), read)
    return steady(entry, unchanged(path))


def _open_regular(path: Path) -> BinaryIO:
    """Open a file; a pipe in its place would be waited for."""
    if path.exists() and not path.is_file():
        raise ValueError("it is no regular file")
    return path.open("rb")


def npy_of_bytes(data: bytes, label: str) -> NDArray[Any]:
    """Return the array of a .npy that came through a pipe; FormatError if it is none, or cut."""
    with as_format_error(label, ".npy"):
        file = io.BytesIO(data)
        shape, dtype, _ = _header(file)
        if dtype.hasobject:
            raise ValueError(_PICKLED)
        size, held = math.prod(shape) * dtype.itemsize, len(data) - file.tell()
        if size > held:
            raise ValueError(f"{held} bytes for {shape} of {dtype}, expected {size}")
        file.seek(0)
        values: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
        return values


def open_npy(path: Path) -> list[Entry]:
    """Return the one array of a .npy, named like the file."""
    return [npy_entry(path, path.stem)]


@of_steady_file
def open_npz(path: Path) -> list[Entry]:
    """Return the arrays of an archive of .npy; ValueError of the parts of a sparse matrix."""
    with as_format_error(str(path), ".npz"), zipfile.ZipFile(path) as archive:
        members = [each for each in archive.infolist() if each.filename.endswith(".npy")]
        entries = []
        for member in members:
            label = f"{path}:{member.filename}"
            opened: Any = partial(archive.open, member)
            name = member.filename.removesuffix(".npy")
            entries.append(_entry(name, label, opened, _member_reader(path, member, label)))
    _check_dense(path, {entry.name: entry for entry in entries})
    return check_unique(entries, str(path))


def _check_dense(path: Path, entries: Mapping[str, Entry]) -> None:
    """Refuse what `scipy.sparse.save_npz` writes, whose arrays are no weights by themselves."""
    if not {"format", "shape", "data"} <= entries.keys():
        return
    try:
        kind = entries["format"].read()
    except FormatError:  # told when it is read, unless it is left out
        return
    name = kind.item() if kind.ndim == 0 else None
    name = name.decode("latin-1") if isinstance(name, bytes) else name
    if name in ("bsr", "coo", "csc", "csr", "dia"):
        raise ValueError(
            f"{path}: found a sparse matrix ({name}), expected dense arrays; "
            "save scipy.sparse.load_npz(...).toarray()"
        )


def _member_reader(path: Path, member: zipfile.ZipInfo, label: str) -> Callable[[], NDArray[Any]]:
    def read() -> NDArray[Any]:
        with as_format_error(label, ".npy"):
            words = member_bytes(path, member)
            file = io.BytesIO(words[:_LONGEST_HEADER].tobytes())
            shape, dtype, fortran = _header(file)
            if dtype.hasobject:
                raise ValueError(_PICKLED)
            values = words[file.tell() :]
            size = math.prod(shape) * dtype.itemsize
            if size > values.size:
                raise ValueError(f"{values.size} bytes for {shape} of {dtype}")
            order: Any = "F" if fortran else "C"
            return in_float64(np.ndarray(shape, dtype, values[:size].data, order=order))

    return read


def open_mapping(source: Mapping[str, Any]) -> list[Entry]:
    """Return the arrays of a mapping, each taken from it when it is read."""
    wrong = [name for name in source if not isinstance(name, str)]
    if wrong:
        raise TypeError(f"source must map names to arrays, got the key {wrong[0]!r}")
    return [_value_entry(source, name) for name in source]


def _value_entry(source: Mapping[str, Any], name: str) -> Entry:
    def read() -> NDArray[Any]:
        value = source[name]
        if hasattr(value, "tocsr"):
            raise TypeError(
                f"{name} must be a dense array, got a sparse matrix; pass {name}.toarray(), "
                "or leave it out by its name (exclude)"
            )
        check_dense(value, name)
        try:
            array = np.asanyarray(value)
        except ValueError as error:
            raise ValueError(f"{name} must be a rectangular array: {error}") from None
        except RuntimeError as error:  # a tensor of torch that gradients are taken of
            raise TypeError(
                f"{name} must be an array, got {type(value).__name__} that NumPy cannot have: "
                f"{error}"
            ) from None
        if array.dtype.hasobject:
            raise TypeError(
                f"{name} must be an array of numbers, got {type(value).__name__} of Python "
                "objects; leave it out by its name (exclude)"
            )
        kind = array.dtype.name
        if kind in SMALL_FLOATS:
            array = array.view(word_type(kind))
        return of_words(array, kind)

    # an array that is there already tells what it is; others, as those of a lazy mapping, later
    value = dict.get(source, name) if isinstance(source, dict) else None
    if not isinstance(value, np.ndarray) or value.dtype.hasobject:
        return Entry(name, read)
    dtype = value.dtype
    if dtype.name in SMALL_FLOATS:
        return Entry(name, read, dtype.name, value.shape)
    return Entry(name, read, type_of_values(dtype), value.shape, unfit_reason(dtype))
