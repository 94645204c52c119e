"""compare and its plot: rows for all, errors as rows, processes that agree."""

import json
import multiprocessing
import sys

import numpy as np
import pytest

from diba_np import factorize, methods
from diba_np.cli.main import main
from diba_np.methods import LABELS
from diba_np.methods.comparison import Row, compare, format_table, recommend
from diba_np.methods.dbf import dbf

SOME = ("sign", "rtn", "svd16", "qswd")


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(5)
    X = rng.standard_normal((200, 40)) @ rng.standard_normal((40, 40))
    return rng.standard_normal((48, 40)).astype(np.float32), X


def test_a_row_for_every_method(problem):
    A, X = problem
    rows = compare(A, bits=1.5, inputs=X)
    assert [row.method for row in rows] == list(LABELS)
    for row in rows:
        assert not row.error, row.error
        assert 0 < row.bits_per_weight <= 1.5 + 1e-9
        assert np.isfinite([row.snr, row.output_snr, row.fit_seconds, row.matvec_us]).all()
    table = format_table(rows).splitlines()
    assert len(table) == len(rows) + 2
    assert "out dB" in table[0]
    assert table[-1] == (
        "fitted without the inputs: sign, rtn, nf, bqq, svd16, svd8, qswd, fcqh, deepc"
    )
    assert len(format_table(compare(A, bits=1.5, methods=["bqq"])).splitlines()) == 2


@pytest.mark.parametrize("method", methods.METHODS)
def test_inputs_change_what_is_fitted_where_a_method_says_so(problem, method):
    A, X = problem
    without, with_inputs = (methods.fit(method, A, 2.0, inputs=x) for x in (None, X))
    equal = np.array_equal(without.to_dense(), with_inputs.to_dense())
    assert equal != type(with_inputs).uses_inputs


def test_rows_go_by_method_then_rate(problem):
    rows = compare(problem[0], bits=[3, 1.5], methods=["svd16", "rtn"])
    wanted = [("svd16", 3.0), ("svd16", 1.5), ("rtn", 3.0), ("rtn", 1.5)]
    assert [(row.method, row.target_bits) for row in rows] == wanted


def test_methods_may_come_from_an_iterator(problem):
    rows = compare(problem[0], bits=[2.0], methods=(label for label in ("sign", "rtn")))
    assert [row.method for row in rows] == ["sign", "rtn"]


def test_a_method_that_fails_is_a_row(problem):
    A, _ = problem
    rows = compare(A, bits=0.02, methods=["svd16", "rtn"])
    assert "bits must be at least" in rows[0].error and np.isnan(rows[0].snr)
    assert "bits must be at least" in format_table(rows)


def test_processes_give_the_same_rows_also_where_some_are_killed(problem):
    A, X = problem
    told = []

    def callback(row):
        told.append(row)
        for process in multiprocessing.active_children() * (len(told) == len(SOME) + 1):
            process.kill()

    alone, spread = (
        compare(A, bits=2, methods=SOME, inputs=X, jobs=jobs, callback=callback) for jobs in (1, 2)
    )
    assert sorted(row.method for row in told) == sorted((*SOME, *SOME))
    for a, b in zip(alone, spread, strict=True):
        assert (a.method, a.bits_per_weight, a.snr, a.output_snr, a.error) == (
            b.method,
            b.bits_per_weight,
            b.snr,
            b.output_snr,
            b.error,
        )


def test_no_process_is_left_where_the_caller_stops(problem):
    def stop(row):
        raise KeyError

    with pytest.raises(KeyError) as held:  # and with it the frames of the call
        compare(problem[0], bits=[2, 3, 4], methods="rtn", jobs=2, callback=stop)
    assert multiprocessing.active_children() == [], held


