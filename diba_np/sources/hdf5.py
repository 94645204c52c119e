"""HDF5 files as sources: every dataset, named by its path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from diba_np.arrays import in_float64
from diba_np.errors import FormatError
from diba_np.files.container import FORMAT, member, open_file
from diba_np.sources.entry import Entry, of_steady_file, type_of_values, unfit_reason

_LARGEST_EXPANSION = 4096  # no chunked data is taken to be compressed more than this
_MOST_GROUPS = 100_000


@of_steady_file
def open_hdf5(path: Path) -> list[Entry]:
    """Return every dataset of a file, sorted by path; one under two names is there twice.

    Raises
    ------
    FormatError
        Not readable as HDF5, or a factorization of ours.
    """
    entries: list[Entry] = []
    length = path.stat().st_size
    walks = 0

    def walk(place: Any, prefix: str, above: tuple[Any, ...]) -> None:
        nonlocal walks
        walks += 1
        if walks > _MOST_GROUPS:  # a few groups linked to each other make any number of paths
            raise FormatError(f"{path}: found more than {_MOST_GROUPS} groups, expected fewer")
        _refuse_ours(path, prefix, place)
        for key in place:
            item = member(place, key)
            name = f"{prefix}{key}"
            if isinstance(item, h5py.Dataset):
                _refuse_ours(path, name, item)
                if item.shape is not None:
                    entries.append(_entry(path, name, item, length))
            elif isinstance(item, h5py.Group):
                own = h5py.h5o.get_info(item.id).addr
                if own not in above:  # links can lead in circles
                    walk(item, f"{name}/", (*above, own))

    with open_file(path) as file:
        if "groups_digest" in file.attrs:
            raise FormatError(f"{path}: is a compressed model already, expected dense arrays")
        walk(file, "", (h5py.h5o.get_info(file.id).addr,))
    return sorted(entries, key=lambda entry: entry.name)


def _refuse_ours(path: Path, name: str, place: Any) -> None:
    if "format" in place.attrs and isinstance(place.attrs["format"], (str, bytes)):
        if place.attrs["format"] in (FORMAT, FORMAT.encode()):
            label = f"{path}:{name}" if name else f"{path}"
            raise FormatError(f"{label}: is a factorization already, expected arrays")


def _entry(path: Path, name: str, item: Any, length: int) -> Entry:
    try:
        dtype = item.dtype
    except TypeError:  # none of NumPy's stands for it
        return Entry(name, _reader(path, name, ""), "", item.shape, "a type of HDF5 alone")
    problem = ""
    if item.external or item.is_virtual:
        problem = "its data lie in another file"
    elif item.nbytes > _LARGEST_EXPANSION * length:
        problem = f"found a file of {length} bytes for {item.nbytes}"
    unfit = "text" if dtype.kind == "O" and _is_text(dtype) else unfit_reason(dtype)
    return Entry(name, _reader(path, name, problem), type_of_values(dtype), item.shape, unfit)


def _is_text(dtype: Any) -> bool:
    return h5py.check_string_dtype(dtype) is not None


def _reader(path: Path, name: str, problem: str) -> Callable[[], NDArray[Any]]:
    def read() -> NDArray[Any]:
        if problem:
            raise FormatError(f"{path}: dataset {name}: {problem}")
        with open_file(path) as file:
            return in_float64(np.asarray(file[name][()]))

    return read
