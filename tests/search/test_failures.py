"""What can go wrong around a file: full disk, no permission, two writers. The old file stays."""

import contextlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest

from diba_np import FormatError, factorize, load
from diba_np.cli.main import main
from diba_np.files.container import groups


@pytest.fixture
def here(tmp_path, monkeypatch, rng):
    monkeypatch.chdir(tmp_path)
    A = rng.normal(size=(60, 50))
    np.save("A.npy", A)
    np.save("X.npy", np.eye(50))
    f = factorize(A, k=20, max_sweeps=3)
    f.save("old.h5")
    f.save("old.h5", group="a")
    shutil.copy("old.h5", "from.h5")
    np.save("old.npy", A)
    return tmp_path


@contextlib.contextmanager
def disk_of(size):
    """Let no file grow beyond `size` bytes, which fails as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


COMMANDS = [
    ("old.h5", ["factorize", "A.npy", "--k", "20", "--max-sweeps", "2", "--quiet"]),
    ("old.npy", ["reconstruct", "from.h5"]),
    ("old.npy", ["apply", "from.h5", "X.npy"]),
]


@pytest.mark.parametrize("size", [0, 100, 3000, 5000])
@pytest.mark.parametrize(("output", "args"), COMMANDS)
def test_a_full_disk_is_a_sentence_and_keeps_the_old_file(here, capsys, size, output, args):
    before, listed = Path(output).read_bytes(), sorted(os.listdir())
    with disk_of(size):
        status = main([*args, "-o", output, "--force"])
    out, err = capsys.readouterr()
    assert (status, out) == (1, "")
    assert err.startswith("diba-np: error: ") and err.count("\n") == 1
    assert "File too large" in err
    assert Path(output).read_bytes() == before
    assert sorted(os.listdir()) == listed


@pytest.mark.parametrize("size", [0, 100, 5000, 12000])
def test_a_full_disk_keeps_all_groups(here, size):
    f, before = load("from.h5"), Path("old.h5").read_bytes()
    with disk_of(size), pytest.raises(OSError, match=r"File too large: 'old\.h5'|too large"):
        f.save("old.h5", group="b")
    assert Path("old.h5").read_bytes() == before
    assert not [name for name in os.listdir() if "part" in name]
    f.save("old.h5", group="b")  # HDF5 was left in order
    assert groups("old.h5") == ["", "a", "b"]


@contextlib.contextmanager
def as_nobody():
    """Be a user without rights, where the tests run as root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_no_permission_is_a_sentence(here, capsys):
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name in ("A.npy", "from.h5"):
            shutil.copy(here / name, place)
        secret = place / "secret.npy"
        shutil.copy(place / "A.npy", secret)
        secret.chmod(0)
        place.chmod(0o555)
        listed = sorted(os.listdir(place))
        small = ["--k", "2", "--max-sweeps", "1", "--solver", "greedy", "--quiet"]
        # whoever has no rights may not read the environment either: all is loaded before
        assert main(["factorize", str(here / "A.npy"), "-o", str(here / "first.h5"), *small]) == 0
        capsys.readouterr()
        for args in (
            ["factorize", str(place / "A.npy"), "-o", str(place / "new.h5"), *small],
            ["reconstruct", str(place / "from.h5"), "-o", str(place / "new.npy")],
            ["factorize", str(secret), "-o", str(here / "new.h5"), *small],
        ):
            with as_nobody():
                status = main(args)
            out, err = capsys.readouterr()
            assert (status, out) == (1, "")
            (message,) = (line for line in err.splitlines() if ": note: " not in line)
            assert message.startswith("diba-np: error: ") and "Permission denied" in message
            assert ".part" not in message
        assert sorted(os.listdir(place)) == listed
        place.chmod(0o755)


def test_two_writers_of_one_file_leave_one_of_theirs(here):
    first, second = load("from.h5"), load("from.h5").T
    stop, seen = threading.Event(), []

    def write(made):
        while not stop.is_set():
            made.save("both.h5")

    first.save("both.h5")
    writers = [threading.Thread(target=write, args=(made,)) for made in (first, second)]
    for writer in writers:
        writer.start()
    try:
        seen += [load("both.h5").shape for _ in range(20)]
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert set(seen) <= {(60, 50), (50, 60)}
    assert not [name for name in os.listdir() if "part" in name]


WRITER = """
import sys, diba_np
made = diba_np.load("from.h5")
for i in range(8):
    made.save("many.h5", group=f"{sys.argv[1]}{i}")
"""


def test_two_processes_that_add_groups_lose_none(here):
    started = [subprocess.Popen([sys.executable, "-c", WRITER, name]) for name in "ab"]
    assert [process.wait(120) for process in started] == [0, 0]
    assert sorted(groups("many.h5")) == sorted(f"{name}{i}" for name in "ab" for i in range(8))


def test_links_out_of_a_file_are_not_followed(here):
    import h5py

    with h5py.File("linked.h5", "w") as file:
        file["a"] = h5py.ExternalLink("from.h5", "/")
        file["b"] = h5py.SoftLink("/b")
    for group in ("a", "b"):
        with pytest.raises(FormatError, match=f"has no group {group}; it holds"):
            load("linked.h5", group=group)
    load("from.h5").save("linked.h5", group="c")
    assert groups("linked.h5") == ["c"]
    with h5py.File("linked.h5") as file:  # as they were
        assert isinstance(file.get("a", getlink=True), h5py.ExternalLink)
        assert isinstance(file.get("b", getlink=True), h5py.SoftLink)
