"""HDF5 files: what is saved comes back; whatever is damaged is an error, never data."""

import io
import os
import pickle
import shutil
from pathlib import Path

import h5py
import naive
import numpy as np
import pytest
from hypothesis import given, settings
from strategies import factors

from diba_np import DiBAFactors, FormatError, factorize, load
from diba_np.files import container
from diba_np.files.atomic import atomic_path
from diba_np.files.container import groups
from diba_np.matrix.stored_array import StoredArray

GOLDEN = Path(__file__).parents[2] / "data" / "golden_v1.h5"


def assert_same(f, g):
    assert f.b1 == g.b1
    assert f.b2 == g.b2
    for name in ("d1", "d2", "d3"):
        np.testing.assert_array_equal(getattr(f, name), getattr(g, name))
    assert (f.shift, f.record, f.shape) == (g.shift, g.record, g.shape)


@settings(max_examples=25)
@given(factors())
def test_save_then_load_is_the_same(tmp_path_factory, f):
    path = tmp_path_factory.mktemp("store") / "f.h5"
    assert f.save(path) == path.stat().st_size
    assert_same(f, load(path))


@pytest.fixture
def small(rng):
    return factorize(rng.normal(size=(9, 11)), k=5, max_sweeps=10)


def test_golden_file_of_version_1():
    f = load(GOLDEN)
    assert (f.shape, f.k, f.shift, f.scale_bits) == ((5, 9), 7, 0.5, 16)
    bits1 = [[(3 * i + 5 * j + i * j) % 7 % 2 for j in range(7)] for i in range(5)]
    bits2 = [[(2 * i + 3 * j + i * j) % 5 % 2 for j in range(9)] for i in range(7)]
    np.testing.assert_array_equal(f.b1.to_dense(), bits1)
    np.testing.assert_array_equal(f.b2.to_dense(), bits2)
    np.testing.assert_array_equal(f.d1, [1.0, -0.5, 2.0, 0.25, 1.5])
    np.testing.assert_array_equal(f.d2, np.arange(-3.0, 4.0) * 2.0**40)
    np.testing.assert_array_equal(f.d3, np.arange(1.0, 10.0) / 8)
    assert f.record == {"made_by": "golden", "value": 1.5}


def test_golden_file_of_version_2():
    f = load(GOLDEN.with_name("golden_v2.h5"))
    assert (f.shape, f.k, f.shift, f.scale_bits) == ((5, 9), 7, 0.25, (4, 3, 2))
    bits1 = [[(3 * i + 5 * j + i * j) % 7 % 2 for j in range(7)] for i in range(5)]
    bits2 = [[(2 * i + 3 * j + i * j) % 5 % 2 for j in range(9)] for i in range(7)]
    np.testing.assert_array_equal(f.b1.to_dense(), bits1)
    np.testing.assert_array_equal(f.b2.to_dense(), bits2)
    np.testing.assert_array_equal(f.d1, np.float32(0.5 * 1.25 ** np.array([0, 15, 3, 8, 1.0])))
    d2 = 2.0**40 * np.array([-2.25, -1.5, -1, 0, 1, 1.5, 2.25])
    np.testing.assert_array_equal(f.d2, d2)
    np.testing.assert_array_equal(f.d3, 2.0 ** (np.arange(9) % 4 - 3.0))
    assert f.record == {"made_by": "golden", "value": 1.5}


def test_layout_on_disk_is_the_documented_one(small, tmp_path):
    small.save(tmp_path / "f.h5")
    with h5py.File(tmp_path / "f.h5") as file:
        assert dict(file.attrs)["format"] == "diba_np"
        names = {"format_version": 1, "m": 9, "n": 11, "k": 5, "scale_bits": 16, "shift": 0.0}
        for name, value in names.items():
            assert file.attrs[name] == value
        assert file.attrs["bit_order"] == "little"
        np.testing.assert_array_equal(file["b1"][:], naive.to_stream(small.b1.to_dense()))
        np.testing.assert_array_equal(file["b2"][:], naive.to_stream(small.b2.to_dense()))
        assert all(file[name].fletcher32 for name in ("b1", "b2", "d1", "d2", "d3"))
        assert file["d1"].dtype == np.dtype("<f2")
        np.testing.assert_array_equal(
            np.float32(file["d2"][:].astype(float) * file.attrs["scale"]), small.d2
        )


