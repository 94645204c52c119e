"""Where a model's arrays come from: files and folders of every kind, or any mapping."""

from __future__ import annotations

import os
import stat
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diba_np.files.signatures import kind_of
from diba_np.sources.entry import Entry, as_format_error, check_unique
from diba_np.sources.gguf import open_gguf
from diba_np.sources.hdf5 import open_hdf5
from diba_np.sources.numpy_files import npy_entry, open_mapping, open_npy, open_npz
from diba_np.sources.onnx import open_onnx
from diba_np.sources.safetensors import INDEX, open_index, open_safetensors, open_shards
from diba_np.sources.torch import open_torch

Source = str | os.PathLike[str] | Mapping[str, Any]

# suffix -> what lists the arrays of such a file
FORMATS: dict[str, Callable[[Path], list[Entry]]] = {
    ".npy": open_npy,
    ".npz": open_npz,
    ".safetensors": open_safetensors,
    ".h5": open_hdf5,
    ".hdf5": open_hdf5,
    ".gguf": open_gguf,
    ".onnx": open_onnx,
    ".pt": open_torch,
    ".pth": open_torch,
    ".bin": open_torch,
    ".ckpt": open_torch,
}

_TORCH_INDEX = ".bin.index.json"

_EXPECTED = (
    "a folder of .npy or of a Hugging Face model, a .npy, .npz, .safetensors (or its "
    ".index.json), .h5, .hdf5, .gguf, .onnx, or a torch file (.bin, .pt, .pth, .ckpt)"
)


def open_source(source: Source) -> list[Entry]:
    """Return the arrays of a source, none of them read yet.

    Parameters
    ----------
    source : path-like or mapping of str to array_like
        A folder of .npy (all below it, named by their paths without the suffix) or of a Hugging
        Face model (its index and shards, or one file); a file of NumPy, safetensors, HDF5 (every
        dataset, named by its path), GGUF, ONNX or torch; the index of shards; arrays by name.

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
        Not readable as what it claims to be, or two arrays have one name.
    """
    if isinstance(source, Mapping):
        entries = open_mapping(source)
    elif isinstance(source, (str, os.PathLike)):
        entries = _open_path(Path(source))
    else:
        raise TypeError(f"source must be a path or a mapping, got {type(source).__name__}")
    if not entries:
        raise ValueError(f"source must hold arrays, found none in {_label(source)}")
    return entries


def _label(source: Source) -> str:
    return f"a {type(source).__name__}" if isinstance(source, Mapping) else str(source)


def _open_path(path: Path) -> list[Entry]:
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path}: found no regular file; a source is read more than once")
    if path.name.endswith(INDEX):
        return open_index(path)
    if path.name.endswith(_TORCH_INDEX):
        return open_index(path, open_torch)
    kind = FORMATS.get(path.suffix.lower()) or _kind_by_content(path)
    if kind is None:
        raise ValueError(f"{path}: expected {_EXPECTED}")
    return kind(path)


def _kind_by_content(path: Path) -> Callable[[Path], list[Entry]] | None:
    """Tell what a file without a known suffix is from its first bytes."""
    kind = kind_of(path)
    if kind == "zip":
        with as_format_error(str(path), "an archive"), zipfile.ZipFile(path) as archive:
            torch = any(name.endswith("data.pkl") for name in archive.namelist())
        return open_torch if torch else open_npz
    return FORMATS[f".{kind}"] if kind else None


def _open_folder(path: Path) -> list[Entry]:
    """Read a folder: the index of shards, else the model's one file, else all shards, else .npy."""
    arrays = [f for f in path.rglob("*") if f.suffix.lower() == ".npy" and not f.is_dir()]
    arrays.sort(key=lambda file: file.relative_to(path).as_posix())
    weights = _weights_of(path)
    if weights is not None:
        if arrays:
            warnings.warn(
                f"{path}: {len(arrays)} .npy files are not read, the folder holds other weights",
                UserWarning,
                stacklevel=4,
            )
        return weights
    if arrays:
        names = [file.relative_to(path).with_suffix("").as_posix() for file in arrays]
        entries = [npy_entry(file, name) for file, name in zip(arrays, names, strict=True)]
        return check_unique(entries, str(path))
    others = sorted(file for file in path.iterdir() if file.suffix.lower() in FORMATS)
    if len(others) > 1:
        names = [file.name for file in others]
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise ValueError(f"{path}: found {shown}; name one of them")
    return _open_path(others[0]) if others else []


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a Hugging Face folder's weights: an index, one file, or all shards."""
    for suffix, index, stem in (
        (".safetensors", INDEX, "model"),
        (".bin", _TORCH_INDEX, "pytorch_model"),
    ):
        for name in (f"{stem}{index}", f"{stem}{suffix}"):
            if (folder / name).is_file():
                return [folder / name]
        indices = sorted(folder.glob(f"*{index}"))
        if len(indices) == 1:
            return indices
        pattern = "*.safetensors" if stem == "model" else "pytorch_model*.bin"
        files = sorted(file for file in folder.glob(pattern) if file.is_file())
        if files:
            return files
    return []


def _weights_of(folder: Path) -> list[Entry] | None:
    """Return the weights of a Hugging Face folder; None if it is not one."""
    files = weight_files(folder)
    if not files:
        return None
    if files[0].suffix == ".json":
        return _open_path(files[0])
    return open_shards(files, FORMATS[files[0].suffix])
