"""GGUF: plain and quantized tensors, metadata, damage refused."""

import struct

import numpy as np
import pytest
from files_of_others import gguf_file

from diba_np.errors import FormatError
from diba_np.sources.gguf import read_metadata
from diba_np.sources.opening import open_source


@pytest.fixture
def path(tmp_path):
    return tmp_path / "m.gguf"


def test_plain_numbers_rows_first(path, rng):
    w = rng.normal(size=(3, 5)).astype("<f4")
    tensors = [
        ("w", (3, 5), 0, w.tobytes()),
        ("h", (4,), 1, np.arange(4, dtype="<f2").tobytes()),
        ("b", (2, 1), 30, np.array([0x3F80, 0xC000], "<u2").tobytes()),
        ("i", (2,), 26, np.array([7, -1], "<i4").tobytes()),
    ]
    path.write_bytes(gguf_file(tensors))
    entries = open_source(path)
    assert [(e.name, e.shape, e.dtype) for e in entries] == [
        ("w", (3, 5), "<f4"),
        ("h", (4,), "<f2"),
        ("b", (2, 1), "bfloat16"),
        ("i", (2,), "<i4"),
    ]
    assert np.array_equal(entries[0].read(), w)
    assert entries[2].read().tolist() == [[1.0], [-2.0]]
    assert entries[3].read().tolist() == [7, -1]


def test_parts_of_a_split_file_are_read_together(tmp_path):
    def write(at, tensors):
        values = [("split.no", 2, struct.pack("<H", at)), ("split.count", 2, struct.pack("<H", 2))]
        path = tmp_path / f"m-{at + 1:05d}-of-00002.gguf"
        path.write_bytes(gguf_file(tensors, values))
        return path

    tensors = [(name, (2,), 0, np.full(2, at, "<f4").tobytes()) for at, name in enumerate("ab")]
    first, second = (write(at, tensors[at : at + 1]) for at in range(2))
    assert {e.name: e.read().tolist() for e in open_source(first)} == {"a": [0, 0], "b": [1, 1]}
    with pytest.raises(FormatError, match="found part 2 of 2 of a split file, expected the first"):
        open_source(second)
    write(1, tensors[:1])
    with pytest.raises(FormatError, match="two arrays named"):
        open_source(first)
    second.unlink()
    with pytest.raises(FormatError, match=f"found no part {second.name}, expected it in the same"):
        open_source(first)
    damaged = [("split.no", 8, bytes([1, *bytes(7)]) + b"x"), ("split.count", 2, b"\2\0")]
    second.write_bytes(gguf_file([], damaged))
    with pytest.raises(FormatError, match="found part none of 2 of a split file"):
        open_source(second)
    first.rename(tmp_path / "m.gguf")
    with pytest.raises(FormatError, match=r"found part 1 of 2 .* named \*-00001-of-00002\.gguf"):
        open_source(tmp_path / "m.gguf")


def test_metadata(path):
    def text(value):
        return struct.pack("<Q", len(value)) + value

    values = [
        ("general.alignment", 4, struct.pack("<I", 64)),
        ("name", 8, text(b"tiny")),
        ("words", 9, struct.pack("<IQ", 8, 2) + text(b"a") + text("ü".encode())),
        ("rates", 9, struct.pack("<IQff", 6, 2, 0.5, 2.0)),
        ("flag", 7, b"\x01"),
    ]
    path.write_bytes(gguf_file([("w", (2,), 0, bytes(8))], values, alignment=64))
    assert read_metadata(path) == {
        "general.alignment": 64,
        "name": "tiny",
        "words": ["a", "ü"],
        "rates": [0.5, 2.0],
        "flag": True,
    }
    assert open_source(path)[0].read().tolist() == [0, 0]


def test_every_quantized_type_is_what_the_package_decodes(path, rng):
    gguf = pytest.importorskip("gguf", reason="the package gguf (extra networks)")
    kinds = sorted(gguf.quants._type_traits)
    tensors, words = [], {}
    for kind in kinds:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        raw = rng.integers(0, 64, (6, 2 * size), dtype=np.uint8)  # no scale becomes infinite
        words[kind.name] = (raw, kind)
        tensors.append((kind.name, (2, 3, 2 * block), int(kind), raw.tobytes()))
    path.write_bytes(gguf_file(tensors))
    entries = {entry.name: entry for entry in open_source(path)}
    assert len(entries) > 15 and not any(entry.unfit for entry in entries.values())
    for name, (raw, kind) in words.items():
        expected = gguf.quants.dequantize(raw, kind).reshape(entries[name].shape)
        np.testing.assert_array_equal(entries[name].read(), expected)


def test_a_type_that_the_package_cannot_decode_is_named(path):
    gguf = pytest.importorskip("gguf", reason="the package gguf (extra networks)")
    kind = gguf.GGMLQuantizationType.Q8_1  # of products inside ggml alone
    block, size = gguf.GGML_QUANT_SIZES[kind]
    path.write_bytes(gguf_file([("a", (2, block), int(kind), bytes(2 * size))]))
    (entry,) = open_source(path)
    assert entry.unfit == "ggml type Q8_1, which the package gguf cannot decode"


def test_as_the_package_writes_them(path, rng):
    gguf = pytest.importorskip("gguf", reason="the package gguf (extra networks)")
    w = rng.normal(size=(4, 64)).astype(np.float32)
    quantized = gguf.quants.quantize(w, gguf.GGMLQuantizationType.Q8_0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.add_tensor("plain", w)
    writer.add_tensor("small", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = {entry.name: entry.read() for entry in open_source(path)}
    assert np.array_equal(found["plain"], w)
    assert 0 < np.abs(found["small"] - w).max() < 0.02
    assert read_metadata(path)["llama.block_count"] == 3


def test_damaged_files_are_refused(path):
    whole = gguf_file([("w", (3, 5), 0, bytes(60))])
    for count in (0, 3, 10, 24, 40, 60):
        path.write_bytes(whole[:count])
        with pytest.raises(FormatError, match=r"m\.gguf: not readable"):
            open_source(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(FormatError, match="array w: found bytes"):
        open_source(path)
    path.write_bytes(gguf_file([], version=1))
    with pytest.raises(FormatError, match="version 1"):
        open_source(path)
    path.write_bytes(gguf_file([("w", (1,), 0, bytes(4))] * 2))
    with pytest.raises(FormatError, match="two arrays named 'w'"):
        open_source(path)
    path.write_bytes(gguf_file([("w", (2**40, 2**40), 0, b"")]))
    with pytest.raises(FormatError, match="expected at most"):
        open_source(path)
    huge = ("words", 9, struct.pack("<IQ", 8, 2**60))
    path.write_bytes(gguf_file([], [huge]))
    with pytest.raises(FormatError, match="an array of"):
        open_source(path)
