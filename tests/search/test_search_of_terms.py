"""Searches for several terms: budgets, what they gain, when they are chosen."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diba_np import ConvergenceWarning, DiBAFactors, factorize
from diba_np.errors import BudgetError
from diba_np.machine.thread_pool import ThreadPool
from diba_np.matrix.budgets import storage_bits
from diba_np.search.options import SearchOptions
from diba_np.search.progress import Run
from diba_np.search.solver import Solver
from diba_np.search.stages import rest_of
from diba_np.search.target import Target
from diba_np.search.terms import count_terms, search_terms, spread_of, sum_within, term_sizes

# rows of very different size are the point here, and few bits lose the smallest

WIDTHS = st.one_of(st.sampled_from([16, 32]), st.tuples(*[st.integers(2, 8)] * 3))
QUICK = {"max_sweeps": 24, "threads": 1}


@pytest.fixture(scope="module")
def uneven():
    """Rows of very different size."""
    rng = np.random.default_rng(2)
    return rng.normal(size=(96, 80)) * np.exp(1.5 * rng.normal(size=(96, 1)))


@given(st.integers(1, 10**4), st.integers(1, 12))
def test_sizes_are_equal_and_add_up(k, count):
    sizes = term_sizes(k, count)
    assert sum(sizes) == k
    assert max(sizes) - min(sizes) <= 1


@given(
    st.integers(1, 200), st.integers(1, 200), st.lists(WIDTHS, min_size=1, max_size=5),
    st.integers(0, 10**6),
)  # fmt: skip
def test_as_many_components_as_the_bits_hold(m, n, widths, more):
    stored = sum(storage_bits(m, n, 1, own) for own in widths) + more
    sizes = sum_within(stored, (m, n), widths)
    assert min(sizes) >= 1

    def bits(found):
        return sum(storage_bits(m, n, k, own) for k, own in zip(found, widths, strict=True))

    assert bits(sizes) <= stored
    middle = [own[1] if isinstance(own, tuple) else own for own in widths]
    if len(set(middle)) == 1:
        assert bits(sizes) + m + n + middle[0] > stored
    with pytest.raises(BudgetError, match=r"terms take .* bits at least, the budget is"):
        sum_within(stored - more - 1, (m, n), widths)


def test_what_terms_leave_over_is_built_once_a_step(uneven, monkeypatch):
    built = []
    monkeypatch.setattr(
        "diba_np.search.terms.rest_of", lambda *a: built.append(len(a) - 1) or rest_of(*a)
    )
    with ThreadPool(1) as pool:
        how = SearchOptions(effort="fast", max_sweeps=2)
        search_terms(Target(uneven, pool), [4, 4, 4], [(3, 3, 3)] * 3, how, Run())
    assert built == [1, 2, 2, 2, 2]


def test_terms_are_counted_by_rate_shape_and_spread():
    differ, alike, equal = (0.4, 8.0, 0.4), (0.04, 1.0, 0.04), (0.02, 0.5, 0.02)
    rough = (1.2, 30.0, 1.2)
    square, tall = (512, 512), (2048, 512)
    counts = [count_terms(bits, square, differ, False) for bits in (0.5, 1, 1.6, 1.8, 3, 4, 6)]
    assert counts == [1, 1, 1, 2, 3, 3, 5]
    assert [count_terms(bits, tall, differ, False) for bits in (2, 2.6, 2.8, 4)] == [1, 1, 2, 2]
    assert [count_terms(bits, tall, differ, False, uneven=True) for bits in (2.8, 4)] == [3, 3]
    assert count_terms(2, (512, 2048), differ, False) == 1
    assert [count_terms(bits, square, alike, False) for bits in (2, 2.3, 2.7, 3)] == [1, 2, 2, 3]
    assert [count_terms(bits, tall, alike, False) for bits in (2.7, 2.8)] == [1, 2]
    assert count_terms(6, square, equal, False) == 1
    assert [count_terms(bits, square, differ, True) for bits in (3, 4)] == [1, 3]
    assert count_terms(4, (20, 16), differ, False) == 1  # too few components to balance
    # where rows of a wide matrix differ much, terms pay whatever its length
    assert [count_terms(bits, tall, rough, False) for bits in (1.6, 1.8, 3, 4)] == [1, 2, 3, 3]
    assert [count_terms(2, (24, 400), spread, False) for spread in (differ, rough)] == [1, 2]
    assert count_terms(3, tall, rough, True) == 1


def test_few_rows_of_unlike_size_are_worth_terms(rng):
    A = rng.normal(size=(24, 240)) * 10 ** rng.uniform(-2, 2, size=(24, 1))
    for matrix in (A, A.T):
        how = {"bits": 2.8, "effort": "fast", "threads": 1}
        chosen, single = (factorize(matrix, terms=count, **how) for count in ("auto", 1))
        assert len(chosen.terms) > 1 and chosen.bits_per_weight <= 2.8
        assert chosen.snr(matrix) > single.snr(matrix) + 1.5


@pytest.mark.parametrize("with_inputs", [False, True])
def test_small_matrices_are_searched_for_one_term_too(rng, with_inputs):
    A = rng.normal(size=(24, 20))
    weights = {"inputs": rng.normal(size=(90, 20))} if with_inputs else {}
    single, f = (factorize(A, bits=8.0, terms=terms, **QUICK, **weights) for terms in (1, "auto"))
    figure = "output_snr_db" if with_inputs else "snr_db"
    assert f.record[figure] >= single.record[figure]
    assert f.bits_per_weight <= 8


@pytest.mark.parametrize(("shape", "bits"), [((12, 12), 16.0), ((200, 3), 24.0), ((33, 4), 24.0)])
def test_no_more_terms_than_the_bits_hold(rng, shape, bits):
    A = rng.normal(size=shape)
    f = factorize(A, bits=bits, **QUICK)
    assert f.bits_per_weight <= bits
    assert f.snr(A) > 20
    assert factorize(A, snr=12.0, **QUICK).snr(A) >= 12


def test_terms_that_are_asked_for_and_a_budget_too_small(rng):
    A = rng.normal(size=(40, 30))
    f = factorize(A, snr=2.0, terms=3, **QUICK)
    assert len(f.terms) == 3
    assert f.snr(A) >= 2.0
    with pytest.raises(ValueError, match="3 terms take 1425 bits at least, the budget is 1080"):
        factorize(A, bits=0.9, terms=3)
    with pytest.raises(ValueError, match="terms must be at most k, got terms=3 for k=2"):
        factorize(A, k=2, terms=3)
    with pytest.raises(ValueError, match="snr=2 dB is not reached: k is to be 805 at least"):
        factorize(A[:8, :8], snr=2.0, terms=60)


def test_the_spread_of_rows_and_columns(rng):
    A = rng.normal(size=(300, 200))
    with ThreadPool(1) as pool:
        assert spread_of(Target(A, pool))[1] == pytest.approx(1, abs=0.2)
        Q = np.linalg.qr(rng.normal(size=(64, 64)))[0]
        assert spread_of(Target(Q, pool))[1] < 1e-6
        steep = A * np.exp(np.linspace(-1, 1, 200))
        assert spread_of(Target(steep, pool))[0] == pytest.approx(np.sqrt(1 / 3), rel=0.1)
        steep[7] = 0
        assert np.isfinite(spread_of(Target(steep, pool))).all()
        assert spread_of(Target(np.zeros((3, 4)), pool)) == (0.0, 0.0, 0.0)
        wide = A[:, :40].T * np.exp(np.linspace(-1, 1, 300))
        for one in (wide, wide.T):
            assert spread_of(Target(one, pool))[2] == pytest.approx(0.05, rel=0.1)
        assert spread_of(Target(wide, pool))[0] == pytest.approx(np.sqrt(1 / 3), rel=0.2)


def test_own_diagonals_gain_where_rows_differ(uneven):
    one = factorize(uneven, bits=3.0, scale_bits="auto", terms=1, **QUICK)
    f = factorize(uneven, bits=3.0, scale_bits="auto", terms="auto", **QUICK)
    assert len(one.terms) == 1
    assert len(f.terms) == 3
    assert f.bits_per_weight <= 3.0
    assert f.snr(uneven) > one.snr(uneven) + 1.0
    assert f.record["snr_db"] == pytest.approx(f.snr(uneven), abs=1e-3)
    assert f.record["stages"] == [term.k for term in f.terms]
    assert f.record["improving_flips_left"] == 0
    history = f.record["objective_history"]
    assert -10 * np.log10(history[-1]) == pytest.approx(f.snr(uneven), abs=0.1)
    same = factorize(uneven, bits=3.0, scale_bits="auto", terms="auto", max_sweeps=24, threads=2)
    np.testing.assert_array_equal(f.to_dense(), same.to_dense())


@pytest.mark.parametrize("options", [{"scale_bits": 16}, {"scale_bits": (4, 3, 4)}, {"shift": 0.5}])
def test_terms_as_asked_for(uneven, options):
    f = factorize(uneven, k=50, terms=3, **options, **QUICK)
    assert [term.k for term in f.terms] == [17, 17, 16]
    assert f.shift == options.get("shift", 0.0)
    if "scale_bits" in options:
        assert {term.scale_bits for term in f.terms} == {options["scale_bits"]}
    g = factorize(uneven, ratio=0.1, terms=2, **options, **QUICK)
    assert g.storage_ratio() <= 0.1
    assert g.snr(uneven) > 8


def test_what_is_stored_is_polished_once_more(uneven):
    f = factorize(uneven, bits=3.0, scale_bits=3, terms=2, **QUICK)
    cut = f.truncate(f.k - 8)
    assert [term.k for term in cut.terms] == [f.terms[0].k, f.terms[1].k - 8]
    adapted = f.truncate(f.k - 8, uneven)
    assert adapted.snr(uneven) > cut.snr(uneven) + 0.1
    assert [term.grids is None for term in adapted.terms] == [False, False]
    alone = f.truncate(f.terms[0].k, uneven)
    assert len(alone.terms) == 1
    with pytest.raises(ValueError, match=r"A must have shape \(96, 80\)"):
        f.truncate(f.k - 8, uneven.T)


def test_smooth_matrices_keep_the_better_way():
    i = np.arange(96)
    A = np.exp(-np.abs(i[:, None] - i) / 9.0) * (1 + 0.02 * i)
    best = factorize(A, bits=3.0, scale_bits="auto", terms="auto", **QUICK)
    for terms in (1, 3):
        other = factorize(A, bits=3.0, scale_bits="auto", terms=terms, **QUICK)
        assert best.snr(A) >= other.snr(A) - 1e-6


def test_a_single_term_of_16_bits_stays_as_it_is(rng):
    rows, columns = (np.exp(1.5 * rng.normal(size=s)) for s in ((128, 1), 128))
    A = rng.normal(size=(128, 128)) * rows * columns
    how = {"bits": 2.0, "scale_bits": "auto", **QUICK}
    one, best = factorize(A, terms=1, **how), factorize(A, terms="auto", **how)
    assert best.snr(A) >= one.snr(A) - 1e-6


def test_a_goal_in_decibels(uneven):
    f = factorize(uneven, snr=14.0, scale_bits="auto", terms=2, **QUICK)
    assert len(f.terms) == 2
    assert f.snr(uneven) >= 14.0


def test_a_k_is_searched_alike_whatever_was_tried_before(rng, monkeypatch):
    A, tried = rng.normal(size=(40, 32)), []
    monkeypatch.setattr(
        "diba_np.search.solver.search_terms",
        lambda target, sizes, *how: tried.append(sizes) or search_terms(target, sizes, *how),
    )
    found = []
    with ThreadPool(1) as pool:
        for ks in ([66], [60, 66]):
            how = SearchOptions(effort="fast", max_sweeps=3)
            solver = Solver(Target(A, pool), how, (4, 3, 4), None, Run())
            solver.set_terms(2, True, "snr", 18.0, 2)
            found.append([term.b1.tobytes() for term in [solver.at(k) for k in ks][-1].terms])
            assert solver.scale_bits != (4, 3, 4)  # a single term was tried too, in its own widths
    assert tried[0] == tried[2] and found[0] == found[1]


def test_with_inputs_the_first_term_has_finer_codes(uneven, rng):
    X = rng.normal(size=(300, 80)) * np.linspace(0.3, 2, 80)
    f = factorize(uneven, bits=3.5, scale_bits="auto", terms="auto", inputs=X, **QUICK)
    assert [term.scale_bits[0] for term in f.terms] == [8, 3, 3]
    assert f.bits_per_weight <= 3.5
    Y = X @ uneven.T
    noise = Y - X @ f.to_dense().T
    exact = 10 * np.log10(np.sum(Y**2) / np.sum(noise**2))
    assert f.record["output_snr_db"] == pytest.approx(exact, abs=1e-3)


def test_a_search_that_is_ended_returns_the_terms_begun(uneven):
    seen = []

    def end(state):
        seen.append(state.phase)
        return len(seen) > 10

    with pytest.warns(ConvergenceWarning, match="ended by callback"):
        f = factorize(uneven, bits=3.0, terms="auto", callback=end, **QUICK)
    assert 1 <= len(f.terms) < 3
    assert np.isfinite(f.to_dense()).all()
    assert f.record["stopped"] == "callback"
    with pytest.warns(ConvergenceWarning, match="; 40 of its 120 components were begun"):
        g = factorize(uneven, k=120, terms=3, time_limit=1e-6, threads=1)
    assert g.k == 40 and np.isfinite(g.to_dense()).all()


@pytest.mark.filterwarnings("ignore::diba_np.ConvergenceWarning")
def test_a_search_that_is_ended_keeps_to_the_bits_and_what_is_exact_stays_so(uneven, rng):
    how = {"bits": 3.0, "max_sweeps": 4, "threads": 1}
    for most in range(1, 24, 3):
        steps = iter(range(1, 99))
        end = partial(lambda s, at, _: next(s) >= at, steps, most)
        assert factorize(uneven, callback=end, **how).bits_per_weight <= 3.0
    A = np.outer(rng.normal(size=96), rng.normal(size=80))
    ended, whole = (factorize(A, callback=lambda _, e=end: e, **how) for end in (True, False))
    assert ended.snr(A) == pytest.approx(whole.snr(A))


@pytest.mark.parametrize(("shape", "bits"), [((40, 40), 4.0), ((64, 96), 2.5), ((50, 70), 1.5)])
@pytest.mark.parametrize("kind", ["constant", "two rows", "one row"])
def test_few_distinct_rows_of_rank_one_are_exact_within_the_bits(kind, shape, bits):
    first = np.arange(shape[0])[:, None]
    rows = {
        "constant": 0 * first + 3.7,
        "two rows": np.where(first % 3, 1.0, -2.0),
        "one row": first == 0,
    }[kind]
    A = rows * np.ones(shape)
    f = factorize(A, bits=bits, effort="fast", threads=1)
    assert f.bits_per_weight <= bits
    assert f.snr(A) > 100.0


@pytest.mark.parametrize("stored", [445, 600])
def test_rank_one_takes_coded_diagonals_where_the_bits_hold_no_finer(stored, rng):
    A = np.outer(rng.normal(size=33), rng.normal(size=17))
    f = factorize(A, bits=stored / A.size, **QUICK)
    assert f.storage_bits() <= stored
    assert f.snr(A) > 15.0


def test_the_bits_of_two_terms_are_a_budget_for_them(rng):
    A = rng.normal(size=(10, 17))
    how = {"terms": 2, "scale_bits": 3, **QUICK}
    f = factorize(A, k=4, **how)
    assert factorize(A, bits=f.bits_per_weight, **how).k == 4


@pytest.mark.parametrize("A", [np.ones((60, 50)), np.zeros((60, 50))])
def test_matrices_of_rank_one_need_one_term(A):
    f = factorize(A, bits=3.0, scale_bits="auto", terms=2, **QUICK)
    assert len(f.terms) == 1
    np.testing.assert_allclose(f.to_dense(), A, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"terms": 0}, ValueError, "terms must be"),
        ({"terms": 1.5}, TypeError, "terms must be"),
        ({"terms": "many"}, TypeError, "terms must be"),
        ({"terms": 9}, ValueError, "terms must be at most k, got terms=9 for k=8"),
        ({"terms": 2, "solver": "greedy"}, ValueError, 'terms must be 1 with solver="greedy"'),
    ],
)
def test_bad_terms(options, error, words):
    with pytest.raises(error, match=words):
        factorize(np.eye(12), k=8, **options)


def test_a_start_is_of_a_single_term(uneven):
    f = factorize(uneven, k=20, terms=2, **QUICK)
    with pytest.raises(ValueError, match="init must be of a single term, got a sum of 2"):
        factorize(uneven, k=20, init=f)
    with pytest.raises(ValueError, match="terms must be 1 with init="):
        factorize(uneven, k=10, terms=2, init=f.terms[0])
    assert isinstance(f.terms[0], DiBAFactors)
    assert SearchOptions().terms == "auto"
