"""Sources of NumPy's, HDF5 and mappings; what each kind refuses and how it says so."""

import io
import os
import zipfile

import h5py
import numpy as np
import pytest
from files_of_others import (
    field,
    gguf_file,
    pickled_dict,
    pickled_tensor,
    safetensors_of,
    torch_zip,
)
from scipy import sparse

import diba_np as dn
from diba_np.errors import FormatError
from diba_np.sources.numpy_files import npy_of_bytes
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


@pytest.mark.parametrize("kind", ["bsr", "coo", "csc", "csr", "dia"])
def test_a_sparse_matrix_of_scipy_is_refused_in_one_sentence(kind, tmp_path):
    path = tmp_path / "s.npz"
    sparse.save_npz(path, sparse.eye(6, format=kind))
    words = rf"s\.npz: found a sparse matrix \({kind}\), expected dense arrays; save .*toarray\(\)$"
    with pytest.raises(ValueError, match=words):
        open_source(path)


def test_arrays_with_the_names_of_a_sparse_matrix_are_arrays(tmp_path):
    for named in (np.ones(3), np.array("dense"), np.array(b"\xff"), np.array({})):
        np.savez(tmp_path / "m.npz", format=named, shape=np.ones(2), data=np.ones((4, 4)))
        entries = {entry.name: entry for entry in open_source(tmp_path / "m.npz")}
        assert list(entries) == ["format", "shape", "data"]
        np.testing.assert_array_equal(entries["data"].read(), np.ones((4, 4)))


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
    (tmp_path / "cut.npz").write_bytes((tmp_path / "m.npz").read_bytes()[:200])
    with pytest.raises(FormatError, match=r"not readable as \.npz"):
        read(tmp_path / "cut.npz")


def test_a_file_that_is_no_npy_is_named_and_pickles_are_not_advised(tmp_path, arrays):
    np.save(tmp_path / "a.npy", arrays["a"])
    (tmp_path / "notes.npy").write_bytes(b"some words, no array")
    entries = {entry.name: entry for entry in open_source(tmp_path)}
    assert np.array_equal(entries["a"].read(), arrays["a"])
    with pytest.raises(FormatError, match=r"notes\.npy: not readable as \.npy \(it begins with"):
        entries["notes"].read()
    np.save(tmp_path / "o.npy", np.array([{}]), allow_pickle=True)
    np.savez(tmp_path / "o.npz", o=np.array([{}], object))
    for path in (tmp_path / "o.npy", tmp_path / "o.npz"):
        with pytest.raises(FormatError, match="Python objects, which are never loaded") as error:
            read(path)
        assert "allow_pickle" not in str(error.value)
    with pytest.raises(ValueError, match=r"found none in .*empty"):
        (tmp_path / "empty").mkdir()
        open_source(tmp_path / "empty")


@pytest.mark.parametrize("old, new", [(b"}", b" "), (b")", b" "), (b"'descr'", b"'descr ")])
def test_a_header_that_is_no_python_is_named(old, new, tmp_path):
    np.save(tmp_path / "w.npy", np.ones((4, 4)))
    damaged = (tmp_path / "w.npy").read_bytes().replace(old, new, 1)
    (tmp_path / "w.npy").write_bytes(damaged)
    (entry,) = open_source(tmp_path)
    with pytest.raises(FormatError, match=r"w\.npy: not readable as \.npy"):
        entry.read()
    with pytest.raises(FormatError, match=r"pipe: not readable as \.npy"):
        npy_of_bytes(damaged, "pipe")


