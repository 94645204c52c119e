"""Groups in other people's HDF5 files: all else is as it was, or a refusal says why."""

import errno
import os
import warnings
from unittest import mock

import h5py
import numpy as np
import pytest

import diba_np as dn
from diba_np.errors import FormatError


@pytest.fixture(scope="module")
def factors():
    return dn.factorize(np.random.default_rng(0).normal(size=(12, 9)), k=5, threads=1)


def write_all_kinds(path, libver, userblock=0):
    """A file with what HDF5 offers that refers to other things."""
    with h5py.File(path, "w", libver=libver, userblock_size=userblock, track_order=True) as file:
        file.attrs["format"] = "of some other program"
        for name in ("zeta", "alpha", "mid"):  # in an order of creation that is not that of names
            file.create_group(name, track_order=True)
        x = file.create_dataset("zeta/x", data=np.arange(5.0), track_times=True)
        y = file.create_dataset("zeta/y", data=np.arange(20.0).reshape(5, 4), chunks=(2, 4))
        x.make_scale("the x")
        y.dims[0].attach_scale(x)
        y.dims[1].label = "columns"
        refs = file.create_dataset("alpha/refs", (3,), h5py.ref_dtype)
        refs[0], refs[1] = y.ref, file["mid"].ref
        regions = file.create_dataset("alpha/regions", (1,), h5py.regionref_dtype)
        regions[0] = y.regionref[1:3, ::2]
        file["mid"].attrs["points at"] = x.ref
        file["mid"].attrs["part of"] = y.regionref[0, 1:]
        file["mid"].attrs.create("many", np.arange(9))
        for i in range(12):  # more than fit into an object's header
            file["mid"].attrs[f"note {i:02d}"] = "ü" * i
        file["type"] = np.dtype([("a", "<i4"), ("b", "S3")])
        file.create_dataset("mid/records", (2,), dtype=file["type"])
        file["mid/soft"] = h5py.SoftLink("/zeta/x")
        file["mid/dangling"] = h5py.SoftLink("/nowhere")
        file["mid/outside"] = h5py.ExternalLink("other.h5", "/x")
        file["mid/hard"] = file["zeta/y"]
        file["mid/circle"] = file["mid"]
        words = file.create_dataset("mid/words", (3,), h5py.string_dtype())
        words[:] = ["one", "", "drei und vier"]
        ragged = file.create_dataset("mid/ragged", (2,), h5py.vlen_dtype("i4"))
        ragged[0], ragged[1] = [1, 2, 3], []
        packed = file.create_dataset(
            "mid/packed", data=np.arange(64).reshape(8, 8), compression="gzip", shuffle=True,
            fletcher32=True, maxshape=(None, 8), chunks=(4, 8), fillvalue=7,
        )  # fmt: skip
        packed.resize((9, 8))
        file["mid/nothing"] = h5py.Empty("f8")
        layout = h5py.VirtualLayout((5,), "f8")
        layout[:] = h5py.VirtualSource(".", "zeta/x", (5,))
        file.create_virtual_dataset("mid/virtual", layout)
        file.create_dataset("mid/raw", (2,), "f8", external=[("raw.bin", 0, 16)])
    if userblock:
        with open(path, "r+b") as file:
            file.write(b"a block of the user's")


