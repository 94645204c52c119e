"""Methods fitted alike, and the choice among them by pilots."""

import numpy as np
import pytest

import diba_np as dn
from diba_np.errors import BudgetError
from diba_np.methods import weighted
from diba_np.methods.weighted import (
    CHOICES,
    FitOptions,
    best_of,
    fit_weighted,
    nearest,
    part_of,
    weighted_error,
)


@pytest.fixture
def problem(rng):
    X = rng.normal(size=(300, 40)) @ (rng.normal(size=(40, 40)) / np.arange(1, 41)[:, None])
    return rng.normal(size=(48, 40)), X.T @ X / 300, np.where(np.arange(48) % 4, 0.5, 4.0)


@pytest.mark.parametrize("method", ["diba", "linear-trellis", "trellis", "gptq", "rtn"])
def test_every_method_heeds_the_gram_matrix(problem, method):
    A, H, w = problem
    how = FitOptions(seed=1, threads=1, effort="fast")
    plain, fitted, weighed = (
        fit_weighted(method, A, 2.5, gram, outputs, how)
        for gram, outputs in ((None, None), (H, None), (H, w))
    )
    assert max(f.bits_per_weight for f in (plain, fitted, weighed)) <= 2.5
    lost = [weighted_error(A - f.to_dense(), H) for f in (plain, fitted)]
    assert lost[1] < (1.0 if method == "rtn" else 0.9) * lost[0] + 1e-9
    if method in weighted.FITS:
        lost = [weighted_error(A - f.to_dense(), H, w) for f in (fitted, weighed)]
        assert lost[1] < lost[0]


def test_weighted_errors(problem):
    A, H, w = problem
    assert weighted_error(A) == pytest.approx(np.sum(A**2))
    assert weighted_error(A, H, w) == pytest.approx(np.trace(np.diag(w) @ A @ H @ A.T))


def test_pilots_that_are_near_do_not_decide():
    assert nearest({"a": 1.0, "b": 1.1, "c": 1.2}) == ["a", "b"]
    assert nearest({"a": 0.0, "b": 0.1}) == ["a"]


def test_best_is_the_better_at_each_rate(problem, rng):
    A, H, w = problem
    how = FitOptions(threads=1, effort="fast")
    for bits in (0.8, 1.5, 3.0):
        errors = {
            method: weighted_error(A - fit_weighted(method, A, bits, H, w, how).to_dense(), H, w)
            for method in (*CHOICES, "best")
        }
        assert errors["best"] <= 1.15 * min(errors.values())
    assert fit_weighted("best", A, 3.0, how=how).method == "linear-trellis"
    binary = rng.integers(0, 2, (48, 6)) @ rng.integers(0, 2, (6, 40))
    assert fit_weighted("best", binary + 0.1 * A, 1.0, how=how).method == "diba"


def test_best_knows_what_bits_a_method_has_no_use_for(problem):
    A = problem[0]
    how = FitOptions(threads=1, effort="fast")
    trellis, diba = (fit_weighted(method, A, 9.0, how=how) for method in ("linear-trellis", "diba"))
    assert trellis.bits_per_weight < 5.0 and diba.snr(A) > trellis.snr(A) + 5.0
    assert fit_weighted("best", A, 9.0, how=how).method == "diba"


def test_the_best_of_methods_leaves_out_those_the_bits_are_too_few_for_and_no_others(problem):
    A = problem[0]
    with pytest.raises(ValueError, match="solver must be"):
        best_of(CHOICES, A, 2.0, None, None, FitOptions(search={"solver": "zip"}))
    assert best_of(("svd8", "rtn"), A, 0.4, None, None, FitOptions()).method == "svd"
    assert best_of(("rtn", "svd8"), A, 0.4, None, None, FitOptions()).method == "svd"
    with pytest.raises(BudgetError, match="bits must be at least"):
        best_of(("rtn", "svd8"), A, 0.01, None, None, FitOptions())


def test_a_part_stands_for_the_whole(rng):
    A = rng.normal(size=(700, 300))
    A[5] *= 40
    H = np.diag(np.where(np.arange(300) == 7, 500.0, 1.0))
    w = rng.random(700)
    part, inner = part_of(A, H, w)
    assert part.shape == (256, 256) and inner.shape == (256, 256)
    whole = weighted_error(A, H, w)
    assert weighted_error(part, inner) == pytest.approx(whole, rel=0.1)
    small, none = part_of(A[:30, :20], None)
    np.testing.assert_array_equal(small, A[:30, :20])
    assert none is None


def test_options_of_a_search_reach_it(problem):
    made = fit_weighted("diba", problem[0], 1.0, how=FitOptions(search={"solver": "greedy"}))
    assert isinstance(made, dn.DiBAFactors) and made.record["solver"] == "greedy"


def test_methods_that_take_inputs_take_a_singular_gram():
    rng = np.random.default_rng(0)
    A, X = rng.normal(size=(24, 32)), rng.normal(size=(8, 32))
    f = fit_weighted("gptq", A, 3.0, X.T @ X / 8)
    plain = fit_weighted("gptq", A, 3.0)
    assert np.linalg.norm(X @ (A - f.to_dense()).T) < np.linalg.norm(X @ (A - plain.to_dense()).T)


def test_best_takes_the_method_that_the_bits_pay_for(rng):
    A = np.outer(rng.choice([-1.0, 1.0], 33), rng.choice([-1.0, 1.0], 17))  # exact by DiBA
    how = FitOptions(0, 1, "fast")
    least = weighted.least_bits("diba", A.shape, how, False)
    methods = [fit_weighted("best", A, bits / A.size, how=how).method for bits in (least - 1, 460)]
    assert methods == ["linear-trellis", "diba"]
    with pytest.raises(BudgetError):
        fit_weighted("diba", A, (least - 1) / A.size, how=how)


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize(
    "method",
    [
        "diba",
        "random",
        "sign",
        "rtn",
        "nf",
        "gptq",
        "bitat",
        "bqq",
        "svd8",
        "svd16",
        "qswd",
        "linear-trellis",
        "best",
    ],
)
def test_the_least_bits_are_those_of_the_smallest_fit(method, gram, rng):
    A, H = rng.normal(size=(33, 17)), np.cov(rng.normal(size=(17, 60))) if gram else None
    for looked_up in (False, True) if method == "linear-trellis" else (False,):
        how = weighted.FitOptions(0, 1, "fast", 8, looked_up)
        least = weighted.least_bits(method, A.shape, how, gram)
        made = weighted.fit_weighted(method, A, least / A.size * (1 + 1e-12), H, None, how)
        assert made.storage_bits() <= least
        with pytest.raises(BudgetError):
            weighted.fit_weighted(method, A, (least - 1) / A.size, H, None, how)
