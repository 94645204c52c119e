"""The command line: exit status, one JSON object, nothing overwritten, a sentence an error."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

import diba_np
import diba_np.machine.versions
from diba_np import factorize, load
from diba_np.cli.main import build_parser, main
from diba_np.products.cpu import kernel_path


@pytest.fixture
def here(tmp_path, monkeypatch, rng):
    monkeypatch.chdir(tmp_path)
    np.save("A.npy", rng.normal(size=(20, 15)))
    return tmp_path


def run(capsys, *args):
    status = main([str(a) for a in args])
    out, err = capsys.readouterr()
    return status, out, err


def made(capsys, *extra):
    status, out, _ = run(capsys, "factorize", "A.npy", "--k", 6, "--json", "--quiet", *extra)
    assert status == 0
    return json.loads(out)


def test_factorize_prints_what_was_made(here, capsys):
    report = made(capsys, "-o", "out.h5")
    f, A = load("out.h5"), np.load("A.npy")
    assert report["output"] == "out.h5"
    assert (report["m"], report["n"], report["k"]) == (20, 15, 6)
    assert report["bits_per_weight"] == f.bits_per_weight
    assert report["storage_ratio"] == f.storage_ratio()
    assert report["snr_db"] == pytest.approx(f.snr(A), abs=1e-4)
    assert report["file_bytes"] == os.path.getsize("out.h5")
    assert report["seconds"] >= 0
    status, out, err = run(capsys, "factorize", "A.npy", "--k", 6, "--quiet")
    assert (status, err) == (0, "")
    for word in ("shape", "20 x 15", "bits per weight", "storage ratio", "SNR", "seconds", "A.h5"):
        assert word in out
    assert load("A.h5").b1 == f.b1


def test_coded_diagonals(here, capsys):
    report = made(capsys, "--scale-bits", "4,3,5", "--effort", "fast")
    assert report["scale_bits"] == [4, 3, 5]
    assert load("A.h5").scale_bits == (4, 3, 5)
    assert load("A.h5").record["effort"] == "fast"
    assert "4/3/5-bit diagonals" in run(capsys, "info", "A.h5")[1]
    with pytest.raises(SystemExit):
        made(capsys, "--scale-bits", "x")


def test_options_reach_the_solver(here, capsys):
    report = made(capsys, "--solver", "greedy", "--seed", 5, "--shift", 0.5, "--threads", 1)
    record = load("A.h5").record
    assert (report["solver"], report["seed"], report["shift"]) == ("greedy", 5, 0.5)
    assert (record["solver"], record["seed"]) == ("greedy", 5)
    assert report["improving_flips_left"] == 0
    for option, value in (("--bits", 12.0), ("--ratio", "2/5"), ("--snr", 2.0)):
        args = ("factorize", "A.npy", option, value, "--json", "--force", "--quiet")
        status, out, _ = run(capsys, *args, "--max-sweeps", 5)
        assert status == 0
        assert json.loads(out)["k"] >= 1


def test_inputs_and_output_weight_reach_the_solver(here, capsys, rng):
    np.save("X.npy", rng.normal(size=(60, 15)).astype(np.float32))
    np.save("w.npy", np.arange(20))
    report = made(capsys, "--inputs", "X.npy", "--output-weight", "w.npy")
    record = load("A.h5").record
    assert record["activations"]["rows"] == 60
    assert "output_weight_sha256" in record["activations"]
    assert report["output_snr_db"] == record["output_snr_db"] > 0
    assert "output SNR when made" in run(capsys, "info", "A.h5")[1]
    args = ("factorize", "A.npy", "--k", 6, "--quiet", "--force")
    assert "output SNR" in run(capsys, *args, "--inputs", "X.npy")[1]
    assert "output SNR" not in run(capsys, *args, "--output-weight", "w.npy")[1]
    np.save("X.npy", np.ones((5, 15)))
    status, _, err = run(capsys, *args, "--inputs", "X.npy")
    assert (status, err[:29]) == (0, "diba-np: note: inputs has 5 r")
    before = (here / "A.h5").read_bytes()
    np.save("X.npy", np.ones((5, 14)))
    status, out, err = run(capsys, *args, "--inputs", "X.npy")
    assert (status, out) == (1, "")
    assert err == (
        "diba-np: error: inputs must have shape (N, 15), one sample a row, got (5, 14)\n"
    )
    assert run(capsys, *args, "--inputs", "none.npy")[2] == (
        "diba-np: error: none.npy: no such file\n"
    )
    assert (here / "A.h5").read_bytes() == before


def test_an_existing_output_is_kept(here, capsys):
    made(capsys)
    before = (here / "A.h5").read_bytes()
    status, out, err = run(capsys, "factorize", "A.npy", "--k", 6)
    assert (status, out) == (1, "")
    assert err == "diba-np: error: A.h5: exists; pass --force to replace it\n"
    assert (here / "A.h5").read_bytes() == before
    made(capsys, "--force", "--seed", 9)
    assert (here / "A.h5").read_bytes() != before


def test_info(here, capsys):
    made(capsys)
    status, out, _ = run(capsys, "info", "A.h5", "--json")
    report = json.loads(out)
    assert (status, report["k"], report["scale_bits"]) == (0, 6, 16)
    assert report["record"]["solver"] == "auto"
    assert "20 x 15" in run(capsys, "info", "A.h5")[1]
    f = factorize(np.load("A.npy"), k=3, max_sweeps=3)
    f.save("many.h5", group="a")
    f.T.save("many.h5", group="b")
    status, out, _ = run(capsys, "info", "many.h5", "--json")
    assert [(g["group"], g["m"]) for g in json.loads(out)["groups"]] == [("a", 20), ("b", 15)]
    assert "15 x 20" in run(capsys, "info", "many.h5", "--group", "b")[1]


def test_reconstruct_and_apply(here, capsys, rng):
    made(capsys)
    f = load("A.h5")
    status, out, _ = run(capsys, "reconstruct", "A.h5", "-o", "B.npy", "--json")
    assert (status, json.loads(out)["shape"]) == (0, [20, 15])
    np.testing.assert_array_equal(np.load("B.npy"), f.to_dense())
    for shape in [(15,), (4, 15), (2, 3, 15)]:
        X = rng.normal(size=shape).astype(np.float32)
        np.save("X.npy", X)
        status, out, _ = run(capsys, "apply", "A.h5", "X.npy", "-o", "Y.npy", "--force", "--json")
        assert (status, json.loads(out)["shape"]) == (0, [*shape[:-1], 20])
        Y = np.load("Y.npy")
        assert Y.dtype == np.float32
        np.testing.assert_allclose(Y, X @ f.to_dense().T, atol=1e-4)
    np.save("X.npy", np.ones((3, 20), np.longdouble))
    assert run(capsys, "apply", "A.h5", "X.npy", "-o", "Z.npy", "--transpose")[0] == 0
    assert np.load("Z.npy").dtype == np.float64
    np.testing.assert_allclose(np.load("Z.npy"), np.ones((3, 20)) @ f.to_dense(), atol=1e-4)
    status, _, err = run(capsys, "apply", "A.h5", "X.npy", "-o", "W.npy")
    assert status == 1
    assert "X.npy: found shape (3, 20), expected (15,) or (..., 15)" in err
    np.save("X.npy", np.ones(15, complex))
    status, _, err = run(capsys, "apply", "A.h5", "X.npy", "-o", "W.npy")
    assert (status, "X.npy must be an array of real numbers, got dtype comp" in err) == (1, True)
    assert not (here / "W.npy").exists()


def test_an_array_in_standard_output_by_its_name_is_not_mixed_with_the_report(here):
    factorize(np.load("A.npy"), k=6, threads=1).save("A.h5")
    line = [sys.executable, "-m", "diba_np", "reconstruct", "A.h5", "-o", "/dev/stdout", "--json"]
    done = subprocess.run(line, capture_output=True, check=True)
    assert np.array_equal(np.load(io.BytesIO(done.stdout)), load("A.h5").to_dense())
    assert done.stdout[-1:] != b"\n" and json.loads(done.stderr)["shape"] == [20, 15]


@pytest.mark.parametrize("which", [(), ("--group", "one")])
def test_retune_never_drops_the_other_groups_of_a_file(here, capsys, rng, which):
    factors = factorize(np.load("A.npy"), k=6, threads=1)
    for group in (None, "one", "two"):
        factors.save("many.h5", group=group)
    np.save("X.npy", rng.normal(size=(300, 15)))
    np.save("Y.npy", rng.normal(size=(300, 20)))
    before = Path("many.h5").read_bytes()
    args = ("retune", "many.h5", "--inputs", "X.npy", "--targets", "Y.npy", *which)
    status, _, err = run(capsys, *args, "-o", "many.h5", "--force")
    assert status == 1 and "many.h5: would replace the file with all its groups" in err
    assert Path("many.h5").read_bytes() == before
    factors.save("A.h5")
    args = ("retune", "A.h5", "--inputs", "X.npy", "--targets", "Y.npy")
    assert run(capsys, *args, "-o", "A.h5", "--force")[0] == 0  # nothing else is in it


def test_retune_and_its_bias_in_apply(here, capsys, rng):
    made(capsys)
    X = rng.normal(size=(200, 15))
    np.save("X.npy", X)
    np.save("Y.npy", X @ np.load("A.npy").T + 1)
    args = ("retune", "A.h5", "--inputs", "X.npy", "--targets", "Y.npy", "-o", "B.h5")
    status, out, _ = run(capsys, *args, "--json")
    report = json.loads(out)
    assert status == 0
    assert report["loss_after"] < report["loss_before"]
    f, g = load("A.h5"), load("B.h5")
    assert f.b1 == g.b1
    assert abs(g.bias.mean() - 1) < 0.3
    assert run(capsys, "apply", "B.h5", "X.npy", "-o", "Z.npy")[0] == 0
    np.testing.assert_allclose(np.load("Z.npy"), (g @ X.T).T + g.bias, atol=1e-5)
    assert "before" in run(capsys, *args, "--force", "--no-bias")[1]
    assert load("B.h5").bias is None
    np.save("Y.npy", np.ones((3, 3)))
    status, _, err = run(capsys, *args, "--force")
    assert (status, "Y must have shape (N, 20), one sample a row, got (3, 3)" in err) == (1, True)


def test_verify(here, capsys, rng):
    made(capsys)
    assert run(capsys, "verify", "A.h5")[0] == 0
    status, out, _ = run(capsys, "verify", "A.h5", "A.npy", "--json")
    report = json.loads(out)
    assert (status, report["ok"], report["same_source"]) == (0, True, True)
    assert report["snr_db"] == pytest.approx(load("A.h5").snr(np.load("A.npy")))
    np.save("other.npy", rng.normal(size=(20, 15)))
    status, out, _ = run(capsys, "verify", "A.h5", "other.npy")
    assert status == 1
    assert "NOT the matrix it was made from" in out
    np.save("other.npy", rng.normal(size=(15, 20)))
    status, _, err = run(capsys, "verify", "A.h5", "other.npy")
    assert (status, "expected (20, 15)" in err) == (1, True)
    os.truncate("A.h5", os.path.getsize("A.h5") - 8)
    status, _, err = run(capsys, "verify", "A.h5")
    assert status == 1
    assert "A.h5" in err


def test_an_exact_result_is_null_in_json(here, capsys):
    np.save("zeros.npy", np.zeros((5, 5)))
    status, out, _ = run(capsys, "factorize", "zeros.npy", "--k", 2, "--json", "--quiet")
    assert status == 0
    assert json.loads(out)["snr_db"] is None
    assert "exact" in run(capsys, "info", "zeros.h5")[1]


def test_an_array_of_a_model_is_verified_as_in_the_whole_model(here, capsys):
    bias = np.array([1.0, np.nan, np.inf, 4.0], np.float32)
    diba_np.factorize_model({"bias": bias}, bits=64, output="m.h5", jobs=1)
    other = np.where(np.isnan(bias), 2.0, bias).astype(np.float32)
    for array, same in ((bias, True), (other, False)):
        np.save("bias.npy", array)
        found = []
        for group in ((), ("--group", "bias")):
            status, out, err = run(capsys, "verify", "m.h5", "bias.npy", "--json", *group)
            found.append((status, err, json.loads(out)["same_source"]))
        assert found == [(0 if same else 1, "", same)] * 2
        verdict = "the matrix it was made from" if same else "NOT the matrix"
        out = run(capsys, "verify", "m.h5", "bias.npy", "--group", "bias")[1]
        assert (verdict in out, "exact" in out) == (True, same)
    np.save("bias.npy", np.array(["a", "b", "c", "d"]))
    err = run(capsys, "verify", "m.h5", "bias.npy", "--group", "bias")[2]
    assert "A must be an array of real numbers, got dtype <U1" in err


def write_nan():
    np.save("bad.npy", np.array([[1.0, np.nan]]))


def write_objects():
    np.save("bad.npy", np.array([[None]]), allow_pickle=True)


def write_archive():
    np.savez("bad.npz", a=np.ones((2, 2)))
    os.rename("bad.npz", "bad.npy")


def write_short():
    np.save("bad.npy", np.ones((100, 100)))
    os.truncate("bad.npy", 1000)


def write_text():
    with open("bad.npy", "w") as file:
        file.write("1,2\n")


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (write_nan, "A contains 1 non-finite entry; first at (0, 1)"),
        (write_objects, "bad.npy: not readable as .npy"),
        (write_archive, "bad.npy: found an archive of arrays"),
        (write_short, "bad.npy: not readable as .npy"),
        (write_text, "bad.npy: not readable as .npy"),
        (lambda: np.save("bad.npy", np.ones(3)), "A must be 2-D, got shape (3,)"),
        (lambda: None, "bad.npy: no such file"),
    ],
)
def test_bad_files_end_in_one_sentence_and_write_nothing(here, capsys, write, words):
    write()
    before = sorted(os.listdir())
    status, out, err = run(capsys, "factorize", "bad.npy", "--k", 2)
    assert (status, out) == (1, "")
    assert words in err
    assert err.count("\n") == 1
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["nonsense"],
        ["factorize", "A.npy"],
        ["factorize", "A.npy", "--k", "2", "--bits", "1"],
        ["factorize", "A.npy", "--k", "0"],
        ["factorize", "A.npy", "--bits", "nan"],
        ["factorize", "A.npy", "--snr", "nan"],
        ["factorize", "A.npy", "--k", "2", "--seed", "-1"],
        ["factorize", "A.npy", "--k", "2", "--shift", "2"],
        ["factorize", "A.npy", "--k", "2", "--tol", "-1"],
        ["factorize", "A.npy", "--k", "2", "--scale-bits", "9"],
        ["factorize", "A.npy", "--k", "2", "--solver", "magic"],
        ["apply", "A.h5"],
    ],
)
def test_wrong_use_is_status_2(here, capsys, args):
    with pytest.raises(SystemExit) as ended:
        main(args)
    assert ended.value.code == 2
    assert "usage: diba-np" in capsys.readouterr().err


def test_other_failures(here, capsys):
    assert "no such folder" in run(capsys, "factorize", "A.npy", "--k", 2, "-o", "no/a.h5")[2]
    assert "too small" in run(capsys, "factorize", "A.npy", "--bits", 0.01)[2]
    assert "give bits of at most 32" in run(capsys, "factorize", "A.npy", "--bits", 6400)[2]
    assert "no such file" in run(capsys, "info", "no.h5")[2]
    (here / "text.h5").write_text("x")
    assert "not readable as HDF5" in run(capsys, "info", "text.h5")[2]


def test_what_is_dense_and_what_is_compressed_already_is_told(here, capsys):
    np.savez("W.npz", A=np.ones((2, 2)))
    (here / "W.gguf").write_bytes(b"GGUF" + bytes(20))
    (here / "W.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    for file, command in (
        ("A.npy", "factorize"),
        ("W.npz", "model"),
        ("W.gguf", "model"),
        ("W.safetensors", "model"),
    ):
        for asked in (("info",), ("verify",), ("reconstruct", "-o", "n.npy")):
            status, _, err = run(capsys, asked[0], file, *asked[1:])
            assert status == 1 and f"nothing compressed; `diba-np {command}` comp" in err, err
    made(capsys)
    with h5py.File("dense.h5", "w") as file:
        file["A"] = np.ones((3, 2))
    before = sorted(os.listdir())
    for args in (("factorize", "--k", 2), ("sweep",), ("compare", "--bits", 2)):
        err = run(capsys, args[0], "A.h5", *args[1:])[2]
        assert "A.h5: is compressed already, expected one dense array (.npy)" in err
        err = run(capsys, args[0], "dense.h5", *args[1:])[2]
        assert "dense.h5: is an HDF5 file" in err and "`diba-np model` takes its arrays" in err
    assert sorted(os.listdir()) == before


def test_outputs_that_cannot_be_are_told_before_the_work(here, capsys):
    pytest.importorskip("matplotlib")
    made(capsys)
    for args, words in (
        (("factorize", "A.npy", "--k", 2, "-o", "-"), "this command writes to a file only"),
        (
            ("factorize", "A.npy", "--k", 2, "-o", "n.h5", "--checkpoint", "n.h5"),
            "n.h5: --checkpoint and --output must be two files",
        ),
        (
            ("factorize", "A.npy", "--k", 2, "-o", "n.h5", "--checkpoint", "A.npy"),
            "A.npy: is also what is read (A.npy); name another file",
        ),
        (
            ("factorize", "A.npy", "--k", 2, "-o", "n.h5", "--checkpoint-every", 5),
            "--checkpoint-every needs a file; give --checkpoint too",
        ),
        (("retune", "A.h5", "--inputs", "A.npy", "--targets", "A.npy", "-o", "-"), "a file only"),
        (
            ("sweep", "A.npy", "-o", "s.png", "--plot", "s.png"),
            "s.png: --plot and --output must be two files",
        ),
        (("report", "A.h5", "-o", "s.png"), "s.png: expected an HTML page's name, one of .html"),
        (("sweep", "A.npy", "--plot", "s.xyz"), "s.xyz: expected a picture's name, one of ."),
        (("compare", "A.npy", "--bits", 2, "--plot", "s.xyz"), "expected a picture's name"),
        (("plot", "A.h5", "-o", "s.xyz"), "expected a picture's name"),
        (("plot", "A.h5", "-o", "s.pgf"), "expected a picture's name"),
    ):
        status, out, err = run(capsys, *args)
        assert (status, out, err.count("\n")) == (1, "", 1), args
        assert words in err
    assert sorted(p.name for p in here.iterdir()) == ["A.h5", "A.npy"]


def test_a_folder_that_is_not_writable_is_told_before_the_work(here, capsys, monkeypatch):
    (here / "closed").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed")
    status, _, err = run(capsys, "factorize", "A.npy", "--k", 2, "-o", "closed/a.h5")
    assert (status, "closed: this folder cannot be written to" in err) == (1, True)


def test_a_warning_is_a_note_on_standard_error(here, capsys):
    args = ("--k", 6, "--solver", "greedy", "--quiet", "--max-sweeps", 1, "--json")
    status, out, err = run(capsys, "factorize", "A.npy", *args)
    assert status == 0
    assert json.loads(out)["converged"] is False
    why = "the greedy solver was ended by --max-sweeps 1 before its own end condition"
    assert err == f"diba-np: note: {why}\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_no_file(here, number):
    np.save("big.npy", np.random.default_rng(0).normal(size=(300, 300)))
    # a shell's background jobs ignore Ctrl-C; here it must count
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from diba_np.cli.main import main; raise SystemExit(main())"
    )
    args = ["factorize", "big.npy", "--k", "100", "--max-sweeps", "1000000"]
    command = [sys.executable, "-c", code, *args]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            read = ""
            while "relaxation" not in read:  # the search has begun
                read += process.stderr.read(1)
                assert process.poll() is None, read + process.stderr.read()
            process.send_signal(number)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 1
    words = "interrupted" if number == signal.SIGINT else "terminated"
    assert err.endswith(f"diba-np: {words}, nothing written\n")
    assert "Traceback" not in err
    assert sorted(os.listdir()) == ["A.npy", "big.npy"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_finalizer_still_ends_the_work(number, capsys, monkeypatch):
    class Finalized:
        def __del__(self):
            signal.raise_signal(number)

    def work(args):
        Finalized()
        time.sleep(30)  # the signal that comes again ends the wait, and with it the work
        return 0

    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {one: signal.signal(one, handler) for one, handler in usual.items()}
    monkeypatch.setattr("diba_np.cli.installation.run_doctor", work)
    monkeypatch.setattr("diba_np.cli.main.build_parser", build_parser.__wrapped__)
    try:
        status, out, err = run(capsys, "doctor")
        assert {one: signal.getsignal(one) for one in usual} == usual
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    words = "interrupted" if number == signal.SIGINT else "terminated"
    assert (status, out, err) == (1, "", f"diba-np: {words}, nothing written\n")


def test_module_and_version(here):
    command = [sys.executable, "-m", "diba_np", "--version"]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert out.stdout == f"diba-np {diba_np.__version__}\n"


def test_warmup(capsys):
    status, out, err = run(capsys, "warmup", "--json")
    report = json.loads(out)
    assert (status, err) == (0, "")
    assert report["path"] == kernel_path()
    assert sum(report["kernels"].values()) == pytest.approx(report["seconds"], abs=0.1)
    assert {"tile_rows", "factorize auto", "product_columns_par float64"} <= set(report["kernels"])
    status, out, _ = run(capsys, "warmup")
    assert status == 0
    assert "kernel path" in out


def test_doctor_tells_what_a_report_needs_and_what_is_wrong(here):
    def doctor(*args, **environment):
        command = [sys.executable, "-m", "diba_np", "doctor", *args]
        return subprocess.run(
            command, capture_output=True, text=True, env=os.environ | environment, check=False
        )

    cache = {"NUMBA_CACHE_DIR": str(here / "cache"), "DIBA_NP_CACHE": "1"}
    done = doctor("--json", **cache)
    report = json.loads(done.stdout)
    assert (done.returncode, done.stderr, report["problems"]) == (0, "", [])
    assert report["versions"] == diba_np.machine.versions.versions()
    assert report["path"] == kernel_path()
    assert report["path"] in report["paths"]
    assert report["cache"].startswith(str(here))
    assert report["environment"]["NUMBA_CACHE_DIR"] == cache["NUMBA_CACHE_DIR"]
    done = doctor(**cache, DIBA_NP_KERNEL="abacus")
    assert done.returncode == 1
    assert "DIBA_NP_KERNEL must be one of portable, avx2, avx512, neon, got 'abacus'" in done.stdout
    assert "numpy" in done.stdout


FIRST_USE = """
import sys, numpy as np, diba_np, numba
from diba_np.cli.warmup import warm_up

