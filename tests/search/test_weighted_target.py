"""Activations: every decision under H equals the full recomputation; every bad input."""

import itertools
import warnings

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from strategies import matrices

from diba_np import factorize, load
from diba_np.arrays import row_blocks
from diba_np.machine.thread_pool import ThreadPool
from diba_np.matrix.quality import output_snr_db
from diba_np.search import coupled, relaxation
from diba_np.search import weighted_target as activations
from diba_np.search import weights as gram
from diba_np.search.exact_steps import squared_error, update_d2, update_row_scales
from diba_np.search.greedy import solve_greedy
from diba_np.search.halves import Half, gauges
from diba_np.search.moves import FixedFlips, JointFlips, Walks
from diba_np.search.progress import Run
from diba_np.search.state import State
from diba_np.search.weighted_target import WeightedTarget

# the naive reference of a move over coupled columns, and the move by passes and shift
MOVES = {
    "sweep_columns_fixed": lambda passes, shift: FixedFlips(passes),
    "sweep_columns_joint": JointFlips,
    "tabu_columns": lambda passes, shift: Walks(12, 5, shift),
}


def gram_of(size, rng):
    """A Gram matrix of correlated channels."""
    X = rng.normal(size=(3 * size, size)) @ rng.normal(size=(size, size))
    return X.T @ X


def problem(seed, shift, m=8, n=7, k=4, whole=False):
    """A target with correlated inputs, and a random state; some channels and bits are dead.

    Components of B1 are independent of one another: no two flips can tie. With `whole` the outputs
    are weighed by a Gram matrix.
    """
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(m, n))
    X = rng.normal(size=(3 * n, n)) @ rng.normal(size=(n, n))
    w = gram_of(m, rng) if whole else rng.random(m) + 0.1
    state = State(
        d1=rng.normal(size=m),
        b1=rng.integers(0, 2, (m, k), dtype=np.uint8),
        d2=rng.normal(size=k),
        b2=rng.integers(0, 2, (n, k), dtype=np.uint8),
        d3=rng.normal(size=n),
        shift=shift,
    )
    while np.linalg.matrix_rank(state.b1 - shift) < k:
        state.b1[:] = rng.integers(0, 2, (m, k))
    if seed % 3 == 0:
        state.b2[0], state.d2[0], state.d3[1] = 0, 0.0, 0.0
    return A, X, w, state


def weighed_target(A, X, w, pool):
    return WeightedTarget(A, pool, gram.as_weights(X, None, w, A.shape, pool))


def plain(target):
    """(A, w, H) as the references take them; w is a matrix where outputs are weighed by one."""
    (_, A), *_ = target.blocks(np.float64)
    w = np.ones(target.shape[0]) if target.w is None else target.w
    return A, w if target.W is None else target.W, target.H


def own_and_other(target, state, left):
    """One side as the references take columns: (A, U, bits, scales, weights of U's side, H)."""
    a, w, H = plain(target)
    side = state.left if left else state.right
    U = side.other.scaled() * state.d2
    known = (side.bits, side.scales)
    return (a.T, U, *known, H, w) if left else (a, U, *known, w, H)


def dense(state):
    return naive.dense_fast(state.d1, state.b1, state.d2, state.b2.T, state.d3, state.shift)


# -- the steps, against brute force ----------------------------------------------------------------