@pytest.mark.parametrize("method", ["gptq", "bitat", "mesa", "dbf", "diba"])
def test_methods_are_fitted_to_some_inputs_and_judged_on_the_others(problem, method):
    A, X = problem
    row = compare(A, bits=2, methods=[method], inputs=X)[0]
    if method == "dbf":
        made = dbf(A, bits=2.0, inputs=X[:150])
    elif method == "diba":
        made = factorize(A, bits=2.0, scale_bits="auto", inputs=X[:150])
    else:
        made = methods.fit(method, A, 2.0, inputs=X[:150])
    full, ours = X[150:] @ A.T.astype(float), X[150:] @ made.to_dense().T.astype(float)
    assert np.isclose(row.output_snr, 10 * np.log10(np.sum(full**2) / np.sum((full - ours) ** 2)))


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"bits": []}, ValueError, "bits must hold at least one rate"),
        ({"bits": [1, -1]}, ValueError, "bits must be finite and above 0"),
        ({"methods": ["sign", "zip"]}, ValueError, "methods must be among .* got 'zip'"),
        ({"methods": []}, ValueError, "methods must hold at least one label, got none"),
        ({"methods": None}, TypeError, 'methods must be "all" or labels .*, got NoneType'),
        ({"seed": np.random.default_rng(0)}, TypeError, "seed must be an int, got Generator"),
        ({"jobs": 0}, ValueError, "jobs must be at least 1"),
        ({"jobs": 1.5}, TypeError, "jobs must be an int"),
        ({"inputs": np.ones((3, 40))}, ValueError, "at least 4 rows"),
        ({"inputs": np.ones((9, 4))}, ValueError, r"inputs must have shape \(N, 40\)"),
    ],
)
def test_bad_arguments(problem, kwargs, error, text):
    with pytest.raises(error, match=text):
        compare(problem[0], **{"bits": [2], "methods": ["sign"], **kwargs})


def test_rows_are_plain_data(problem):
    import dataclasses

    row = compare(problem[0], bits=2, methods="rtn")[0]
    assert json.loads(json.dumps(dataclasses.asdict(row)))["method"] == "rtn"


def test_recommendations_name_the_best_its_lead_and_how_it_multiplies():
    rows = [
        Row("plain", 1.0, 1.0, 5.0),
        Row("packed", 1.0, 1.0, 6.25, multiplies=True),
        Row("plain", 2.0, 2.0, 11.5),
        Row("packed", 2.0, 2.0, 10.0, multiplies=True),
        Row("broken", 2.0, error="no"),
        Row("broken", 3.0, error="no"),
        Row("plain", 4.0, 4.0, np.inf),
        Row("packed", 4.0, 3.0, np.inf, multiplies=True),
        Row("plain", 8.0, 4.0, 9.0),
    ]
    assert recommend(rows) == [
        "1 bit: packed, 6.25 dB, 1.25 dB above plain; multiplies from its bits",
        "2 bits: plain, 11.50 dB, 1.50 dB above packed; decodes first; "
        "without decoding: packed, 10.00 dB",
        "3 bits: no method",
        "4 bits: packed, exact, as plain; multiplies from its bits",
        "8 bits: plain, 9.00 dB; decodes first",
    ]
    # the outputs decide where there are any
    judged = [Row("a", 1.0, 1.0, 5.0, 7.0), Row("b", 1.0, 1.0, 4.0, 9.0)]
    assert recommend(judged)[0].startswith("1 bit: b, 9.00 dB, 2.00 dB above a")
    assert recommend([]) == []


def test_what_multiplies_from_its_bits(problem):
    wanted = {"diba": True, "linear-trellis": True, "bqq": True, "svd16": True}
    wanted |= {"trellis": False, "gptq": False, "fcqh": False}
    rows = compare(problem[0], bits=2.0, methods=list(wanted))
    assert {row.method: row.multiplies for row in rows} == wanted


def test_command_recommends(here, capsys):
    args = ("compare", "A.npy", "--bits", 1.5, 3, "--recommend", "--methods", "rtn", "svd16")
    status, out, _ = run(capsys, *args)
    assert status == 0 and len(out.splitlines()) == 2
    assert out.startswith("1.5 bits: rtn, ") and "without decoding: svd16" in out
    report = json.loads(run(capsys, *args, "--json")[1])
    assert report["recommended"] == out.splitlines() and len(report["rows"]) == 4


def test_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="curves are drawn with it")
    from diba_np.report.curves import plot_comparison

    rows = [
        Row(f"m{i}", rate, rate, 4.0 * rate + 0.01 * i, rate)
        for i in range(14)
        for rate in (1.0, 2.0, 4.0)
    ]
    for quality in ("snr", "output_snr"):
        path = tmp_path / f"{quality}.png"
        plot_comparison(rows, path, quality)
        assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="at least one finite"):
        plot_comparison([Row("a", 1.0, error="no")], tmp_path / "x.png")
    with pytest.raises(ValueError, match="quality must be"):
        plot_comparison(rows, tmp_path / "x.png", "psnr")


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch, problem):
    monkeypatch.chdir(tmp_path)
    np.save("A.npy", problem[0])
    np.save("X.npy", problem[1])
    return tmp_path


