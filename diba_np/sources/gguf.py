"""GGUF files: metadata, then a table of tensors, then their bytes.

The layout is that of ggml's ``docs/gguf.md``, versions 2 and 3. Plain numbers are read here; blocks
of quantized ones are decoded by the package `gguf` (extra ``networks``), whatever type it knows.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diba_np.arrays import row_blocks
from diba_np.errors import FormatError
from diba_np.matrix.small_floats import BFLOAT16, word_type
from diba_np.sources.entry import Entry, as_format_error, check_unique, mapped, of_steady_file

# ggml's numbers of types that are plain numbers
_PLAIN = {
    0: "<f4",
    1: "<f2",
    24: "|i1",
    25: "<i2",
    26: "<i4",
    27: "<i8",
    28: "<f8",
    30: BFLOAT16,
}

# numbers of the types of metadata
_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9

_MOST_DIMENSIONS = 8  # ggml itself has four
_MOST_DEPTH = 4  # of arrays in arrays
_ALIGNMENT = 32


class _Stream:
    """Reads a file's beginning piece by piece, never more than it has."""

    def __init__(self, path: Path) -> None:
        self.length = path.stat().st_size
        self.file = path.open("rb")

    def bytes(self, count: int) -> bytes:
        if count > self.length - self.file.tell():
            raise ValueError(f"it ends within {count} bytes")
        return self.file.read(count)

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.bytes(struct.calcsize(code)))[0]

    def text(self) -> str:
        return self.bytes(self.number("Q")).decode("utf-8", "surrogateescape")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or depth >= _MOST_DEPTH:
            raise ValueError(f"a value of type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if count > self.length:
            raise ValueError(f"an array of {count} entries in a file of {self.length} bytes")
        if inner in _NUMBERS:
            code = _NUMBERS[inner]
            raw = self.bytes(count * struct.calcsize(code))
            return list(struct.unpack(f"<{count}{code}", raw))
        return [self.value(inner, depth + 1) for _ in range(count)]


# name, shape (rows first), ggml's type, offset
_Info = tuple[str, tuple[int, ...], int, int]


def _read_head(path: Path) -> tuple[dict[str, Any], list[_Info], int]:
    """Return the metadata, the table of tensors and where their bytes begin."""
    with as_format_error(str(path), "GGUF"):
        stream = _Stream(path)
        with stream.file:
            if stream.bytes(4) != b"GGUF":
                raise ValueError("it begins with other bytes")
            version = stream.number("I")
            if version not in (2, 3):
                order = "big-endian numbers" if version >> 16 else f"version {version}"
                raise ValueError(f"{order}; versions 2 and 3, little-endian, are read")
            tensors, values = stream.number("Q"), stream.number("Q")
            metadata = {}
            for _ in range(values):
                key = stream.text()
                metadata[key] = stream.value(stream.number("I"))
            infos = []
            for _ in range(tensors):
                name, sides = stream.text(), stream.number("I")
                if sides > _MOST_DIMENSIONS:
                    raise ValueError(f"tensor {name} of {sides} dimensions")
                shape = tuple(stream.number("Q") for _ in range(sides))[::-1]
                infos.append((name, shape, stream.number("I"), stream.number("Q")))
            alignment = metadata.get("general.alignment", _ALIGNMENT)
            if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 30:
                raise ValueError(f"an alignment of {alignment}")
            return metadata, infos, -(-stream.file.tell() // alignment) * alignment


def read_metadata(path: Path) -> dict[str, Any]:
    """Return a GGUF file's metadata: numbers, strings and lists of them, by key.

    Raises
    ------
    FormatError
    """
    return _read_head(path)[0]


def need(metadata: Mapping[str, Any], key: str, label: str) -> Any:
    """Return the value of a key of a GGUF file's metadata.

    Raises
    ------
    FormatError
        There is none.
    """
    value = metadata.get(key)
    if value is None:
        raise FormatError(f"{label}: {key}: found none, expected it; convert the network once more")
    return value


def open_gguf(path: Path) -> list[Entry]:
    """Return the tensors of a GGUF file, rows first, quantized ones as float32.

    Those of all parts, where the file is the first of a split one.
    """
    return check_unique([e for part in split_parts(path) for e in _open_part(part)], str(path))


# as llama.cpp names the parts of a split file
_PART = re.compile(r"(.*)-00001-of-(\d{5})\.gguf", re.IGNORECASE)


def split_parts(path: Path) -> list[Path]:
    """Return the files of a GGUF file that may be the first of a split one; itself if it is whole.

    Raises
    ------
    FormatError
        It is another part than the first, or one is not there.
    """
    metadata = read_metadata(path)
    number, count = metadata.get("split.no", 0), metadata.get("split.count", 1)
    if not isinstance(count, int) or count < 2:
        return [path]
    match = _PART.fullmatch(path.name)
    if number or match is None or int(match[2]) != count:
        own = number + 1 if isinstance(number, int) else "none"
        raise FormatError(
            f"{path}: found part {own} of {count} of a split file, expected the first, "
            f"named *-00001-of-{count:05d}.gguf"
        )
    rest = [f"{match[1]}-{at:05d}-of-{count:05d}{path.suffix}" for at in range(2, count + 1)]
    parts = [path.with_name(name) for name in rest]
    for part in parts:
        if not part.is_file():
            raise FormatError(f"{path}: found no part {part.name}, expected it in the same folder")
    return [path, *parts]


@of_steady_file
def _open_part(path: Path) -> list[Entry]:
    _, infos, start = _read_head(path)
    length = path.stat().st_size
    entries = []
    for name, shape, kind, offset in infos:
        label = f"{path}: array {name}"
        if kind in _PLAIN:
            dtype = _PLAIN[kind]
            size = math.prod(shape) * word_type(dtype).itemsize
            _check_place(label, start + offset, size, length)
            read = _plain_reader(path, start + offset, shape, dtype)
            entries.append(Entry(name, read, dtype, shape))
            continue
        entries.append(_quantized(path, label, name, shape, kind, start + offset))
    return entries


def _check_place(label: str, first: int, size: int, length: int) -> None:
    if first + size > length:
        raise FormatError(
            f"{label}: found bytes {first} to {first + size}, expected at most {length}"
        )


def _plain_reader(
    path: Path, start: int, shape: tuple[int, ...], dtype: str
) -> Callable[[], NDArray[Any]]:
    def read() -> NDArray[Any]:
        with as_format_error(str(path), "GGUF"):
            return mapped(path, start, shape, dtype)

    return read


def _quantized(
    path: Path, label: str, name: str, shape: tuple[int, ...], kind: int, start: int
) -> Entry:
    try:
        import gguf
    except ImportError:

        def ask() -> NDArray[Any]:
            raise ImportError(
                f"{label}: its numbers are quantized, which needs the package gguf: "
                "pip install 'diba-np[networks]'"
            )

        return Entry(name, ask, "<f4", shape)
    try:
        quantization = gguf.GGMLQuantizationType(kind)
        block, size = gguf.GGML_QUANT_SIZES[quantization]
    except (ValueError, KeyError):

        def refuse() -> NDArray[Any]:
            raise FormatError(f"{label}: found ggml type {kind}, which the package gguf lacks")

        return Entry(name, refuse, f"ggml type {kind}", shape, f"ggml type {kind}")
    if not shape or shape[-1] % block:
        raise FormatError(f"{label}: found shape {shape}, expected rows of {block} numbers each")
    row = shape[-1] // block * size
    rows = math.prod(shape[:-1])
    _check_place(label, start, rows * row, path.stat().st_size)

    def read() -> NDArray[Any]:
        values = np.empty(shape, np.float32)
        if not values.size:
            return values
        with as_format_error(label, f"GGUF's {quantization.name}"):
            words = np.memmap(path, np.uint8, "r", start, (rows, row))
            flat = values.reshape(rows, shape[-1])
            for part in row_blocks(flat.shape):
                flat[part] = gguf.quants.dequantize(np.ascontiguousarray(words[part]), quantization)
        return values

    known = _is_decoded(quantization)
    unfit = "" if known else f"ggml type {quantization.name}, which the package gguf cannot decode"
    return Entry(name, read, "<f4", shape, unfit)


@cache
def _is_decoded(quantization: Any) -> bool:
    """Return whether the package decodes a type, by what it does with one block."""
    import gguf

    block = np.zeros((1, gguf.GGML_QUANT_SIZES[quantization][1]), np.uint8)
    try:
        gguf.quants.dequantize(block, quantization)
    except NotImplementedError:
        return False
    return True
