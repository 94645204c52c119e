"""Checkpoints: a run that ends at any step and goes on gives the bits of one that never ended."""

import json
import signal
import subprocess
import sys
import time
import tracemalloc
import warnings
import zipfile

import naive
import numpy as np
import pytest

from diba_np import ConvergenceWarning, factorize, load
from diba_np.cli.main import main
from diba_np.errors import BudgetError, FormatError
from diba_np.files.atomic import atomic_path
from diba_np.files.checkpoint import Checkpoint, _gather, _scatter
from diba_np.products.cpu import has_bfloat16
from diba_np.search import factorization
from diba_np.search.options import EFFORTS, Effort
from diba_np.search.progress import Run

M, N = 40, 32


class Killed(Exception):
    pass


@pytest.fixture(autouse=True)
def nobody_waits_for_the_disk(monkeypatch):
    """Some thousand checkpoints are written here; a process that ends needs none on the disk."""
    monkeypatch.setattr("os.fsync", lambda handle: None)


def matrix(seed=0, shape=(M, N)):
    return np.random.default_rng(seed).normal(size=shape)


def run(A, path=None, end_after=None, **options):
    """Factorize, writing a checkpoint after every step; raise `Killed` after some steps."""
    steps = 0

    def callback(_):
        nonlocal steps
        steps += 1
        if steps == end_after:
            raise Killed

    if path is not None:
        options |= {"checkpoint": path, "checkpoint_every": 1e-9}
    options.setdefault("threads", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return factorize(A, callback=callback, **options), steps


def contents(f):
    arrays = [a for t in f.terms for a in (t.d1, t.d2, t.d3, t.b1.words, t.b2.words)]
    record = {name: value for name, value in f.record.items() if name != "seconds"}
    return [a.tobytes() for a in arrays], [t.grids for t in f.terms], json.dumps(record)


INPUTS = np.random.default_rng(5).normal(size=(90, N)) * np.linspace(0.2, 2.0, N)
CASES = {
    "auto": {"k": 14, "max_sweeps": 12},
    "halves": {"k": 14, "shift": 0.5, "effort": "fast", "max_sweeps": 12},
    "coded": {"bits": 2.0, "scale_bits": (4, 3, 4), "max_sweeps": 12},
    "widths": {"bits": 2.0, "scale_bits": "auto", "max_sweeps": 12},
    "single": {"ratio": 0.08, "scale_bits": 32, "max_sweeps": 12},
    "best": {"k": 9, "effort": "best", "max_sweeps": 10, "seed": 3},
    "greedy": {"k": 10, "solver": "greedy"},
    "greedy coded": {"k": 10, "solver": "greedy", "scale_bits": 5, "tol": 1e-3},
    "snr": {"snr": 5.0, "max_sweeps": 8},
    "snr greedy": {"snr": 2.0, "solver": "greedy", "max_sweeps": 5},
    "gram": {"k": 12, "gram": INPUTS.T @ INPUTS, "max_sweeps": 10},
    "inputs": {"bits": 2.0, "inputs": INPUTS, "max_sweeps": 10, "scale_bits": 6},
    "snr of outputs": {"snr": 6.0, "inputs": INPUTS, "max_sweeps": 6},
    "output weight": {"k": 12, "output_weight": np.linspace(0.1, 3.0, M), "max_sweeps": 10},
    "stages": {"k": 64, "max_sweeps": 6, "scale_bits": 5},
    "stages of inputs": {"k": 64, "inputs": INPUTS, "max_sweeps": 4},
    "terms": {"bits": 6.0, "terms": 2, "scale_bits": "auto", "max_sweeps": 6},
    "leading terms, and none": {"bits": 3.0, "max_sweeps": 6},
    "terms of inputs": {"k": 64, "terms": 2, "inputs": INPUTS, "max_sweeps": 4, "scale_bits": 5},
    "greedy inputs": {"k": 8, "inputs": INPUTS, "solver": "greedy"},
}


@pytest.mark.parametrize("case", CASES)
def test_ended_at_any_step_and_resumed_gives_the_same(case, tmp_path, rng):
    A, options = matrix() + 2.0 * case.startswith("leading"), CASES[case]
    path = tmp_path / "run.ckpt"
    whole, steps = run(A, **options)
    done = 0
    while True:
        ahead = int(rng.integers(2, max(3, steps // 3) + 1))
        threads = 1 + (case == "auto" and done == 1)
        try:
            made, _ = run(A, path, end_after=ahead, threads=threads, **options)
            break
        except Killed:
            done += 1
            assert [p.name for p in tmp_path.iterdir()] in (["run.ckpt"], [])
    assert done >= 1
    assert contents(made) == contents(whole)
    assert list(tmp_path.iterdir()) == []


def test_every_single_step_can_be_the_last(tmp_path):
    A, options = matrix(), {"k": 6, "max_sweeps": 5, "scale_bits": 4}
    whole, steps = run(A, **options)
    for step in range(1, steps + 1):
        path = tmp_path / f"{step}.ckpt"
        with pytest.raises(Killed):
            run(A, path, end_after=step, **options)
        made, _ = run(A, path, **options)
        assert contents(made) == contents(whole)


@pytest.mark.parametrize("effort", ["balanced", "best"])
def test_a_longer_and_a_second_search_are_resumed(effort, tmp_path, monkeypatch):
    monkeypatch.setitem(EFFORTS, "balanced", Effort(8, 3, 50, 20, 16))
    monkeypatch.setitem(EFFORTS, "best", Effort(12, 3, 50, 20, 12, "balanced"))
    i = np.arange(N)
    A, options = 0.9 ** abs(i[:, None] - i), {"k": 18, "effort": effort}
    whole, steps = run(A, **options)
    assert steps > (28 if effort == "best" else 16)
    for step in range(1, steps + 1):
        path = tmp_path / f"{step}.ckpt"
        with pytest.raises(Killed):
            run(A, path, end_after=step, **options)
        made, _ = run(A, path, threads=1 + step % 2, **options)
        assert contents(made) == contents(whole)


def of_uneven_components():
    """Return a matrix whose components fall, but none is a term of its own."""
    U, s, Vt = np.linalg.svd(matrix(shape=(128, 32)).cumsum(axis=0).cumsum(axis=1), False)
    s[0] = 1.2 * s[1]
    return (U * s) @ Vt


def test_a_search_for_more_terms_is_resumed(tmp_path, monkeypatch):
    monkeypatch.setitem(EFFORTS, "fast", Effort(4, 1, 50, 20, 4))
    A, options = of_uneven_components(), {"bits": 4.0, "effort": "fast"}  # two terms, then three
    whole, steps = run(A, **options)
    assert len(whole.terms) == 3 and whole.bits_per_weight <= 4.0
    assert len(run(A, time_limit=1e3, **options)[0].terms) < 3  # these alone share a limit
    path = tmp_path / "run.ckpt"
    with pytest.raises(Killed):
        run(A, path, end_after=3 * steps // 5, **options)  # in the search for three
    assert contents(run(A, path, **options)[0]) == contents(whole)


def test_an_error_of_a_callback_is_passed_on_whatever_its_kind():
    A, steps = of_uneven_components(), []

    def callback(state):
        steps.append(state.k)
        if state.k == 30:  # of more terms than were searched for first
            raise BudgetError("its own")

    with pytest.raises(BudgetError, match="its own"):
        factorize(A, bits=4.0, max_sweeps=8, threads=1, callback=callback)
    assert max(steps) > 40


def test_init_is_resumed(tmp_path):
    A = matrix()
    start, _ = run(A, k=9, solver="greedy", max_sweeps=1)
    whole, _ = run(A, k=9, init=start)
    path = tmp_path / "a.ckpt"
    with pytest.raises(Killed):
        run(A, path, end_after=3, k=9, init=start)
    with pytest.raises(ValueError, match="another run, not the same init"):
        run(A, path, k=9, init=run(A, k=9, seed=1)[0])
    assert contents(run(A, path, k=9, init=start)[0]) == contents(whole)


def test_finished_state_stays_until_the_caller_removes_it(tmp_path):
    A, keeper = matrix(), Checkpoint(tmp_path / "a.ckpt")
    f = factorize(A, k=8, checkpoint=keeper, threads=1)
    assert keeper.path.exists()
    calls = []
    again = factorize(A, k=8, checkpoint=Checkpoint(keeper.path), callback=calls.append, threads=1)
    assert contents(again) == contents(f)
    assert len(calls) == 0
    keeper.remove()
    assert not keeper.path.exists()


def test_a_finished_state_tells_why_it_was_ended(tmp_path):
    how = {"k": 8, "threads": 1, "callback": lambda seen: seen.step == 3}
    for _ in range(2):
        with pytest.warns(ConvergenceWarning, match="ended by callback"):
            f = factorize(matrix(), checkpoint=Checkpoint(tmp_path / "a.ckpt"), **how)
        assert f.record["stopped"] == "callback"


def test_the_seconds_of_earlier_runs_may_use_the_time_up():
    later = Run(time_limit=10.0)
    later.set_clock({"seconds": 11.0, "stopped": ""})
    assert later.step("polish", 1, 2, 3) and later.stopped == "time_limit"


def test_seconds_of_all_runs_count_for_the_time_limit(tmp_path):
    A, path = matrix(), tmp_path / "a.ckpt"
    calls = []

    def slow(seen):
        calls.append(seen.seconds)
        time.sleep(0.05)
        if len(calls) == 6:
            raise Killed

    options = {
        "k": 8,
        "time_limit": 60.0,
        "threads": 1,
        "checkpoint": path,
        "checkpoint_every": 1e-9,
    }
    with pytest.raises(Killed):
        factorize(A, callback=slow, **options)
    seen = []
    factorize(A, callback=lambda s: seen.append(s.seconds), **options)
    assert seen[0] >= 0.2


# -- row blocks ------------------------------------------------------------------------------------


def test_row_blocks_of_any_source_give_the_same_and_are_resumed(tmp_path):
    A = matrix(shape=(300, 32)).astype(np.float32)
    np.save(tmp_path / "A.npy", A)
    mapped = np.load(tmp_path / "A.npy", mmap_mode="r")
    options = {"k": 20, "max_sweeps": 10, "block_rows": 50}
    blocks, _ = run(A, **options)
    assert contents(run(mapped, **options)[0]) == contents(blocks)
    assert contents(run(A, **{**options, "block_rows": 64})[0])[0] == contents(blocks)[0]
    whole, _ = run(A, k=20, max_sweeps=10)
    assert blocks.snr(A) == pytest.approx(whole.snr(A), abs=0.1)
    with pytest.raises(Killed):
        run(mapped, tmp_path / "a.ckpt", end_after=7, **options)
    with pytest.raises(ValueError, match="block_rows was 50 and is now 128"):
        run(mapped, tmp_path / "a.ckpt", **{**options, "block_rows": 128})
    assert contents(run(mapped, tmp_path / "a.ckpt", **options)[0]) == contents(blocks)


@pytest.mark.parametrize("weights", [{}, {"output_weight": np.linspace(0.5, 2.0, 300)}])
@pytest.mark.parametrize("solver", ["auto", "greedy"])
def test_no_flip_improves_what_row_blocks_give(solver, weights):
    A = matrix(shape=(300, 32))
    f, _ = run(A, k=10, solver=solver, block_rows=64, max_sweeps=20, **weights)
    assert f.record["improving_flips_left"] == 0
    if not weights:
        parts = (f.d1, f.b1.to_dense(), f.d2, f.b2.to_dense(), f.d3)
        assert naive.improving_flips(A, *parts, f.shift, relative=1e-9) == 0


@pytest.mark.parametrize(
    ("m", "n", "k", "block"), [(12000, 96, 96, 512), (1536, 512, 384, 256), (768, 768, 384, 64)]
)
def test_row_blocks_keep_the_promised_memory(m, n, k, block, tmp_path):
    A = np.lib.format.open_memmap(tmp_path / "A.npy", "w+", np.float32, (m, n))
    A[:] = matrix(shape=(m, n))
    options = {"k": k, "max_sweeps": 1, "block_rows": block}
    ends = {"callback": lambda seen: seen.phase == "polish" and seen.step == 1, "threads": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        factorize(A[:200], **options, **ends)
        tracemalloc.start()
        factorize(A, **options, **ends)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak <= 4 * 3 * (k * (m + n) + block * n)


@pytest.mark.parametrize("block_rows", [0, 2.5, "x", True])
def test_bad_row_blocks(block_rows):
    with pytest.raises((TypeError, ValueError), match="block_rows must be"):
        factorize(matrix(), k=3, block_rows=block_rows)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"k": 9}, "k was 8 and is now 9"),
        ({"k": None, "bits": 2.0}, "bits was null and is now 2.0"),
        ({"shift": 0.5}, "shift was 0.0 and is now 0.5"),
        ({"scale_bits": 32}, "scale_bits was 16 and is now 32"),
        ({"solver": "greedy"}, "effort was"),
        ({"effort": "fast"}, "effort was"),
        ({"max_sweeps": 11}, "max_sweeps was 12 and is now 11"),
        ({"max_sweeps": None}, "max_sweeps was 12 and is now null"),
        ({"tol": 0.1}, "tol was"),
        ({"time_limit": 9.0}, "time_limit was null and is now 9.0"),
        ({"inputs": INPUTS}, "of the activations was null"),
        ({"output_weight": np.ones(M)}, "output_weight_sha256 of the activations was null"),
    ],
)
def test_another_setting_is_refused(change, name, tmp_path):
    path = tmp_path / "a.ckpt"
    options = {"k": 8, "max_sweeps": 12}
    with pytest.raises(Killed):
        run(matrix(), path, end_after=4, **options)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=name):
        run(matrix(), path, **{**options, **change})
    assert path.read_bytes() == before


def test_another_matrix_another_cpu_and_another_version_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.ckpt"
    with pytest.raises(Killed):
        run(matrix(), path, end_after=4, k=8)
    with pytest.raises(ValueError, match="not the same sha256 of A"):
        run(matrix(1), path, k=8)
    with pytest.raises(ValueError, match="dtype of A was"):
        run(matrix().astype(np.float32), path, k=8)
    from diba_np import factorize as module

    factorize_module = sys.modules[module.__module__]
    with monkeypatch.context() as other:
        other.setattr(factorize_module, "has_bfloat16", lambda: not has_bfloat16())
        with pytest.raises(ValueError, match="bfloat16 was"):
            run(matrix(), path, k=8)
    monkeypatch.setattr(
        factorize_module,
        "versions",
        lambda: dict.fromkeys(("diba_np", "numpy", "scipy", "numba"), "0"),
    )
    with pytest.raises(ValueError, match="version of diba_np was"):
        run(matrix(), path, k=8)


def test_damage_is_an_error_and_never_a_state(tmp_path, rng):
    path = tmp_path / "a.ckpt"
    with pytest.raises(Killed):
        run(matrix(), path, end_after=9, k=8)
    whole = path.read_bytes()
    keeper = Checkpoint(path)
    with zipfile.ZipFile(path) as archive:
        fingerprint = json.loads(archive.read("about.json"))["fingerprint"]
    reference = json.dumps(_scatter(keeper.open(fingerprint), arrays := []))
    for _ in range(300):
        at = int(rng.integers(len(whole)))
        flipped = bytearray(whole)
        flipped[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(flipped))
        try:
            found = keeper.open(fingerprint)
        except (FormatError, ValueError):
            continue
        got = []
        assert json.dumps(_scatter(found, got)) == reference
        assert [a.tobytes() for a in got] == [a.tobytes() for a in arrays]
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError, match="remove it to start anew"):
            keeper.open(fingerprint)