def kernels():
    return {d for n, m in sys.modules.items() if n.startswith("diba_np.kernels")
            for d in vars(m).values() if isinstance(d, numba.core.dispatcher.Dispatcher)}

def compiled():
    return {d.__name__: len(d.overloads) for d in kernels()}

folder = warm_up()["cache"]
before = compiled()
rng = np.random.default_rng(0)
f = diba_np.factorize(rng.normal(size=(40, 30)), k=8)
diba_np.factorize(rng.normal(size=(40, 30)), k=8, solver="greedy", threads=1)
words = rng.integers(0, 2**64, (2048, 32), np.uint64)
b = diba_np.PackedBits.from_words(words, 2048)
g = diba_np.DiBAFactors(np.ones(2048), b, np.ones(2048), b, np.ones(2048))
for f in (f, f.T, g, g.T):
    for dtype in (np.float32, np.float64):
        for columns in (1, 20):
            f @ np.ones((f.shape[1], columns), dtype)
        f @ np.ones(f.shape[1], dtype)
    f.matvec_rounded(np.ones(f.shape[1]))
after = compiled()
print({name for name in after if after[name] != before.get(name, 0)})
print(folder, {d.__name__ for d in kernels() if sum(d.stats.cache_misses.values())})
"""


def test_after_warmup_nothing_is_compiled():
    # on the cache of all tests: the first process fills what they left out
    environment = os.environ | {"DIBA_NP_CACHE": "1"}
    used = [sys.executable, "-c", FIRST_USE]
    for run in ("first", "second"):
        out = subprocess.run(used, capture_output=True, text=True, check=True, env=environment)
        new, stored = out.stdout.splitlines()
        assert new == "set()", run
    assert not stored.startswith("None")
    assert stored.endswith(" set()")


def test_a_sweep_keeps_rates_that_are_nearly_equal(here, capsys):
    args = ("--bits", 2, 2.0000001, "-o", "c.h5", "--max-sweeps", 1, "--json", "--quiet")
    status, out, _ = run(capsys, "sweep", "A.npy", *args)
    assert status == 0
    groups = [row["group"] for row in json.loads(out)["rows"]]
    assert groups == ["bits_2", "bits_2.0000001"]
    assert [load("c.h5", group=name).method for name in groups] == ["diba", "diba"]


@pytest.mark.skipif(os.name == "nt", reason="names of POSIX")
def test_titles_of_any_name(here, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    from diba_np.report import pictures

    name, panels_of = "\udcff a$_{b$", pictures.panels_of
    try:
        os.rename("A.npy", f"{name}.npy")
    except OSError:
        pytest.skip("a file system of Unicode names")
    factorize(np.load(f"{name}.npy"), k=2, max_sweeps=1).save(f"{name}.h5")
    monkeypatch.setattr(pictures, "panels_of", lambda *args: panels_of(*args)[:1])  # is quicker
    for args in (
        ("plot", f"{name}.h5"),
        ("report", f"{name}.h5"),
        ("compare", f"{name}.npy", "--bits", 2, "--methods", "rtn", "--plot", "c.png"),
    ):
        assert run(capsys, *args)[0] == 0, args
    assert "\\udcff a$_{b$.h5" in Path(f"{name}.html").read_text("utf-8")
