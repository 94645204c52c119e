"""compare and its plot: rows for all, errors as rows, processes that agree."""

import json

import numpy as np
import pytest

from diba_np import baselines
from diba_np.compare import METHODS, Row, compare, format_table

SOME = ("sign", "rtn", "svd16", "qswd")


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(5)
    X = rng.standard_normal((200, 40)) @ rng.standard_normal((40, 40))
    return rng.standard_normal((48, 40)).astype(np.float32), X


def test_a_row_for_every_method_and_rate(problem):
    A, X = problem
    rows = compare(A, bits=[1.5, 3], inputs=X)
    assert [(row.method, row.target_bits) for row in rows] == [
        (name, rate) for name in METHODS for rate in (1.5, 3.0)
    ]
    for row in rows:
        if row.method in baselines.METHODS:
            assert not row.error, row.error
        if not row.error:
            assert 0 < row.bits_per_weight <= row.target_bits + 1e-9
            assert np.isfinite([row.snr, row.output_snr, row.fit_seconds, row.matvec_us]).all()
    table = format_table(rows)
    assert len(table.splitlines()) == len(rows) + 1 and "out dB" in table


def test_a_method_that_fails_is_a_row(problem):
    A, _ = problem
    rows = compare(A, bits=0.02, methods=["svd16", "rtn"])
    assert "bits must be at least" in rows[0].error and np.isnan(rows[0].snr)
    assert "bits must be at least" in format_table(rows)


def test_processes_give_the_same_rows(problem):
    A, X = problem
    alone, spread = (compare(A, bits=2, methods=SOME, inputs=X, jobs=jobs) for jobs in (1, 2))
    for a, b in zip(alone, spread, strict=True):
        assert (a.method, a.bits_per_weight, a.snr, a.output_snr, a.error) == (
            b.method,
            b.bits_per_weight,
            b.snr,
            b.output_snr,
            b.error,
        )


def test_outputs_are_judged_on_inputs_held_out(problem):
    A, X = problem
    row = compare(A, bits=2, methods=["gptq"], inputs=X)[0]
    made = baselines.fit("gptq", A, 2.0, inputs=X[:150])
    full, ours = X[150:] @ A.T.astype(float), X[150:] @ made.to_dense().T.astype(float)
    assert np.isclose(row.output_snr, 10 * np.log10(np.sum(full**2) / np.sum((full - ours) ** 2)))


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"bits": []}, ValueError, "bits must hold at least one rate"),
        ({"bits": [1, -1]}, ValueError, "bits must be positive"),
        ({"methods": ["sign", "zip"]}, ValueError, "methods must be among .* got 'zip'"),
        ({"jobs": 0}, ValueError, "jobs must be at least 1"),
        ({"jobs": 1.5}, TypeError, "jobs must be an int"),
        ({"inputs": np.ones((3, 40))}, ValueError, "at least 4 rows"),
        ({"inputs": np.ones((9, 4))}, ValueError, "inputs must have 40 columns"),
    ],
)
def test_bad_arguments(problem, kwargs, error, text):
    with pytest.raises(error, match=text):
        compare(problem[0], **{"bits": [2], "methods": ["sign"], **kwargs})


def test_rows_are_plain_data(problem):
    import dataclasses

    row = compare(problem[0], bits=2, methods="rtn")[0]
    assert json.loads(json.dumps(dataclasses.asdict(row)))["method"] == "rtn"


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    from diba_np.report import plot_comparison

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