@settings(max_examples=12)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 0.3]), st.integers(1, 3))
@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize(("whole", "left"), [(False, False), (True, False), (True, True)])
def test_every_decision_about_a_column_equals_its_naive_namesake(
    name, whole, left, seed, shift, passes
):
    A, X, w, state = problem(seed, shift, whole=whole)
    with ThreadPool(1) as pool, pytest.MonkeyPatch.context() as patch:
        patch.setattr(activations, "BLOCK", 3)  # columns within a block and across blocks
        target = weighed_target(A, X, w, pool)
        before = state.copy()
        side = state.left if left else state.right
        flips = target.sweep_coupled(side, MOVES[name](passes, shift))
        a, U, bits, scales, w, H = own_and_other(target, before, left)
        slack = activations.SLACK * target.energy / len(scales)
        how = (12, 5) if name == "tabu_columns" else (passes,)
        bits, scales, reference = getattr(naive, name)(a, U, bits, scales, shift, w, H, slack, *how)
        np.testing.assert_array_equal(side.bits, bits)
        np.testing.assert_allclose(side.scales, scales, rtol=1e-6, atol=1e-9)
        assert flips == reference.sum()
        assert squared_error(target, state) <= squared_error(target, before) + 1e-9


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.5]))
@pytest.mark.parametrize("whole", [False, True])
def test_closed_forms_are_minima_of_the_weighed_objective(whole, seed, shift):
    A, X, w, state = problem(seed, shift, whole=whole)
    with ThreadPool(1) as pool:
        target = weighed_target(A, X, w, pool)
        a, w, H = plain(target)
        steps = {
            "d1": lambda: update_row_scales(target, state.left),
            "d2": lambda: update_d2(target, state),
            "d3": lambda: update_row_scales(target, state.right),
        }
        for name, step in steps.items():
            before = naive.weighed_error(a, dense(state), w, H)
            step()
            error = naive.weighed_error(a, dense(state), w, H)
            assert error <= before + 1e-9
            assert error == pytest.approx(squared_error(target, state), rel=1e-9, abs=1e-9)
            for i, change in itertools.product(range(len(getattr(state, name))), (-1e-3, 1e-3)):
                getattr(state, name)[i] += change
                assert (
                    naive.weighed_error(a, dense(state), w, H) >= error * (1 - 1e-6) - 1e-8
                )  # the ridge of d2
                getattr(state, name)[i] -= change
        assert update_d2(target, state) == pytest.approx(squared_error(target, state), abs=1e-8)


def test_a_column_that_does_not_change_passes_nothing_on():
    A, X, w, state = problem(1, 0.0)
    with ThreadPool(1) as pool:
        target = weighed_target(A, X, w, pool)
        while target.sweep_coupled(state.right, FixedFlips(100)):
            pass
        done = state.copy()
        assert target.sweep_coupled(state.right, FixedFlips(1)) == 0
        np.testing.assert_array_equal(state.b2, done.b2)
        np.testing.assert_array_equal(state.d3, done.d3)


@pytest.mark.parametrize("name", MOVES)
def test_the_size_of_a_block_does_not_matter(name, monkeypatch):
    results = []
    for block in (1, 4, 64):
        A, X, w, state = problem(5, 0.0, m=20, n=30, k=9)
        monkeypatch.setattr(activations, "BLOCK", block)
        with ThreadPool(1) as pool:
            target = weighed_target(A, X, w, pool)
            target.sweep_coupled(state.right, MOVES[name](3, 0.0))
        results.append(state)
    for other in results[1:]:
        np.testing.assert_array_equal(results[0].b2, other.b2)
        np.testing.assert_allclose(results[0].d3, other.d3, rtol=1e-8)


# -- factorize -------------------------------------------------------------------------------------


def parts(f):
    return f.d1, f.b1.to_dense(), f.d2, f.b2.to_dense(), f.d3


def objective_of(A, X, w):
    with ThreadPool(1) as pool:
        weights = gram.as_weights(X, None, w, A.shape, pool)
    H = np.eye(A.shape[1]) if weights.gram is None else weights.regularised()
    if weights.output_gram is not None:
        return weights.output_gram, H
    return np.ones(len(A)) if weights.outputs is None else weights.outputs, H


@settings(max_examples=10)
@given(matrices(8), st.integers(1, 5), st.sampled_from([0.0, 0.5]), st.integers(0, 99))
@pytest.mark.parametrize("solver", ["greedy", "auto"])
@pytest.mark.parametrize("given_weights", ["inputs", "outputs", "both", "whole"])
def test_no_single_flip_improves_what_is_returned(solver, given_weights, A, k, shift, seed):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(20, A.shape[1])) @ rng.normal(size=(A.shape[1], A.shape[1]))
    w = gram_of(len(A), rng) if given_weights == "whole" else rng.random(len(A)) + 0.01
    X, w = X if given_weights != "outputs" else None, w if given_weights != "inputs" else None
    sweeps = 200 if solver == "greedy" else 30
    weights_given = {"inputs": X, "output_weight": w}
    f = factorize(
        A, k=k, solver=solver, shift=shift, seed=seed, max_sweeps=sweeps, threads=1, **weights_given
    )
    assert f.record["improving_flips_left"] == 0
    weights = objective_of(A, X, w)
    assert naive.improving_flips_weighed(A, *parts(f), f.shift, *weights, relative=1e-9) == 0