def test_single_precision_where_half_would_lose(tmp_path, small):
    f = DiBAFactors(np.full(9, 1 / 3), small.b1, small.d2 * 1e-20, small.b2, small.d3 * 1e20)
    f.save(tmp_path / "f.h5")
    assert_same(f, load(tmp_path / "f.h5"))
    with h5py.File(tmp_path / "f.h5") as file:
        assert file["d1"].dtype == np.dtype("<f4")


@pytest.mark.parametrize("grids", [False, True])
def test_a_bias_is_kept_counted_and_pickled(tmp_path, rng, grids):
    f = factorize(rng.normal(size=(9, 11)), k=5, max_sweeps=10, scale_bits=4 if grids else 16)
    parts = (f.d1, f.b1, f.d2, f.b2, f.d3)
    g = DiBAFactors(*parts, record=f.record, bias=np.arange(9) / 3, grids=f.grids)
    assert g.storage_bits() == f.storage_bits() + 9 * 32
    g.save(tmp_path / "g.h5")
    for again in (load(tmp_path / "g.h5"), pickle.loads(pickle.dumps(g))):
        assert_same(g, again)
        np.testing.assert_array_equal(again.bias, np.float32(np.arange(9) / 3))
    assert g.T.bias is None
    np.testing.assert_array_equal(g @ np.ones(11), f @ np.ones(11))
    for h in (f.with_bias(g.bias), g.with_bias(None).with_bias(list(g.bias))):
        assert_same(g, h)
        np.testing.assert_array_equal(h.bias, g.bias)
    assert g.with_bias(None).bias is None
    with pytest.raises(ValueError, match=r"bias must have shape \(9,\)"):
        f.with_bias(np.ones(11))
    edit(tmp_path / "g.h5", lambda file: file.__delitem__("bias"))
    with pytest.raises(FormatError, match="digest: found"):
        load(tmp_path / "g.h5")


def test_payload_plus_at_most_16_kib(tmp_path, attention):
    f = factorize(attention, bits=1.0, max_sweeps=30)
    assert f.save(tmp_path / "f.h5") <= f.storage_bits() / 8 + 16 * 1024
    greedy = factorize(attention[:300], k=40, solver="greedy")
    assert greedy.save(tmp_path / "g.h5") <= greedy.storage_bits() / 8 + 16 * 1024


def test_a_file_of_others_holds_no_factorization(tmp_path):
    path = tmp_path / "other.h5"
    with h5py.File(path, "w") as file:
        file["x"] = np.arange(5.0)
        file.create_group("part")
    with pytest.raises(FormatError, match=r"the file holds no factorization\)$"):
        load(path)
    for group in ("x", "y"):
        with pytest.raises(FormatError, match=f"has no group {group}; it holds no factorization"):
            load(path, group=group)
    with pytest.raises(FormatError, match="the file holds no factorization"):
        load(path, group="part")


def test_what_is_no_path_or_no_record_is_named(tmp_path):
    f = DiBAFactors([1.0], [[1]], [1.0], [[1]], [1.0])
    with pytest.raises(TypeError, match=r"^path must be a path, got int$"):
        load(3)
    with pytest.raises(TypeError, match=r"^path must be a path, got BytesIO$"):
        f.save(io.BytesIO())
    record = {}
    record["again"] = record
    with pytest.raises(ValueError, match=r"record must hold what JSON can, .* contains itself"):
        f.with_record(record).save(tmp_path / "f.h5")


