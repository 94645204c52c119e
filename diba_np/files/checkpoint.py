"""`Checkpoint`: the state of a search in a file, so that a run that was killed goes on from there.

The file is a zip archive, uncompressed: ``about.json`` (format, version and the fingerprint of the
run), ``state.json`` and the arrays that the latter refers to, as ``.npy``. Every entry carries a
CRC-32. It is written under a temporary name, flushed and renamed.
"""

from __future__ import annotations

import json
import os
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diba_np.checks import check_number
from diba_np.errors import FormatError
from diba_np.files.atomic import PathLike, atomic_path, remove_leftovers, target_of
from diba_np.files.fingerprint import as_stored, differences

FORMAT = "diba_np checkpoint"
VERSION = 2

EVERY = 60.0  # seconds between two writes, unless told otherwise


class Checkpoint:
    """A file that keeps the state of one call of `factorize`.

    `factorize` takes a path as well and then removes the file when it returns. With a `Checkpoint`
    the file stays, with the finished state in it, until the caller has saved the result and calls
    `remove`: a process that is killed before the result is saved loses nothing either.

    Parameters
    ----------
    path : path-like
        In a folder that exists. A file there must be a checkpoint of the same run.
    every : float, default 60
        Seconds, at least, between two writes; what is lost at most, beside the step under way.

    Attributes
    ----------
    opened : bool
        Whether what lies there, if anything does, is of the run that called `open`.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong kind or value.
    OSError
        The folder does not exist or cannot be written.
    """

    def __init__(self, path: PathLike, every: float = EVERY) -> None:
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"checkpoint must be a path, got {type(path).__name__}")
        self.path = Path(path)
        self.every = check_number(every, "checkpoint_every", above=0.0)
        if self.path.is_dir():
            raise IsADirectoryError(f"{self.path}: is a folder")
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"{self.path.parent}: no such folder")
        if not os.access(self.path.parent, os.W_OK):
            raise PermissionError(f"{self.path.parent}: cannot be written to")
        self.path = target_of(self.path)  # a link stays, what it leads to is written and removed
        self._fingerprint: dict[str, Any] = {}
        self._written = time.monotonic()
        self.opened = False

    def open(self, fingerprint: dict[str, Any]) -> Any:
        """Return the state that the file holds, or None without a file.

        Parameters
        ----------
        fingerprint : dict
            What decides about the bits of the result, as JSON holds it.

        Raises
        ------
        ValueError
            The file belongs to a run with another fingerprint; the message names the difference.
        FormatError
            The file is damaged or no checkpoint.
        """
        self._fingerprint = as_stored(fingerprint)
        remove_leftovers(self.path)
        if not self.path.exists():
            self.opened = True
            return None
        try:
            with zipfile.ZipFile(self.path) as archive:
                about, arrays = _read(archive)
        except _DAMAGE as error:
            if isinstance(error, PermissionError):
                raise
            raise FormatError(
                f"{self.path}: not readable as a checkpoint ({error}); remove it to start anew if "
                "it was one, or name another file"
            ) from error
        if about["version"] != VERSION:
            raise FormatError(
                f"{self.path}: checkpoint version: found {about['version']}, expected {VERSION}"
            )
        self._compare(about["fingerprint"])
        self.opened = True
        return arrays

    def _compare(self, recorded: dict[str, Any]) -> None:
        apart = differences(recorded, self._fingerprint)
        if apart:
            raise ValueError(
                f"{self.path}: checkpoint of another run, {', '.join(apart)}; "
                "give the same arguments, or remove it to start anew"
            )

    def due(self) -> bool:
        """Return whether `every` seconds have passed since the last write."""
        return time.monotonic() - self._written >= self.every

    def write(self, state: Any) -> None:
        """Write a state: dicts, lists, JSON values and arrays; replaces the last one.

        A disk that is full or gone is a `UserWarning`: the run itself can go on.
        """
        arrays: list[NDArray[Any]] = []
        tree = _scatter(state, arrays)
        about = {"format": FORMAT, "version": VERSION, "fingerprint": self._fingerprint}
        try:
            with (
                atomic_path(self.path) as temporary,
                zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
            ):
                archive.writestr("about.json", json.dumps(about))
                archive.writestr("state.json", json.dumps(tree))
                for index, array in enumerate(arrays):
                    with archive.open(f"{index}.npy", "w", force_zip64=True) as entry:
                        np.lib.format.write_array(entry, array, allow_pickle=False)
        except OSError as error:
            warnings.warn(f"checkpoint not written: {error}", UserWarning, stacklevel=2)
        self._written = time.monotonic()

    def remove(self) -> None:
        """Delete the file and what a killed writer may have left of it."""
        self.path.unlink(missing_ok=True)
        remove_leftovers(self.path)


# what reading a damaged archive may end in
_DAMAGE = (zipfile.BadZipFile, OSError, EOFError, ValueError, LookupError, TypeError, RuntimeError)


def _read(archive: zipfile.ZipFile) -> tuple[dict[str, Any], Any]:
    """Return what ``about.json`` holds, and the state if its version is known; all checked."""
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
        raise zipfile.BadZipFile("a compressed entry")
    about = json.loads(archive.read("about.json"))
    if about["format"] != FORMAT or not isinstance(about["fingerprint"], dict):
        raise zipfile.BadZipFile("of another kind")
    if about["version"] != VERSION:
        return about, None
    # before sizes in the arrays' headers are believed
    damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"checksum of {damaged}")
    return about, _gather(json.loads(archive.read("state.json")), archive)


def _scatter(value: Any, arrays: list[NDArray[Any]]) -> Any:
    """Return a tree that JSON holds, with arrays taken out of it."""
    if isinstance(value, np.ndarray):
        arrays.append(value)
        return {"array": len(arrays) - 1}
    if isinstance(value, dict):
        return {name: _scatter(item, arrays) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_scatter(item, arrays) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _gather(tree: Any, archive: zipfile.ZipFile) -> Any:
    """Undo `_scatter`; tuples come back as lists."""
    if isinstance(tree, dict):
        if tree.keys() == {"array"}:
            with archive.open(f"{tree['array']}.npy") as entry:
                return np.lib.format.read_array(entry, allow_pickle=False)
        return {name: _gather(item, archive) for name, item in tree.items()}
    if isinstance(tree, list):
        return [_gather(item, archive) for item in tree]
    return tree
