"""Compressed matrices in HDF5 files: atomic to write, checked to the last byte to read.

`write_container` and `read_container` are the one way into a file and out of it. Format version 1,
for DiBA. At the root, or in a group of it:

* attributes ``format="diba_np"``, ``format_version``, ``m``, ``n``, ``k``, ``shift``,
  ``scale_bits``, ``scale``, ``bit_order="little"``, ``record`` (JSON), ``digest`` (SHA-256 over
  the other attributes and the datasets);
* datasets ``b1`` and ``b2`` (uint8): the bits row after row as one stream, least significant bit
  first, with no padding at the row ends;
* datasets ``d1``, ``d2``, ``d3``: ``<f2`` or ``<f4``; d2 is to be multiplied by ``scale``
  (float64, a power of two).

Format version 2, written only for coded diagonals, differs in the diagonals:

* attribute ``scale_bits``: three code widths; ``grids`` (3, 2) float32 in place of ``scale``: low
  and ratio of each grid, see `diba_np.scales.LogGrid.to_pair`;
* datasets ``d1``, ``d2``, ``d3`` (uint8): the codes as one stream, least significant bit first.

The other methods (`diba_np.baselines`) carry a ``method`` attribute, the attributes ``m``, ``n``
and ``scale``, and attributes and one-dimensional datasets of their own. No ``method`` means DiBA.

Every dataset carries a Fletcher-32 checksum, and the file's own structures are checksummed too,
except for the heap of strings, whose sizes are checked before HDF5 reads them.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from numpy.typing import NDArray

from diba_np.bits import PackedBits
from diba_np.errors import FormatError
from diba_np.factors import DiBAFactors
from diba_np.scales import (
    HALF,
    LEAST_CODE,
    MOST_CODE,
    SINGLE,
    LogGrid,
    pack_codes,
    power_of_two,
    unpack_codes,
)

if TYPE_CHECKING:
    from diba_np.baselines.base import CompressedMatrix

FORMAT = "diba_np"
PLAIN_VERSION, CODED_VERSION = 1, 2

# HDF5 1.10 and later read these files; its structures are compact and checksummed
_LIBVER = ("v110", "v110")

_LARGEST_RECORD = 60_000  # bytes of JSON; an HDF5 attribute holds 64 KiB

_DTYPES: dict[int, np.dtype[Any]] = {HALF: np.dtype("<f2"), SINGLE: np.dtype("<f4")}

_DIAGONALS = ("d1", "d2", "d3")

PathLike = str | os.PathLike[str]


@contextmanager
def atomic_path(path: PathLike) -> Iterator[Path]:
    """Give a temporary path in the same folder; on success flush it and rename it to `path`.

    On an exception, Ctrl-C included, the temporary file is removed and `path` is as it was.
    """
    final = Path(path)
    handle, name = tempfile.mkstemp(dir=final.parent, prefix=f".{final.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        # mkstemp makes private files; a result is as readable as any new file of the user's
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)


def _digest(attributes: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> str:
    """Return the SHA-256 over the attributes (sorted, as JSON) and the arrays' bytes."""
    sha = hashlib.sha256(json.dumps(attributes, sort_keys=True, default=_plain).encode())
    for name in sorted(arrays):
        array = arrays[name]
        sha.update(f"{name} {array.dtype.str} {array.size} ".encode())
        sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()


def _payload(factors: DiBAFactors) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Return the (attributes, arrays) that stand for a factorization in a file."""
    attributes: dict[str, Any] = {
        "m": factors.shape[0],
        "n": factors.shape[1],
        "k": factors.k,
        "shift": factors.shift,
        "bit_order": "little",
    }
    arrays: dict[str, NDArray[Any]] = {
        "b1": factors.b1.to_stream(),
        "b2": factors.b2.to_stream(),
    }
    bits = factors.scale_bits
    if factors.grids is not None:
        attributes["format_version"] = CODED_VERSION
        attributes["scale_bits"] = [grid.bits for grid in factors.grids]
        attributes["grids"] = np.array([grid.to_pair() for grid in factors.grids], np.float32)
        for name, grid in zip(_DIAGONALS, factors.grids, strict=True):
            arrays[name] = pack_codes(grid.encode(getattr(factors, name)), grid.bits)
    elif isinstance(bits, int):
        scale = power_of_two(factors.d2) if bits == HALF else 1.0
        attributes |= {"scale_bits": bits, "scale": scale}
        arrays["d1"] = factors.d1.astype(_DTYPES[bits])
        arrays["d2"] = (factors.d2.astype(np.float64) / scale).astype(_DTYPES[bits])
        arrays["d3"] = factors.d3.astype(_DTYPES[bits])
    return attributes, arrays


def _write(
    place: h5py.Group,
    attributes: dict[str, Any],
    arrays: dict[str, NDArray[Any]],
    record: dict[str, Any],
) -> None:
    try:
        text = json.dumps(record, default=_plain)
    except TypeError as error:
        raise TypeError(f"record must hold what JSON can: {error}") from None
    if len(text.encode()) > _LARGEST_RECORD:
        raise ValueError(
            f"record takes {len(text.encode())} bytes as JSON, at most {_LARGEST_RECORD} fit"
        )
    for name, array in arrays.items():
        # a chunk, and with it a checksum, takes at least one entry
        checked = {"chunks": array.shape, "fletcher32": True} if array.size else {}
        place.create_dataset(name, data=array, track_times=False, **checked)
    attributes = {
        "format": FORMAT,
        "format_version": PLAIN_VERSION,
        **attributes,
        "record": text,
    }
    for name, value in attributes.items():
        place.attrs[name] = value
    place.attrs["digest"] = _digest(attributes, arrays)


def _plain(value: Any) -> Any:
    """Turn NumPy scalars and arrays into what JSON can hold."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")