@pytest.mark.parametrize("packing", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damaged_packed_arrays_are_named(packing, tmp_path, rng):
    buffer = io.BytesIO()
    np.save(buffer, np.round(rng.normal(size=(60, 60)), 1))
    with zipfile.ZipFile(tmp_path / "a.npz", "w", packing) as archive:
        archive.writestr("w.npy", buffer.getvalue())
        archive.writestr("v.npy", buffer.getvalue())
    whole = (tmp_path / "a.npz").read_bytes()
    for place in (40, 48, 60, 120, 300, 600):
        damaged = bytearray(whole)
        damaged[place : place + 8] = b"\xff" * 8
        (tmp_path / "a.npz").write_bytes(damaged)
        entry = open_source(tmp_path / "a.npz")[0]
        with pytest.raises(FormatError, match=r"a\.npz:w\.npy: not readable as \.npy"):
            entry.read()


def test_masked_entries_and_what_numpy_cannot_have_are_refused_in_mappings():
    class Graded:
        def __array__(self, *_, **__):
            raise RuntimeError("Can't call numpy() on Tensor that requires grad")

    masked = np.ma.masked_array(np.arange(5.0), [0, 1, 0, 0, 0])
    first, second, third = open_source({"m": masked, "g": Graded(), "whole": np.ma.array([1.0])})
    with pytest.raises(ValueError, match="m must have no masked entries, got 1"):
        first.read()
    with pytest.raises(TypeError, match=r"g must be an array, got Graded .* requires grad"):
        second.read()
    assert third.read().tolist() == [1.0]


def test_what_is_no_number_is_known_before_it_is_read(tmp_path):
    arrays = {"s": np.array(["x"]), "c": np.ones(2, complex), "d": np.array(["2020"], "M8[Y]")}
    np.savez(tmp_path / "m.npz", **arrays)
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["s"], file["c"] = "text", arrays["c"]
    expected = {"s": "text", "c": "complex numbers", "d": "dates"}
    for source in (arrays, tmp_path / "m.npz"):
        assert {entry.name: entry.unfit for entry in open_source(source)} == expected
    assert {e.name: e.unfit for e in open_source(tmp_path / "m.h5")} == {
        "c": "complex numbers",
        "s": "text",
    }


def test_mappings_say_what_is_wrong_and_the_remedy():
    sparse = pytest.importorskip("scipy.sparse").csr_matrix(np.eye(3))
    with pytest.raises(TypeError, match=r"w must be a dense array.* sparse matrix; pass w\.to"):
        read({"w": sparse})
    with pytest.raises(TypeError, match="of Python objects; leave it out by its name"):
        read({"w": [{}, None]})
    with pytest.raises(ValueError, match="w must be a rectangular array"):
        read({"w": [[1, 2], [3]]})
    with pytest.raises(TypeError, match="map names to arrays, got the key 3"):
        open_source({3: np.eye(2)})
    with pytest.raises(TypeError, match="a path or a mapping"):
        open_source(3)


def test_small_floats_of_ml_dtypes_in_a_mapping():
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="the package ml_dtypes")
    values = np.array([[1.5, -2.0]])
    for name in ("bfloat16", "float8_e4m3fn"):
        (entry,) = open_source({"w": values.astype(getattr(ml_dtypes, name))})
        assert (entry.dtype, entry.shape) == (name, (1, 2))
        assert entry.read().tolist() == values.tolist()


def test_what_a_folder_holds_beside_plain_files(tmp_path, arrays):
    np.save(tmp_path / "a.npy", arrays["a"])
    (tmp_path / "a.npy").rename(tmp_path / "A.NPY")
    (tmp_path / "sub.npy").mkdir()
    np.save(tmp_path / "sub.npy" / "b.npy", arrays["b"])
    equal(read(tmp_path), {"A": arrays["a"], "sub.npy/b": arrays["b"]})
    if not hasattr(os, "mkfifo"):
        return
    os.mkfifo(tmp_path / "pipe.npy")
    (tmp_path / "link.npy").symlink_to("nothing")
    entries = {entry.name: entry for entry in open_source(tmp_path)}  # waits for nobody
    with pytest.raises(FormatError, match=r"pipe\.npy: not readable as \.npy \(it is no regular"):
        entries["pipe"].read()
    with pytest.raises(FileNotFoundError, match=r"link\.npy"):
        entries["link"].read()


def write_one(path, array):
    """A file of one float32 matrix, in the format of its suffix."""
    kind, size, shape = path.suffix, array.size, array.shape
    if kind == ".npy":
        np.save(path, array)
    elif kind == ".npz":
        np.savez(path, w=array)
    elif kind == ".h5":
        with h5py.File(path, "w") as file:
            file["w"] = array
    elif kind == ".safetensors":
        path.write_bytes(safetensors_of({"w": array}))
    elif kind == ".gguf":
        path.write_bytes(gguf_file([("w", shape, 0, array.tobytes())]))
    elif kind == ".pt":
        tensor = pickled_tensor("0", "FloatStorage", size, 0, shape, (shape[1], 1))
        body = b"\x80\x02" + pickled_dict({"w": tensor}) + b"."
        path.write_bytes(torch_zip(body, {"0": array.tobytes()}))
    else:
        sides = b"".join(field(1, side) for side in shape)
        tensor = sides + field(2, 1) + field(8, b"w") + field(9, array.tobytes())
        path.write_bytes(field(7, field(5, tensor)))