@settings(max_examples=20)
@given(matrices(10), st.integers(1, 6), st.sampled_from([0.0, 0.5]), st.integers(0, 99))
def test_greedy_objective_never_rises_at_any_half_step(A, k, shift, seed):
    rng = np.random.default_rng(seed)
    n = A.shape[1]
    X, w = rng.normal(size=(3 * n, n)) @ rng.normal(size=(n, n)), rng.random(len(A)) + 0.01
    with ThreadPool(1) as pool:
        target = weighed_target(A, X, w, pool)
        found = solve_greedy(target, k, shift=shift, rng=rng, max_sweeps=300, tol=0.0, run=Run())
        state, history = found.state, found.history
        assert all(after <= before + 1e-11 for before, after in itertools.pairwise(history))
        a, w, H = plain(target)
        error = naive.weighed_error(a, dense(state), w, H)
        assert error == pytest.approx(history[-1] * (target.energy or 1.0), abs=1e-6)


def correlated(n, rows, seed):
    """Inputs with a falling spectrum in a fixed rotated basis."""
    Q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(n, n)))
    rows_of = np.random.default_rng(seed).normal(size=(rows, n))
    return (rows_of / np.sqrt(np.arange(1, n + 1))) @ Q.T


@pytest.mark.parametrize(("solver", "gain"), [("auto", 1.5), ("greedy", 1.2)])
def test_inputs_raise_the_output_snr_on_other_inputs(solver, gain, attention):
    A = attention[:128, :128]
    X, other = correlated(128, 2000, 1), correlated(128, 2000, 2)
    f = factorize(A, k=64, solver=solver, inputs=X)
    without = factorize(A, k=64, solver=solver)
    assert output_snr_db(A, f, other) >= output_snr_db(A, without, other) + gain
    assert f.record["output_snr_db"] == pytest.approx(output_snr_db(A, f, X), abs=1e-4)
    assert f.record["snr_db"] == pytest.approx(f.snr(A), abs=1e-4)


def test_white_inputs_are_no_inputs(attention):
    A = attention[:64, :48]
    white = factorize(A, k=24, gram=np.eye(48))
    assert white.snr(A) == pytest.approx(factorize(A, k=24).snr(A), abs=0.3)


def test_a_gram_matrix_of_outputs_does_to_rows_what_that_of_inputs_does_to_columns(attention):
    A = attention[:96, :80]
    W, H = (np.cov(correlated(size, 2000, 5).T) for size in A.shape)

    def snr(f, W, H):
        E = A - f.to_dense()
        return 10 * np.log10(np.vdot(W @ A, A @ H) / np.vdot(W @ E, E @ H))

    f, turned = factorize(A, k=40, output_weight=W), factorize(A.T, k=40, gram=W).T
    assert snr(f, W, np.eye(80)) == pytest.approx(snr(turned, W, np.eye(80)), abs=0.3)
    both, diagonal = (factorize(A, k=40, gram=H, output_weight=w) for w in (W, np.diag(W)))
    assert snr(both, W, H) > snr(diagonal, W, H) + 1.5
    # weights on the diagonal alone are those of a vector
    w = np.linspace(0.5, 2, 96)
    f, g = (factorize(A, k=30, output_weight=given, seed=1) for given in (w, np.diag(w)))
    assert snr(f, np.diag(w), np.eye(80)) == pytest.approx(snr(g, np.diag(w), np.eye(80)), abs=0.3)


def test_output_weights_of_any_size(rng):
    A = rng.normal(size=(12, 10))
    f, g = (factorize(A, k=8, output_weight=np.full(12, w)) for w in (1.0, 1e307))
    np.testing.assert_array_equal(f.to_dense(), g.to_dense())


