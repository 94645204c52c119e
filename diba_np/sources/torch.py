"""Weights that torch saved: a zip of a pickle and raw storages, or the older stream of pickles.

The pickle is read by an unpickler that can build tensors and containers of them and nothing else:
no class or function of any module is ever called, whatever the file names.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
    member_bytes,
    of_steady_file,
    of_words,
    unfit_reason,
)

_STORAGES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "BFloat16Storage": BFLOAT16,
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "|i1",
    "ByteStorage": "|u1",
    "BoolStorage": "|b1",
    "ComplexFloatStorage": "<c8",
    "ComplexDoubleStorage": "<c16",
    "UntypedStorage": "|u1",
}

_DTYPES = {
    "float32": "<f4",
    "float64": "<f8",
    "float16": "<f2",
    "bfloat16": BFLOAT16,
    "float8_e4m3fn": "float8_e4m3fn",
    "float8_e5m2": "float8_e5m2",
    "float8_e4m3fnuz": "float8_e4m3fnuz",
    "float8_e5m2fnuz": "float8_e5m2fnuz",
    "float8_e8m0fnu": "float8_e8m0fnu",
    "int64": "<i8",
    "int32": "<i4",
    "int16": "<i2",
    "int8": "|i1",
    "uint64": "<u8",
    "uint32": "<u4",
    "uint16": "<u2",
    "uint8": "|u1",
    "bool": "|b1",
    "complex64": "<c8",
    "complex128": "<c16",
}

_MOST_DEPTH = 50  # of dictionaries in dictionaries


@dataclass(frozen=True)
class _Storage:
    """What a tensor's numbers are a part of: a member of the archive, or a piece of the stream."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True)
class _Tensor:
    """A view of a storage: offset, sides and steps in entries."""

    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    steps: tuple[int, ...]


class _Named(str):
    """The name of a type that stands for it."""


def _tensor(storage: Any, offset: Any, shape: Any, steps: Any, *rest: Any) -> _Tensor:
    """Build a tensor; its place in the storage is checked."""
    # with a type of its own (the newer form), the storage counts bytes
    dtypes = [_DTYPES[item] for item in rest if isinstance(item, _Named) and item in _DTYPES]
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor of no storage; refused")
    dtype = dtypes[0] if dtypes else storage.dtype
    shape, steps, offset = tuple(map(int, shape)), tuple(map(int, steps)), int(offset)
    last = offset + sum((count - 1) * step for count, step in zip(shape, steps, strict=True))
    held = storage.count * word_type(storage.dtype).itemsize // word_type(dtype).itemsize
    if min((offset, *steps, *shape), default=0) < 0 or (0 not in shape and last >= held):
        raise pickle.UnpicklingError("a tensor reaches outside its storage")
    return _Tensor(storage, dtype, offset, shape, steps)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _of_type(function: Any, kind: Any, args: Any, *_: Any) -> Any:
    if function not in (_tensor, _parameter) or not isinstance(args, tuple):
        raise pickle.UnpicklingError("a tensor of another kind; refused")
    return function(*args)


_FUNCTIONS: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _of_type,
    ("torch.nn.parameter", "Parameter"): _Named("Parameter"),
    ("torch", "Tensor"): _Named("Tensor"),
    ("torch", "Size"): tuple,
    ("torch.storage", "UntypedStorage"): _Named("UntypedStorage"),
    ("collections", "OrderedDict"): OrderedDict,
}


class _TensorsOnly(pickle.Unpickler):
    """Unpickles containers of tensors and refuses everything else."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return what may be called; refuse all else."""
        if (module, name) in _FUNCTIONS:
            return _FUNCTIONS[module, name]
        if module == "torch" and (name in _STORAGES or name in _DTYPES):
            return _Named(name)
        raise pickle.UnpicklingError(f"{module}.{name} is not a tensor; refused")

    def persistent_load(self, pid: Any) -> _Storage:
        """Return the storage that a tensor names."""
        kind, dtype, key, _, count = pid[:5]  # the older form adds a view, always None here
        if kind != "storage" or dtype not in _STORAGES or any(pid[5:]):
            raise pickle.UnpicklingError(f"{kind} of {dtype} is not a storage; refused")
        storage = _Storage(str(key), _STORAGES[dtype], int(count))
        if storage.count < 0 or self.storages.setdefault(storage.key, storage) != storage:
            raise pickle.UnpicklingError(f"storage {key} of two kinds; refused")
        return storage


