"""Models written out dense: safetensors (one file, or a folder of shards) and .npz.

One array after another and a block of rows at a time: the memory is that of a block.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from diba_np.arrays import row_blocks
from diba_np.files.atomic import PathLike, as_path, atomic_folder, atomic_path
from diba_np.matrix.small_floats import SMALL_FLOATS, encode, narrowed, value_type, word_type
from diba_np.matrix.stored_array import StoredArray
from diba_np.sources.safetensors import INDEX, Writing, write_safetensors

if TYPE_CHECKING:
    from diba_np.matrix.base import CompressedMatrix
    from diba_np.models.file import ModelFactors


def export_model(model: ModelFactors, path: PathLike, shard_bytes: int) -> int:
    """Write every array of a model dense; return the bytes written. See `ModelFactors.export`."""
    final = as_path(path)
    if final.suffix.lower() == ".npz":
        return _write_npz(model, final)
    if final.suffix.lower() == ".safetensors":
        return _write_safetensors(model, list(model), final)
    if final.exists() and not final.is_dir():
        raise ValueError(
            f"{final}: expected a folder, or a name that ends with .safetensors or .npz"
        )
    return _write_folder(model, final, shard_bytes)


def _little(dtype: str) -> str:
    """Return the little-endian type of the same numbers, as safetensors has them."""
    return dtype if dtype in SMALL_FLOATS else np.dtype(dtype).newbyteorder("<").str


def _bytes_of(model: ModelFactors, name: str) -> int:
    dtype = model.array_dtype(name)
    return math.prod(model.array_shape(name)) * word_type(dtype).itemsize


def _pieces(matrix: CompressedMatrix, dtype: str) -> Iterator[NDArray[Any]]:
    """Yield an array's words in row order, a block of rows at a time."""
    if isinstance(matrix, StoredArray):
        yield matrix.values
        return
    expand = matrix.row_expander()
    for rows in row_blocks(matrix.shape):
        block = expand(rows)
        if dtype in SMALL_FLOATS:
            yield encode(block, dtype)
        else:
            yield narrowed(block, value_type(dtype))


# -- safetensors -----------------------------------------------------------------------------------


def _write_safetensors(model: ModelFactors, names: list[str], final: Path) -> int:
    def pieces(name: str, dtype: str) -> Iterator[NDArray[Any]]:
        return _pieces(model.read(name), dtype)

    arrays = {}
    for name in names:
        dtype = _little(model.array_dtype(name))
        arrays[name] = Writing(dtype, model.array_shape(name), partial(pieces, name, dtype))
    return write_safetensors(final, arrays)


def _shards(model: ModelFactors, shard_bytes: int) -> list[list[str]]:
    """Share the names among files of at most that many bytes, or of one array."""
    shards: list[list[str]] = [[]]
    held = 0
    for name in model:
        size = _bytes_of(model, name)
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def _write_folder(model: ModelFactors, final: Path, shard_bytes: int) -> int:
    """Write a folder at once if there is none of that name, else its files one by one."""
    if final.is_dir():
        return _write_shards(model, final, shard_bytes)
    with atomic_folder(final) as folder:
        return _write_shards(model, folder, shard_bytes)


def _write_shards(model: ModelFactors, folder: Path, shard_bytes: int) -> int:
    shards = _shards(model, shard_bytes)
    count = len(shards)
    single, index_file = folder / "model.safetensors", folder / f"model{INDEX}"
    # of two forms readers take either: the other one goes, when the new one is there
    if count == 1:
        size = _write_safetensors(model, shards[0], single)
        index_file.unlink(missing_ok=True)
        return size
    size, places = 0, dict[str, str]()
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{count:05d}.safetensors"
        size += _write_safetensors(model, names, folder / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(_bytes_of(model, name) for name in model)}}
    text = json.dumps(index | {"weight_map": places}, indent=2)
    with atomic_path(index_file) as temporary:
        temporary.write_text(text, "utf-8")
    single.unlink(missing_ok=True)
    return size + len(text)


# -- NumPy -----------------------------------------------------------------------------------------


def _write_npz(model: ModelFactors, final: Path) -> int:
    wrong = [name for name in model if re.search("[\0\ud800-\udfff]", name)]
    if wrong:
        raise ValueError(
            f"an archive's names hold neither NUL nor surrogates, found the array {wrong[0]!r}"
        )
    size = 0
    with atomic_path(final) as temporary:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            for name in model:
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    _write_npy(model, name, file)  # type: ignore[arg-type]
        size = temporary.stat().st_size
    return size


def _write_npy(model: ModelFactors, name: str, file: BinaryIO) -> None:
    dtype = model.array_dtype(name)
    kind = value_type(dtype)
    header = {"descr": kind.str, "fortran_order": False, "shape": model.array_shape(name)}
    np.lib.format.write_array_header_1_0(file, header)
    matrix = model.read(name)
    if isinstance(matrix, StoredArray):
        values = matrix.array if dtype in SMALL_FLOATS else matrix.values.view()
        raw = np.ascontiguousarray(values.astype(kind, copy=False)).reshape(-1)
        if raw.size:
            file.write(raw.view(np.uint8).data)
        return
    for piece in _pieces(matrix, kind.str if dtype in SMALL_FLOATS else dtype):
        if piece.size:
            file.write(np.ascontiguousarray(piece).view(np.uint8).data)
