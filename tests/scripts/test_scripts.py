"""The scripts: their readers on files made here, and the vendored matrices as documented."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import made_networks  # noqa: E402
import minilm  # noqa: E402
import sources  # noqa: E402
import study_outputs  # noqa: E402


def test_vendored_matrices_have_the_documented_hashes_and_shapes():
    rows = re.findall(r"`(\S+\.npy)` \| (\d+) × (\d+) .*`([0-9a-f]{64})`", _data_readme())
    assert len(rows) == len(list((ROOT / "data").glob("*.npy"))) == 3
    for name, m, n, digest in rows:
        path = ROOT / "data" / name
        assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
        matrix = np.load(path, allow_pickle=False)
        assert (matrix.shape, matrix.dtype) == ((int(m), int(n)), np.float32)


def _data_readme():
    return (ROOT / "data" / "README.md").read_text()


def test_packages_are_documented_with_their_hashes():
    packages = [p for p in vars(sources).values() if isinstance(p, sources.Package)]
    assert len(packages) > 5
    for package in packages:
        assert package.sha256 in _data_readme()
        assert f"`{package.name}` {package.version}" in _data_readme()


def run_script(name, *args):
    command = [sys.executable, str(ROOT / "scripts" / name), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_bench_data_smoke():
    (row,) = json.loads(run_script("bench_data.py", "--smoke", "--json"))
    assert row["bits_per_weight"] <= 1.0
    assert row["snr 0/1"] > 3
    assert row["k"] == 108


def test_points_are_lost_against_a_dense_network_only(monkeypatch, capsys):
    import study_mesa
    from mesa_pipelines import Outcome

    made = Outcome("MESA", 0.75, SimpleNamespace(weights=[np.ones((4, 4))]), [], kept=16, bits=64)
    monkeypatch.setattr(study_mesa, "run_pipeline", lambda *_, **__: made)
    parts = dict.fromkeys(("fit", "validation", "test"), (np.ones((2, 3)), np.ones(2)))
    for names, lost in ((["MESA"], ""), (["FC", "MESA"], "0.00")):
        study_mesa.table(parts, {}, 1, names, study_mesa.Q, study_mesa.ALPHA)
        assert f"\n| MESA | 75.00 | {lost} | 4.00 |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["study_mesa.py", "--alphas", "--q", "5"])
    with pytest.raises(SystemExit):
        study_mesa.main()
    assert "--q is of the table" in capsys.readouterr().err


def test_what_studies_keep_is_of_its_settings(tmp_path, monkeypatch):
    """Files of other settings are not taken for those that are asked for."""
    import digits
    import study_digits
    import study_four

    places = []

    def placed(*arguments):
        places.extend(path for path in arguments if isinstance(path, Path))
        return {}

    class Asked(Exception):
        pass

    def dense_of(*arguments):
        placed(*arguments)
        raise Asked

    monkeypatch.setattr(study_four, "_images", lambda smoke: None)
    monkeypatch.setattr(study_four.fd, "dense_of", dense_of)
    for epochs in (3, 4):
        with pytest.raises(Asked):
            study_four.measured(("MLP", "DiBA", 1.0, 0), tmp_path, 1, epochs, True)
    for name in ("Classifier", "show"):
        monkeypatch.setattr(study_digits, name, mock.Mock())
    monkeypatch.setattr(study_digits, "dense_mlp", lambda *_: None)
    monkeypatch.setattr(study_digits, "load_digits", lambda: digits.drawn_digits(50))
    monkeypatch.setattr(study_digits, "measure", placed)
    for effort in ("fast", "best"):
        words = f"study --ratios 8 --methods DiBA --effort {effort} --folder {tmp_path}"
        monkeypatch.setattr(sys, "argv", words.split())
        study_digits.main()
    assert len(set(places)) == len(places) == 4


def test_times_of_a_study_count_its_jobs():
    import study_language

    before = study_language.seconds_of_all()
    busy = "import time\nwhile time.process_time() < 0.2: pass"
    subprocess.run([sys.executable, "-c", busy], check=True)
    assert study_language.seconds_of_all() - before >= 0.18  # whole ticks of 0.01


def test_study_mesa_smoke():
    told = run_script("study_mesa.py", "--smoke")
    for name in ("FC", "FC+Q+H", "DeepC", "MPDC", "M+Q+H", "MESA"):
        assert f"\n| {name} |" in told
    assert " -> " in told


def test_the_digits_are_cut_by_class_without_overlap():
    import digits

    X, y = digits.drawn_digits(200)
    X[:, 0] = np.arange(200)  # which row it is
    parts = digits.split((X, y))
    assert [len(rows) for rows, _ in parts.values()] == [120, 40, 40]
    seen = np.concatenate([rows[:, 0] for rows, _ in parts.values()])
    assert len(np.unique(seen)) == 200
    for _, labels in parts.values():
        assert len(set(np.bincount(labels))) == 1


def test_a_package_is_fetched_once_and_refused_when_it_is_another(tmp_path, monkeypatch):
    monkeypatch.setenv("DIBA_NP_DATA", str(tmp_path))
    package = sources.Package("thing", "1.0", hashlib.sha256(b"right").hexdigest(), "MIT")
    calls = []

    def download(command, **_):
        calls.append(command)
        (tmp_path / "thing-1.0" / "thing.tgz").write_bytes(b"right")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(sources.subprocess, "run", download)
    assert sources.fetch(package).read_bytes() == b"right"
    sources.fetch(package)
    assert len(calls) == 1
    other = sources.Package("thing", "1.0", "0" * 64, "MIT", client="npm")
    with pytest.raises(SystemExit, match="no file there has the expected SHA-256"):
        sources.fetch(other)
    assert calls[1][:3] == ["npm", "pack", "--silent"]

    def missing(command, **_):
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(sources.subprocess, "run", missing)
    with pytest.raises(SystemExit, match="could not be downloaded"):
        sources.fetch(other)


def test_bench_terms_smoke():
    out = run_script("bench_terms.py", "--smoke")
    assert "| Gaussian | 3 | " in out
    assert "| 40² | 2 | " in out


def test_the_solvers_sources_are_there(monkeypatch):
    import bench_solver

    before = bench_solver.code_version()
    monkeypatch.setattr(bench_solver, "SOURCES", (*bench_solver.SOURCES, "methods/rounding.py"))
    assert bench_solver.code_version() != before
    monkeypatch.setattr(bench_solver, "SOURCES", ("search/*.py", "gone/*.py"))
    with pytest.raises(FileNotFoundError, match="SOURCES is out of date"):
        bench_solver.code_version()


def test_bench_solver_smoke():
    out = run_script("bench_solver.py", "--smoke")
    assert "| Gaussian | 48 × 40 | 2 |" in out
    assert "| 48 × 40 | 2 | fast |" in out  # seconds with a Gram matrix and without
    assert "| matrix | bits | effort | 0.125, dB (s) | 1, dB (s) |" in out
    assert "| 48 × 48 | fast | 2 |" in out  # by threads
    assert "| 48 × 48 | fast | 2 processes |" in out
    assert out.count("\n|---") == 7


def test_what_a_layer_reads_is_shown_without_padding():
    net = made_networks.random_network()
    rows = [[1, 3, 4, 2], [1, 2], [1, 5, 2]]
    name = "encoder.layer.0.output.dense"
    seen = minilm.inputs_of(net, rows, [name])[name]
    assert seen.shape == (9, made_networks.INNER)
    alone = minilm.inputs_of(net, rows[1:2], [name])[name]
    np.testing.assert_allclose(seen[:2], alone, atol=1e-5)  # the shortest row is read first


def test_study_activations_smoke():
    rows = json.loads(run_script("study_activations.py", "--smoke", "--json"))
    reached = {row["method"]: row["output_snr"] for row in rows}
    assert reached["with inputs"] > reached["without inputs"] + 3
    assert reached["with inputs"] > reached["DBF, weighted"]


def test_study_rivals_smoke(tmp_path):
    def rivals(*more):
        return run_script("study_rivals.py", "--smoke", "--folder", str(tmp_path), *more)

    first = rivals("--methods", "diba", "linear-trellis")
    rows = {}
    for line in first.splitlines()[2:]:
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        rows[cells[1]] = cells
    assert set(rows) == {"diba", "linear-trellis"}
    ours, other = (rows[name] for name in ("diba", "linear-trellis"))
    means = [float(cells[5]) for cells in (ours, other)]
    beside = re.match(r"([+-][\d.]+) \(", other[6])
    assert float(beside[1]) == pytest.approx(means[1] - means[0], abs=0.02)
    assert means[0] == pytest.approx((float(ours[3]) + float(ours[4])) / 2, abs=0.02)
    assert ours[9] == other[9] == "from its bits" and other[7].endswith(" of 4")
    assert float(ours[2]) <= 4 and float(other[2]) <= 4
    # from what is kept, and only from that
    assert rivals("--methods", "diba", "linear-trellis", "bqq", "--only-finished") == first
    told = rivals("--methods", "diba", "bqq", "--json")
    (bqq, *_) = (row for row in json.loads(told) if row["method"] == "bqq")
    assert bqq["without_inputs"] and bqq["snr"] > 10


def test_study_outputs_smoke():
    rows = json.loads(run_script("study_outputs.py", "--smoke", "--json"))
    assert len(rows) == 6
    assert np.mean([row["matrix"] - row["vector"] for row in rows]) > 0.3


def test_the_bound_of_white_weights_is_six_db_a_bit(rng):
    A = rng.normal(size=(60, 50))
    assert study_outputs.bound(A, np.eye(60), np.eye(50), 1.0) == pytest.approx(6.02, abs=0.4)
    W, H = np.diag(np.exp(np.arange(60) / 9)), np.diag(np.exp(np.arange(50) / 9))
    assert study_outputs.bound(A, W, H, 1.0) > 9


def test_fit_taps_smoke():
    first, again = (run_script("fit_taps.py", "--smoke") for _ in range(2))
    assert first == again and "(2, 1, 3): (  # " in first


def test_bench_linear_trellis_smoke(tmp_path):
    told = run_script("bench_linear_trellis.py", "--smoke").splitlines()
    assert len(told) == 2 + 9 and "ratio" in told[0]
    np.save(tmp_path / "A.npy", np.random.default_rng(0).normal(size=(64, 48)))
    told = run_script("bench_linear_trellis.py", "--smoke", "--rest", str(tmp_path / "A.npy"))
    alone, *rest = (float(cell) for cell in told.splitlines()[-1].split("|")[2:-1])
    assert all(10 < value < alone for value in rest)


def test_study_matrices_smoke(tmp_path):
    first = run_script("study_matrices.py", "--smoke", "--folder", str(tmp_path))
    assert "rises strictly with the ratio on all 3" in first
    again = run_script("study_matrices.py", "--smoke", "--folder", str(tmp_path))
    assert again == first  # from the results that were kept, seconds and all


def test_study_digits_smoke(tmp_path):
    told = run_script("study_digits.py", "--smoke", "--folder", str(tmp_path))
    right, changed = {}, {}
    for table, rows in zip(told.split("answered ")[1:], (right, changed), strict=True):
        for line in table.splitlines():
            cells = [cell.strip() for cell in line.split("|")[1:-1]]
            if len(cells) > 5 and cells[0] in ("DiBA", "integer codes", "random binaries"):
                rows[cells[0], cells[1]] = [float(c.split(" ")[0]) for c in cells[2:6]]
        assert len(rows) == 6
    dense = float(told.split()[1])
    for ratio in ("1/32", "1/16"):
        ours, control = right["DiBA", ratio], right["random binaries", ratio]
        assert ours[-1] >= ours[0]  # refitted end to end, against replaced only
        assert ours[-1] > control[0]
    for row, shares in right.items():
        for share, other in zip(shares, changed[row], strict=True):
            assert abs(dense - share) <= other + 0.02  # both are rounded
    assert run_script("study_digits.py", "--smoke", "--folder", str(tmp_path)) == told


def test_study_four_smoke(tmp_path):
    def told(*more):
        return run_script("study_four.py", "--smoke", "--folder", str(tmp_path), *more)

    first = told("--plot", str(tmp_path / "a.png"))
    rows, dense = {}, float(re.search(r"MLP, dense (\S+) ±", first)[1])
    for line in first.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 11 and cells[0] not in ("method", "---"):
            rows[cells[0], cells[1]] = cells
        elif len(cells) == 9 and cells[0] not in ("method", "---"):
            rows["classes", cells[0]] = cells
    assert set(rows) >= {("DiBA", "1"), ("QSWD", "1"), ("MESA", "own"), ("MESA", "1")}
    for (name, _), cells in rows.items():
        if name == "classes":
            assert cells[1] == "4" and all(cells)
            total, *parts = (float(x) for x in re.findall(r"[\d.]+", cells[5]))
        else:
            replaced, _, trained = (float(cell.split(" ")[0] or 0) for cell in cells[2:5])
            assert trained > replaced or replaced > dense - 5  # trained, against replaced only
            assert cells[10] == "2"  # seeds
            total, *parts = (float(x) for x in re.findall(r"[\d.]+", cells[7]))
            assert total < 1.05 * (float(cells[1]) if cells[1] != "own" else 1.5)
        assert abs(total - sum(parts)) < 0.03  # all are rounded
    assert {name for kind, name in rows if kind == "classes"} == {"QSWD", "MESA"}
    assert (tmp_path / "a.png").stat().st_size > 1000
    # times of products are measured anew for the classes
    again = told("--parts", "digits", "--only-finished")
    assert again.strip() in first
    assert "vector quantization" in told("--special")


def test_bench_tokens_smoke():
    rows = json.loads(run_script("bench_tokens.py", "--smoke", "--dense", "--json"))
    assert [row["bits"] for row in rows] == [1, 2, 32]
    assert rows[0]["bytes"] < rows[1]["bytes"] < rows[2]["bytes"]
    rows += json.loads(
        run_script(
            "bench_tokens.py", "--smoke", "--method", "linear-trellis", "--bits", "2", "--json"
        )
    )
    assert all(row["prompt"] > 0 and row["tokens"] > 0 for row in rows)


def test_bench_layer_smoke():
    told = run_script("bench_layer.py", "--smoke")
    assert told.count("\n| 64 × 48 |") == 2


def test_bench_signs_smoke():
    told = run_script("bench_signs.py", "--smoke")
    assert told.count("\n| 65 × 70 |") == 2


def test_torture_resume_smoke():
    told = run_script("torture_resume.py", "--smoke").splitlines()
    assert [line.split()[0] for line in told] == ["factorize", "model"]
    assert all(" 0 unequal " in line and " 0 files left" in line for line in told)


def test_bench_large_smoke():
    header, _, row = run_script("bench_large.py", "--smoke").splitlines()
    cells = dict(zip(header.split(" | "), row.split(" | "), strict=True))
    assert float(cells["share"]) < 2  # a small matrix: what does not grow with it counts
    assert int(cells["writes"]) > 0