def test_a_file_of_another_kind_is_kept(tmp_path):
    path = tmp_path / "A.npy"
    np.save(path, matrix())
    before = path.read_bytes()
    with pytest.raises(FormatError, match="not readable as a checkpoint"):
        factorize(matrix(), k=8, checkpoint=path)
    assert path.read_bytes() == before
    np.savez(tmp_path / "A.npz", a=matrix())
    with pytest.raises(FormatError, match="not readable as a checkpoint"):
        factorize(matrix(), k=8, checkpoint=tmp_path / "A.npz")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"checkpoint": 3}, TypeError, "checkpoint must be a path, got int"),
        ({"checkpoint": "a", "checkpoint_every": 0}, ValueError, "checkpoint_every must be"),
        ({"checkpoint": "a", "checkpoint_every": "x"}, TypeError, "checkpoint_every must be"),
        ({"checkpoint": "."}, IsADirectoryError, "is a folder"),
        ({"checkpoint": "missing/a"}, FileNotFoundError, "no such folder"),
    ],
)
def test_bad_arguments(options, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        factorize(matrix(), k=3, **options)


def test_a_disk_that_fails_is_a_warning(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", full)
    with pytest.warns(UserWarning, match="checkpoint not written: .*No space left"):
        f = factorize(
            matrix(), k=8, checkpoint=tmp_path / "a.ckpt", checkpoint_every=1e-9, threads=1
        )
    assert contents(f) == contents(factorize(matrix(), k=8, threads=1))
    assert list(tmp_path.iterdir()) == []


def test_a_link_stays_and_what_it_leads_to_is_removed(tmp_path):
    (tmp_path / "scratch").mkdir()
    link, state = tmp_path / "a.ckpt", tmp_path / "scratch" / "state"
    link.symlink_to(state)
    for _ in range(2):  # to no file yet; to one that is there
        keeper = Checkpoint(link)
        keeper.open({})
        keeper.write({})
        assert link.is_symlink() and state.is_file()
    keeper.remove()
    assert link.is_symlink() and list(state.parent.iterdir()) == []


def test_trees_come_back_as_they_were(tmp_path):
    keeper = Checkpoint(tmp_path / "a")
    keeper.open({"a": (1, 2)})
    state = {
        "x": np.arange(6, dtype=np.float32).reshape(2, 3),
        "empty": np.empty((0, 4)),
        "list": [1.5, None, True, "text", np.float64(0.1), {"deep": np.uint8([1, 0])}],
        "big": 2**127 + 1,
    }
    keeper.write(state)
    found = Checkpoint(tmp_path / "a").open({"a": [1, 2]})
    first, second = [], []
    assert json.dumps(_scatter(found, first)) == json.dumps(_scatter(state, second))
    for a, b in zip(first, second, strict=True):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    assert _gather([1, {"a": 2}], None) == [1, {"a": 2}]


# -- command line ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_the_checkpoint_and_the_old_output(number, tmp_path):
    A, path, out = tmp_path / "A.npy", tmp_path / "run.ckpt", tmp_path / "A.h5"
    np.save(A, matrix(shape=(120, 100)))
    out.write_bytes(b"old")
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from diba_np.cli.main import main; sys.exit(main())"
    )
    words = ["factorize", A, "--k", "40", "-o", out, "--force", "--quiet", "--threads", "1"]
    words += ["--max-sweeps", "900", "--checkpoint", path, "--checkpoint-every"]
    command = [sys.executable, "-c", program, *map(str, words)]
    with subprocess.Popen([*command, "0.01"], stdout=-1, stderr=-1, text=True) as child:
        while child.poll() is None and not path.exists():
            time.sleep(0.002)
        child.send_signal(number)
        printed, said = child.communicate(timeout=60)
    how = "terminated" if number == signal.SIGTERM else "interrupted"
    assert said == f"diba-np: {how}, the same command goes on from {path}\n"
    assert (child.returncode, printed) == (1, "")
    assert out.read_bytes() == b"old"
    assert {p.name for p in tmp_path.iterdir()} == {"A.npy", "A.h5", "run.ckpt"}
    if number == signal.SIGTERM:
        assert main(["factorize", *map(str, words[1:]), "60"]) == 0
        whole = factorize(np.load(A), k=40, max_sweeps=900, threads=1)
        assert contents(load(out)) == contents(whole)
        assert {p.name for p in tmp_path.iterdir()} == {"A.npy", "A.h5"}


@pytest.mark.parametrize(("opened", "said"), [(False, "nothing written"), (True, "the same comm")])
def test_an_interruption_tells_of_a_checkpoint_of_this_run_alone(
    opened, said, tmp_path, capsys, monkeypatch
):
    np.save(tmp_path / "A.npy", np.eye(8))
    (tmp_path / "run.ckpt").write_bytes(b"of another run")

    def interrupted(*_, checkpoint, **__):
        if opened:
            checkpoint.path.unlink()
            checkpoint.open({})
            checkpoint.write({})
        raise KeyboardInterrupt

    monkeypatch.setattr(factorization, "factorize", interrupted)
    line = ["factorize", str(tmp_path / "A.npy"), "--k", "2"]
    assert main([*line, "--checkpoint", str(tmp_path / "run.ckpt")]) == 1
    assert f"interrupted, {said}" in capsys.readouterr().err


def test_what_a_killed_writer_left_is_removed_and_a_living_one_is_not(tmp_path):
    path = tmp_path / "a.h5"
    program = (
        "import os, sys; from diba_np.files.atomic import atomic_path\n"
        "with atomic_path(sys.argv[1]) as p: os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    with atomic_path(path) as mine, atomic_path(path) as other:
        assert sorted(tmp_path.iterdir()) == sorted([mine, other])
        mine.write_text("1")
        other.write_text("2")
    assert list(tmp_path.iterdir()) == [path]