def test_many_groups_in_one_file(tmp_path, rng):
    path = tmp_path / "model.h5"
    layers = [factorize(rng.normal(size=(5, 6)), k=i + 1, max_sweeps=3) for i in range(3)]
    for i, f in enumerate(layers):
        f.save(path, group=f"layer.{i}")
    layers[0].save(path, group="block/attention")
    for i, f in enumerate(layers):
        assert_same(f, load(path, group=f"layer.{i}"))
    assert_same(layers[0], load(path, group="block/attention"))
    layers[2].save(path, group="layer.0")
    assert_same(layers[2], load(path, group="layer.0"))
    assert_same(layers[1], load(path, group="layer.1"))
    layers[1].save(path, group="block")  # above another, whose name goes on
    assert_same(layers[0], load(path, group="block/attention"))
    layers[2].save(path, group="block")
    assert_same(layers[2], load(path, group="block"))
    assert_same(layers[0], load(path, group="block/attention"))
    assert sorted(groups(path))[0] == "block"
    assert sorted(groups(path))[1:] == ["block/attention", "layer.0", "layer.1", "layer.2"]
    with pytest.raises(
        FormatError, match=r"holds factorizations in groups block, block/att.*name one with group="
    ):
        load(path)
    with pytest.raises(FormatError, match=r"has no group layer\.9; it holds groups"):
        load(path, group="layer.9")
    with pytest.raises(ValueError, match="group must be a name"):
        layers[0].save(path, group="/")
    for group in ("a\0b", "a\ud800"):
        with pytest.raises(ValueError, match="group must be a name"):
            layers[0].save(path, group=group)
        with pytest.raises(FormatError, match="has no group a"):
            load(path, group=group)
    for group in (".", "a/.", "./a"):
        with pytest.raises(ValueError, match=r"group must have no part '\.', got"):
            layers[0].save(path, group=group)
        with pytest.raises(FormatError, match=r"it holds groups block, block/attention, layer"):
            load(path, group=group)
    # arrays of one factorization are no groups of another
    with pytest.raises(ValueError, match=r"'layer\.0/b1' is an array of another factorization"):
        layers[1].save(path, group="layer.0/b1")
    layers[1].save(path, group="under/b1")
    with pytest.raises(ValueError, match="its array 'b1' is a group of the file already"):
        layers[1].save(path, group="under")
    assert_same(layers[2], load(path, group="layer.0"))
    assert_same(layers[1], load(path, group="under/b1"))
    for call in (layers[0].save, load):
        with pytest.raises(TypeError, match="group must be a str, got int"):
            call(path, group=3)