def write_container(
    path: PathLike,
    attributes: dict[str, Any],
    arrays: dict[str, NDArray[Any]],
    record: dict[str, Any],
    *,
    group: str | None = None,
) -> int:
    """Write attributes, arrays and a record to an HDF5 file.

    The file is written beside `path` under a temporary name, flushed and renamed, so that `path`
    is at every moment either as before or complete.

    Parameters
    ----------
    path : path-like
        Replaced if it exists, except that with `group` its other groups are kept.
    attributes : dict
        Strings, numbers, small arrays of numbers.
    arrays : dict
        One-dimensional arrays by dataset name.
    record : dict
        What JSON can hold.
    group : str, optional
        Name of the group to write to, for many in one file.

    Returns
    -------
    int
        The file's bytes: the arrays plus at most 16 KiB, for a record of `factorize`.

    Raises
    ------
    TypeError, ValueError
        The record is not JSON or is too large for an attribute; the group's name is empty.
    FormatError
        With `group`: `path` exists and is not an HDF5 file.
    OSError
        The folder cannot be written.
    """
    if group is not None and not group.strip("/"):
        raise ValueError(f"group must be a name, got {group!r}")
    final = Path(path)
    with atomic_path(final) as temporary:
        keep = group is not None and final.exists()
        with h5py.File(temporary, "w", libver=_LIBVER) as file:
            if keep:
                with _open(final) as old:
                    for name in old:
                        old.copy(name, file)
                    for name, value in old.attrs.items():
                        file.attrs[name] = value
            place: h5py.Group = file
            if group is not None:
                if group in file:
                    del file[group]
                place = file.create_group(group)
            _write(place, attributes, arrays, record)
    return final.stat().st_size


def save(factors: DiBAFactors, path: PathLike, *, group: str | None = None) -> int:
    """Write a factorization to an HDF5 file; see `write_container`.

    Parameters
    ----------
    factors : DiBAFactors
    path : path-like
    group : str, optional

    Returns
    -------
    int
        The file's bytes.
    """
    attributes, arrays = _payload(factors)
    return write_container(path, attributes, arrays, factors.record, group=group)


