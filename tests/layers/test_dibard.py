"""retune: exact closed forms, never worse than its start, and every bad input."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from strategies import factors

from diba_np import DiBAFactors, DiBALinear, factorize, methods, retune
from diba_np.layers.diagonal_fit import DiagonalFit
from diba_np.training.losses import cross_entropy, mse
from diba_np.training.moments import LeastSquares, moments
from diba_np.training.samples import open_samples


def samples(rng, A, count=400, noise=0.1, offset=0.5):
    """Correlated inputs and the outputs of A on them, with an offset and noise."""
    n = A.shape[1]
    X = rng.normal(size=(count, n)) @ (rng.normal(size=(n, n)) / np.sqrt(n)) + 0.3
    return X, X @ A.T + offset + noise * rng.normal(size=(count, len(A)))


def loss_of(f, X, Y, loss=mse):
    return loss(DiBALinear(f, dtype=np.float64).forward(X), Y)[0]


@pytest.fixture
def problem(rng):
    A = rng.normal(size=(12, 10))
    return factorize(A, k=14, max_sweeps=50), *samples(rng, A)


@pytest.mark.parametrize("method", ["als", "lbfgs", "adam"])
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_every_method_improves_and_keeps_the_bits(method, shift, rng):
    A = rng.normal(size=(12, 10))
    f = factorize(A, k=14, shift=shift, max_sweeps=50)
    X, Y = samples(rng, A)
    g = retune(f, X, Y, method=method, learning_rate=0.05, steps=60, patience=60)
    assert g.b1 == f.b1
    assert g.b2 == f.b2
    assert g.scale_bits == 16
    assert loss_of(g, X, Y) < 0.75 * loss_of(f, X, Y)
    told = g.record["retune"]
    assert (told["method"], told["samples"], told["held_out"]) == (method, 400, 40)
    assert told["loss_after"] < told["loss_before"]
    assert g.record["solver"] == f.record["solver"]
    assert "retune" not in f.record


def test_methods_agree_where_the_problem_is_nearly_convex(problem):
    f, X, Y = problem
    als = retune(f, X, Y, validation=0, steps=300, patience=300)
    lbfgs = retune(f, X, Y, validation=0, method="lbfgs", steps=500, patience=500)
    assert loss_of(lbfgs, X, Y) == pytest.approx(loss_of(als, X, Y), rel=0.05)


@settings(max_examples=25)
@given(factors(st.integers(2, 6)), st.integers(0, 10**6))
def test_each_closed_form_lowers_the_exact_squared_error(f, seed):
    rng = np.random.default_rng(seed)
    X, Y = samples(rng, rng.normal(size=f.shape), count=30)
    data = moments([(X[:20], Y[:20]), (X[20:], Y[20:])], True, np.zeros(f.shape[0]))
    solver = LeastSquares(f, data, 0.0)

    (b1, b2) = solver.bits[0]

    def exact():
        dense = (solver.d["d1"][:, None] * b1 * solver.d["d2"]) @ (b2 * solver.d["d3"])
        np.testing.assert_allclose(solver.apply(X[0]), dense @ X[0], atol=1e-9)
        difference = (X - X.mean(0)) @ dense.T - (Y - Y.mean(0))
        error = float(np.sum(difference**2)) / 30
        assert data.error(dense) == pytest.approx(error, rel=1e-8, abs=1e-8 * data.yy)
        return error

    errors = [exact()]
    for _ in range(4):
        solver.sweep()
        errors.append(exact())
    # the small ridge may cost a little where a system is singular
    assert all(b <= a + 1e-5 * data.yy for a, b in itertools.pairwise(errors))


def test_d1_and_bias_solve_each_outputs_regression(problem):
    f, X, Y = problem
    g = retune(f, X, Y, steps=1, validation=0)
    # with d2 and d3 as they came out, d1 and bias are re-solved by the next first half-step
    t = (X * g.d3) @ g.b2.to_dense().T * g.d2 @ g.b1.to_dense().T
    for i in range(12):
        slope, bias = np.polyfit(t[:, i], Y[:, i], 1) if t[:, i].any() else (g.d1[i], 0)
        assert np.isfinite([slope, bias]).all()
    residual = Y - DiBALinear(g, dtype=np.float64).forward(X)
    np.testing.assert_allclose(residual.mean(0), 0, atol=0.02)


def test_memory_maps_and_other_dtypes_give_the_same(problem, tmp_path):
    f, X, Y = problem
    X, Y = X.astype(np.float32), Y.astype(np.float32)
    np.save(tmp_path / "X.npy", X)
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    a, b = retune(f, X, Y, seed=3), retune(f, mapped, Y, seed=3)
    np.testing.assert_array_equal(a.d2, b.d2)
    np.testing.assert_array_equal(a.bias, b.bias)


def test_never_worse_than_the_start(rng):
    A = rng.normal(size=(8, 8))
    f = factorize(A, k=10, max_sweeps=50)
    X = rng.normal(size=(50, 8))
    good = retune(f, X, X @ f.to_dense().T)  # the start is exact already
    Y = X @ f.to_dense().T
    assert loss_of(good, X, Y) <= loss_of(f, X, Y) + 1e-9
    for wild in ("adam", "lbfgs"):
        g = retune(f, X, Y, method=wild, learning_rate=10.0, steps=3, validation=0.5)
        told = g.record["retune"]
        assert told["loss_after"] <= told["loss_before"]


def test_a_start_of_coded_diagonals_that_is_kept_stays_as_it_was(rng):
    f = factorize(rng.normal(size=(20, 16)), k=10, scale_bits=(4, 3, 4), max_sweeps=30)
    X = rng.normal(size=(200, 16))
    Y = X @ f.to_dense().T + 0.01 * rng.normal(size=(200, 20))
    # better diagonals are near, but on grids of so few levels they are worse
    g = retune(f, X, Y, bias=False)
    assert g.record["retune"]["kept_step"] == 0
    assert (g.grids, g.storage_bits()) == (f.grids, f.storage_bits())
    np.testing.assert_array_equal(g.to_dense(), f.to_dense())


@pytest.mark.parametrize("unit", [1e-30, 1e-10, 1e6, 1e30])
def test_outputs_of_any_size_are_fitted_as_well(problem, unit):
    f, X, Y = problem[0], problem[1], problem[2]
    usual = retune(f, X, Y + 1).record["retune"]
    scaled = DiBAFactors(f.d1 * unit, f.b1, f.d2, f.b2, f.d3, f.shift)
    told = retune(scaled, X, (Y + 1) * unit).record["retune"]
    gains = [each["loss_after"] / each["loss_before"] for each in (usual, told)]
    assert gains[1] == pytest.approx(gains[0], rel=0.02)


@pytest.mark.parametrize("method", ["als", "lbfgs", "adam"])
def test_the_bias_is_that_of_the_rounded_diagonals(method, rng):
    A = rng.normal(size=(24, 16))
    X = rng.normal(size=(300, 16)) + 1.5
    Y = X @ A.T
    f = factorize(A, bits=3.0, scale_bits=3, terms=1, max_sweeps=30)
    g = retune(f, X, Y, method=method, validation=0)
    rest = Y - X @ g.to_dense().T
    least = np.mean(np.sum((rest - rest.mean(axis=0)) ** 2, axis=1))
    assert loss_of(g, X, Y) == pytest.approx(least, rel=1e-3)
    assert g.record["retune"]["loss_after"] == pytest.approx(loss_of(g, X, Y), rel=1e-3)


@pytest.mark.parametrize("method", ["als", "lbfgs"])
def test_a_bias_alone_is_kept_where_rounding_undoes_the_rest(method, rng):
    f = factorize(rng.normal(size=(20, 16)), k=10, scale_bits=(4, 3, 4), max_sweeps=30)
    X = rng.normal(size=(200, 16))
    Y = X @ f.to_dense().T + 3.0 + 0.01 * rng.normal(size=(200, 20))
    g = retune(f, X, Y, method=method)
    assert g.record["retune"]["kept_step"] == 0
    np.testing.assert_allclose(g.bias, 3.0, atol=0.02)
    np.testing.assert_array_equal(g.to_dense(), f.to_dense())


def test_a_bias_of_another_loss_is_fitted_to_the_rounded_diagonals(rng):
    A = rng.normal(size=(6, 16))
    X = rng.normal(size=(300, 16)) + 1.0
    labels = (X @ A.T).argmax(axis=1)
    f = factorize(A, bits=5.0, scale_bits=3, terms=1, max_sweeps=30)
    g = retune(f, X, labels, loss="cross_entropy", validation=0, learning_rate=0.02)
    assert loss_of(g, X, labels, cross_entropy) < 0.8 * loss_of(f, X, labels, cross_entropy)
    shares = np.exp(DiBALinear(g, dtype=np.float64).forward(X))
    shares /= shares.sum(axis=1, keepdims=True)
    # the gradient of the bias: of each class as many are expected as there are
    np.testing.assert_allclose(
        shares.mean(axis=0), np.bincount(labels, minlength=6) / 300, atol=0.01
    )


@pytest.mark.parametrize("method", ["lbfgs", "adam"])
@pytest.mark.parametrize(("unit", "of_outputs"), [(1e-6, 1), (1e4, 1), (1, 1e-24), (1, 1e20)])
def test_units_of_the_data_do_not_count(problem, method, unit, of_outputs):
    f, X, Y = problem
    options = {"method": method, "steps": 10}
    usual = retune(f, X, Y + 1, **options).record["retune"]
    f = DiBAFactors(f.d1 * of_outputs, f.b1, f.d2, f.b2, f.d3, f.shift)
    told = retune(f, X * unit, (Y + 1) * unit * of_outputs, **options).record["retune"]
    gains = [each["loss_after"] / each["loss_before"] for each in (usual, told)]
    assert gains[1] == pytest.approx(gains[0], rel=0.05)


def test_long_histories_are_thinned(problem, tmp_path):
    f, X, Y = problem[0], problem[1], problem[2]
    g = retune(f, X, Y, steps=600, patience=10**6)
    assert len(g.record["retune"]["history"]) <= 200
    assert g.save(tmp_path / "g.h5") < 20_000
    assert "snr_db" not in g.record  # it was of other diagonals


def test_stay_holds_the_diagonals(problem):
    f, X, Y = problem
    for method in ("als", "adam"):
        free = retune(f, X, Y, method=method)
        held = retune(f, X, Y, method=method, stay=1e4)

        def away(g):
            return np.linalg.norm(g.to_dense() - f.to_dense())

        assert away(held) < 0.3 * away(free)
        told = held.record["retune"]
        assert told["loss_after"] <= told["loss_before"]


def test_als_and_lbfgs_agree_on_the_objective_with_stay(problem):
    f, X, Y = problem
    als = retune(f, X, Y, validation=0, stay=0.3, steps=300, patience=300)
    lbfgs = retune(f, X, Y, validation=0, stay=0.3, method="lbfgs", steps=300, patience=300)
    a, b = (min(g.record["retune"]["history"]) for g in (als, lbfgs))
    assert a == pytest.approx(b, rel=0.01)


@pytest.mark.parametrize(
    ("loss", "labels"), [(mse, False), (cross_entropy, False), (cross_entropy, True)]
)
def test_gradients_of_the_objective_equal_central_differences(rng, loss, labels):
    """Loss and distance together, in float64, over several batches."""
    f = factorize(rng.normal(size=(4, 5)), k=3, max_sweeps=10)
    X = rng.normal(size=(23, 5))
    Y = rng.integers(0, 4, 23) if labels else rng.random((23, 4))
    fit = DiagonalFit(
        layer=DiBALinear(f, dtype=np.float64),
        samples=open_samples(X, Y, f.shape, labels, 0.3, 7, 0),
        loss=loss, bias=True, steps=1, learning_rate=1.0, schedule="cosine", clip=None,
        patience=1, callback=None,
    )  # fmt: skip
    fit.begin(0.5)
    for value in fit.layer.parameters.values():
        np.add(value, 0.1 * rng.normal(size=value.shape), out=value)
        assert value.dtype == np.float64
    fit.full_gradient()
    kept = {name: fit.gradient_unit * g for name, g in fit.layer.gradients.items()}
    for name, value in fit.layer.parameters.items():
        for at in range(value.size):
            slopes = []
            for step in (1e-5, -1e-5):
                value[at] += step
                slopes.append(fit.full_gradient() / (2 * step))
                value[at] -= step
            assert kept[name][at] == pytest.approx(sum(slopes), rel=1e-6, abs=1e-7)


def batches_of(X, Y, sizes=(100, 1, 150, 149)):
    cuts = np.cumsum(sizes)[:-1]
    return list(zip(np.split(X, cuts), np.split(Y, cuts), strict=True))


@pytest.mark.parametrize("method", ["als", "lbfgs", "adam"])
def test_batches_from_an_iterable_or_a_factory(problem, method):
    f, X, Y = problem
    options = {"method": method, "steps": 15, "learning_rate": 0.05}
    told = []
    for source in (batches_of(X, Y), lambda: iter(batches_of(X, Y))):
        g = retune(f, source, **options)
        told.append(g.record["retune"])
        assert loss_of(g, X, Y) < 0.8 * loss_of(f, X, Y)
        assert told[-1]["samples"] == 400
        assert 15 < told[-1]["held_out"] < 70
    assert told[0]["history"] == told[1]["history"]


def test_all_samples_as_batches_give_what_arrays_give(problem):
    f, X, Y = problem
    a = retune(f, X, Y, validation=0)
    b = retune(f, batches_of(X, Y), validation=0)
    np.testing.assert_allclose(a.to_dense(), b.to_dense(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        (np.ones((4, 3)), TypeError, "Y must be given"),
        (3, TypeError, "got X of type int"),
        (iter([]), TypeError, "again at every pass.*got a list_iterator"),
        ([], ValueError, "must yield at least one batch, got none"),
        ([np.ones((4, 3))], TypeError, r"must yield pairs \(x, y\), got a ndarray"),
        ([(np.ones((4, 5)), np.ones((4, 2)))], ValueError, r"X must have shape \(N, 3\)"),
    ],
)
def test_bad_batches(source, error, words):
    f = factorize(np.arange(6.0).reshape(2, 3), k=2)
    with pytest.raises(error, match=words):
        retune(f, source)


def test_batches_that_change_between_passes_are_refused(problem):
    f, X, Y = problem
    passes = iter([batches_of(X, Y), batches_of(X, Y)[:3]])
    with pytest.raises(ValueError, match="the same samples at every pass, got 400 and then 251"):
        retune(f, lambda: next(passes))


def test_a_loss_with_a_gradient_of_another_shape_is_refused(problem):
    f, X, Y = problem
    with pytest.raises(ValueError, match=r"gradient of shape \(40, 12\), got \(\)"):
        retune(f, X, Y, loss=lambda y_pred, y: (0.0, 1.0))
    for value in (np.ones(3), "low"):
        with pytest.raises(TypeError, match="with a number as value, got"):
            retune(f, X, Y, loss=lambda y_pred, y, value=value: (value, y_pred))
    for value in (0.0, (0.0,), None):
        with pytest.raises(TypeError, match=r"loss must return \(value, gradient\), got"):
            retune(f, X, Y, loss=lambda y_pred, y, value=value: value)


def test_without_bias(problem):
    f, X, Y = problem
    g = retune(f, X, Y, bias=False)
    assert g.bias is None
    with_bias = retune(f, X, Y)
    again = retune(with_bias, X, Y, bias=False)
    np.testing.assert_array_equal(again.bias, with_bias.bias)


@pytest.mark.parametrize("soft", [False, True])
def test_cross_entropy(rng, soft):
    A = rng.normal(size=(5, 12))
    f = factorize(A, k=10, max_sweeps=50)
    X = rng.normal(size=(600, 12))
    labels = (X @ A.T).argmax(axis=1)
    Y = np.eye(5)[labels] if soft else labels
    g = retune(f, X, Y, loss="cross_entropy", learning_rate=0.02)
    assert g.record["retune"]["method"] == "adam"
    assert loss_of(g, X, labels, cross_entropy) < 0.8 * loss_of(f, X, labels, cross_entropy)
    hits = [np.mean((h @ X.T).argmax(axis=0) == labels) for h in (f, g)]
    assert hits[1] > hits[0]


def test_a_loss_of_the_callers(problem):
    f, X, Y = problem

    def absolute(y_pred, y):
        away = y_pred - y
        return float(np.abs(away).sum()) / len(y), np.sign(away) / np.float32(len(y))

    g = retune(f, X, Y, loss=absolute, learning_rate=0.02)
    assert g.record["retune"]["loss"] == "absolute"
    assert loss_of(g, X, Y, absolute) < loss_of(f, X, Y, absolute)


def test_same_seed_same_result_and_the_callback_ends(problem):
    f, X, Y = problem
    a = retune(f, X, Y, method="adam", steps=3, seed=5)
    b = retune(f, X, Y, method="adam", steps=3, seed=5, threads=1)
    np.testing.assert_array_equal(a.d1, b.d1)
    seen = []
    retune(f, X, Y, method="adam", callback=lambda step, loss: seen.append(step) or step == 2)
    assert seen == [1, 2]


def test_training_that_is_ended_by_a_loss_that_is_not_finite_is_told(problem):
    f, X, Y = problem
    calls = []

    def loss(outputs, wanted):
        calls.append(len(outputs))
        value, gradient = mse(outputs, wanted)
        return (np.nan if len(calls) == 9 else value), gradient

    with pytest.warns(UserWarning, match=r"ended early, .* is kept \(epoch .*: the loss is nan"):
        g = retune(f, X, Y, loss=loss, steps=4, learning_rate=0.05, batch_size=100)
    assert g.record["retune"]["loss_after"] < g.record["retune"]["loss_before"]


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"f": 3}, TypeError, "f must be a DiBAFactors, got int"),
        (
            {"f": methods.fit("rtn", np.eye(8), 4.0)},
            TypeError,
            "got UniformRounding; scales of other methods are trained by .*as_layer",
        ),
        ({"X": np.ones((4, 5))}, ValueError, r"X must have .*\(N, 3\), .* got \(4, 5\)"),
        ({"Y": np.ones((4, 5))}, ValueError, r"Y must have .*\(N, 2\), .* got \(4, 5\)"),
        ({"Y": np.ones((5, 2))}, ValueError, "as many samples, got 4 and 5"),
        ({"X": np.full((4, 3), np.nan)}, ValueError, "X contains 12 non-finite entries"),
        ({"loss": "hinge"}, ValueError, "loss must be a callable or one of mse, cross_entropy"),
        ({"callback": 3}, TypeError, "callback must be callable, got int"),
        (
            {"loss": lambda y, t: (np.nan, y)},
            ValueError,
            "loss must be finite at the start, got nan",
        ),
        ({"method": "sgd"}, ValueError, "method must be one of als, lbfgs, adam, got 'sgd'"),
        ({"method": "als", "loss": mse}, ValueError, 'method="als" is for loss="mse"'),
        ({"validation": 1.0}, ValueError, r"validation must lie in \[0, 1\), got 1"),
        ({"schedule": "step"}, ValueError, "schedule must be one of cosine, constant, got 'step'"),
        ({"clip": 0}, ValueError, "clip must be"),
        (
            {"loss": "cross_entropy", "Y": np.ma.masked_array([0, 1, 1, 0], [0, 0, 1, 0])},
            ValueError,
            "Y must have no masked entries, got 1",
        ),
        ({"Y": csr_matrix(np.ones((4, 2)))}, TypeError, r"Y must .* pass Y.toarray\(\)"),
        ({"stay": -1}, ValueError, "stay must not be negative, got -1"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"loss": "cross_entropy", "Y": np.array([0, 1, 2, 0])}, ValueError, r"labels in \[0, 2\)"),
        ({"loss": "cross_entropy", "Y": np.ones(4)}, TypeError, "class labels as ints"),
    ],
)
def test_bad_inputs(changed, error, words):
    good = {
        "f": factorize(np.arange(6.0).reshape(2, 3), k=2),
        "X": np.ones((4, 3)),
        "Y": np.ones((4, 2)),
    }
    with pytest.raises(error, match=words):
        retune(**(good | changed))


@pytest.mark.parametrize("method", ["als", "lbfgs", "adam"])
def test_every_term_is_fitted(method, rng):
    A = rng.normal(size=(12, 10))
    first = factorize(A, k=9, max_sweeps=50, scale_bits=5)
    second = factorize(A - first.to_dense(), k=8, max_sweeps=50)
    f = DiBAFactors.from_terms([first, second], {"solver": "by hand"})
    X, Y = samples(rng, A)
    g = retune(f, X, Y, method=method, learning_rate=0.02, steps=60, patience=60)
    for one, other in zip(f.terms, g.terms, strict=True):
        assert (one.b1, one.b2, one.scale_bits) == (other.b1, other.b2, other.scale_bits)
        assert not np.array_equal(one.d1, other.d1)
    assert loss_of(g, X, Y) < 0.75 * loss_of(f, X, Y)
    assert g.record["solver"] == "by hand"
    kept = retune(
        g, X, Y, method=method, callback=lambda step, loss: True, steps=1, learning_rate=9
    )
    assert loss_of(kept, X, Y) <= loss_of(g, X, Y) * (1 + 1e-9)


def test_closed_forms_of_terms_lower_the_exact_squared_error(rng):
    A = rng.normal(size=(9, 8))
    first = factorize(A, k=6)
    f = DiBAFactors.from_terms([first, factorize(A - first.to_dense(), k=5)])
    X, Y = samples(rng, A, count=60)
    solver = LeastSquares(f, moments([(X, Y)], False, np.zeros(9)))
    layer = DiBALinear(f, dtype=np.float64)
    last = np.mean(np.sum((layer.forward(X) - Y) ** 2, axis=1))
    for _ in range(5):
        solver.sweep()
        for name, value in solver.d.items():
            layer.parameters[name][...] = value
        exact = np.mean(np.sum((layer.forward(X) - Y) ** 2, axis=1))
        assert exact <= last * (1 + 1e-9)
        np.testing.assert_allclose(solver.apply(X[0]), layer.forward(X[0]), atol=1e-8)
        last = exact