# -- damage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 8, 9, 15, 16, 17, 100])
def test_what_is_too_large_for_one_chunk_has_several(size, tmp_path, monkeypatch):
    monkeypatch.setattr(container, "LARGEST_CHUNK", 64)  # bytes; HDF5 has 4 GiB
    kept = StoredArray.of(np.arange(float(size)))
    kept.save(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5") as file:
        (data,) = (item for item in file.values() if item.size)
        assert data.fletcher32 and 8 * data.chunks[0] <= 64
        assert data.chunks[0] * -(-size // data.chunks[0]) < size + 8  # hardly any room is lost
    assert np.array_equal(load(tmp_path / "a.h5").to_array((size,), "f8"), np.arange(float(size)))


def test_one_chunk_is_all_below_the_limit_of_hdf5():
    assert container.chunks_of(2**30, np.dtype("u1")) == (2**30,)
    assert container.chunks_of(2**32, np.dtype("u1")) == (2**31,)


def test_a_flipped_byte_anywhere_is_found(small, tmp_path):
    path, broken = tmp_path / "f.h5", tmp_path / "broken.h5"
    small.save(path)
    data = path.read_bytes()
    heap = data.index(b"GCOL")  # strings, the part of the file that HDF5 has no checksum for
    harmless = []
    for at in sorted({*range(0, len(data), 17), *range(heap, heap + 200, 2)}):
        flipped = data[at] ^ (0x10, 0xFF, 0x01)[at % 3]
        broken.write_bytes(data[:at] + bytes([flipped]) + data[at + 1 :])
        try:
            g = load(broken)
        except FormatError:
            continue
        assert_same(small, g)  # a byte that no structure uses
        harmless.append(at)
    payload = small.d1.astype("<f2").tobytes()
    start = data.index(payload)
    assert not set(harmless) & set(range(start, start + len(payload)))


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, -1])
def test_truncated_files(small, tmp_path, keep):
    path = tmp_path / "f.h5"
    size = small.save(path)
    os.truncate(path, {0.5: size // 2, -1: size - 1}.get(keep, keep))
    with pytest.raises(FormatError, match=r"f\.h5"):
        load(path)


def edit(path, change):
    with h5py.File(path, "r+") as file:
        change(file)


def put(name, value):
    def change(file):
        file.attrs[name] = value

    return change


def resize(name, array):
    def change(file):
        del file[name]
        file[name] = array

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("format", "zip"), "attribute format: found 'zip', expected 'diba_np'"),
        (put("format_version", 99), "format_version: found 99, expected at most 3"),
        (put("k", 6), "dataset b1: found"),
        (put("m", -1), "attribute m: found -1, expected a positive size"),
        (put("m", 2**62), "attribute m: found"),
        (put("m", "nine"), "attribute m: found 'nine', expected int"),
        (put("shift", 0.25), "digest: found"),
        (put("scale", 3.0), "digest: found"),
        (put("scale_bits", 17), "scale_bits: found 17"),
        (put("bit_order", "big"), "bit_order: found big, expected little"),
        (put("digest", "0" * 64), "digest: found"),
        (put("record", "{}"), "digest: found"),
        (lambda f: f.attrs.__delitem__("k"), "attribute k: found none, expected int"),
        (lambda f: f.attrs.__delitem__("format"), "attribute format: found none"),
        (lambda f: f.__delitem__("d2"), "dataset d2: found none, expected 5 entries of <f2"),
        (resize("d2", np.ones(4, "<f2")), r"dataset d2: found \(4,\) of <f2"),
        (resize("d2", np.ones(5, "<f4")), r"of <f4, expected \(5,\) of <f2"),
        (resize("b1", np.ones(6, "u1")), "digest: found"),
    ],
)
def test_inconsistent_files_name_what_was_found_and_expected(small, tmp_path, change, words):
    path = tmp_path / "f.h5"
    small.save(path)
    edit(path, change)
    with pytest.raises(FormatError, match=words) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_claimed_size_is_checked_before_memory_is_taken(small, tmp_path):
    path = tmp_path / "f.h5"
    small.save(path)

    def swell(file):
        file.attrs["m"], file.attrs["k"] = 2**30, 2**13
        for name, size in (("b1", 2**40), ("b2", 11 * 2**10), ("d1", 2**30), ("d2", 2**13)):
            dtype = file[name].dtype
            del file[name]
            file.create_dataset(name, (size,), dtype, chunks=(min(size, 2**20),))

    edit(path, swell)
    with pytest.raises(FormatError, match="dataset b1: found a file of"):
        load(path)


def test_not_hdf5_missing_and_folder(tmp_path):
    (tmp_path / "x.h5").write_text("no")
    with pytest.raises(FormatError, match="not readable as HDF5"):
        load(tmp_path / "x.h5")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load(tmp_path / "y.h5")
    with pytest.raises(FormatError, match="found a folder"):
        load(tmp_path)


# -- writing ---------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file(small, tmp_path, monkeypatch):
    path = tmp_path / "f.h5"
    small.save(path)
    before = path.read_bytes()
    other = DiBAFactors(small.d1, small.b1, small.d2, small.b2, small.d3, record={"x": object()})
    with pytest.raises(TypeError, match="record must hold what JSON can"):
        other.save(path)
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["f.h5"]


def test_a_record_too_large_is_refused(small, tmp_path):
    f = DiBAFactors(small.d1, small.b1, small.d2, small.b2, small.d3, record={"x": "y" * 70000})
    with pytest.raises(ValueError, match=r"record takes 7000\d bytes"):
        f.save(tmp_path / "f.h5")
    assert os.listdir(tmp_path) == []


def test_numpy_values_in_a_record(small, tmp_path):
    f = DiBAFactors(
        small.d1,
        small.b1,
        small.d2,
        small.b2,
        small.d3,
        record={"a": np.float32(2), "b": np.ones(2)},
    )
    f.save(tmp_path / "f.h5")
    assert load(tmp_path / "f.h5").record == {"a": 2.0, "b": [1.0, 1.0]}


def test_the_file_takes_the_users_permissions(small, tmp_path):
    small.save(tmp_path / "f.h5")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "f.h5").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_save_needs_no_other_name_for_the_same_file(small, tmp_path):
    small.save(str(tmp_path / "a.h5"))
    shutil.copy(tmp_path / "a.h5", tmp_path / "b.h5")
    assert_same(load(tmp_path / "a.h5"), load(tmp_path / "b.h5"))