def facts(path, ours=()):
    """All that can be seen in a file, but for groups of ours."""
    found = {}

    def value(file, item):
        if isinstance(item, h5py.RegionReference):
            if not item:
                return None
            return file[item].name, h5py.h5r.get_region(item, file.id).get_select_bounds()
        if isinstance(item, h5py.Reference):
            return file[item].name if item else None
        if isinstance(item, np.ndarray) and item.dtype == object:
            return [value(file, each) for each in item.ravel()]
        if isinstance(item, np.ndarray) and item.dtype.names:
            return {key: value(file, item[key]) for key in item.dtype.names}
        return item.tolist() if isinstance(item, (np.ndarray, np.generic)) else repr(item)

    def walk(file, place, name, seen):
        info = h5py.h5o.get_info(place.id)
        order = place.id.get_create_plist().get_link_creation_order()
        times = (info.addr, info.rc)
        attributes = {key: value(file, place.attrs[key]) for key in place.attrs}
        found[name] = ("group", times, order, attributes)
        found[name + ":names"] = [key for key in place if f"{name}{key}" not in ours]
        for key in place:
            below = f"{name}{key}"
            if below in ours:
                continue
            link = place.get(key, getlink=True)
            if not isinstance(link, h5py.HardLink):
                found[below] = (type(link).__name__, vars(link))
                continue
            item = place[key]
            address = h5py.h5o.get_info(item.id).addr
            if isinstance(item, h5py.Group):
                if address in seen:
                    found[below] = ("again", address)
                else:
                    walk(file, item, f"{below}/", {*seen, address})
            elif isinstance(item, h5py.Datatype):
                found[below] = ("type", address, repr(item.dtype), dict(item.attrs))
            else:
                info = h5py.h5o.get_info(item.id)
                plist = item.id.get_create_plist()
                found[below] = (
                    "dataset", address, info.mtime, item.shape, item.maxshape, repr(item.dtype),
                    item.chunks, [plist.get_filter(i)[:3] for i in range(plist.get_nfilters())],
                    item.id.get_type().committed(),
                    {k: value(file, item.attrs[k]) for k in item.attrs},
                    None if item.shape is None else value(file, item[()]),
                )  # fmt: skip

    with h5py.File(path, "r") as file:
        found["userblock"] = file.userblock_size
        walk(file, file, "", set())
    found["head"] = path.read_bytes()[: found["userblock"]]
    return found