def _flat(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, _Tensor]]:
    """Yield the tensors of nested containers; names are joined by dots."""
    if isinstance(value, _Tensor):
        yield name, value
        return
    if depth > _MOST_DEPTH:
        raise ValueError("containers nested too deeply")
    if isinstance(value, dict):
        inside = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        inside = [(str(number), item) for number, item in enumerate(value)]
    else:
        return  # a number of steps, a version, a setting
    for key, item in inside:
        yield from _flat(item, f"{name}.{key}" if name else key, depth + 1)


@of_steady_file
def open_torch(path: Path) -> list[Entry]:
    """Return the tensors of a file of ``torch.save``; none is read yet.

    Raises
    ------
    FormatError
        The file is damaged, or its pickle names anything but tensors and containers of them.
    """
    label = str(path)
    with as_format_error(label, "a torch file"):
        try:
            opened = _open_zip if zipfile.is_zipfile(path) else _open_stream
            entries = opened(path)
        except pickle.UnpicklingError as error:
            hint = "; save the state dict alone" if "is not a tensor" in str(error) else ""
            raise ValueError(f"{error}{hint}") from error
        except RecursionError:
            raise ValueError("nested too deeply") from None
    return check_unique(entries, label)


def _entry(path: Path, name: str, tensor: _Tensor, words: Callable[[], Any]) -> Entry:
    """Return the entry of a tensor; `words` gives the storage's bytes."""

    def read() -> NDArray[Any]:
        with as_format_error(f"{path}: array {name}", "a torch tensor"):
            kind = word_type(tensor.dtype)
            if 0 in tensor.shape:
                return of_words(np.zeros(tensor.shape, kind), tensor.dtype)
            raw = words()
            raw = raw[: raw.size // kind.itemsize * kind.itemsize].view(kind)
            view = np.lib.stride_tricks.as_strided(
                raw[tensor.offset :],
                tensor.shape,
                [step * kind.itemsize for step in tensor.steps],
                writeable=False,
            )
            return of_words(view, tensor.dtype)

    unfit = unfit_reason(word_type(tensor.dtype))
    return Entry(name, read, tensor.dtype, tensor.shape, unfit)


def _open_zip(path: Path) -> list[Entry]:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        heads = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(heads) != 1:
            raise ValueError(f"{len(heads)} members data.pkl, expected one")
        folder = heads[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("its numbers are not little-endian")
        unpickler = _TensorsOnly(io.BytesIO(archive.read(heads[0])))
        tensors = list(_flat(unpickler.load()))
        members = {}
        for storage in unpickler.storages.values():
            members[storage.key] = member = archive.getinfo(f"{folder}data/{storage.key}")
            size = storage.count * word_type(storage.dtype).itemsize
            if member.file_size < size:
                raise ValueError(f"storage {storage.key} has {member.file_size} bytes, not {size}")

    def reader(storage: _Storage) -> Callable[[], NDArray[np.uint8]]:
        return lambda: member_bytes(path, members[storage.key])

    return [_entry(path, name, tensor, reader(tensor.storage)) for name, tensor in tensors]


def _open_stream(path: Path) -> list[Entry]:
    """Read the form before torch 1.6: magic, protocol, system, tensors, keys, raw storages."""
    places: dict[str, tuple[int, int]] = {}
    with path.open("rb") as file:
        for _ in range(3):
            _TensorsOnly(file).load()
        unpickler = _TensorsOnly(file)
        tensors = list(_flat(unpickler.load()))
        keys = _TensorsOnly(file).load()
        length = path.stat().st_size
        for key in keys if isinstance(keys, list) else []:
            count = int.from_bytes(file.read(8), "little")
            storage = unpickler.storages.get(str(key))
            if storage is None:
                raise ValueError(f"storage {key} of no tensor")
            size = count * word_type(storage.dtype).itemsize
            if count != storage.count or file.tell() + size > length:
                raise ValueError(f"storage {key} has {count} entries, not {storage.count}")
            places[storage.key] = (file.tell(), size)
            file.seek(size, io.SEEK_CUR)
    missing = [tensor.storage.key for _, tensor in tensors if tensor.storage.key not in places]
    if missing:
        raise FormatError(f"{path}: found no storage {missing[0]}, expected it")

    def reader(storage: _Storage) -> Callable[[], NDArray[np.uint8]]:
        start, size = places[storage.key]
        return lambda: np.memmap(path, np.uint8, "r", start, (size,))

    return [_entry(path, name, tensor, reader(tensor.storage)) for name, tensor in tensors]
