"""ONNX models: initializers and constants, read from the protocol buffer without other packages.

Numbers of fields are those of ``onnx.proto``: ModelProto.graph 7, GraphProto.node 1 and
initializer 5, TensorProto as in `_tensor`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diba_np.errors import FormatError
from diba_np.matrix.small_floats import BFLOAT16, word_type
from diba_np.sources.entry import (
    Entry,
    as_format_error,
    check_unique,
    mapped,
    of_steady_file,
    of_words,
    unchanged,
)

_DTYPES = {
    1: "<f4",
    2: "|u1",
    3: "|i1",
    4: "<u2",
    5: "<i2",
    6: "<i4",
    7: "<i8",
    9: "|b1",
    10: "<f2",
    11: "<f8",
    12: "<u4",
    13: "<u8",
    16: BFLOAT16,
    17: "float8_e4m3fn",
    18: "float8_e4m3fnuz",
    19: "float8_e5m2",
    20: "float8_e5m2fnuz",
    24: "float8_e8m0fnu",
}

_UNFIT = {8: "text", 14: "complex numbers", 15: "complex numbers"}

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# fields of packed numbers, those of fixed length and those of varying
_FIXED = {4: "<f4", 10: "<f8"}
_VARYING = (5, 7, 11)

Field = tuple[int, Any]


def fields(message: memoryview) -> Iterator[Field]:
    """Yield (number, int or bytes) of each field of a protocol buffer message.

    Raises
    ------
    ValueError
        It ends within a field, or is none.
    """
    at, end = 0, len(message)

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while at < end and shift < 64:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
        raise ValueError("it ends within a number")

    while at < end:
        key = varint()
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            yield number, varint()
            continue
        if kind not in (_FIXED64, _BYTES, _FIXED32):
            raise ValueError(f"wire type {kind}, expected 0, 1, 2 or 5")
        size = {_FIXED64: 8, _FIXED32: 4}.get(kind)
        size = varint() if size is None else size
        if at + size > end:
            raise ValueError("it ends within a field")
        yield number, message[at : at + size]
        at += size


def _varints(packed: memoryview) -> NDArray[np.int64]:
    """Return packed numbers of varying length."""
    raw = np.frombuffer(packed, np.uint8)
    ends = np.flatnonzero(raw < 128)
    if not len(raw):
        return np.zeros(0, np.int64)
    if not len(ends) or ends[-1] != len(raw) - 1:
        raise ValueError("it ends within a number")
    starts = np.concatenate(([0], ends[:-1] + 1))
    if (ends - starts >= 10).any():
        raise ValueError("a number of more than 64 bits")
    place = np.arange(len(raw)) - np.repeat(starts, ends - starts + 1)
    parts = (raw & 127).astype(np.uint64) << (7 * place).astype(np.uint64)
    return np.add.reduceat(parts, starts).view(np.int64)


def _shape_of(message: memoryview) -> tuple[int, ...]:
    sides: list[int] = []
    for number, value in fields(message):
        if number == 1:
            sides += [value] if isinstance(value, int) else _varints(value).tolist()
    if min(sides, default=0) < 0:
        raise ValueError(f"a shape of {sides}")
    return tuple(sides)


def _tensor(path: Path, message: memoryview, name: str = "") -> Entry:
    """Return the entry of a TensorProto."""
    kind, place, external, numbers = 0, 0, dict[str, str](), dict[int, list[Any]]()
    shape = _shape_of(message)
    for number, value in fields(message):
        if number == 2:
            kind = int(value)
        elif number == 8 and not name:
            name = bytes(value).decode("utf-8", "surrogateescape")
        elif number == 13:
            pair = dict(fields(value))
            external[bytes(pair.get(1, b"")).decode()] = bytes(pair.get(2, b"")).decode()
        elif number == 14:
            place = int(value)
        elif number in (9, *_FIXED, *_VARYING):
            numbers.setdefault(number, []).append(value)
    label = f"{path}: array {name}"
    dtype = _DTYPES.get(kind)
    if dtype is None:

        def refuse() -> NDArray[Any]:
            raise FormatError(f"{label}: found ONNX type {kind}, expected real numbers")

        return Entry(name, refuse, f"ONNX type {kind}", shape, _UNFIT.get(kind, f"type {kind}"))
    read = _reader(label, shape, dtype, numbers)
    if place == 1:
        read = _external_reader(path, label, shape, dtype, external)
    return Entry(name, read, dtype, shape)


def _reader(
    label: str, shape: tuple[int, ...], dtype: str, numbers: dict[int, list[Any]]
) -> Callable[[], NDArray[Any]]:
    """Return the reader of numbers that lie in the message itself."""

    def read() -> NDArray[Any]:
        with as_format_error(label, "an ONNX tensor"):
            kind, count = word_type(dtype), math.prod(shape)
            found: Any = np.zeros(0, kind)
            for number, parts in numbers.items():
                if number in _VARYING:
                    values = [
                        np.array([v], np.uint64).view(np.int64)
                        if isinstance(v, int)
                        else _varints(v)
                        for v in parts
                    ]
                    whole = np.concatenate(values)
                    # 16-bit floats and those of 8 bits come as their bits
                    bits = kind.kind in "uib"
                    narrow = kind if bits else np.dtype(f"<u{kind.itemsize}")
                    found = whole.astype(narrow) if bits else whole.astype(narrow).view(kind)
                else:
                    raw = b"".join(bytes(part) for part in parts) if len(parts) > 1 else parts[0]
                    found = np.frombuffer(raw, np.dtype(_FIXED.get(number, kind)))
            if found.size != count or found.dtype != kind:
                raise ValueError(f"{found.size} numbers for shape {shape}")
            return of_words(found.reshape(shape), dtype)

    return read


def _external_reader(
    path: Path, label: str, shape: tuple[int, ...], dtype: str, facts: dict[str, str]
) -> Callable[[], NDArray[Any]]:
    """Return the reader of numbers that lie in another file of the model's folder."""
    check = unchanged(path.parent / facts.get("location", ""))

    def read() -> NDArray[Any]:
        check()
        with as_format_error(label, "an ONNX tensor"):
            name, start = facts.get("location", ""), int(facts.get("offset", "0"))
            if not name or Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"its data lie in {name!r}, expected a file of the model's folder")
            other = path.parent / name
            size = math.prod(shape) * word_type(dtype).itemsize
            if not other.is_file():
                raise ValueError(f"its data lie in {name}, which is not there")
            if start < 0 or start + size > other.stat().st_size:
                raise ValueError(f"{name} has {other.stat().st_size} bytes, not {start + size}")
            return mapped(other, start, shape, dtype)

    return read


