"""factorize: the figures it owes on real weights, exactness by brute force, every bad input."""

import itertools
import math
import time
import warnings

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import matrices

from diba_np import ConvergenceWarning, DiBAFactors, factorize, snr_db
from diba_np.arrays import row_blocks
from diba_np.errors import BudgetError, FormatError
from diba_np.search import solver
from diba_np.search.options import EFFORTS


def parts(f):
    return f.d1, f.b1.to_dense(), f.d2, f.b2.to_dense(), f.d3


def same_bits(f, g):
    return (
        f.b1 == g.b1
        and f.b2 == g.b2
        and all(np.array_equal(getattr(f, d), getattr(g, d)) for d in ("d1", "d2", "d3"))
    )


# -- quality ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shift", "least"), [(0.0, 6.45), (0.5, 6.57)])
def test_attention_matrix_at_k_192(attention, shift, least):
    f = factorize(attention, k=192, shift=shift)
    assert f.snr(attention) >= least
    assert f.snr(attention) == pytest.approx(f.record["snr_db"], abs=1e-4)
    assert f.record["converged"] is True


def test_greedy_reaches_what_single_flips_allow(attention):
    f = factorize(attention, k=192, solver="greedy")
    assert 3.9 <= f.snr(attention) <= 4.4
    assert f.record["improving_flips_left"] == 0
    assert f.record["converged"] is True


def test_a_budget_of_bits_holds_all_counted(attention):
    f = factorize(attention, bits=1.0, scale_bits=16, max_sweeps=20)
    assert f.k == 172
    assert f.scale_bits == 16
    assert f.bits_per_weight <= 1.0
    assert factorize(attention, ratio=1 / 32, scale_bits=16, max_sweeps=20).k == 172


def test_diagonals_are_coded_by_default_where_the_budget_counts_bits(attention):
    part = attention[:96, :96]
    for budget in ({"bits": 1.0}, {"ratio": 1 / 32}, {"snr": 5.0}):
        f = factorize(part, max_sweeps=20, **budget)
        auto = factorize(part, max_sweeps=20, scale_bits="auto", **budget)
        assert isinstance(f.scale_bits, tuple) and f.b1 == auto.b1 and f.k == auto.k
    assert factorize(part, k=30, max_sweeps=20).scale_bits == 16
    assert factorize(part[:24, :20], bits=2.0, solver="greedy").scale_bits == 16
    again = factorize(part, k=f.k, init=f, max_sweeps=20)
    assert again.scale_bits == f.scale_bits and again.snr(part) >= f.snr(part) - 1e-6


@pytest.mark.parametrize(("scale_bits", "least"), [((4, 3, 4), 6.25), ("auto", 6.25), (6, 6.1)])
def test_coded_diagonals_buy_components(attention, scale_bits, least):
    f = factorize(attention, bits=1.0, scale_bits=scale_bits, effort="fast")
    if scale_bits != "auto":
        assert f.scale_bits == (scale_bits if isinstance(scale_bits, tuple) else (6, 6, 6))
    assert f.bits_per_weight <= 1.0
    assert f.k > 172
    assert f.snr(attention) >= least - 0.1
    assert f.snr(attention) == pytest.approx(f.record["snr_db"], abs=1e-4)
    for name, grid in zip(("d1", "d2", "d3"), f.grids, strict=True):
        np.testing.assert_array_equal(grid.round(getattr(f, name)), getattr(f, name))
    again = factorize(attention, k=f.k, scale_bits=f.scale_bits, init=f)
    assert again.snr(attention) >= f.snr(attention) - 1e-6


def test_single_precision_diagonals(attention):
    f = factorize(attention[:64, :48], bits=3.0, scale_bits=32, max_sweeps=20)
    assert f.scale_bits == 32
    assert f.bits_per_weight <= 3.0


