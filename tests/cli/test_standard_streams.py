"""The command line at its ends: pipes, closed streams, plain terminals, words of the interface."""

import errno
import io
import json
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest

import diba_np as dn
from diba_np.cli.main import main
from diba_np.cli.output import in_options
from diba_np.files import lock
from diba_np.machine.display import shown


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    rng = np.random.default_rng(0)
    np.save(folder / "A.npy", rng.normal(size=(18, 14)))
    dn.factorize(np.load(folder / "A.npy"), k=5, threads=1).save(folder / "A.h5")
    return folder


def shell(folder, command, **environment):
    program = f"{sys.executable} -m diba_np"
    return subprocess.run(
        ["bash", "-c", command.replace("diba-np", program)],
        cwd=folder,
        capture_output=True,
        check=False,
        env=os.environ | environment,
    )


def test_a_reader_that_went_away_is_no_error(folder):
    done = shell(folder, "diba-np info A.h5 --json | true; echo ${PIPESTATUS[0]} >&2")
    assert done.stderr in (b"141\n", b"0\n")  # 0 where it was written before the end of `true`
    done = shell(folder, "diba-np reconstruct A.h5 -o - | true; echo ${PIPESTATUS[0]} >&2")
    assert b"Traceback" not in done.stderr and b"Broken pipe" not in done.stderr
    # a pipe whose reader has gone for sure
    code = (
        "import os, subprocess, sys\nr, w = os.pipe(); os.close(r)\n"
        "done = subprocess.run([sys.executable, '-m', 'diba_np', 'info', 'A.h5'], stdout=w,\n"
        "    stderr=subprocess.PIPE)\nprint(done.returncode, done.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    assert done.stdout == "141 b''\n"


def test_full_and_closed_streams(folder):
    done = shell(folder, "diba-np info A.h5 > /dev/full")
    assert done.returncode == 1
    assert done.stderr == b"diba-np: error: standard output: No space left on device\n"
    for words in ("--version", "info --help"):
        done = shell(folder, f"diba-np {words} > /dev/full")
        assert done.returncode == 1
        assert done.stderr == b"diba-np: error: standard output: No space left on device\n"
    assert shell(folder, "diba-np info A.h5 >&-").returncode == 0
    assert shell(folder, "diba-np info nothing.h5 2>&-").returncode == 1
    done = shell(folder, "diba-np reconstruct A.h5 -o - >&-")
    assert done.stderr == b"diba-np: error: standard output is closed; name a file\n"
    # a file that is opened while no stream is open holds nothing but itself
    done = shell(folder, "diba-np reconstruct A.h5 -o R.npy <&- >&- 2>&- && wc -c < R.npy")
    assert int(done.stdout) == np.lib.format.open_memmap(folder / "R.npy").nbytes + 128


def test_text_degrades_where_the_terminal_lacks_characters(folder):
    name = "größe-漢"
    (folder / f"{name}.npy").write_bytes((folder / "A.npy").read_bytes())
    for locale in ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0",
                    "PYTHONCOERCECLOCALE": "0"}):  # fmt: skip
        words = f"diba-np factorize {name}.npy --k 3 --solver greedy --quiet --force"
        done = shell(folder, words, **locale)
        assert done.returncode == 0, done.stderr
        done = shell(folder, f"diba-np info {name}.h5 --json", **locale)
        assert done.returncode == 0 and b"Traceback" not in done.stderr
        done = shell(folder, f"diba-np verify none-{name}.h5", **locale)
        assert done.returncode == 1 and done.stderr.startswith(b"diba-np: error: none-gr")


