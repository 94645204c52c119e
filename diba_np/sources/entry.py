"""`Entry`: one array of a source, and what its readers share."""

from __future__ import annotations

import json
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diba_np.arrays import in_float64
from diba_np.errors import FormatError
from diba_np.matrix.small_floats import SMALL_FLOATS, decode, value_type, word_type

try:
    from lzma import LZMAError
except ImportError:  # a Python without it unpacks no such archive
    LZMAError = zipfile.BadZipFile  # type: ignore[misc, assignment]

# what readers of damaged files raise
_UNREADABLE = (
    ValueError,
    EOFError,
    OSError,
    LookupError,
    TypeError,
    RuntimeError,
    ArithmeticError,
    MemoryError,
    AttributeError,
    zipfile.BadZipFile,
    zlib.error,
    LZMAError,
    SyntaxError,  # of a header that is no expression of Python
    tokenize.TokenError,
)


@dataclass(frozen=True)
class Entry:
    """One array of a source, read when it is asked for.

    Attributes
    ----------
    name : str
    read : callable
        Returns the array; a memory map where the file allows it, float32 for the types that NumPy
        has not. FormatError where the file does not hold what it says, or was changed since.
    dtype : str
        NumPy's name of the type in the source, or one of `SMALL_FLOATS`; "" if only reading tells.
    shape : tuple of int or None
        None if only reading tells.
    unfit : str
        Why it can be neither factorized nor stored (text, complex numbers); empty if it can.
    """

    name: str
    read: Callable[[], NDArray[Any]]
    dtype: str = ""
    shape: tuple[int, ...] | None = None
    unfit: str = ""


def _state_of(path: Path) -> tuple[int, ...] | None:
    """Return what tells that a file was written to or replaced; None if there is none."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def unchanged(path: Path) -> Callable[[], None]:
    """Return what raises `FormatError` where a file is no longer what it is now.

    Places in it are known from when it was opened; another file has other numbers there.
    """
    before = _state_of(path)

    def check() -> None:
        now = _state_of(path)
        if now is not None and now != before:  # one that is gone is told by who reads it
            raise FormatError(
                f"{path}: was changed while its arrays were being read; begin again with the file "
                "as it is now"
            )

    return check


def steady(entry: Entry, check: Callable[[], None]) -> Entry:
    """Return an entry that is read only while its file is what it was, see `unchanged`."""

    def read() -> NDArray[Any]:
        check()
        return entry.read()

    return replace(entry, read=read)


def of_steady_file(open_file: Callable[[Path], list[Entry]]) -> Callable[[Path], list[Entry]]:
    """Decorate what lists the arrays of one file: none is read of a file that was changed since."""

    @wraps(open_file)
    def opened(path: Path) -> list[Entry]:
        check = unchanged(path)
        return [steady(entry, check) for entry in open_file(path)]

    return opened


@contextmanager
def as_format_error(label: str, kind: str) -> Iterator[None]:
    """Turn whatever a reader finds wrong into a `FormatError`."""
    try:
        yield
    except FormatError:
        raise
    except _UNREADABLE as error:
        if isinstance(error, (PermissionError, FileNotFoundError)):
            raise
        text = str(error).splitlines() or [type(error).__name__]
        raise FormatError(f"{label}: not readable as {kind} ({text[0]})") from error


_UNFIT = {
    "S": "text",
    "U": "text",
    "T": "text",
    "c": "complex numbers",
    "M": "dates",
    "m": "durations",
    "V": "records",
    "O": "Python objects",
}


def unfit_reason(dtype: Any) -> str:
    """Return why arrays of a NumPy type cannot be numbers of a model; empty if they can.

    >>> unfit_reason(np.dtype("U3")), unfit_reason(np.dtype("f2"))
    ('text', '')
    """
    return "" if dtype.kind in "buif" else _UNFIT.get(dtype.kind, f"{dtype} numbers")


def type_of_values(dtype: Any) -> str:
    """Return the name of the type that an array's values are stored in: float64 of longdouble.

    >>> type_of_values(np.dtype(np.longdouble)), type_of_values(np.dtype("<i2"))
    ('<f8', '<i2')
    """
    return "<f8" if dtype.kind == "f" and dtype.itemsize > 8 else str(dtype.str)


def of_words(words: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Return the values of what a file holds for an array of that type."""
    return decode(words, dtype) if dtype in SMALL_FLOATS else in_float64(words)


def mapped(path: Path, start: int, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """Return an array whose bytes lie in a file, through a map; float32 for small floats."""
    if 0 in shape:
        return np.zeros(shape, value_type(dtype))
    return of_words(np.memmap(path, word_type(dtype), "r", start, shape), dtype)


def member_bytes(path: Path, member: zipfile.ZipInfo) -> NDArray[np.uint8]:
    """Return a member of an archive, its checksum tested; a map where it is stored as it is."""
    if member.compress_type != zipfile.ZIP_STORED or not member.file_size:
        with zipfile.ZipFile(path) as archive:
            return np.frombuffer(archive.read(member), np.uint8)
    with path.open("rb") as file:
        file.seek(member.header_offset)
        head = file.read(30)  # the local header; its names end with the lengths of what follows
    if len(head) < 30 or head[:4] != b"PK\x03\x04":
        raise ValueError(f"member {member.filename} is not where the archive says")
    extra = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
    start = member.header_offset + 30 + extra
    words: NDArray[np.uint8] = np.memmap(path, np.uint8, "r", start, (member.file_size,))
    if zlib.crc32(words) != member.CRC:
        raise zipfile.BadZipFile(f"Bad CRC-32 for file {member.filename!r}")
    return words


def unique_json(text: bytes | str, label: str) -> Any:
    """Parse JSON; FormatError for text that is none, and for two members of one name."""

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise FormatError(f"{label}: the header names {twice!r} twice, expected it once")
        return table

    with as_format_error(label, "JSON"):
        try:
            return json.loads(text, object_pairs_hook=members)
        except RecursionError:
            raise ValueError("nested too deeply") from None


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """Return the object in a JSON file, if it is `optional` an empty one where there is no file.

    Raises
    ------
    FileNotFoundError
    FormatError
        It holds no JSON object.
    """
    if optional and not path.is_file():
        return {}
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    with as_format_error(str(path), "JSON"):
        try:
            table = json.loads(path.read_text("utf-8"))
        except RecursionError:
            raise ValueError("nested too deeply") from None
    if not isinstance(table, dict):
        raise FormatError(f"{path}: found {type(table).__name__}, expected an object")
    return table


def check_unique(entries: list[Entry], label: str) -> list[Entry]:
    """Return the entries; FormatError where two have one name."""
    seen: set[str] = set()
    for entry in entries:
        if entry.name in seen:
            raise FormatError(f"{label}: holds two arrays named {entry.name!r}, expected one")
        seen.add(entry.name)
    return entries
