"""The rate-distortion curve: each point is what `factorize` gives for its budget."""

import json

import numpy as np
import pytest

from diba_np import factorize, load
from diba_np.cli.main import main
from diba_np.search.rates import sweep


def test_each_point_is_the_factorization_of_its_budget(rng):
    A = rng.normal(size=(40, 32))
    made = sweep(A, bits=[3.0, 1.5, 3], scale_bits=16, shift=0.5, seed=4)
    assert len(made) == 2
    for rate, f in zip([1.5, 3.0], made, strict=True):
        alone = factorize(A, bits=rate, scale_bits=16, shift=0.5, seed=4, effort="fast")
        assert (f.b1, f.b2) == (alone.b1, alone.b2)
        assert f.bits_per_weight <= rate
    assert made[0].record["snr_db"] < made[1].record["snr_db"]


def test_callback_may_end_it_and_inputs_are_passed_on(rng):
    A, X = rng.normal(size=(40, 32)), rng.normal(size=(200, 32))
    seen = []
    made = sweep(A, [1.5, 2.0, 4.0], inputs=X, callback=lambda f: seen.append(f) or len(seen) == 2)
    assert made == seen
    assert all("output_snr_db" in f.record for f in made)


def test_a_sweep_goes_on_from_its_checkpoints(tmp_path, rng):
    A, seen = rng.normal(size=(40, 32)), []
    expected = sweep(A, [1.5, 2.0, 3.0])

    def end(f):
        seen.append(f)
        if len(seen) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        sweep(A, [1.5, 2.0, 3.0], callback=end, checkpoint=tmp_path / "c")
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(kept) == {"c.1.5-bits", "c.2.0-bits"}
    again = sweep(A, [1.5, 2.0, 3.0], checkpoint=tmp_path / "c")
    for one, other in zip(again, expected, strict=True):
        assert (one.b1, one.b2) == (other.b1, other.b2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("bits", "options", "error", "words"),
    [
        ([], {}, ValueError, "bits must hold at least one rate, got none"),
        ([1.0, 1e4], {}, ValueError, r"bits=10000 is too large .*; give bits of at most 32"),
        ([1.0, -2.0], {}, ValueError, "bits must be finite and above 0, got -2"),
        ("much", {}, TypeError, "bits must be a number, got str"),
        (1.0, {"k": 3}, TypeError, r"sweep takes the budgets bits=, got k="),
        (1.0, {"init": None}, TypeError, r"sweep has no init=: .* pass it to factorize"),
        (1.0, {"snr": 3}, TypeError, r"sweep takes the budgets bits=, got snr="),
        (1.0, {"effort": "huge"}, ValueError, "effort must be one of"),
        ([0.01, 2.0], {}, ValueError, "bits=0.01 is too small for a 40 x 32 matrix"),
    ],
)
def test_bad_arguments(rng, bits, options, error, words):
    with pytest.raises(error, match=words):
        sweep(rng.normal(size=(40, 32)), bits, **options)


@pytest.fixture
def here(tmp_path, monkeypatch, rng):
    monkeypatch.chdir(tmp_path)
    np.save("A.npy", rng.normal(size=(40, 32)))
    return tmp_path


def run(capsys, *args):
    status = main([str(a) for a in args])
    out, err = capsys.readouterr()
    return status, out, err


def test_command_prints_the_curve_draws_it_and_keeps_the_factors(here, capsys):
    args = ("sweep", "A.npy", "--bits", 3, 1.5, "--plot", "c.png", "-o", "A.h5", "--seed", 1)
    status, out, _ = run(capsys, *args, "--json")
    assert status == 0
    report = json.loads(out)
    assert (report["m"], report["n"], report["output"]) == (40, 32, "A.h5")
    assert [row["target_bits"] for row in report["rows"]] == [1.5, 3.0]
    for row in report["rows"]:
        f = load("A.h5", group=row["group"])
        assert (row["k"], row["bits_per_weight"]) == (f.k, f.bits_per_weight)
        assert row["snr_db"] == pytest.approx(f.snr(np.load("A.npy")), abs=1e-4)
    assert (here / "c.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in here.iterdir()) == ["A.h5", "A.npy", "c.png"]
    status, out, err = run(capsys, *args)
    assert (status, out) == (1, "")
    assert "c.png: exists; pass --force to replace it" in err
    status, out, _ = run(capsys, "sweep", "A.npy", "--bits", 1.5)
    assert status == 0
    words = out.split()
    assert words[:7] == ["target", "bits/w", "k", "SNR", "dB", "seconds", "1.5"]
    assert 1.4 < float(words[7]) <= 1.5