def test_output_weight_moves_the_error_to_outputs_that_count_less(attention):
    A = attention[:96, :80]
    w = np.ones(96)
    w[:20] = 30.0
    f, g = factorize(A, k=30, output_weight=w), factorize(A, k=30)
    error = [np.sum((A[:20] - h.to_dense()[:20]) ** 2) for h in (f, g)]
    assert error[0] < 0.9 * error[1]
    # rows that do not count are fitted all the same: d1 and B1 do not depend on their weight
    w[:20] = 0.0
    f = factorize(A, k=30, output_weight=w)
    assert np.sum((A[:20] - f.to_dense()[:20]) ** 2) < np.sum(A[:20] ** 2)


def same(f, g):
    return f.b1 == g.b1 and f.b2 == g.b2 and np.array_equal(f.d2, g.d2)


def test_inputs_of_every_kind_give_the_same_bits(tmp_path, rng):
    A = rng.normal(size=(12, 10))
    X = rng.normal(size=(50, 10)).astype(np.float32)
    f = factorize(A, k=4, inputs=X, max_sweeps=20)
    np.save(tmp_path / "X.npy", X)
    for inputs in (
        np.load(tmp_path / "X.npy", mmap_mode="r"),
        np.asfortranarray(X),
        X.tolist(),
        X.astype(np.float64),
    ):
        assert same(f, factorize(A, k=4, inputs=inputs, max_sweeps=20))
    H = X.astype(np.float64).T @ X
    f = factorize(A, k=4, gram=H, max_sweeps=20)
    for scale in (1.0, 1e30, 1e-30):
        g = factorize(A, k=4, gram=scale * H, max_sweeps=20)
        assert g.record["output_snr_db"] == pytest.approx(f.record["output_snr_db"], abs=0.1)


def test_inputs_are_read_in_blocks(monkeypatch, rng):

    X = rng.normal(size=(103, 6))
    monkeypatch.setattr(row_blocks, "__defaults__", (10 * 6,))
    with ThreadPool(1) as pool:
        np.testing.assert_allclose(gram.gram_of_inputs(X, pool), X.T @ X / 103, atol=1e-14)


@pytest.mark.parametrize("solver", ["auto", "greedy"])
@pytest.mark.parametrize("whole", [False, True])
def test_same_seed_same_bits_for_every_number_of_threads(whole, solver, attention):
    A, X = attention[:200, :150], correlated(150, 400, 0)
    how = {"inputs": X, "output_weight": np.cov(correlated(200, 500, 1).T) if whole else None}
    one, two = (
        factorize(A, k=60, solver=solver, threads=t, max_sweeps=10, tol=0.01, **how) for t in (1, 2)
    )
    assert same(one, two)


@pytest.mark.parametrize("whole", [False, True])
def test_a_memory_map_of_the_matrix_gives_the_same_bits(whole, tmp_path, rng):
    A = rng.normal(size=(20, 15)).astype(np.float32)
    np.save(tmp_path / "A.npy", A)
    mapped = np.load(tmp_path / "A.npy", mmap_mode="r")
    w = gram_of(20, rng) if whole else rng.random(20)
    with_weights = {"inputs": rng.normal(size=(40, 15)), "output_weight": w}
    f, g = (factorize(a, k=6, max_sweeps=20, **with_weights) for a in (A, mapped))
    assert same(f, g)


def test_init_and_snr_go_by_the_weighed_error(rng):
    A, X = rng.normal(size=(30, 24)), correlated(24, 200, 3)
    start = factorize(A, k=10, max_sweeps=20)
    better = factorize(A, k=10, init=start, inputs=X)
    assert better.record["output_snr_db"] > output_snr_db(A, start, X) + 0.5
    f = factorize(A, snr=4.0, max_sweeps=20, inputs=X)
    assert output_snr_db(A, f, X) >= 4.0 - 1e-3
    assert f.k < factorize(A, snr=4.0, max_sweeps=20).k


