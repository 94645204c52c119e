"""Where a model's arrays come from: folders of .npy, .npz, .safetensors, HDF5, any mapping."""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diba_np.errors import FormatError
from diba_np.matrix.bfloat16 import BFLOAT16, from_bfloat16

Source = str | os.PathLike[str] | Mapping[str, Any]

# the element types of the safetensors format that NumPy can hold, and bfloat16
_SAFETENSORS = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": BFLOAT16,
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "|u1",
    "BOOL": "|b1",
}

_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
_LARGEST_EXPANSION = 4096  # no chunked HDF5 data is taken to be compressed more than this


@dataclass(frozen=True)
class Entry:
    """One array of a source, read when it is asked for.

    Attributes
    ----------
    name : str
    read : callable
        Returns the array; a memory map where the file allows it, float32 for bfloat16.
    dtype : str
        NumPy's name of the type in the source, or "bfloat16".
    """

    name: str
    read: Callable[[], NDArray[Any]]
    dtype: str = ""


def open_source(source: Source) -> list[Entry]:
    """Return the arrays of a source, none of them read yet.

    Parameters
    ----------
    source : path-like or mapping of str to array_like
        A folder (every .npy in it and below, named by its path without the suffix), an .npz,
        .safetensors or HDF5 file (.h5, .hdf5: every dataset, named by its path), one .npy, or
        arrays by name.

    Returns
    -------
    list of Entry
        In the source's own order; folders and HDF5 files sorted by name.

    Raises
    ------
    TypeError
        Neither a path nor a mapping of names.
    FileNotFoundError
    ValueError
        Of no known kind, or without arrays.
    FormatError
        Not readable as what it claims to be.
    """
    if isinstance(source, Mapping):
        wrong = [name for name in source if not isinstance(name, str)]
        if wrong:
            raise TypeError(f"source must map names to arrays, got the key {wrong[0]!r}")
        entries = [Entry(name, _getter(source, name)) for name in source]
    elif isinstance(source, (str, os.PathLike)):
        entries = _open_path(Path(source))
    else:
        raise TypeError(f"source must be a path or a mapping, got {type(source).__name__}")
    if not entries:
        raise ValueError(f"source must hold arrays, found none in {_label(source)}")
    return entries


def _label(source: Source) -> str:
    return f"a {type(source).__name__}" if isinstance(source, Mapping) else str(source)


def _getter(source: Mapping[str, Any], name: str) -> Callable[[], NDArray[Any]]:
    return lambda: np.asanyarray(source[name])


def _open_path(path: Path) -> list[Entry]:
    if path.is_dir():
        files = sorted(path.rglob("*.npy"), key=lambda file: file.relative_to(path).as_posix())
        return [
            Entry(file.relative_to(path).with_suffix("").as_posix(), _npy_reader(file))
            for file in files
        ]
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    kinds: dict[str, Callable[[Path], list[Entry]]] = {
        ".npy": lambda file: [Entry(file.stem, _npy_reader(file))],
        ".npz": _open_npz,
        ".safetensors": _open_safetensors,
        ".h5": _open_hdf5,
        ".hdf5": _open_hdf5,
    }
    if path.suffix.lower() not in kinds:
        raise ValueError(
            f"{path}: expected a folder of .npy, .npy, .npz, .safetensors, .h5 or .hdf5"
        )
    return kinds[path.suffix.lower()](path)


# -- NumPy's own -----------------------------------------------------------------------------------


@contextmanager
def _as_format_error(label: str, kind: str) -> Iterator[None]:
    """Turn whatever a reader finds wrong into a `FormatError`."""
    try:
        yield
    except FormatError:
        raise
    except (ValueError, EOFError, OSError, KeyError, RuntimeError, zipfile.BadZipFile) as error:
        if isinstance(error, PermissionError):
            raise
        text = str(error).splitlines() or [type(error).__name__]
        raise FormatError(f"{label}: not readable as {kind} ({text[0]})") from error


def _npy_reader(path: Path) -> Callable[[], NDArray[Any]]:
    def read() -> NDArray[Any]:
        with _as_format_error(str(path), ".npy"):
            found = np.load(path, mmap_mode="r", allow_pickle=False)
            if not isinstance(found, np.ndarray):
                raise ValueError("found an archive")
            return found

    return read


