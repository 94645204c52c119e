"""safetensors: every type to the bit, shards and Hugging Face folders, damage refused."""

import json

import numpy as np
import pytest
from files_of_others import safetensors, safetensors_of

from diba_np.errors import FormatError
from diba_np.matrix.small_floats import EIGHT_BITS, SMALL_FLOATS, decode, encode
from diba_np.sources.opening import open_source


def read(source):
    return {entry.name: np.asarray(entry.read()) for entry in open_source(source)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "m.safetensors"


def test_as_their_library_writes_them(path, rng):
    library = pytest.importorskip("safetensors.numpy", reason="the package safetensors")
    arrays = {
        "a": rng.normal(size=(4, 3)),
        "b": rng.normal(size=(2, 3, 2)).astype(np.float16),
        "i": np.arange(5),
        "t": np.array([True, False]),
    }
    library.save_file(arrays, path, metadata={"format": "np"})
    found = read(path)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array)


def test_names_shapes_and_types(path, rng):
    half = rng.normal(size=(3, 4)).astype(np.float16)
    words = encode(rng.normal(size=(2, 5)), "bfloat16")
    header = {
        "__metadata__": {"a": "b"},
        "layer/ü.weight": {"dtype": "F16", "shape": [3, 4], "data_offsets": [0, 24]},
        "w": {"dtype": "BF16", "shape": [2, 5], "data_offsets": [24, 44]},
        "none": {"dtype": "F32", "shape": [0, 7], "data_offsets": [44, 44]},
    }
    path.write_bytes(safetensors(header, half.tobytes() + words.tobytes()))
    found = read(path)
    assert list(found) == ["layer/ü.weight", "w", "none"]
    assert np.array_equal(found["layer/ü.weight"], half)
    assert found["w"].dtype == np.float32
    assert np.array_equal(found["w"], decode(words, "bfloat16"))
    assert found["none"].shape == (0, 7)
    entries = open_source(path)
    assert [entry.dtype for entry in entries] == ["<f2", "bfloat16", "<f4"]
    assert [entry.shape for entry in entries] == [(3, 4), (2, 5), (0, 7)]


@pytest.mark.parametrize("dtype", list(EIGHT_BITS))
def test_floats_of_8_bits_are_what_ml_dtypes_says(dtype, path):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="the package ml_dtypes")
    codes = np.arange(256, dtype=np.uint8)
    kind = np.dtype(getattr(ml_dtypes, dtype))
    values = decode(codes, dtype)
    np.testing.assert_array_equal(values, codes.view(kind).astype(np.float32))
    assert np.array_equal(encode(values, dtype), codes)
    rng = np.random.default_rng(0)
    some = np.exp2(rng.uniform(-12, 7, 5000)) * (1 if dtype == "float8_e8m0fnu" else -1)
    some = some.astype(np.float32)
    assert np.array_equal(encode(some, dtype), some.astype(kind).view(np.uint8))
    names = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
    if dtype in names:
        path.write_bytes(safetensors_of({"w": codes.reshape(16, 16)}, {"w": names[dtype]}))
        (entry,) = open_source(path)
        assert entry.dtype == dtype
        np.testing.assert_array_equal(entry.read(), values.reshape(16, 16))


def test_bfloat16_is_rounded_to_even_and_keeps_its_nans():
    words = np.arange(1 << 16, dtype=np.uint16)
    assert np.array_equal(encode(decode(words, "bfloat16"), "bfloat16"), words)
    one, step = np.uint32(0x3F800000), 1 << 15
    ties = np.array([one + step, one + 3 * step, one + step + 1], np.uint32).view(np.float32)
    assert encode(ties, "bfloat16").tolist() == [0x3F80, 0x3F82, 0x3F81]
    low = np.array([0x7F800001], np.uint32).view(np.float32)  # a NaN in the bits that go
    assert np.isnan(decode(encode(low, "bfloat16"), "bfloat16")).all()
    assert set(SMALL_FLOATS) == {"bfloat16", *EIGHT_BITS}


def test_types_that_cannot_be_numbers_are_named_and_do_not_refuse_the_file(path):
    header = {
        "c": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]},
        "f4": {"dtype": "F4", "shape": [2], "data_offsets": [8, 9]},
        "new": {"dtype": "F3_E1", "shape": [2], "data_offsets": [9, 10]},
        "w": {"dtype": "U8", "shape": [2], "data_offsets": [10, 12]},
    }
    path.write_bytes(safetensors(header, bytes(12)))
    entries = {entry.name: entry for entry in open_source(path)}
    unfit = {name: entry.unfit for name, entry in entries.items() if entry.unfit}
    assert unfit == {"c": "complex numbers", "f4": "4-bit floats", "new": "type F3_E1"}
    assert entries["w"].read().tolist() == [0, 0]
    with pytest.raises(FormatError, match="found dtype C64"):
        entries["c"].read()