def test_record_tells_about_the_inputs(tmp_path, rng):
    import hashlib

    A, X, w = rng.normal(size=(8, 6)), rng.normal(size=(40, 6)), np.arange(8.0)
    f = factorize(A, k=3, inputs=X, output_weight=w, max_sweeps=5)
    assert f.record["activations"] == {
        "from": "inputs",
        "rows": 40,
        "sha256": hashlib.sha256(b"<f8 40 6 " + X.tobytes()).hexdigest(),
        "shrinkage": 0.075,  # 6 / (2 * 40)
        "ridge": 1e-4,
        "dead_channels": 0,
        "output_weight_sha256": hashlib.sha256(b"<f8 8 1 " + w.tobytes()).hexdigest(),
    }
    f.save(tmp_path / "f.h5")
    assert load(tmp_path / "f.h5").record == f.record
    assert "activations" not in factorize(A, k=3, max_sweeps=5).record
    g = factorize(A, k=3, gram=X.T @ X, max_sweeps=5)
    assert (g.record["activations"]["from"], g.record["activations"]["rows"]) == ("gram", None)


# -- what is warned about and what is refused ------------------------------------------------------


def test_few_rows_and_dead_channels_are_told(rng):
    A = rng.normal(size=(8, 6))
    with pytest.warns(UserWarning, match="inputs has 3 rows for 6 channels: too few"):
        factorize(A, k=3, inputs=rng.normal(size=(3, 6)), max_sweeps=5)
    X = rng.normal(size=(30, 6))
    X[:, [2, 4]] = 0
    with pytest.warns(UserWarning, match="has 2 channels that are always zero, the first at 2"):
        f = factorize(A, k=3, inputs=X, max_sweeps=5)
    assert np.isfinite(f.to_dense()).all()
    assert f.record["activations"]["dead_channels"] == 2
    assert f.record["improving_flips_left"] == 0
    with pytest.warns(UserWarning, match="gram has 1 channel that is always zero, the first at 0"):
        factorize(A, k=3, gram=np.diag([0.0, 1, 1, 1, 1, 1]), max_sweeps=5)


def test_correlations_are_shrunk_by_the_share_that_the_rows_ask_for(rng):
    rows, n = 40, 6
    X = rng.normal(size=(rows, n)) @ rng.normal(size=(n, n))
    H = X.T @ X / rows
    H /= np.diag(H).mean()
    share = n / (2 * rows)
    expected = (1 - share) * H + (share + 1e-4) * np.diag(np.diag(H))
    with ThreadPool(1) as pool:
        weights = gram.as_weights(X, None, None, (3, n), pool)
    np.testing.assert_allclose(weights.regularised(), expected, rtol=1e-12)


def test_one_row_and_one_channel(rng):
    A, X = rng.normal(size=(8, 6)), np.ones((1, 6))
    with pytest.warns(UserWarning, match="1 rows for 6"):
        f = factorize(A, k=3, inputs=X, max_sweeps=5)
    assert f.record["output_snr_db"] == pytest.approx(output_snr_db(A, f, X), abs=1e-3)
    assert f.record["output_snr_db"] > output_snr_db(A, factorize(A, k=3, max_sweeps=5), X) + 3
    factorize(rng.normal(size=(8, 1)), k=3, inputs=np.ones((1, 1)), max_sweeps=5)