@of_steady_file
def open_onnx(path: Path) -> list[Entry]:
    """Return the initializers of an ONNX model, and the tensors of its constants, by name.

    Raises
    ------
    FormatError
        It is no protocol buffer, or cut short.
    """
    entries: list[Entry] = []
    with as_format_error(str(path), "ONNX"):
        if not path.stat().st_size:
            raise ValueError("it is empty")
        whole = np.memmap(path, np.uint8, "r").data
        for number, graph in fields(whole):
            if number != 7 or isinstance(graph, int):
                continue
            for part, message in fields(graph):
                if part == 5:
                    entries.append(_tensor(path, message))
                elif part == 1:
                    entries += _constants(path, message)
    return check_unique(entries, str(path))


def _constants(path: Path, node: memoryview) -> Iterator[Entry]:
    """Yield the tensors among a node's attributes; the first output names them."""
    parts = list(fields(node))
    outputs = [bytes(value).decode("utf-8", "surrogateescape") for at, value in parts if at == 2]
    kinds = [bytes(value) for at, value in parts if at == 4]
    if not outputs or kinds != [b"Constant"]:
        return
    for at, attribute in parts:
        if at == 5:
            for inner, tensor in fields(attribute):
                if inner == 5:
                    yield _tensor(path, tensor, outputs[0])