@pytest.mark.parametrize("suffix", ["npy", "npz", "h5", "safetensors", "pt", "onnx", "gguf"])
def test_nothing_is_read_of_a_file_that_was_changed(suffix, tmp_path):
    path = tmp_path / f"w.{suffix}"
    write_one(path, np.ones((3, 2), np.float32))
    (entry,) = open_source(path)
    assert entry.read().tolist() == [[1, 1], [1, 1], [1, 1]]
    write_one(path, np.zeros((30, 2), np.float32))
    with pytest.raises(FormatError, match=f"w.{suffix}: was changed while its arrays were being"):
        entry.read()


def test_hdf5(arrays, tmp_path):
    path = tmp_path / "m.h5"
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[f"deep/{name}"] = array
        file["null"] = h5py.Empty("f")
        file["tied"] = file["deep/a"]  # one array under two names
        file["deep/circle"] = file["deep"]
        file.attrs["format"] = "of some other program"
        file["deep"].attrs["format"] = 3
    expected = {f"deep/{name}": array for name, array in arrays.items()} | {"tied": arrays["a"]}
    equal(read(path), expected)
    with h5py.File(path, "a") as file:
        file.create_dataset("huge", (2**40, 2**10), "f8", chunks=(64, 64))
        file.create_dataset("out", (4,), "f8", external=[("elsewhere", 0, 32)])
        space = h5py.h5s.create_simple((3,))
        h5py.h5d.create(file.id, b"time", h5py.h5t.UNIX_D32LE, space)
    entries = {entry.name: entry for entry in open_source(path)}
    for name, words in (("huge", "dataset huge: found a file of"), ("out", "another file")):
        with pytest.raises(FormatError, match=words):
            entries[name].read()
    assert (entries["time"].unfit, entries["time"].shape) == ("a type of HDF5 alone", (3,))
    path.unlink()
    dn.factorize(np.eye(4), k=2).save(path)
    dn.factorize_model({"b": np.zeros(3)}, bits=64, jobs=1).save(tmp_path / "model.h5")
    with pytest.raises(FormatError, match=r"model\.h5: is a compressed model already, expected"):
        open_source(tmp_path / "model.h5")
    with pytest.raises(FormatError, match="is a factorization already, expected arrays"):
        open_source(path)
    path.write_bytes(b"no file of theirs")
    with pytest.raises(FormatError, match="not readable as HDF5"):
        open_source(path)


def test_groups_linked_to_each_other_do_not_hang(tmp_path, monkeypatch):
    from diba_np.sources import hdf5

    monkeypatch.setattr(hdf5, "_MOST_GROUPS", 1000)
    with h5py.File(tmp_path / "m.h5", "w") as file:
        place = file
        for _ in range(40):
            below = place.create_group("a")
            place["b"] = below
            place = below
    with pytest.raises(FormatError, match="more than 1000 groups"):
        open_source(tmp_path / "m.h5")


def test_a_folder_of_one_file_and_of_several(tmp_path, arrays):
    np.savez(tmp_path / "m.npz", **arrays)
    equal(read(tmp_path), arrays)
    np.savez(tmp_path / "n.npz", **arrays)
    with pytest.raises(ValueError, match=r"found m\.npz, n\.npz; name one of them"):
        open_source(tmp_path)


def test_json_that_may_be_missing(tmp_path):
    from diba_np.sources.entry import read_json

    assert read_json(tmp_path / "none.json", optional=True) == {}
    assert read_json(tmp_path, optional=True) == {}  # a folder is no file
    with pytest.raises(FileNotFoundError, match=r"none.json: no such file"):
        read_json(tmp_path / "none.json")
    (tmp_path / "x.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "x.json", optional=True) == {"a": 1}
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(FormatError, match=r"x.json: found list, expected an object"):
        read_json(tmp_path / "x.json", optional=True)