@settings(max_examples=25)
@given(matrices(9), st.integers(1, 6), st.integers(2, 8), st.sampled_from(["greedy", "auto"]))
def test_coded_diagonals_on_matrices_of_every_kind(A, k, width, solver):
    f = factorize(A, k=k, scale_bits=width, solver=solver, max_sweeps=30)
    assert f.scale_bits == (width,) * 3
    assert f.record["improving_flips_left"] == 0
    assert naive.improving_flips(A, *parts(f), f.shift, relative=1e-9) == 0
    if np.any(A):
        assert f.snr(A) >= -1e-6


@pytest.mark.parametrize("kind", ["zeros", "constant", "rank one", "1x1"])
def test_auto_widths_on_degenerate_matrices(kind):
    A = KINDS[kind]
    assert factorize(A, k=4, scale_bits="auto").snr(A) >= 25.0


def test_a_handful_of_entries_takes_floats_where_grids_are_too_much(rng):
    A = rng.normal(size=(4, 4))
    f = factorize(A, bits=12.0)
    assert (f.k, f.scale_bits) == (2, 16) and f.bits_per_weight == 11.0
    with pytest.raises(BudgetError, match=r"k=1 already takes bits=9\.5"):
        factorize(A, bits=9.0)
    with pytest.raises(BudgetError, match="2 terms take"):
        factorize(A, bits=12.0, terms=2)


def test_snr_budget_finds_the_smallest_k(rng):
    A = rng.normal(size=(40, 30))
    f = factorize(A, snr=4.0, max_sweeps=30)
    assert f.snr(A) >= 4.0
    assert factorize(A, k=f.k - 1, max_sweeps=30).snr(A) < 4.0


# -- exactness -------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(matrices(9), st.integers(1, 6), st.sampled_from([0.0, 0.5]), st.integers(0, 100))
@pytest.mark.parametrize("solver", ["greedy", "auto"])
def test_no_single_flip_improves_what_is_returned(solver, A, k, shift, seed):
    f = factorize(A, k=k, solver=solver, shift=shift, seed=seed, max_sweeps=200)
    assert f.record["improving_flips_left"] == 0
    assert naive.improving_flips(A, *parts(f), f.shift, relative=1e-9) == 0


def test_flips_that_gain_rounding_alone_come_to_an_end():
    rows = (
        [-9.621878601015665e-06, 3.390187684193642e-06, 1.6976032588446025e-05,
         -0.0054055176895840395, -0.003266902572063802],
        [6.331942487974872e-05, -5.6376727723298085e-06, -2.263885504890089e-05,
         -0.011490551515721864, 0.0020259884458554847],
    )  # fmt: skip
    for row in rows:
        f = factorize([row], k=2, solver="greedy", shift=0.5, seed=100, max_sweeps=200)
        assert f.record["converged"]
        assert f.record["improving_flips_left"] == 0


@settings(max_examples=25)
@given(matrices(), st.integers(1, 6), st.sampled_from([0.0, 0.5]))
def test_greedy_objective_never_rises_at_any_half_step(A, k, shift):
    # 32-bit diagonals hold every row that the search's float64 ones do
    f = factorize(A, k=k, solver="greedy", shift=shift, max_sweeps=300, scale_bits=32)
    history = f.record["objective_history"]
    assert all(after <= before + 1e-10 for before, after in itertools.pairwise(history))
    if np.any(A):
        error = np.sum((A - naive.dense_fast(*parts(f), shift)) ** 2) / np.sum(A**2)
        assert error <= history[-1] + 1e-5


def test_the_dense_form_equals_the_reference(rng):
    A = rng.normal(size=(13, 9))
    f = factorize(A, k=7, shift=0.5)
    np.testing.assert_allclose(f.to_dense(), naive.dense(*parts(f), 0.5), atol=1e-5)


@pytest.mark.parametrize("solver", ["auto", "greedy"])
def test_same_seed_same_bits_for_every_number_of_threads(solver, attention):
    A = attention[:200, :150]
    one = factorize(A, k=60, solver=solver, threads=1, max_sweeps=40)
    assert same_bits(one, factorize(A, k=60, solver=solver, threads=2, max_sweeps=40))
    assert not same_bits(one, factorize(A, k=60, solver=solver, seed=1, max_sweeps=40))