@pytest.mark.parametrize("libver", ["earliest", "v110", "latest"])
@pytest.mark.parametrize("userblock", [0, 1024])
def test_everything_else_of_a_file_is_as_it_was(factors, tmp_path, libver, userblock, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "theirs.h5"
    (tmp_path / "raw.bin").write_bytes(np.array([1.5, 2.5]).tobytes())
    write_all_kinds(path, libver, userblock)
    before = facts(path)
    factors.save(path, group="ours/deep")
    assert facts(path, ours=["ours"]) == before
    factors.T.save(path, group="mid/one")
    factors.T.save(path, group="ours/deep")
    after = facts(path, ours=["ours", "mid/one"])
    assert after == before
    for group in ("ours/deep", "mid/one"):
        made = dn.load(path, group=group)
        assert made.shape == (9, 12) and made.b1 == factors.T.b1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["raw.bin", "theirs.h5"]


def test_saving_again_and_again_does_not_let_a_file_grow(factors, tmp_path):
    path = tmp_path / "many.h5"
    for name in ("a", "b"):
        factors.save(path, group=name)
    sizes = [factors.save(path, group="a") for _ in range(6)]
    assert sizes[-1] == path.stat().st_size
    # what is replaced is used again, but for a heap of strings
    assert sizes[-1] < sizes[0] + 5 * 4500, sizes


@pytest.mark.parametrize(
    ("group", "error", "words"),
    [
        ("mid", ValueError, "holds '.*' of another program; name another group"),
        ("zeta/x", ValueError, "'zeta/x' is an array .* of another program"),
        ("type", ValueError, "'type' is an array"),
        ("mid/soft", FormatError, "mid/soft: found a link"),
        ("mid/dangling/x", FormatError, "mid/dangling: found a link"),
        ("mid/outside/x", FormatError, "mid/outside: found a link"),
        ("noted", ValueError, "holds attributes of another program, the first 'by'"),
    ],
)
def test_what_is_of_another_program_is_never_replaced(factors, tmp_path, group, error, words):
    path = tmp_path / "theirs.h5"
    write_all_kinds(path, "earliest")
    with h5py.File(path, "a") as file:
        file.create_group("noted").attrs["by"] = "them"
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1.0
    before = path.read_bytes(), (tmp_path / "other.h5").read_bytes()
    with pytest.raises(error, match=words) as raised:
        factors.save(path, group=group)
    assert type(raised.value) is error  # a sound file is not called unreadable
    assert (path.read_bytes(), (tmp_path / "other.h5").read_bytes()) == before


@pytest.mark.parametrize("group", ["a", "new", "a/below"])
def test_no_group_is_written_to_the_file_of_a_whole_model(factors, tmp_path, group):
    path = tmp_path / "model.h5"
    rng = np.random.default_rng(0)
    dn.factorize_model({"a": rng.normal(size=(20, 18))}, bits=4, jobs=1, effort="fast", output=path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"model\.h5: holds a whole model.*; save to another file"):
        factors.save(path, group=group)
    assert path.read_bytes() == before
    factors.save(path)  # without a group the whole file is replaced
    assert dn.load(path).b1 == factors.b1


def test_no_group_is_written_to_the_file_of_a_network(factors, tmp_path):
    from diba_np.files.container_writer import write_groups

    path = tmp_path / "network.h5"
    write_groups(path, [("x", {}, {"v": np.arange(3.0)}, {})], {"contents": "network"})
    with pytest.raises(ValueError, match=r"network\.h5: holds a whole network, in which no group"):
        factors.save(path, group="mine")


def test_a_file_that_is_in_use_is_an_error_of_the_system(factors, tmp_path):
    path = tmp_path / "a.h5"
    factors.save(path, group="one")
    import subprocess
    import sys

    program = "import h5py, sys\nf = h5py.File(sys.argv[1], 'r+')\nprint(1, flush=True)\ninput()\n"
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert other.stdout.readline() == "1\n"
        for call in (
            lambda: dn.load(path, group="one"),
            lambda: factors.save(path, group="two"),
        ):
            with pytest.raises(OSError, match=r"a\.h5: is in use, another program has it open"):
                call()
    finally:
        other.communicate("\n")
    assert dn.load(path, group="one").b1 == factors.b1
    with h5py.File(path, "r+"), pytest.raises(OSError, match="is in use"):
        factors.save(path, group="two")  # in this very process
    with h5py.File(path, "r"):
        factors.save(path, group="two")


def test_a_file_system_without_locks_is_no_file_in_use(factors, tmp_path, monkeypatch):
    factors.save(tmp_path / "a.h5")
    said = "[Errno {0}] Unable to open file (unable to lock file, errno = {0}, error message = '')"

    for number, words in (
        (errno.ENOLCK, r"a\.h5: cannot be locked .*; HDF5_USE_FILE_LOCKING=FALSE"),
        (errno.EAGAIN, r"a\.h5: is in use"),
    ):
        error = OSError(number, said.format(number))
        monkeypatch.setattr(h5py, "File", mock.Mock(side_effect=error))
        with pytest.raises(OSError, match=words):
            dn.load(tmp_path / "a.h5")


def test_too_many_open_files_is_no_fault_of_the_file(factors, tmp_path):
    resource = pytest.importorskip("resource", reason="limits of a process, on POSIX")
    path = tmp_path / "a.h5"
    factors.save(path)
    dn.load(path)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, limits[1]))
        try:
            while True:
                held.append(os.open(path, os.O_RDONLY))
        except OSError:
            pass
        with pytest.raises(OSError, match="Too many open files") as error:
            dn.load(path)
        assert not isinstance(error.value, ValueError)
    finally:
        for handle in held:
            os.close(handle)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_pipes_are_refused_and_not_waited_for(factors, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="found a pipe or a device"):
        dn.load(tmp_path / "pipe")
    with pytest.raises(OSError, match="expected one that a group can be added to"):
        factors.save(tmp_path / "pipe", group="a")


def test_hard_links_are_told_about(factors, tmp_path):
    path, other = tmp_path / "a.h5", tmp_path / "b.h5"
    factors.save(path)
    os.link(path, other)
    before = other.read_bytes()
    with pytest.warns(UserWarning, match=r"a\.h5: other names of this file \(hard links\) keep"):
        factors.T.save(path)
    assert other.read_bytes() == before and dn.load(path).shape == (9, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        factors.save(path)