A = np.random.default_rng(0).normal(size=(8, 6))
X = np.random.default_rng(1).normal(size=(30, 6))
NAN = X.copy()
NAN[3, 2] = np.nan
SKEW = np.eye(6)
SKEW[1, 4] = 0.5


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        ({"inputs": X, "gram": np.eye(6)}, TypeError, "at most one of inputs=, gram=, got both"),
        ({"inputs": NAN}, ValueError, r"inputs contains 1 non-finite entry; first at \(3, 2\)"),
        (
            {"inputs": X.T},
            ValueError,
            r"inputs must have shape \(N, 6\), one sample a row, got \(6",
        ),
        ({"inputs": X[0]}, ValueError, r"inputs must have shape \(N, 6\), .* got \(6,\)"),
        ({"inputs": X[:0]}, ValueError, r"inputs must have rows and columns, got shape \(0, 6\)"),
        ({"inputs": "x"}, TypeError, "inputs must be an array of real numbers"),
        ({"inputs": X * 1j}, TypeError, "inputs must be an array of real numbers, got dtype comp"),
        ({"inputs": X * 0}, ValueError, "inputs must not be all zero"),
        ({"gram": X}, ValueError, r"gram must have shape \(6, 6\), got \(30, 6\)"),
        ({"gram": SKEW}, ValueError, r"gram must be symmetric, got 0.5 at \(1, 4\) and 0 at"),
        ({"gram": np.eye(6) * np.nan}, ValueError, "gram contains 36 non-finite entries"),
        (
            {"gram": np.diag([1.0, 1, 1, 1, 1, -0.5])},
            ValueError,
            "gram must be positive semidefinite, got a smallest eigenvalue of -0.5",
        ),
        (
            {"gram": np.ones((6, 6)) - 0.9 * np.eye(6)},
            ValueError,
            "gram must be positive semidefinite, got a smallest eigenvalue of -0.9",
        ),
        ({"gram": -np.eye(6)}, ValueError, "smallest eigenvalue of -1"),
        ({"gram": np.zeros((6, 6))}, ValueError, "gram must not be all zero"),
        ({"output_weight": np.ones(6)}, ValueError, r"have shape \(8,\) or \(8, 8\), got \(6,"),
        ({"output_weight": -np.ones(8)}, ValueError, "finite and not negative, got -1 at 0"),
        ({"output_weight": [1, 1, 1, np.nan] * 2}, ValueError, "not negative, got nan at 3"),
        ({"output_weight": np.zeros(8)}, ValueError, "output_weight must not be all zero"),
        (
            {"output_weight": np.ma.masked_array(np.ones(8), np.arange(8) > 3)},
            ValueError,
            "output_weight must have no masked entries, got 4",
        ),
        (
            {"output_weight": csr_matrix(np.eye(8))},
            TypeError,
            r"got a sparse matrix; pass output_weight.toarray\(\)",
        ),
        ({"output_weight": ["x"] * 8}, TypeError, "output_weight must be an array of real"),
        ({"output_weight": [[1], [1, 2]]}, ValueError, "output_weight must be a vector or matrix"),
        ({"output_weight": np.eye(6)}, ValueError, r"have shape \(8,\) or \(8, 8\), got \(6, 6"),
        ({"output_weight": -np.eye(8)}, ValueError, "output_weight must be positive semidefinite"),
        ({"output_weight": np.zeros((8, 8))}, ValueError, "output_weight must not be all zero"),
        (
            {"output_weight": np.triu(np.ones((8, 8)))},
            ValueError,
            "output_weight must be symmetric",
        ),
        ({"output_weight": np.ones((8, 8)) * np.inf}, ValueError, "output_weight contains 64 non-"),
        ({"output_weight": np.ones((2, 2, 2))}, ValueError, "output_weight must have shape"),
    ],
)
def test_bad_weights_end_in_one_clear_sentence(args, error, words):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error, match=words) as caught:
            factorize(A, k=2, **args)
    assert "\n" not in str(caught.value)


def test_rounding_in_single_precision_is_no_error(rng):
    wide = rng.normal(size=(5, 40)).astype(np.float32)  # far from full rank
    H = (wide.T @ wide).astype(np.float32)
    H[3, 5] = np.nextafter(H[3, 5], np.float32(9))
    A = rng.normal(size=(8, 40))
    f = factorize(A, k=3, gram=H, max_sweeps=5)
    E = A - f.to_dense()
    reached = 10 * np.log10(np.sum((A @ wide.T) ** 2) / np.sum((E @ wide.T) ** 2))
    assert reached > 6.0
    assert f.record["output_snr_db"] == pytest.approx(reached, abs=1e-3)


