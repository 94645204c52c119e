"""Leading terms: what one component holds most of is a term of its own, where that is better."""

import numpy as np
import pytest

from diba_np import factorize
from diba_np.matrix.quality import snr_db
from diba_np.search import pilot, size

QUICK = {"effort": "fast", "threads": 1}


def beside(A, f, part=np.s_[:]):
    """SNR of what a matrix is beside its mean, or of some of its rows."""
    return snr_db((A - A.mean())[part], (f.to_dense() - A.mean())[part])


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(4).normal(size=(72, 96))


@pytest.mark.parametrize("mean", [5.0, 1e3])
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_a_mean_costs_the_rest_next_to_nothing(noise, mean, shift):
    plain = factorize(noise, bits=1.9, shift=shift, **QUICK)
    f = factorize(mean + noise, bits=2.0, shift=shift, **QUICK)
    assert f.terms[0].k == 1 and f.bits_per_weight <= 2.0
    assert beside(mean + noise, f) > plain.snr(noise) - 0.4
    assert f.record["improving_flips_left"] == 0 and f.record["stages"][0] == 1
    error = f.record["objective_history"][-1]
    assert -10 * np.log10(error) == pytest.approx(f.snr(mean + noise), abs=0.5)


@pytest.mark.parametrize("size", [1e2, 1e5, 1e8])
def test_one_huge_entry_buries_no_other_row(noise, size):
    A = noise.copy()
    A[17, 3] = size
    rows = np.arange(len(A)) != 17
    f = factorize(A, bits=1.5, **QUICK)
    assert (
        snr_db(A[rows], f.to_dense()[rows]) > factorize(noise, bits=1.3, **QUICK).snr(noise) - 0.3
    )


def test_with_inputs_too(noise):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 96)) @ rng.normal(size=(96, 96)) + 2.0
    options = {"bits": 1.5, "inputs": X, **QUICK}
    one, f = factorize(9 + noise, terms=1, **options), factorize(9 + noise, **options)
    assert f.record["output_snr_db"] > one.record["output_snr_db"] + 2.0


def test_a_goal_with_inputs_is_reached_as_it_is_told(noise):
    X = np.random.default_rng(2).normal(size=(120, 96))  # few rows: much shrinkage
    f = factorize(9 + noise, snr=30.0, inputs=X, **QUICK)
    assert f.terms[0].k == 1 and f.record["output_snr_db"] >= 30.0


def test_of_rank_one_nothing_else_is_stored(noise):
    A = np.outer(noise[0, :40], noise[1, :30])
    f = factorize(A, bits=2.5, **QUICK)
    assert (f.k, f.record["stages"], f.record["converged"]) == (1, None, True)
    assert f.snr(A) > 120
    few = factorize(A, bits=0.7, **QUICK)  # not even floats of 16 bits fit
    assert few.k == 1 and few.bits_per_weight <= 0.7 and few.snr(A) > 30
    rows = np.repeat(noise[:1], 40, axis=0)
    assert factorize(rows, bits=1.0, **QUICK).bits_per_weight <= 1.0


def test_a_goal_counts_what_leads(noise):
    A = 60 + noise
    assert factorize(A, snr=20.0, **QUICK).k == 1
    f = factorize(A, snr=42.0, **QUICK)
    assert f.snr(A) >= 42.0 and f.terms[0].k == 1
    assert f.bits_per_weight < factorize(A, snr=42.0, terms=1, **QUICK).bits_per_weight


def test_the_better_is_kept_where_it_is_in_doubt():
    rng = np.random.default_rng(1)
    rows, columns = (np.exp(1.5 * rng.normal(size=s)) for s in ((64, 1), 64))
    A = rng.normal(size=(64, 64)) * rows * columns
    for bits in (1.0, 2.0):
        one = factorize(A, bits=bits, terms=1, **QUICK)
        assert factorize(A, bits=bits, **QUICK).snr(A) >= one.snr(A) - 1e-6
    one, f = (factorize(A, snr=15.0, **QUICK, **more) for more in ({"terms": 1}, {}))
    assert f.snr(A) >= 15.0 and f.bits_per_weight <= one.bits_per_weight


@pytest.mark.parametrize(
    "options", [{"k": 20}, {"bits": 2.0, "terms": 1}, {"bits": 2.0, "scale_bits": 16}]
)
def test_what_was_asked_for_stays_one_term(noise, options):
    assert len(factorize(5 + noise, **options, **QUICK).terms) == 1


@pytest.mark.parametrize(
    "budgets", [({"bits": 1.0}, {"bits": 1.05}), ({"snr": 6.0}, {"snr": 66.0})]
)
def test_widths_for_the_rest_are_those_of_the_rest_alone(noise, budgets, monkeypatch):
    seen = []

    def chosen(*given):
        seen.append(pilot.choose_widths(*given))
        return seen[-1]

    monkeypatch.setattr(size, "choose_widths", chosen)
    for A, budget in zip((noise, 1e3 + noise), budgets, strict=True):
        factorize(A, **budget, **QUICK)
    assert len(seen) == 2 and seen[0] == seen[1]
