"""Replacing files: where another program has them open, as on Windows; on a full disk."""

import os
import sys

import numpy as np
import pytest

from diba_np.files import atomic
from diba_np.files.atomic import atomic_folder, atomic_path, remove_leftovers
from diba_np.networks.stages import save_state


def refusals(monkeypatch, count):
    """Let renaming fail so many times; return what was tried."""
    tried, replace = [], os.replace

    def refuse(source, target):
        tried.append(target)
        if len(tried) <= count:
            raise PermissionError(13, "Access is denied", str(source), 5, str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(atomic, "_PAUSE", 0)
    return tried


def test_a_file_that_is_open_for_a_moment_is_replaced_on_windows(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("old")
    tried = refusals(monkeypatch, 3)
    monkeypatch.setattr(sys, "platform", "win32")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
    assert (path.read_text(), len(tried)) == ("new", 4)
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("system", ["win32", "linux"])
def test_a_file_that_stays_open_is_left_and_named(tmp_path, monkeypatch, system):
    path = tmp_path / "a.txt"
    path.write_text("old")
    tried = refusals(monkeypatch, 1000)
    monkeypatch.setattr(sys, "platform", system)
    with pytest.raises(PermissionError) as caught, atomic_path(path) as temporary:
        temporary.write_text("new")
    assert caught.value.filename == str(path)
    assert len(tried) == (50 if system == "win32" else 1)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_read_only_temporary_file_is_removed(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("old")
    path.chmod(0o444)
    unlink, modes = type(path).unlink, []

    def unlink_as_on_windows(self, missing_ok=False):
        if self.exists():
            modes.append(self.stat().st_mode & 0o200)
            if not modes[-1]:
                raise PermissionError(13, "Access is denied", str(self))
        unlink(self, missing_ok=missing_ok)

    refusals(monkeypatch, 1000)
    monkeypatch.setattr(type(path), "unlink", unlink_as_on_windows)
    with pytest.raises(PermissionError), atomic_path(path) as temporary:
        temporary.write_text("new")
    assert modes == [0, 0o200]
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_leftover_that_cannot_be_removed_is_left(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    left = tmp_path / f".a.txt.{atomic._HOST}-{2**31 - 1}-00.aa.part"
    left.touch()
    unlink = type(path).unlink

    def refuse(self, missing_ok=False):
        if self == left:
            raise PermissionError(1, "Operation not permitted", str(self))
        unlink(self, missing_ok=missing_ok)

    monkeypatch.setattr(type(path), "unlink", refuse)
    with atomic_path(path) as temporary:
        temporary.write_text("new")
    assert sorted(os.listdir(tmp_path)) == [left.name, "a.txt"]
    monkeypatch.undo()
    remove_leftovers(path)
    assert os.listdir(tmp_path) == ["a.txt"]


def test_the_folder_is_flushed_for_reading_and_a_file_for_writing(tmp_path, monkeypatch):
    seen, open_handle = {}, os.open

    def opened(path, how, *rest, **more):
        seen[os.fspath(path)] = how & 3
        return open_handle(path, how, *rest, **more)

    monkeypatch.setattr(os, "open", opened)
    with atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    assert seen.pop(str(tmp_path)) == os.O_RDONLY
    assert seen == {str(temporary): os.O_RDWR}


def test_a_folder_is_whole_or_not_there(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "f") as folder:
        (folder / "a").write_text("a")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with atomic_folder(tmp_path / "f") as folder:
        (folder / "a").write_text("a")
        assert not (tmp_path / "f").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["f", "a"]


def test_an_error_within_a_folder_names_what_it_would_be(tmp_path):
    with pytest.raises(OSError, match="No space left") as full:
        with atomic_folder(tmp_path / "f") as folder:
            raise OSError(28, "No space left", str(folder / "a"))
    assert full.value.filename == str(tmp_path / "f" / "a")


@pytest.mark.skipif(os.name == "nt", reason="links of POSIX")
def test_a_link_to_no_folder_yet_is_written_through(tmp_path):
    (tmp_path / "link").symlink_to("f")
    with atomic_folder(tmp_path / "link") as folder:
        (folder / "a").write_text("a")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "f" / "a").is_file()


def test_a_folder_that_a_killed_writer_has_left_is_removed(tmp_path, monkeypatch):
    with atomic_folder(tmp_path / "f") as folder:
        left = folder.with_name(folder.name)
    left.mkdir()
    (left / "a").write_text("a")
    remove_leftovers(tmp_path / "f")
    assert left.is_dir()  # this process runs
    monkeypatch.setattr(atomic, "_PROCESS", "0" * 8)
    remove_leftovers(tmp_path / "f")
    assert not left.exists()


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path):
    resource = pytest.importorskip("resource", reason="limits of files")
    array = np.zeros(1 << 12)

    def atomically(path):
        with atomic_path(path) as part, open(part, "wb") as file:
            np.save(file, array)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for write in (atomically, lambda path: save_state(path, array)):
        try:  # NumPy's own error has neither name nor number
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 10, hard))
            with pytest.raises(OSError, match=r"x\.npy: could be written in part only; is the"):
                write(tmp_path / "x.npy")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