def one(**facts):
    return safetensors({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | facts})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "a header of 0 bytes"),
        ((2**60).to_bytes(8, "little") + b"{}", "a header of"),
        (safetensors(b"{x}"), "not readable as JSON"),
        (safetensors(b'{"w":' * 5000), "not readable as JSON"),
        (safetensors([1]), "no JSON object"),
        (safetensors({"w": 3}), "expected dtype, shape, offsets"),
        (one(shape=["x"]) + b"1234", "expected"),
        (one(shape=[2**40, 2**40]) + b"1234", "found 4 bytes for F32"),
        (one(data_offsets=[4, 8]) + b"1234", "expected at most 4"),
        (one(shape=[-1], data_offsets=[4, 0]) + b"1234", "found -4 bytes"),
        (
            safetensors(
                b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
                b'"w":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
                b"ab",
            ),
            "names 'w' twice",
        ),
        (
            safetensors(
                {
                    "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
                    "b": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]},
                },
                b"abcd",
            ),
            "overlap at byte 2",
        ),
    ],
)
def test_damaged_files_are_refused(content, words, path):
    path.write_bytes(content)
    with pytest.raises(FormatError, match=words):
        read(path)


def test_one_place_under_two_names_is_read_twice(path):
    place = {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}
    path.write_bytes(safetensors({"a": place, "b": place}, np.array([1, 2], "<f4").tobytes()))
    found = read(path)
    assert found["a"].tolist() == found["b"].tolist() == [[1.0], [2.0]]


# -- shards ----------------------------------------------------------------------------------------

NAMES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def folder(tmp_path, rng):
    """A Hugging Face folder of two shards; returns it and its arrays."""
    arrays = {name: rng.normal(size=(3, 2)).astype("<f4") for name in ("a", "b", "c")}
    (tmp_path / NAMES[0]).write_bytes(safetensors_of({"a": arrays["a"]}))
    (tmp_path / NAMES[1]).write_bytes(safetensors_of({"b": arrays["b"], "c": arrays["c"]}))
    places = {"a": NAMES[0], "b": NAMES[1], "c": NAMES[1]}
    write_index(tmp_path, places)
    (tmp_path / "config.json").write_text("{}")
    return tmp_path, arrays


def write_index(folder, places):
    text = json.dumps({"metadata": {}, "weight_map": places})
    (folder / "model.safetensors.index.json").write_text(text)


def test_a_folder_of_shards_its_index_and_shards_without_one(folder):
    path, arrays = folder
    for source in (path, path / "model.safetensors.index.json"):
        found = read(source)
        assert list(found) == ["a", "b", "c"]
        assert all(np.array_equal(found[name], arrays[name]) for name in arrays)
    (path / "model.safetensors.index.json").unlink()
    assert list(read(path)) == ["a", "b", "c"]
    (path / NAMES[0]).unlink()
    with pytest.raises(FormatError, match=r"no shard 1 of 2 of model"):
        read(path)


def test_what_the_index_says_must_be_there(folder):
    path, arrays = folder
    write_index(path, {"a": NAMES[0], "x": NAMES[1]})
    with pytest.raises(FormatError, match="found no array 'x'"):
        read(path)
    write_index(path, {"a": "other.safetensors"})
    with pytest.raises(FormatError, match=r"found no shard other\.safetensors"):
        read(path)
    for outside in ("../m.safetensors", str(path / NAMES[0])):
        write_index(path, {"a": outside})
        with pytest.raises(FormatError, match="expected one of its folder"):
            read(path)
    (path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(FormatError, match="no weight_map"):
        read(path)
    # a name in two shards is that of the shard which the index names
    (path / NAMES[0]).write_bytes(safetensors_of({"a": arrays["a"], "b": arrays["a"]}))
    write_index(path, {"a": NAMES[0], "b": NAMES[1], "c": NAMES[1]})
    assert np.array_equal(read(path)["b"], arrays["b"])
    (path / "model.safetensors.index.json").unlink()
    with pytest.raises(FormatError, match="two arrays named 'b'"):
        read(path)


def test_one_file_of_a_folder_and_other_files_beside_it(tmp_path, rng):
    w = rng.normal(size=(3, 2)).astype("<f4")
    (tmp_path / "model.safetensors").write_bytes(safetensors_of({"w": w}))
    (tmp_path / "model.fp16.safetensors").write_bytes(safetensors_of({"w": w.astype("<f2")}))
    assert read(tmp_path)["w"].dtype == np.float32
    np.save(tmp_path / "other.npy", w)
    with pytest.warns(UserWarning, match=r"1 \.npy files are not read"):
        assert list(read(tmp_path)) == ["w"]


def test_a_file_without_a_suffix_is_told_by_its_content(tmp_path, rng):
    blob = tmp_path / "0a1b"
    blob.write_bytes(safetensors_of({"w": rng.normal(size=(3, 2)).astype("<f4")}))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.safetensors").symlink_to(blob)
    assert list(read(blob)) == list(read(tmp_path / "folder")) == ["w"]
