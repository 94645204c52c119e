"""Sources of a model's arrays: each kind read as its own library writes it, damage refused."""

import json

import h5py
import numpy as np
import pytest

import diba_np as dn
from diba_np.errors import FormatError
from diba_np.matrix.bfloat16 import from_bfloat16, to_bfloat16
from diba_np.sources.opening import open_source


def read(source):
    return {entry.name: np.asarray(entry.read()) for entry in open_source(source)}


def equal(found, expected):
    assert list(found) == list(expected)
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        assert np.array_equal(found[name], expected[name])


@pytest.fixture
def arrays(rng):
    return {
        "a": rng.normal(size=(4, 3)),
        "b": rng.normal(size=(2, 3, 2)).astype(np.float16),
        "i": np.arange(5),
        "t": np.array([True, False]),
    }


def test_folder_npz_npy_and_mapping(arrays, tmp_path):
    equal(read(arrays), arrays)
    (tmp_path / "sub").mkdir()
    np.savez(tmp_path / "m.npz", **arrays)
    equal(read(tmp_path / "m.npz"), arrays)
    np.savez_compressed(tmp_path / "c.npz", **arrays)
    equal(read(tmp_path / "c.npz"), arrays)
    np.save(tmp_path / "sub" / "z.npy", arrays["a"])
    np.save(tmp_path / "y.w.npy", np.asfortranarray(arrays["a"]))
    equal(read(tmp_path), {"sub/z": arrays["a"], "y.w": arrays["a"]})
    equal(read(tmp_path / "y.w.npy"), {"y.w": arrays["a"]})
    with pytest.raises(ValueError, match="expected a folder of"):
        open_source(__file__)
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_source(tmp_path / "none.npz")
    np.save(tmp_path / "o.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(FormatError, match=r"not readable as \.npy"):
        read(tmp_path / "o.npy")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "m.npz").read_bytes()[:200])
    with pytest.raises(FormatError, match=r"not readable as \.npz"):
        read(tmp_path / "cut.npz")


def test_hdf5(arrays, tmp_path):
    path = tmp_path / "m.h5"
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[f"deep/{name}"] = array
        file["null"] = h5py.Empty("f")
    equal(read(path), {f"deep/{name}": array for name, array in arrays.items()})
    with h5py.File(path, "a") as file:
        file.create_dataset("huge", (2**40, 2**10), "f8", chunks=(64, 64))
    with pytest.raises(FormatError, match="dataset huge"):
        open_source(path)
    with h5py.File(path, "w") as file:
        file.create_dataset("out", (4,), "f8", external=[("elsewhere", 0, 32)])
    with pytest.raises(FormatError, match="another file"):
        open_source(path)
    path.unlink()
    dn.factorize(np.eye(4), k=2).save(path)
    with pytest.raises(FormatError, match="is a factorization already, expected arrays"):
        open_source(path)
    path.write_bytes(b"no file of theirs")
    with pytest.raises(FormatError, match="not readable as HDF5"):
        open_source(path)


def safetensors(header, data=b""):
    text = json.dumps(header).encode() if isinstance(header, (dict, list)) else header
    return len(text).to_bytes(8, "little") + text + data


def test_safetensors_as_their_library_writes_them(arrays, tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "m.safetensors"
    library.save_file(arrays, path, metadata={"format": "np"})
    found = read(path)
    equal({name: found[name] for name in arrays}, arrays)


def test_safetensors(tmp_path, rng):
    path = tmp_path / "m.safetensors"
    half = rng.normal(size=(3, 4)).astype(np.float16)
    words = to_bfloat16(rng.normal(size=(2, 5)).astype(np.float32))
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
    assert np.array_equal(found["w"], from_bfloat16(words))
    assert np.array_equal(to_bfloat16(found["w"]), words)
    assert found["none"].shape == (0, 7)
    assert [entry.dtype for entry in open_source(path)] == ["<f2", "bfloat16", "<f4"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "a header of 0 bytes"),
        ((2**60).to_bytes(8, "little") + b"{}", "a header of"),
        (safetensors(b"{x}"), "not readable as .safetensors"),
        (safetensors([1]), "no JSON object"),
        (safetensors({"w": 3}), "expected dtype, shape, offsets"),
        (safetensors({"w": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}), "expected"),
        (safetensors({"w": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}), "F8_E4M3"),
        (
            safetensors({"w": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}),
            "found 4 bytes for F32",
        ),
        (
            safetensors({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"1234"),
            "expected at most 4",
        ),
        (
            safetensors({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}, b"1234"),
            "found -4 bytes",
        ),
    ],
)
def test_damaged_safetensors_are_refused(content, words, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=words):
        read(path)
