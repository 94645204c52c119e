"""`SearchOptions`: one place for each option, read by all that take options."""

import inspect
from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest

import diba_np as dn
from diba_np.cli.main import build_parser
from diba_np.search import solver
from diba_np.search.options import SearchOptions
from diba_np.search.rates import sweep
from diba_np.search.stages import relax_staged

NAMES = [one.name for one in fields(SearchOptions)]


def test_factorize_shows_every_option_in_its_signature_and_documentation():
    signature = inspect.signature(dn.factorize)
    for one in fields(SearchOptions):
        assert signature.parameters[one.name].default == one.default
        assert f"\n{one.name} :" in inspect.getdoc(dn.factorize)


def test_the_command_has_every_option():
    options = build_parser().subparsers()["factorize"].options()
    assert {"--" + name.replace("_", "-") for name in NAMES} <= options.keys()
    for one in fields(SearchOptions):
        assert options["--" + one.name.replace("_", "-")].default == one.default


def test_the_record_and_the_fingerprint_carry_what_they_should():
    used = SearchOptions(solver="greedy", seed=3, threads=2)
    assert used.record() == {
        "solver": "greedy", "effort": None, "seed": 3, "max_sweeps": 1000, "tol": 0.0,
    }  # fmt: skip
    assert used.fingerprint().keys() == set(NAMES) - {"threads"}
    own = SearchOptions(max_sweeps=SearchOptions().sweeps)  # inputs, and uneven components, get
    assert own.fingerprint() != SearchOptions().fingerprint()  # more where it is not given


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"shift": 2}, ValueError, r"shift must lie in \[0, 1\], got 2"),
        ({"shift": "0"}, TypeError, "shift must be a number, got str"),
        ({"scale_bits": 9}, ValueError, "scale_bits must be 16, 32"),
        ({"scale_bits": "best"}, ValueError, 'scale_bits must be a number of bits or "auto"'),
        ({"solver": "exact"}, ValueError, "solver must be one of auto, greedy, got 'exact'"),
        ({"effort": None}, ValueError, "effort must be one of fast, balanced, best, got None"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"max_sweeps": 0}, ValueError, "max_sweeps must be at least 1, got 0"),
        ({"tol": -1.0}, ValueError, "tol must not be negative, got -1"),
        ({"time_limit": 0}, ValueError, "time_limit must be finite and above 0, got 0"),
        ({"threads": 1.5}, TypeError, "threads must be an int, got float"),
        ({"block_rows": True}, TypeError, "block_rows must be an int, got bool"),
    ],
)
def test_bad_options_are_named_before_any_work(options, error, words):
    A = np.eye(4)
    for call in (
        lambda: SearchOptions(**options),
        lambda: dn.factorize(A, k=2, **options),
        lambda: sweep(A, [4, 5], **options),
    ):
        with pytest.raises(error, match=words):
            call()


def test_unknown_options_are_named():
    with pytest.raises(TypeError, match=r"factorize\(\) got an unexpected keyword argument 'sede'"):
        dn.factorize(np.eye(4), k=2, sede=1)
    with pytest.raises(TypeError, match=r"factorize_model\(\) got an unexpected .* 'time_limit'"):
        dn.factorize_model({"a": np.eye(20)}, bits=4, time_limit=1)


def test_options_are_fixed():
    with pytest.raises(FrozenInstanceError):
        SearchOptions().seed = 1


@pytest.mark.parametrize("coupled", [False, True])
def test_best_searches_as_balanced_does_too(coupled, monkeypatch):
    ran = []

    def relaxed(*args, **how):
        ran.append(how["iterations"])
        return relax_staged(*args, **how)

    monkeypatch.setattr(solver, "relax_staged", relaxed)
    at = np.arange(64)
    how = {"k": 32, "threads": 1}
    if coupled:
        how["inputs"] = np.random.default_rng(0).normal(size=(200, 64))
    name = "output_snr_db" if coupled else "snr_db"
    A = 0.9 ** abs(at[:, None] - at)  # its components come out of uneven size
    balanced, best = (
        dn.factorize(A, effort=one, **how).record[name] for one in ("balanced", "best")
    )
    usual, _, also = ran
    assert also == usual and best >= balanced - 0.01