def test_the_global_random_state_is_not_touched(rng):
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    factorize(rng.normal(size=(8, 8)), k=3, max_sweeps=5)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


# -- inputs of every kind --------------------------------------------------------------------------


KINDS = {
    "1x1": np.array([[3.0]]),
    "1xn": np.arange(1.0, 41)[None],
    "mx1": np.arange(1.0, 41)[:, None],
    "zeros": np.zeros((8, 5)),
    "constant": np.full((30, 20), -2.5),
    "rank one": np.outer(np.arange(1.0, 20), np.arange(1.0, 16)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_that_the_format_holds_exactly(kind):
    assert factorize(KINDS[kind], k=4).snr(KINDS[kind]) >= 60.0


def test_of_rank_one_with_codes_a_search_goes_on_where_rounding_costs_more(rng):
    outer = np.outer(rng.normal(size=40), rng.normal(size=30))
    A = outer + 1e-4 * rng.normal(size=outer.shape)
    how = {"k": 30, "scale_bits": (4, 3, 4), "effort": "fast"}
    assert factorize(A, **how).snr(A) > 25.0  # the rank-one fit with these codes is at 18 dB
    assert factorize(outer, **how).snr(outer) > 25.0
    f = factorize(outer, **how, terms=2)
    assert len(f.terms) == 2 and f.snr(outer) > 25.0


@pytest.mark.parametrize("scale_bits", [32, 8])
def test_the_first_component_of_a_rank_one_fit_is_all_of_it(scale_bits):
    A = np.outer(np.where(np.arange(40) < 5, -1.25, 2.5), np.ones(30))  # codes hold it
    f = factorize(A, k=20, scale_bits=scale_bits)
    assert np.count_nonzero(f.d2) == 1
    assert f.truncate(1).snr(A) == f.snr(A) > 100.0


def test_the_rank_one_fit_is_what_a_search_falls_back_on(rng):
    A = np.outer(rng.normal(size=40), rng.normal(size=30)) + 0.1 * rng.normal(size=(40, 30))
    s = np.linalg.svd(A, compute_uv=False)
    best = 10 * np.log10(np.sum(s**2) / np.sum(s[1:] ** 2))
    assert factorize(A, k=2, scale_bits=32).snr(A) > best - 0.05


def test_every_k_that_is_tried_for_a_goal_has_the_rank_one_fit_to_fall_back_on():
    A = np.outer(np.linspace(-2.0, 3.0, 40), np.linspace(1.0, -2.0, 30))
    A += 0.03 * np.random.default_rng(0).normal(size=A.shape)  # it is at 35 dB
    assert factorize(A, snr=32.0, scale_bits=32, effort="fast").k == 1


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_takes_degenerate_matrices_too(kind):
    f = factorize(KINDS[kind], k=4, solver="greedy")
    assert f.record["improving_flips_left"] == 0
    assert f.snr(KINDS[kind]) >= 0.0


@pytest.mark.parametrize("unit", [1e30, 1e-30])
def test_magnitudes(unit, attention):
    A = attention[:64, :48].astype(np.float64)
    plain, scaled = factorize(A, k=30, max_sweeps=40), factorize(A * unit, k=30, max_sweeps=40)
    assert scaled.snr(A * unit) == pytest.approx(plain.snr(A), abs=0.05)
    assert scaled.scale_bits == 16
    x = np.ones(48, np.float32)
    y = scaled.to_dense().astype(np.float64) @ x / unit
    np.testing.assert_allclose((scaled @ x) / unit, y, atol=1e-4 * np.abs(y).max())


@pytest.mark.parametrize(
    "dtype", [np.float16, np.float32, np.int8, np.uint8, np.int64, ">f4", bool]
)
def test_dtypes(dtype, rng):
    A = (rng.normal(size=(20, 15)) * 20).astype(dtype)
    f = factorize(A, k=8, max_sweeps=30)
    assert f.snr(A) > 1
    assert f.record["source"]["dtype"] == str(A.dtype)


def test_layouts_give_the_same_bits(rng):
    A = rng.normal(size=(30, 40))
    base = factorize(A[::-1, ::2].copy(), k=9, max_sweeps=20)
    assert same_bits(base, factorize(A[::-1, ::2], k=9, max_sweeps=20))
    assert same_bits(base, factorize(np.asfortranarray(A[::-1, ::2]), k=9, max_sweeps=20))
    assert same_bits(base, factorize(A[::-1, ::2].tolist(), k=9, max_sweeps=20))


def test_a_read_only_memory_map_gives_the_same_bits(tmp_path, rng):
    A = rng.normal(size=(30, 40)).astype(np.float32)
    np.save(tmp_path / "A.npy", A)
    mapped = np.load(tmp_path / "A.npy", mmap_mode="r")
    assert same_bits(factorize(A, k=9, max_sweeps=20), factorize(mapped, k=9, max_sweeps=20))


def test_a_memory_map_is_never_held_whole(tmp_path, monkeypatch):

    m, n = 500, 300
    np.save(tmp_path / "A.npy", np.random.default_rng(0).normal(size=(m, n)))
    mapped = np.load(tmp_path / "A.npy", mmap_mode="r")
    taken = []
    plain = np.memmap.__getitem__

    def spy(self, at):
        part = plain(self, at)
        taken.append(np.size(part))
        return part

    monkeypatch.setattr(np.memmap, "__getitem__", spy)
    monkeypatch.setattr(row_blocks, "__defaults__", (64 * n,))
    f = factorize(mapped, k=5, max_sweeps=3, block_rows=50)
    assert f.snr(mapped) > 0
    assert max(taken) == 64 * n  # blocks are whole words


@pytest.mark.parametrize("shape", [(7, 3000), (3000, 7)])
def test_thin_matrices(shape, rng):
    A = rng.normal(size=shape)
    assert factorize(A, k=6, max_sweeps=30).snr(A) > 2


# -- control ---------------------------------------------------------------------------------------


def test_init_is_only_improved(attention):
    A = attention[:96, :80]
    start = factorize(A, k=30, max_sweeps=10)
    better = factorize(A, k=30, init=start)
    assert better.snr(A) >= start.snr(A) - 1e-6
    again = factorize(A, k=30, init=start, solver="greedy")
    assert again.snr(A) >= start.snr(A) - 1e-6
    with pytest.raises(ValueError, match=r"init must have shape \(96, 80\), k=31"):
        factorize(A, k=31, init=start)
    with pytest.raises(TypeError, match="init must be a DiBAFactors"):
        factorize(A, k=30, init="x")
    with pytest.raises(ValueError, match="init cannot be used with snr="):
        factorize(A, snr=3.0, init=start)


@pytest.mark.parametrize("solver", ["auto", "greedy"])
@pytest.mark.filterwarnings("ignore::diba_np.ConvergenceWarning")
def test_callback_can_end_a_stage_at_its_start(solver, rng):
    seen = []
    end = "greedy" if solver == "greedy" else "polish"
    A = rng.normal(size=(20, 20))
    f = factorize(A, k=8, solver=solver, callback=lambda s: seen.append(s) or s.phase == end)
    assert [s.step for s in seen if s.phase == end] == [0]
    assert f.record["stopped"] == "callback" and f.snr(A) > 0.0


def test_callback_sees_the_steps_and_can_end_the_search(rng):
    seen = []
    with pytest.warns(ConvergenceWarning, match="ended by callback"):
        f = factorize(
            rng.normal(size=(20, 20)), k=8, callback=lambda s: seen.append(s) or len(seen) == 5
        )
    assert [s.step for s in seen] == [1, 2, 3, 4, 5]
    assert {(s.phase, s.k, s.steps) for s in seen} == {("relaxation", 8, 128)}
    assert f.record["stopped"] == "callback"
    assert f.record["converged"] is False


def test_time_limit_returns_the_best_so_far(attention):
    factorize(attention[:50, :50], k=10, max_sweeps=5)  # compile
    started = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        f = factorize(attention, k=192, time_limit=0.5, max_sweeps=100000)
    assert time.monotonic() - started < 30
    assert f.snr(attention) > 3


def test_max_sweeps_of_the_greedy_solver_warns(attention):
    with pytest.warns(ConvergenceWarning, match="ended by max_sweeps=2"):
        f = factorize(attention[:100, :100], k=40, solver="greedy", max_sweeps=2)
    assert f.record["sweeps"] == 2


def test_progress_goes_to_standard_error(capsys, rng, monkeypatch):
    A = rng.normal(size=(20, 20))
    factorize(A, k=8, max_sweeps=5)
    assert capsys.readouterr() == ("", "")
    from diba_np.machine import display
    from diba_np.search import progress

    monkeypatch.setattr(display.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    factorize(A, k=8, max_sweeps=5, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[0].startswith("relaxation k=8: 1/5, ")


def test_record_tells_how_it_was_made(rng):
    A = rng.normal(size=(20, 15))
    f = factorize(A, k=8, seed=3, max_sweeps=30)
    import hashlib

    digest = hashlib.sha256(b"<f8 20 15 " + A.tobytes()).hexdigest()
    assert f.record["source"] == {"shape": [20, 15], "dtype": "float64", "sha256": digest}
    assert (f.record["solver"], f.record["seed"], f.record["max_sweeps"]) == ("auto", 3, 30)
    assert f.record["seconds"] >= 0
    assert set(f.record["versions"]) == {"diba_np", "python", "numpy", "scipy", "numba", "h5py"}
    assert f.record["snr_db"] == pytest.approx(snr_db(A, f), abs=1e-4)


GOOD = np.random.default_rng(0).normal(size=(6, 5))
NAN = GOOD.copy()
NAN[4, 1] = np.nan
NAN[5, :2] = np.inf


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        ({"A": NAN}, ValueError, r"A contains 3 non-finite entries; first at \(4, 1\)"),
        ({"A": NAN[:5]}, ValueError, r"A contains 1 non-finite entry; first at \(4, 1\)"),
        ({"A": GOOD[0]}, ValueError, r"A must be 2-D, got shape \(5,\)"),
        ({"A": GOOD[:0]}, ValueError, r"got shape \(0, 5\)"),
        ({"A": GOOD * 1j}, TypeError, "A must be an array of real numbers, got dtype complex128"),
        ({"A": np.array([[None]])}, TypeError, "got dtype object"),
        ({"A": [["a"]]}, TypeError, "got dtype <U1"),
        ({"A": [[1, 2], [3]]}, ValueError, "rectangular"),
        ({"A": GOOD * 1e50}, ValueError, r"largest magnitude in A must lie in"),
        ({"A": GOOD * 1e-50}, ValueError, r"largest magnitude in A must lie in"),
        ({"k": None}, TypeError, "exactly one of k=, bits=, ratio=, snr=, got none"),
        ({"bits": 2.0}, TypeError, "got k=2, bits=2.0"),
        ({"k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"k": 2.0}, TypeError, "k must be an int, got float"),
        ({"k": True}, TypeError, "k must be an int, got bool"),
        ({"k": None, "bits": 0.1}, ValueError, "bits=0.1 is too small for a 6 x 5 matrix"),
        ({"k": None, "bits": math.nan}, ValueError, "bits must be finite and above 0, got nan"),
        ({"k": None, "ratio": "x"}, TypeError, "ratio must be a number, got str"),
        ({"k": None, "snr": math.inf}, ValueError, "snr must be finite, got inf"),
        ({"solver": "best"}, ValueError, "solver must be one of auto, greedy, got 'best'"),
        ({"effort": 9}, ValueError, "effort must be one of fast, balanced, best, got 9"),
        ({"scale_bits": "all"}, ValueError, "scale_bits must be a number of bits or .auto., got"),
        ({"scale_bits": 1}, ValueError, "scale_bits must be 16, 32, an int in .2, 8. or three"),
        ({"shift": -0.5}, ValueError, r"shift must lie in \[0, 1\], got -0.5"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": None}, TypeError, "seed must be an int, got NoneType"),
        ({"max_sweeps": 0}, ValueError, "max_sweeps must be at least 1, got 0"),
        ({"tol": -1.0}, ValueError, "tol must not be negative, got -1"),
        ({"time_limit": 0}, ValueError, "time_limit must be finite and above 0, got 0"),
        ({"threads": 0}, ValueError, "threads must be at least 1, got 0"),
        ({"callback": 3}, TypeError, "callback must be callable, got int"),
    ],
)
def test_bad_inputs_end_in_one_clear_sentence(args, error, words):
    with pytest.raises(error, match=words) as caught:
        factorize(**({"A": GOOD, "k": 2} | args))
    assert not isinstance(caught.value, FormatError)
    assert "\n" not in str(caught.value)


def test_sparse_matrices_are_refused():
    from scipy.sparse import csr_matrix

    with pytest.raises(TypeError, match=r"pass A.toarray\(\)"):
        factorize(csr_matrix(GOOD), k=2)


def test_result_type_and_finite():
    f = factorize(GOOD, k=3)
    assert isinstance(f, DiBAFactors)
    assert f.k == 3
    assert np.isfinite(f.to_dense()).all()


@pytest.mark.filterwarnings("ignore::diba_np.ConvergenceWarning")
def test_a_search_for_a_goal_that_is_ended_returns_the_best_so_far(rng):
    A = rng.normal(size=(40, 30))
    f = factorize(A, snr=25.0, callback=lambda state: True)
    assert f.record["stopped"] == "callback"
    assert f.snr(A) < 25.0
    calls = []
    f = factorize(A, snr=8.0, callback=lambda state: calls.append(state.k) or len(set(calls)) > 3)
    assert len(set(calls)) <= 4
    assert f.k in calls


@pytest.mark.parametrize(("goal", "k"), [(2.0, 12), (50.0, 30)])
@pytest.mark.filterwarnings("ignore::diba_np.ConvergenceWarning")
def test_a_search_for_a_goal_that_is_ended_returns_the_least_k_that_reached_it(
    goal, k, rng, monkeypatch
):
    tried = (30, 12, 20)
    monkeypatch.setattr(solver.budgets, "smallest_k", lambda reach, *_: [reach(k) for k in tried])
    A = rng.normal(size=(40, 30))
    f = factorize(A, snr=goal, terms=1, max_sweeps=10, callback=lambda s: s.k == 20)
    assert (f.k, f.record["stopped"]) == (k, "callback")


@pytest.mark.parametrize("kind", [np.matrix, np.ma.masked_array])
@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_subclasses_of_arrays_are_arrays(rng, kind):
    A = rng.normal(size=(12, 9))
    f = factorize(A, k=5, max_sweeps=20)
    assert same_bits(factorize(kind(A), k=5, max_sweeps=20), f)
    assert f.snr(kind(A)) == f.snr(A)
    with pytest.raises(ValueError, match="A must have no masked entries, got"):
        factorize(np.ma.masked_array(A, mask=A > 1), k=5)
    with pytest.raises(TypeError, match="A must be an array of real numbers, got dtype complex"):
        f.snr(A + 1j)


def test_max_sweeps_limits_the_search_also_where_it_is_the_usual_number():
    # a falling spectrum is searched for longer, unless the caller sets a limit
    A = 0.9 ** np.abs(np.subtract.outer(np.arange(64), np.arange(64)))
    usual = EFFORTS["balanced"].iterations
    sweeps = [
        factorize(A, k=30, max_sweeps=limit).record["sweeps"]
        for limit in (usual - 1, usual, usual + 1, None)
    ]
    assert max(sweeps[:3]) < usual + 20 < sweeps[3]