def run(capsys, *args):
    status = main([str(a) for a in args])
    out, err = capsys.readouterr()
    return status, out, err


def test_command_prints_the_rows(here, capsys, problem):
    # what is named twice is fitted once
    args = ("compare", "A.npy", "--bits", 1.5, 3, 1.5, "--methods", "rtn", "svd16", "rtn")
    status, out, _ = run(capsys, *args, "--json")
    report = json.loads(out)
    assert (status, report["m"], report["n"]) == (0, 48, 40)
    rows = report["rows"]
    wanted = [("rtn", 1.5), ("rtn", 3), ("svd16", 1.5), ("svd16", 3)]
    assert [(row["method"], row["target_bits"]) for row in rows] == wanted
    assert rows[0]["snr"] == compare(problem[0], 1.5, "rtn")[0].snr
    assert rows[0]["output_snr"] is None
    status, out, _ = run(capsys, *args, "--inputs", "X.npy")
    assert status == 0
    assert "out dB" in out and len(out.splitlines()) == 6


def test_command_ends_well_where_one_method_fails(here, capsys):
    args = ("compare", "A.npy", "--bits", 0.5, "--methods")
    status, out, _ = run(capsys, *args, "svd8", "svd16")
    assert status == 0
    assert "svd16       0.5   BudgetError: bits must be at least" in out
    status, out, _ = run(capsys, *args, "svd16", "--json")
    assert status == 1
    assert "bits must be at least" in json.loads(out)["rows"][0]["error"]
    with pytest.raises(SystemExit, match="2"):
        run(capsys, *args, "zip")
    assert "--methods: invalid choice: 'zip' (choose from" in capsys.readouterr().err


def test_command_draws(here, capsys):
    pytest.importorskip("matplotlib", reason="curves are drawn with it")
    args = ("compare", "A.npy", "--bits", 1.5, 3, "--methods", "rtn", "nf", "--plot", "c.png")
    assert run(capsys, *args)[0] == 0
    assert (here / "c.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in here.iterdir()) == ["A.npy", "X.npy", "c.png"]
    status, _, err = run(capsys, *args)
    assert (status, "c.png: exists; pass --force" in err) == (1, True)
    assert run(capsys, *args, "--force", "--inputs", "X.npy")[0] == 0


@pytest.mark.parametrize("more", [(), ("--inputs", "X.npy")])
def test_figures_are_told_whatever_becomes_of_the_picture(here, capsys, more):
    pytest.importorskip("matplotlib", reason="curves are drawn with it")
    np.save("zero.npy", np.zeros(np.load("A.npy").shape))
    for args in (("sweep", "zero.npy"), ("compare", "zero.npy", "--methods", "rtn", *more)):
        status, out, err = run(capsys, *args, "--bits", 3, "--plot", "z.png")
        assert status == 0 and ("exact" in out or "inf" in out)
        assert err.splitlines()[-1].endswith("z.png: not drawn, no fit has a finite SNR")
        assert not (here / "z.png").exists()


def test_command_says_what_to_install_before_it_works(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, out, err = run(capsys, "compare", "A.npy", "--bits", 2, "--plot", "c.png")
    assert (status, out) == (1, "")
    assert err == "diba-np: error: plots need matplotlib: pip install 'diba-np[plot]'\n"


def test_other_commands_take_the_files_of_every_method(here, capsys, problem):
    A, X = problem
    made = methods.fit("qswd", A, 2.0)
    made.save("q.h5")
    status, out, _ = run(capsys, "info", "q.h5", "--json")
    report = json.loads(out)
    assert (status, report["method"], report["storage_bits"]) == (0, "qswd", made.storage_bits())
    assert report["storage_breakdown"] == made.storage_breakdown()
    assert "qswd" in run(capsys, "info", "q.h5")[1]
    assert run(capsys, "reconstruct", "q.h5", "-o", "B.npy")[0] == 0
    np.testing.assert_array_equal(np.load("B.npy"), made.to_dense())
    assert run(capsys, "apply", "q.h5", "X.npy", "-o", "Y.npy")[0] == 0
    np.testing.assert_allclose(np.load("Y.npy"), X @ made.to_dense().T, rtol=1e-3, atol=1e-3)
    status, out, _ = run(capsys, "verify", "q.h5", "A.npy", "--json")
    assert (status, json.loads(out)["snr_db"]) == (0, made.snr(A))
