"""Runs that are killed, doubled or spread over a cluster: the same bits, or one sentence."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import diba_np as dn
from diba_np.files.parts import Parts
from diba_np.models.executors import Runner
from diba_np.models.file import open_model
from diba_np.models.fit_rows import factorize_rows

CODE = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
CODE += "from diba_np.cli.main import main; raise SystemExit(main())"
ARGS = ["model", "m.npz", "--bits", "3", "-o", "m.h5", "--effort", "fast", "--json-log", "log"]


@pytest.fixture
def here(tmp_path, monkeypatch, rng):
    monkeypatch.chdir(tmp_path)
    np.savez("m.npz", **{f"w{i}": rng.normal(size=(90, 80)) for i in range(4)})
    return tmp_path


def begin(*args):
    return subprocess.Popen(
        [sys.executable, "-c", CODE, *ARGS, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"NUMBA_NUM_THREADS": "1"},
    )


def wait_for(event, process):
    """Wait until the log tells about the event."""
    while True:
        if os.path.exists("log"):
            with open("log") as log:
                if f'"event": "{event}"' in log.read():
                    return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def reference():
    with np.load("m.npz") as arrays:
        return dn.factorize_model(dict(arrays), bits=3.0, effort="fast", jobs=1, threads=1)


def same(path, expected):
    with open_model(path) as made:
        assert list(made) == list(expected)
        for name in expected:
            for one, other in zip(made[name].terms, expected[name].terms, strict=True):
                assert one.b1 == other.b1 and one.b2 == other.b2
            assert np.array_equal(made.dense(name), expected.dense(name))


def test_a_killed_run_goes_on_from_its_parts(here):
    process = begin("--jobs", "1", "--threads", "1")
    wait_for("matrix", process)
    process.kill()
    process.communicate()
    assert not os.path.exists("m.h5")
    assert os.path.exists("m.h5.parts/0.h5") or list(here.glob("m.h5.parts/*.h5"))
    # other settings: refused, and the parts stay
    with pytest.raises(
        ValueError, match=r"holds parts of another run \(bits was 3\.0 and is now 2\.0"
    ):
        dn.factorize_model("m.npz", bits=2.0, effort="fast", jobs=1, threads=1, output="m.h5")
    seen = []
    dn.factorize_model(
        "m.npz", bits=3.0, effort="fast", jobs=1, threads=1, output="m.h5", callback=seen.append
    )
    done = [event for event in seen if event["event"] == "matrix"]
    assert len(done) == 4 and any(event["resumed"] for event in done)
    assert not any(event["event"] == "curve" for event in seen)
    same("m.h5", reference())
    assert sorted(p.name for p in here.iterdir()) == ["log", "m.h5", "m.npz"]


def test_a_signal_is_one_sentence_and_keeps_the_parts(here):
    process = begin("--jobs", "2", "--threads", "1")
    wait_for("matrix", process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)  # its own processes hold the pipes too
    assert (process.returncode, out) == (1, "")
    assert "interrupted; " in err.splitlines()[-1] and "kept in m.h5.parts" in err
    assert "Traceback" not in err
    assert json.loads((here / "log").read_text().splitlines()[-1])["event"] == "interrupted"
    parts = {path.name for path in (here / "m.h5.parts").iterdir()}
    assert {"run.json", "curves.json"} < parts


def test_two_runs_at_once_are_one_refusal(here):
    with open("m.npz", "rb") as file:
        before = file.read()
    parts = Parts(here / "m.h5", {"a": 1})
    with pytest.raises(OSError, match=r"m\.h5: another run writes to it now"):
        dn.factorize_model("m.npz", bits=3.0, jobs=1, threads=1, output=here / "m.h5")
    parts.close()
    assert sorted(p.name for p in here.iterdir()) == ["m.npz"]
    assert (here / "m.npz").read_bytes() == before


def test_parts_stay_for_the_same_run_and_go_for_another(here):
    parts = Parts(here / "m.h5", {"a": [1, 2]})
    parts.write("curves", [1])
    parts.path(0).write_bytes(b"of a task")
    parts.close()
    assert (here / "m.h5.parts").is_dir()
    again = Parts(here / "m.h5", {"a": (1, 2)})
    assert again.read("curves") == [1]
    again.close()
    again = Parts(here / "m.h5", {"a": [3]}, restart=True)
    assert again.read("curves") is None and not again.path(0).exists()
    again.close()
    assert not (here / "m.h5.parts").exists()
    # searches that are finished stay, what is no file of theirs is made again
    model = {f"w{i}": np.random.default_rng(i).normal(size=(24, 20)) for i in range(2)}
    how = {"bits": 3.0, "jobs": 1, "effort": "fast", "output": here / "two.h5"}

    def stop(event):
        if event["event"] == "matrix" and event["matrices_done"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dn.factorize_model(model, callback=stop, **how)
    (here / "two.h5.parts" / "1.h5").write_bytes(b"no file of theirs")
    events = []
    dn.factorize_model(model, callback=events.append, **how)
    resumed = {event["name"]: event["resumed"] for event in events if event["event"] == "matrix"}
    assert resumed == {"w0": True, "w1": False}


def test_a_search_goes_on_from_its_checkpoint(here, monkeypatch):
    from diba_np.models import fit_rows
    from diba_np.search import progress

    monkeypatch.setattr(fit_rows, "CHECKPOINT_EVERY", 1e-6)
    A = np.load("m.npz")["w0"]
    options = {"effort": "fast", "threads": 1, "scale_bits": 16}
    whole = dn.factorize(A, bits=2.0, **options)
    steps = []
    step = progress.Run.step

    def stop(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 30:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(progress.Run, "step", stop)
    path = here / "0.checkpoint"
    with pytest.raises(KeyboardInterrupt):
        factorize_rows(A, 2.0, None, options, str(path))
    assert path.exists()
    state = path.read_bytes()
    before = len(steps)
    found = factorize_rows(A, 2.0, None, options, str(path))
    inside = len(steps) - before
    assert found.b1 == whole.b1 and found.b2 == whole.b2
    # damaged: anew, with the same result
    path.write_bytes(state[: len(state) // 2])
    before = len(steps)
    found = factorize_rows(A, 2.0, None, options, str(path))
    assert found.b1 == whole.b1 and len(steps) - before > inside


def fail(item):
    raise ValueError(f"no {item}")


def test_a_failure_ends_the_run_and_the_processes(here):
    with Runner(2, 1) as runner, pytest.raises(ValueError, match="no 1"):
        list(runner.run(fail, [1], lambda item: (item,)))
        assert multiprocessing.active_children() == []


# -- Dask ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_worker_of_a_cluster_costs_nothing_but_time(here):
    pytest.importorskip("distributed")
    script = Path(__file__).parents[2] / "scripts" / "torture_cluster.py"
    done = subprocess.run(
        [sys.executable, script, "shell", "--smoke", "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"NUMBA_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = json.loads(done.stdout)
    assert (row["workers"], row["killed"], row["same"]) == (2, 1, row["arrays"])


def test_no_scheduler_is_one_sentence(here, monkeypatch):
    import importlib.util

    from diba_np.cli.main import main

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main([*ARGS, "--scheduler", "tcp://127.0.0.1:1"]) == 1