@contextmanager
def _open(path: Path) -> Iterator[h5py.File]:
    """Open a file for reading; whatever HDF5 finds wrong with it becomes a `FormatError`."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_dir():
        raise FormatError(f"{path}: found a folder, expected an HDF5 file")
    status = path.stat()
    _check_heaps(path, status.st_mtime_ns, status.st_size)
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError, KeyError, UnicodeDecodeError) as error:
        if isinstance(error, PermissionError):
            raise
        raise FormatError(f"{path}: not readable as HDF5 ({_first_line(error)})") from error


@lru_cache(maxsize=32)
def _check_heaps(path: Path, _modified: int, size: int) -> None:
    """Check the sizes in the heaps that hold an HDF5 file's strings.

    They are the one structure of the file without a checksum, and HDF5 itself loops for ever on
    some damaged sizes there. Costs a scan of the file, once for each state of it.
    """
    if size == 0:
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = data.find(b"GCOL\x01\x00\x00\x00")
        while start >= 0:
            end = start + int.from_bytes(data[start + 8 : start + 16], "little")
            at = start + 16
            while at + 16 <= end <= size:
                index = int.from_bytes(data[at : at + 2], "little")
                length = int.from_bytes(data[at + 8 : at + 16], "little")
                step = length if index == 0 else 16 + -(-length // 8) * 8
                if step < 16 or at + step > end:
                    raise FormatError(
                        f"{path}: string heap at byte {start}: found an entry of {length} bytes, "
                        f"expected at most {end - at - 16}"
                    )
                at += step
            start = data.find(b"GCOL\x01\x00\x00\x00", start + 4)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def groups(path: PathLike) -> list[str]:
    """Return the names of all groups of a file that hold a matrix of ours; "" is the root."""
    found: list[str] = []

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Group) and "format" in item.attrs:
            found.append(name)

    with _open(Path(path)) as file:
        if "format" in file.attrs:
            found.append("")
        file.visititems(visit)
    return found


@dataclass(frozen=True)
class Container:
    """What one group of a file holds, its digest checked.

    Attributes
    ----------
    label : str
        The path, and the group's name if it has one: the start of every complaint.
    attributes : dict
        All but format, record and digest.
    arrays : dict
        One-dimensional arrays by dataset name.
    record : dict
    """

    label: str
    attributes: dict[str, Any]
    arrays: dict[str, NDArray[Any]]
    record: dict[str, Any]


class _Reader:
    """Reads one group, checking each piece before it is used."""

    def __init__(self, path: Path, place: h5py.Group) -> None:
        self.path, self.place = path, place
        self.label = f"{path}" if place.name in (None, "/") else f"{path}:{place.name}"
        self.length = path.stat().st_size

    def fail(self, what: str, found: Any, expected: Any) -> FormatError:
        return FormatError(f"{self.label}: {what}: found {found}, expected {expected}")

    def attribute(self, name: str, *kinds: type) -> Any:
        expected = " or ".join(kind.__name__ for kind in kinds)
        if name not in self.place.attrs:
            raise self.fail(f"attribute {name}", "none", expected)
        value = self.place.attrs[name]
        value = value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise self.fail(f"attribute {name}", repr(value), expected)
        return value

    def numbers(self, name: str, shape: tuple[int, ...], kind: str) -> list[Any]:
        value = np.asarray(self.place.attrs.get(name))
        if value.shape != shape or value.dtype.kind != kind:
            raise self.fail(f"attribute {name}", f"{value.shape} of {value.dtype}", f"{shape}")
        numbers: list[Any] = value.tolist()
        return numbers

    def array(self, name: str, size: int | None, dtype: np.dtype[Any] | None) -> NDArray[Any]:
        """Read a dataset; None for a size or dtype that the attributes do not tell."""
        item = self.place.get(name)
        if not isinstance(item, h5py.Dataset):
            expected = "a dataset" if dtype is None else f"{size} entries of {dtype.str}"
            raise self.fail(f"dataset {name}", "none", expected)
        size = item.size if size is None else size
        dtype = item.dtype if dtype is None else dtype
        if item.shape != (size,) or item.dtype != dtype or dtype.kind not in "uif":
            raise self.fail(
                f"dataset {name}", f"{item.shape} of {item.dtype.str}", f"({size},) of {dtype.str}"
            )
        if size * dtype.itemsize > self.length:
            raise self.fail(
                f"dataset {name}",
                f"a file of {self.length} bytes",
                f"at least {size * dtype.itemsize}",
            )
        values: NDArray[Any] = item[:]
        return values

    def contents(self) -> Container:
        """Read everything; `FormatError` unless it is whole and of this format."""
        found = self.attribute("format", str)
        if found != FORMAT:
            raise self.fail("attribute format", repr(found), repr(FORMAT))
        version = self.attribute("format_version", int)
        if version not in (PLAIN_VERSION, CODED_VERSION):
            raise self.fail("attribute format_version", version, f"at most {CODED_VERSION}")
        for name in ("m", "n"):
            if not 1 <= self.attribute(name, int) < 2**31:
                raise self.fail(f"attribute {name}", self.attribute(name, int), "a positive size")
        if "method" in self.place.attrs:
            self.attribute("method", str)
            names = [name for name, item in self.place.items() if isinstance(item, h5py.Dataset)]
            arrays = {name: self.array(name, None, None) for name in names}
        else:
            layout = _layout(self)
            arrays = {name: self.array(name, *layout[name]) for name in layout}
        # every attribute but the digest itself is under the digest
        attributes = {
            name: self.attribute(name, str, int, float, list)
            for name in self.place.attrs
            if name != "digest"
        }
        digest, actual = self.attribute("digest", str), _digest(attributes, arrays)
        if digest != actual:
            raise self.fail("digest", actual, digest)
        record = json.loads(self.attribute("record", str))
        for name in ("format", "record"):
            del attributes[name]
        return Container(self.label, attributes, arrays, record)


def _layout(reader: _Reader) -> dict[str, tuple[int, np.dtype[Any]]]:
    """Check the attributes of a DiBA factorization; return its datasets' sizes and dtypes."""
    m, n, k = (reader.attribute(name, int) for name in ("m", "n", "k"))
    if not 1 <= k < 2**31:
        raise reader.fail("attribute k", k, "a positive size")
    reader.attribute("shift", float)
    if reader.attribute("bit_order", str) != "little":
        raise reader.fail("attribute bit_order", reader.attribute("bit_order", str), "little")
    byte = np.dtype("u1")
    bits = {"b1": (-(-m * k // 8), byte), "b2": (-(-k * n // 8), byte)}
    sizes = dict(zip(_DIAGONALS, (m, k, n), strict=True))
    if reader.attribute("format_version", int) == CODED_VERSION:
        widths = reader.numbers("scale_bits", (3,), "i")
        reader.numbers("grids", (3, 2), "f")
        if not all(LEAST_CODE <= width <= MOST_CODE for width in widths):
            raise reader.fail("attribute scale_bits", widths, "three widths from 2 to 8")
        coded = zip(sizes.items(), widths, strict=True)
        return bits | {name: (-(-width * size // 8), byte) for (name, size), width in coded}
    reader.attribute("scale", float)
    width = reader.attribute("scale_bits", int)
    if width not in _DTYPES:
        raise reader.fail("attribute scale_bits", width, "16 or 32")
    return bits | {name: (size, _DTYPES[width]) for name, size in sizes.items()}


def read_container(path: PathLike, *, group: str | None = None) -> Container:
    """Read what `write_container` wrote.

    Everything is checked: version, sizes against the file's length, checksums, the digest.

    Parameters
    ----------
    path : path-like
    group : str, optional

    Returns
    -------
    Container

    Raises
    ------
    FileNotFoundError
    FormatError
        The file is not readable as HDF5, has no such group, or is inconsistent; the message names
        the path, the dataset or attribute, what was found and what was expected.
    """
    final = Path(path)
    with _open(final) as file:
        place: Any = file
        if group is not None:
            place = file.get(group)
            if not isinstance(place, h5py.Group):
                raise FormatError(f"{final}: group {group}: found {_names(file)}, expected it")
        if "format" not in place.attrs:
            hint = "; name one with group=" if len(file) and group is None else ""
            raise FormatError(
                f'{final}: attribute format: found none, expected "{FORMAT}" '
                f"(the file holds {_names(file)}{hint})"
            )
        return _Reader(final, place).contents()


def _names(file: h5py.File) -> str:
    names = list(file)
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"groups {shown}" if names else "no groups"


def load(path: PathLike, *, group: str | None = None) -> DiBAFactors | CompressedMatrix:
    """Read a compressed matrix from an HDF5 file, whichever method made it.

    Everything is checked: version, sizes against the file's length, checksums, the digest, zero
    padding. A damaged file is an error, never a result.

    Parameters
    ----------
    path : path-like
    group : str, optional
        The group to read, for files with many.

    Returns
    -------
    DiBAFactors or diba_np.baselines.base.CompressedMatrix

    Raises
    ------
    FileNotFoundError
    FormatError
        As `read_container`, or the contents contradict each other.
    """
    contents = read_container(path, group=group)
    if "method" in contents.attributes:
        from diba_np.baselines import rebuild

        return rebuild(contents)
    return _factors(contents)


def _factors(contents: Container) -> DiBAFactors:
    attributes, arrays = contents.attributes, contents.arrays
    m, n, k = (attributes[name] for name in ("m", "n", "k"))
    shift, record = attributes["shift"], contents.record
    try:
        bits1 = PackedBits.from_stream(arrays["b1"], (m, k))
        bits2 = PackedBits.from_stream(arrays["b2"], (k, n))
        if attributes["format_version"] == PLAIN_VERSION:
            d2 = arrays["d2"].astype(np.float64) * attributes["scale"]
            return DiBAFactors(arrays["d1"], bits1, d2, bits2, arrays["d3"], shift, record)
        pairs = zip(attributes["scale_bits"], attributes["grids"], strict=True)
        first, second, third = (LogGrid.from_pair(width, pair) for width, pair in pairs)
        grids = (first, second, third)
        d1, d2, d3 = (
            grid.decode(unpack_codes(arrays[name], grid.bits, size))
            for grid, name, size in zip(grids, _DIAGONALS, (m, k, n), strict=True)
        )
        return DiBAFactors(d1, bits1, d2, bits2, d3, shift, record, grids=grids)
    except (ValueError, TypeError) as error:
        raise FormatError(f"{contents.label}: {error}") from error