def test_what_a_terminal_would_obey_is_shown_as_an_escape(tmp_path, capsys):
    assert shown("a\x1b[2Jb\nc\u202e ü\udcff") == "a\\x1b[2Jb\\nc\\u202e ü\\udcff"
    rng = np.random.default_rng(0)
    arrays = {"evil\x1b[2J\nname": rng.normal(size=(20, 16))}
    path = tmp_path / "m.h5"
    dn.factorize_model(arrays, bits=4, effort="fast", jobs=1, threads=1, output=path).close()
    assert main(["info", str(path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "evil\\x1b[2J\\nname" in out
    assert main(["info", str(tmp_path / "\x1b[2J.h5")]) == 1
    assert "\x1b" not in capsys.readouterr().err
    assert main(["info", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["groups"][0]["group"] == "evil\x1b[2J\nname"


def test_inputs_that_are_pipes(folder, tmp_path):
    out = tmp_path / "B.h5"
    words = "diba-np factorize /dev/stdin --k 3 --solver greedy"
    done = shell(folder, f"cat A.npy | {words} --quiet -o {out}")
    assert done.returncode == 0, done.stderr
    done = shell(folder, f"diba-np verify {out} <(cat A.npy)")
    assert done.returncode == 0 and b"the matrix it was made from" in done.stdout
    done = shell(folder, "diba-np apply A.h5 <(cat A.npy) -o - | cat > Y.npy")
    assert np.load(folder / "Y.npy").shape == (18, 18)
    done = shell(folder, "cat A.npy | diba-np factorize /dev/stdin --k 3")
    assert done.returncode == 1 and b"name one with --output" in done.stderr
    done = shell(folder, f"head -c 300 A.npy | diba-np factorize /dev/stdin --k 3 -o {out} --force")
    assert done.returncode == 1 and b"172 bytes for (18, 14) of float64" in done.stderr
    done = shell(folder, f"echo nothing | diba-np factorize /dev/stdin --k 3 -o {out} --force")
    assert done.returncode == 1 and b"not readable as .npy (it begins with" in done.stderr
    done = shell(folder, f"diba-np model <(cat A.npy) --bits 2 -o {tmp_path}/m.h5")
    assert done.returncode == 1 and b"a source is read more than once" in done.stderr


def test_a_pipe_as_output(folder, tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    assert main(["reconstruct", str(folder / "A.h5"), "-o", str(pipe)]) == 0
    reader.join()
    assert np.load(io.BytesIO(got[0])).shape == (18, 14)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["factorize", "A.npy", "--k", "2", "-o", "A.npy"], "is also what is read (A.npy)"),
        (
            ["factorize", "A.npy", "--k", "2", "--inputs", "X.npy", "-o", "X.npy"],
            "is also what is read (X.npy)",
        ),
        (["reconstruct", "A.h5", "-o", "A.h5"], "is also what is read (A.h5)"),
        (["apply", "A.h5", "X.npy", "-o", "link"], "is also what is read (X.npy)"),
        (["compare", "A.npy", "--bits", "1", "--plot", "A.npy"], "is also what is read (A.npy)"),
        (["model", "m.npz", "--bits", "2", "-o", "m.npz"], "is also what is read (m.npz)"),
    ],
)
def test_an_output_is_never_an_input(words, said, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    np.save("X.npy", np.ones((3, 14)))
    np.savez("m.npz", w=np.eye(20))
    if not os.path.lexists("link"):
        os.symlink("X.npy", "link")
    before = {name: Path(name).read_bytes() for name in ("A.npy", "A.h5", "X.npy", "m.npz")}
    assert main([*words, "--force"]) == 1
    assert said in capsys.readouterr().err
    assert before == {name: Path(name).read_bytes() for name in before}


def test_a_model_is_not_written_over_its_source(tmp_path):
    np.savez(tmp_path / "m.npz", w=np.eye(20))
    with pytest.raises(ValueError, match="output must not be the source"):
        dn.factorize_model(tmp_path / "m.npz", bits=4, output=tmp_path / "m.npz")


@pytest.mark.parametrize(
    "name",
    ["runs/seed=0/bits=2/A.h5", "seed=1/A.npy", "bits=2.h5", "a-seed=3", "bits=1.5-x", "'seed=0'"],
)
def test_names_of_files_are_not_rewritten_as_options(name):
    assert in_options(f"{name}: no such file; give bits=2") == (
        f"{name}: no such file; give --bits 2"
    )


def test_messages_speak_of_options(folder, tmp_path, capsys):
    assert in_options("give bits= (exclude)") == "give --bits (--exclude)"
    assert in_options('method="als" is for loss="mse"') == "--method als is for --loss mse"
    assert in_options("k=1 of every matrix takes") == "k=1 of every matrix takes"
    assert in_options("pass bits=1.5, or snr=.") == "pass --bits 1.5, or --snr."
    path = tmp_path / "many.h5"
    f = dn.load(folder / "A.h5")
    f.save(path, group="a")
    f.save(path, group="b")
    assert main(["reconstruct", str(path), "-o", str(tmp_path / "R.npy")]) == 1
    said = capsys.readouterr().err
    assert "many.h5: holds factorizations in groups a, b; name one with --group" in said
    assert main(["info", str(path), "--group", "x"]) == 1
    assert "many.h5: has no group x; it holds groups a, b" in capsys.readouterr().err
    for words in (["export", str(folder / "A.h5"), "-o", "out"], ["generate", str(path), "a"]):
        assert main(words) == 1
        said = capsys.readouterr().err
        assert "is no file of a model or network; it holds " in said
    assert main(["info", str(folder / "A.h5"), "--group", "x"]) == 1
    said = capsys.readouterr().err
    assert "A.h5: has no group x; it holds one matrix, at its root; leave --group out" in said
    with h5py.File(path, "a") as file:
        file.attrs["format"] = "NeXus"
        file.create_group("theirs").attrs["format"] = "hyperspy"
    assert main(["verify", str(path)]) == 0
    assert "2 factorization(s) checked" in capsys.readouterr().out
    assert main(["apply", str(path), str(folder / "A.npy"), "-o", str(tmp_path / "R.npy")]) == 1
    said = capsys.readouterr().err
    assert "found 'NeXus' of another program" in said and "name one with --group" in said
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file.attrs["format"] = np.array([1, 2])
    assert main(["info", str(tmp_path / "other.h5")]) == 1
    assert "holds no factorization" in capsys.readouterr().err


def test_a_system_that_starts_no_process_is_no_fault_of_standard_output(
    folder, monkeypatch, capsys
):
    def fail(*_, **__):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.chdir(folder)
    monkeypatch.setattr(multiprocessing.context.SpawnProcess, "start", fail)
    command = ("compare", "A.npy", "--bits", "2", "--methods", "rtn", "sign", "--jobs", "2")
    assert main(command) == 1
    err = capsys.readouterr().err
    assert "Resource temporarily unavailable" in err and "standard output" not in err


def test_a_full_temporary_folder_is_no_fault_of_a_stream(folder, tmp_path, monkeypatch, capfd):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    os.mkfifo(tmp_path / "pipe")
    for output in ("-", str(tmp_path / "pipe")):
        assert main(["reconstruct", str(folder / "A.h5"), "-o", output]) == 1
        err = capfd.readouterr().err
        assert err.startswith("diba-np: error: temporary folder ")
        assert "(TMPDIR names another): No space left on device" in err


def test_a_file_system_without_locks_is_no_fault_of_standard_output(
    folder, tmp_path, monkeypatch, capsys
):
    def no_locks(handle):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock, "_lock", no_locks)
    words = ["model", str(folder / "A.npy"), "--bits", "4", "-o", str(tmp_path / "m.h5")]
    assert main(words) == 1
    path = tmp_path / "m.h5.parts" / "lock"
    assert capsys.readouterr().err == f"diba-np: error: {path}: No locks available\n"
