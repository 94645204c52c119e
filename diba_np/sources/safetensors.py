"""The safetensors format: a JSON header and the arrays' bytes one after another; shards of it.

Format: 8 bytes of the header's length (little-endian), the header, the bytes. Written down at
https://huggingface.co/docs/safetensors ("Format").
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diba_np.errors import FormatError
from diba_np.files.atomic import PathLike, atomic_path, reserve
from diba_np.matrix.small_floats import BFLOAT16, word_type
from diba_np.sources.entry import (
    Entry,
    as_format_error,
    check_unique,
    mapped,
    of_steady_file,
    unique_json,
)

# the element types of the format, and NumPy's names or ours
DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": BFLOAT16,
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
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

_OTHERS = {"C64": "complex numbers", "F4": "4-bit floats"}

_KINDS = {
    word_type(dtype).str if dtype[0] in "<|" else dtype: kind for kind, dtype in DTYPES.items()
}

INDEX = ".safetensors.index.json"

_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)\.(?:safetensors|bin)")


@of_steady_file
def open_safetensors(path: Path) -> list[Entry]:
    """Return the arrays of one file; the header is read and checked, no more."""
    length = path.stat().st_size
    label = str(path)
    with as_format_error(label, ".safetensors"), path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= min(length - 8, _LONGEST_HEADER):
            raise ValueError(f"a header of {size} bytes in a file of {length}")
        text = file.read(size)
    header = unique_json(text, label)
    if not isinstance(header, dict):
        raise FormatError(f"{label}: not readable as .safetensors (the header is no JSON object)")
    places: list[tuple[int, int]] = []
    entries = [
        _entry(path, name, facts, 8 + size, length, places)
        for name, facts in header.items()
        if name != "__metadata__"
    ]
    end = 0
    for first, last in sorted(set(places)):  # one place for two names is a tied array
        if first < end:
            raise FormatError(f"{label}: found arrays that overlap at byte {first} of the data")
        end = last
    return entries


def _entry(
    path: Path, name: str, facts: Any, start: int, length: int, places: list[tuple[int, int]]
) -> Entry:
    label = f"{path}: array {name}"
    try:
        kind, shape = facts["dtype"], tuple(int(side) for side in facts["shape"])
        first, last = (int(at) for at in facts["data_offsets"])
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise FormatError(f"{label}: found {facts!r}, expected dtype, shape, offsets") from error
    if not 0 <= first <= last <= length - start:
        if last < first and isinstance(kind, str) and kind in DTYPES:
            raise FormatError(f"{label}: found {last - first} bytes for {kind} of shape {shape}")
        raise FormatError(
            f"{label}: found bytes {first} to {last}, expected at most {length - start}"
        )
    places.append((first, last))
    dtype = DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:

        def refuse() -> NDArray[Any]:
            raise FormatError(f"{label}: found dtype {kind}, expected {', '.join(DTYPES)}")

        return Entry(name, refuse, str(kind), shape, _OTHERS.get(str(kind), f"type {kind}"))
    if min(shape, default=1) < 0 or last - first != math.prod(shape) * word_type(dtype).itemsize:
        raise FormatError(f"{label}: found {last - first} bytes for {kind} of shape {list(shape)}")

    def read() -> NDArray[Any]:
        with as_format_error(str(path), ".safetensors"):
            return mapped(path, start + first, shape, dtype)

    return Entry(name, read, np.dtype(dtype).str if dtype[0] in "<|" else dtype, shape)


# -- shards ----------------------------------------------------------------------------------------


def open_index(path: Path, open_shard: Any = open_safetensors) -> list[Entry]:
    """Return the arrays of all shards that an index names; where two hold a name, the index says.

    Parameters
    ----------
    path : Path
        ``model.safetensors.index.json``: ``{"weight_map": {name: file}}``.
    open_shard : callable
        Opens one shard.

    Raises
    ------
    FormatError
        The index is none, names a file that is not there or outside its folder, or a shard lacks
        an array.
    """
    index = unique_json(path.read_bytes(), str(path))
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise FormatError(f"{path}: found no weight_map of name to file, expected one")
    entries: list[Entry] = []
    for file in sorted(set(places.values())):
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise FormatError(f"{path}: found the file {file!r}, expected one of its folder")
        shard = path.parent / file
        if not shard.is_file():
            raise FormatError(f"{path}: found no shard {file}, expected it in the same folder")
        inside = open_shard(shard)
        missing = {n for n, at in places.items() if at == file} - {e.name for e in inside}
        if missing:
            raise FormatError(f"{shard}: found no array {min(missing)!r}, expected it by the index")
        entries += [entry for entry in inside if places.get(entry.name, file) == file]
    return check_unique(entries, str(path.parent))


def open_shards(files: list[Path], open_shard: Any = open_safetensors) -> list[Entry]:
    """Return the arrays of several files of one folder; all of a series of shards must be there."""
    folder = files[0].parent
    for file in files:
        match = _SHARD.fullmatch(file.name)
        if match is None:
            continue
        stem, _, total = match.groups()
        series = {
            int(other[2])
            for other in (_SHARD.fullmatch(each.name) for each in files)
            if other and other[1] == stem and other[3] == total
        }
        missing = set(range(1, int(total) + 1)) - series if int(total) < 10**5 else {1}
        if missing:
            raise FormatError(
                f"{folder}: found no shard {min(missing)} of {int(total)} of {stem}, expected all"
            )
    return check_unique([e for file in files for e in open_shard(file)], str(folder))


# -- writing ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Writing:
    """An array to be written.

    Attributes
    ----------
    dtype : str
        Little-endian NumPy name, or that of a small float.
    shape : tuple of int
    pieces : callable
        Returns its words in row order, piece by piece, when they are to be written.
    """

    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[NDArray[Any]]]

    @property
    def size(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * word_type(self.dtype).itemsize


def write_safetensors(path: PathLike, arrays: Mapping[str, Writing]) -> int:
    """Write one file, whole or not at all; return its bytes. The memory is that of a piece.

    Raises
    ------
    ValueError
        An array has the one name that the format keeps for itself.
    OSError
        It cannot be written.
    """
    if "__metadata__" in arrays:
        raise ValueError("an array named '__metadata__' cannot be written to safetensors")
    # the widest first, so that each lies at a multiple of its own width
    order = sorted(arrays, key=lambda name: -word_type(arrays[name].dtype).itemsize)
    places, end = {}, 0
    for name in order:
        places[name] = [end, end + arrays[name].size]
        end = places[name][1]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, array in arrays.items():
        kind, shape = _KINDS[array.dtype], list(array.shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": places[name]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    size = 8 + len(text) + end
    with atomic_path(path) as temporary:
        reserve(temporary, size, temporary)
        with temporary.open("r+b") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                for piece in arrays[name].pieces():
                    if piece.size:
                        file.write(np.ascontiguousarray(piece).view(np.uint8).data)
    return size
