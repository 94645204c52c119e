"""Damage done to files on purpose: bytes, lengths, attributes, datasets, links, headers.

`torture_files.py` has the files read. Each generator writes one case at a time to the same path.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from diba_np.files import container

# (class, name, path, whether it must be refused or the same)
Case = tuple[str, str, Path, bool]


def damaged(data: bytes, rng: np.random.Generator, step: int) -> Iterator[tuple[str, str, bytes]]:
    """Yield (class, name, bytes): each window of `step` bytes hit, and lengths changed."""
    size = len(data)
    values: list[Callable[[bytes], bytes]] = [
        lambda old: bytes([old[0] ^ 1 << int(rng.integers(8))]) + old[1:],
        lambda old: bytes([old[0] ^ 0xFF]) + old[1:],
        lambda old: bytes(len(old)),
        lambda old: b"\xff" * len(old),
        lambda old: rng.bytes(len(old)),
        lambda old: (int.from_bytes(old, "little") + 1).to_bytes(9, "little")[: len(old)],
        lambda old: old[:4] + b"\x7f" * (len(old) - 4),
    ]
    for window in range(0, size, step):
        at = min(window + int(rng.integers(step)), size - 1)
        change = values[int(rng.integers(len(values)))]
        old = data[at : at + 8]
        new = change(old)
        if new == old:
            new = bytes([old[0] ^ 0x10]) + old[1:]
        yield "bytes changed", f"byte {at}", data[:at] + new + data[at + len(new) :]
    for _ in range(max(4, size // (8 * step))):
        a, b = sorted(int(v) for v in rng.integers(0, size, 2))
        yield "bytes put in", f"{b - a} at {a}", data[:a] + rng.bytes(1 + (b - a) % 64) + data[a:]
        yield "bytes taken out", f"{a} to {b}", data[:a] + data[b + 1 :]
        yield "piece repeated", f"{a} to {b}", data[:a] + data[a:b] + data[a:]
        yield "truncated", f"at {a}", data[:a]
    for keep in (0, 1, 7, 8, 9, size // 2, size - 8, size - 1):
        yield "truncated", f"at {keep}", data[:keep]


WRONG: list[Any] = [
    "text", "", "\ud7ff" * 3, 0, -1, 1, 2**31, 2**62, np.uint64(2**64 - 1), 0.5, np.nan, np.inf,
    -1e300, True, b"bytes \xff", np.zeros(0), np.ones(3), np.ones((3, 2)), np.arange(3),
    [2, 300, -4], np.array(["a", "bc"], h5py.string_dtype()), 1 + 2j,
    np.zeros(2, [("a", "f4"), ("b", "i2")]), np.float16(1), h5py.Empty("f4"),
    h5py.Empty(h5py.string_dtype()), np.void(b"\x00\x01"),
    "[" * 5000, "9" * 6000, "x" * 30000, '{"a": NaN}', "[1]", "null",
]  # fmt: skip


def place_of(file: h5py.File, group: str) -> Any:
    return file[group] if group else file


def attribute_edits(names: list[str]) -> Iterator[tuple[str, Callable[[Any], None]]]:
    for name in names:
        for i, value in enumerate(WRONG):
            yield (
                f"{name} = wrong value {i}",
                lambda at, n=name, v=value: at.attrs.__setitem__(n, v),
            )
        yield f"{name} deleted", lambda at, n=name: at.attrs.__delitem__(n)
        yield f"{name} renamed", lambda at, n=name: at.attrs.__setitem__(n + "_", at.attrs.pop(n))

        def reference(at: Any, n: str = name) -> None:
            at.attrs.create(n, at.ref, dtype=h5py.ref_dtype)

        yield f"{name} a reference", reference


def dataset_edits(names: list[str], other: Path) -> Iterator[tuple[str, Callable[[Any], None]]]:
    """Yield edits that replace a dataset of a group by something else."""

    def put(name: str, **options: Any) -> Callable[[Any], None]:
        def change(at: Any) -> None:
            del at[name]
            at.create_dataset(name, **options)

        return change

    def link(name: str, target: Any) -> Callable[[Any], None]:
        def change(at: Any) -> None:
            del at[name]
            at[name] = target

        return change

    def virtual(name: str) -> Callable[[Any], None]:
        def change(at: Any) -> None:
            size, dtype = at[name].shape, at[name].dtype
            del at[name]
            layout = h5py.VirtualLayout(size, dtype)
            if size[0]:
                layout[:] = h5py.VirtualSource(str(other), "b1", size, dtype)
            at.create_virtual_dataset(name, layout)

        return change

    def same_with(name: str, **options: Any) -> Callable[[Any], None]:
        def change(at: Any) -> None:
            values = at[name][:]
            del at[name]
            at.create_dataset(name, data=values, **options)

        return change

    huge = 2**40
    for name in names:
        yield f"{name} deleted", lambda at, n=name: at.__delitem__(n)
        yield f"{name} a group", lambda at, n=name: (at.__delitem__(n), at.create_group(n))
        yield f"{name} text", put(name, data=np.array(["a"] * 9, h5py.string_dtype()))
        yield f"{name} ragged", put(name, shape=(9,), dtype=h5py.vlen_dtype(np.uint8))
        yield f"{name} references", put(name, shape=(9,), dtype=h5py.ref_dtype)
        yield f"{name} records", put(name, data=np.zeros(9, [("a", "u1"), ("b", "f8")]))
        yield f"{name} opaque", put(name, data=np.zeros(9, "V8"))
        yield f"{name} scalar", put(name, data=np.uint8(1))
        yield f"{name} null", put(name, data=h5py.Empty("u1"))
        yield f"{name} 2-D", put(name, data=np.zeros((3, 3), np.uint8))
        yield f"{name} empty", put(name, data=np.zeros(0, np.uint8))
        yield f"{name} huge", put(name, shape=(huge,), dtype="u1", chunks=(1 << 25,))
        yield f"{name} huge, one chunk", put(name, shape=(1 << 31,), dtype="u1", chunks=(1 << 31,))
        yield (
            f"{name} zeros by gzip",
            put(name, data=np.zeros(1 << 20, np.uint8), compression="gzip", chunks=(1 << 18,)),
        )
        yield (
            f"{name} from another file",
            put(name, shape=(9,), dtype="u1", external=[("/proc/self/environ", 0, 9)]),
        )
        yield f"{name} virtual", virtual(name)
        yield f"{name} soft link", link(name, h5py.SoftLink(f"/{name}"))
        yield f"{name} dangling", link(name, h5py.SoftLink("/nowhere"))
        yield f"{name} external link", link(name, h5py.ExternalLink(str(other), "/b1"))
        yield f"{name} the root", link(name, h5py.SoftLink("/"))
        yield f"{name} gzipped", same_with(name, compression="gzip")
        yield (
            f"{name} huge chunks",
            put(name, shape=(9,), dtype="u1", chunks=(1 << 31,), maxshape=(None,)),
        )
        yield f"{name} big endian", put(name, data=np.ones(9, ">f4"))


def redigest(at: Any) -> None:
    """Give a group a digest that fits, as a hostile writer would."""
    attributes = {}
    for name in at.attrs:
        value = at.attrs[name]
        plain = value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value
        if name != "digest":
            attributes[name] = plain
    if any(max(at[name].chunks or [0]) > 1 << 24 for name in at):
        raise ValueError("too large to be read here")
    arrays = {name: at[name][:] for name in at}
    at.attrs["digest"] = container.digest_of(attributes, arrays)


def hdf5_cases(
    name: str, path: Path, groups: list[str], folder: Path, rng: np.random.Generator, smoke: bool
) -> Iterator[Case]:
    data = path.read_bytes()
    target = folder / "case.h5"
    for kind, told, changed in damaged(data, rng, 2048 if smoke else 16):
        target.write_bytes(changed)
        yield kind, f"{name}: {told}", target, True
    other = folder / "diba.h5"
    group = groups[0]
    with h5py.File(path) as file:
        at = place_of(file, group)
        attributes = list(at.attrs)
        datasets = [item for item in at if isinstance(at[item], h5py.Dataset)]
    edits = [("attribute edited", *edit) for edit in attribute_edits(attributes)]
    edits += [("dataset replaced", *edit) for edit in dataset_edits(datasets, other)]
    for kind, told, change in edits:
        if smoke and rng.random() > 0.03:
            continue
        for fitting in (False, True):
            shutil.copy(path, target)
            try:
                with h5py.File(target, "r+") as file:
                    at = place_of(file, group)
                    change(at)
                    if fitting:
                        redigest(at)
            except Exception:  # HDF5 has no such file, or there is nothing to take a digest of
                continue
            yield (
                (f"{kind}, digest fits" if fitting else kind),
                f"{name}: {told}",
                target,
                not fitting,
            )


def link_cases(
    folder: Path, files: dict[str, Path], smoke: bool
) -> Iterator[tuple[Case, list[str]]]:
    """Yield files whose groups lead in circles or elsewhere."""
    target = folder / "case.h5"

    def soft(file: h5py.File) -> None:
        del file["a"]
        file["a"] = h5py.SoftLink("/a")

    def pair(file: h5py.File) -> None:
        del file["a"]
        file["a"], file["c"] = h5py.SoftLink("/c"), h5py.SoftLink("/a")

    def hard(file: h5py.File) -> None:
        file["a/again"] = file["/"]

    def outside(file: h5py.File) -> None:
        del file["a"]
        file["a"] = h5py.ExternalLink(str(files["diba"]), "/")

    def itself(file: h5py.File) -> None:
        del file["a"]
        file["a"] = h5py.ExternalLink(str(target), "/a")

    def deep(file: h5py.File) -> None:
        at = file
        for _ in range(1000):
            at = at.create_group("g")

    def wide(file: h5py.File) -> None:
        for i in range(50 if smoke else 1000):
            file.create_group(f"g{i}")

    for change in (soft, pair, hard, outside, itself, deep, wide):
        shutil.copy(files["many"], target)
        with h5py.File(target, "r+") as file:
            change(file)
        for group in ("a", "a/again", "/".join("g" * 1000)):
            yield ("links", f"{change.__name__} {group[:9]}", target, False), [group]
        yield ("links", change.__name__, target, True), ["deep/er", "b"]


def npy_cases(folder: Path, rng: np.random.Generator, smoke: bool) -> Iterator[Case]:
    target, whole = folder / "case.npy", folder / "whole.npy"
    np.save(whole, rng.normal(size=(6, 5)))
    data = whole.read_bytes()
    for kind, told, changed in damaged(data, rng, 16 if smoke else 4):
        target.write_bytes(changed)
        yield f".npy {kind}", told, target, kind == "truncated"
    headers = [
        *(f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}}}" for shape in (
            (2**40, 5), (2**63, 2), (-1, 5), (6, -5), (0, 5), (6, 0), (), (30,), (6, 5, 1),
            "(True, 5)", "6", "[6, 5]", "(6.0, 5)", "None", "'65'", (10**30, 10**30),
            (2**20, 2**13),
        )),
        *(f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': (6, 5)}}" for descr in (
            "|O", "O8", ">f8", "<f4", "<c16", "|S8", "<U2", "|V8", "<M8[s]", "|b1", "<f16", "<i8",
            [("a", "<f4"), ("b", "<f4")], [("a", "|O")], "nonsense", 7, None, "<f8" * 99,
            "<f999999",
        )),
        "{}", "[]", "'x'", "{'descr': '<f8'}", "(" * 200, "-" * 9000 + "1", "[" * 9000, "{" * 9000,
        "__import__('os').system('true')", "{'descr': '<f8', 'shape': (6, 5)}", "\x00" * 60,
        "9" * 9000, "{'descr': '<f8', 'fortran_order': 3, 'shape': (6, 5)}", "'" * 50, "\\",
    ]  # fmt: skip
    versions = (b"\x01\x00", b"\x02\x00", b"\x03\x00")
    for number, header in enumerate(headers):
        for version in versions[number % 3 :: 3] if smoke else versions:
            text = header.encode("latin1") + b"\n"
            width = 2 if version[0] == 1 else 4
            head = b"\x93NUMPY" + version + len(text).to_bytes(width, "little") + text
            target.write_bytes(head + data[-240:])
            yield ".npy header", f"{header[:60]} v{version[0]}", target, False
    for told, content in (
        ("version 9", b"\x93NUMPY\x09\x09" + data[8:]),
        ("header of 4 GiB", b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + data[10:]),
        ("pickle", b"\x80\x04cos\nsystem\n(X\x04\x00\x00\x00truetR."),
        ("zip", b"PK\x03\x04" + data),
        ("HDF5", (folder / "diba.h5").read_bytes()),
    ):
        target.write_bytes(content)
        yield ".npy header", told, target, True