# -- the start -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0.3, 1.0])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("left", [False, True])
def test_a_coupled_half_solves_its_regression(left, both, rank, rng, monkeypatch):
    """``C~ X G + rho X = Y + (C~ - C) N G + rho P`` holds after the last inner step."""
    monkeypatch.setattr(coupled, "POWER", 1.0)
    monkeypatch.setattr(coupled, "RANK", rank)
    A, X, w, _ = problem(1, 0.0, m=30, n=20, k=6, whole=left or both)
    with ThreadPool(1) as pool:
        target = weighed_target(A, X if both or not left else None, w, pool)
        plain = target.surrogate()
        axes = tuple(H if H is None else coupled._Axis(H) for H in map(target.coupling, (0, 1)))
        halves = tuple(
            Half(i, size, gauge, rng, pool)
            for i, (size, gauge) in enumerate(zip(A.shape, gauges(6), strict=True))
        )
        sides = coupled.CoupledSides(plain, axes, halves)
        schedule = relaxation.Schedule(1.0)  # penalty 1 in both inner steps
        own = 0 if left else 1
        sides.move(1 - own, schedule, 0.0)
        half, other = sides._seen[own], sides._seen[1 - own]
        before = half.half.X.astype(float)
        points = []
        blend, project = half.half.blend, half.half.project

        def spy_blend(rows, X, damping):
            points.append(X.astype(float))
            blend(rows, X, damping)

        def spy_project(pin):
            project(pin)
            points.append((2 * half.half.Z - half.half.Q).astype(float))

        half.half.blend, half.half.project = spy_blend, spy_project
        ridge = schedule.ridge
        sides.move(own, schedule, 0.0)
        N = other.half.X.astype(float)

        def correlations(axis):
            H = target.coupling(axis)
            if H is None:
                return np.eye(A.shape[axis])
            size = np.sqrt(np.diag(H))
            return H / np.outer(size, size)

        C, G = correlations(own), N.T @ correlations(1 - own) @ N
        np.testing.assert_allclose(np.diag(G), 1.0, atol=1e-5)
        G += ridge * np.eye(6)
        axis = axes[own]
        V = axis.top.astype(float)
        near = V * axis.lam @ V.T + axis.tail * (np.eye(len(V)) - V @ V.T)
        if rank == 1.0:
            np.testing.assert_allclose(near, C, atol=1e-5)
        assert np.linalg.eigvalsh(2 * near - C).min() > 0  # so that the steps converge
        (_, a), *_ = plain.blocks(np.float64)
        a = correlations(0) @ a @ correlations(1) / sides.target.unit
        Y = (a if left else a.T) @ N
        where = before * other.norm
        solved = near @ points[2] @ G + points[2]
        wanted = Y + (near - C) @ where @ G + points[1]
        np.testing.assert_allclose(solved, wanted, atol=2e-3 * np.abs(Y).max())


def test_the_start_knows_the_correlations(attention):
    A, X = attention[:96, :96], correlated(96, 3000, 1)
    with ThreadPool(1) as pool:
        target = weighed_target(A, X, None, pool)
        how = {"shift": 0.0, "iterations": 40}
        error = []
        for relax in (coupled.relax_coupled, diagonal_start):
            found = relax(target, 40, rng=np.random.default_rng(0), run=Run(), **how)
            error.append(squared_error(target, found.state))
    assert error[0] < 0.8 * error[1]


def diagonal_start(target, k, **how):
    """The start that knows the channels' sizes only."""
    plain = target.surrogate()
    found = relaxation.relax(plain, k, **how)
    plain.restore(found.state, target.unit)
    update_d2(target, found.state)
    return found


@pytest.mark.filterwarnings("ignore::diba_np.ConvergenceWarning")
def test_widths_are_chosen_by_the_error_of_the_outputs(rng):
    # channels from 1 to 1/96: d3 has to span them, which the weights alone do not tell
    A, X = rng.normal(size=(96, 96)), rng.normal(size=(1500, 96)) / np.arange(1, 97)
    how = {"bits": 2.0, "effort": "fast", "max_sweeps": 40}
    plain = factorize(A, scale_bits="auto", **how)
    f = factorize(A, scale_bits="auto", inputs=X, **how)
    other = factorize(A, scale_bits=plain.scale_bits, inputs=X, **how)
    assert f.bits_per_weight <= 2
    assert f.record["output_snr_db"] > other.record["output_snr_db"] + 0.3