def _open_npz(path: Path) -> list[Entry]:
    with _as_format_error(str(path), ".npz"), zipfile.ZipFile(path) as archive:
        members = [name for name in archive.namelist() if name.endswith(".npy")]
    if len(set(members)) < len(members):
        raise FormatError(f"{path}: holds two arrays of one name")

    def reader(member: str) -> Callable[[], NDArray[Any]]:
        def read() -> NDArray[Any]:
            label = f"{path}:{member}"
            with _as_format_error(label, ".npy"), zipfile.ZipFile(path) as archive:
                with archive.open(member) as file:
                    found: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
                    return found

        return read

    return [Entry(member.removesuffix(".npy"), reader(member)) for member in members]


# -- safetensors -----------------------------------------------------------------------------------


def _open_safetensors(path: Path) -> list[Entry]:
    """Read the header: 8 bytes of its length, JSON, then the arrays' bytes one after another."""
    length = path.stat().st_size
    with _as_format_error(str(path), ".safetensors"):
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= min(length - 8, _LONGEST_HEADER):
                raise ValueError(f"a header of {size} bytes in a file of {length}")
            header = json.loads(file.read(size))
        if not isinstance(header, dict):
            raise ValueError("the header is no JSON object")
    entries = []
    for name, told in header.items():
        if name != "__metadata__":
            entries.append(_safetensor(path, name, told, 8 + size, length))
    return entries


def _safetensor(path: Path, name: str, told: Any, start: int, length: int) -> Entry:
    label = f"{path}: array {name}"
    try:
        kind, shape = told["dtype"], [int(side) for side in told["shape"]]
        first, last = (int(at) for at in told["data_offsets"])
    except (TypeError, KeyError, ValueError) as error:
        raise FormatError(f"{label}: found {told!r}, expected dtype, shape, offsets") from error
    dtype = _SAFETENSORS.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise FormatError(f"{label}: found dtype {kind}, expected {', '.join(_SAFETENSORS)}")
    stored = np.dtype("<u2") if dtype == BFLOAT16 else np.dtype(dtype)
    if min(shape, default=1) < 0 or last - first != math.prod(shape) * stored.itemsize:
        raise FormatError(f"{label}: found {last - first} bytes for {kind} of shape {shape}")
    if not 0 <= first <= last <= length - start:
        raise FormatError(
            f"{label}: found bytes {first} to {last}, expected at most {length - start}"
        )

    def read() -> NDArray[Any]:
        if first == last:
            return np.zeros(shape, np.float32 if dtype == BFLOAT16 else stored)
        with _as_format_error(str(path), ".safetensors"):
            raw: NDArray[Any] = np.memmap(path, np.uint8, "r", start + first, (last - first,))
        values = raw.view(stored).reshape(shape)
        return from_bfloat16(values) if dtype == BFLOAT16 else values

    return Entry(name, read, dtype if dtype == BFLOAT16 else stored.str)


# -- HDF5 ------------------------------------------------------------------------------------------


def _open_hdf5(path: Path) -> list[Entry]:
    import h5py

    from diba_np.files.container import open_file

    found: list[str] = []
    length = path.stat().st_size

    def visit(name: str, item: Any) -> None:
        if "format" in item.attrs:
            raise FormatError(f"{path}:{name}: is a factorization already, expected arrays")
        if not isinstance(item, h5py.Dataset) or item.shape is None:
            return
        if item.external or item.is_virtual:
            raise FormatError(f"{path}: dataset {name}: its data lie in another file")
        if item.nbytes > _LARGEST_EXPANSION * length:
            raise FormatError(
                f"{path}: dataset {name}: found a file of {length} bytes for {item.nbytes}"
            )
        found.append(name)

    with open_file(path) as file:
        if "format" in file.attrs:
            raise FormatError(f"{path}: is a factorization already, expected arrays")
        file.visititems(visit)

    def reader(name: str) -> Callable[[], NDArray[Any]]:
        def read() -> NDArray[Any]:
            with open_file(path) as file:
                values: NDArray[Any] = np.asarray(file[name][()])
                return values

        return read

    return [Entry(name, reader(name)) for name in sorted(found)]
