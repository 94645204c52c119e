"""Arrays of every kind of number where a matrix, samples, weights or a Gram matrix is asked for."""

import numpy as np
import pytest

import diba_np as dn
from diba_np import methods
from diba_np.checks import as_matrix, as_real, as_samples
from diba_np.matrix.quality import output_snr_db
from diba_np.networks.layerwise import compress_layers

M, N, S = 12, 16, 40


@pytest.fixture
def problem(rng):
    """A matrix, samples and targets whose numbers bfloat16 holds exactly."""
    A, X = rng.integers(-8, 9, (M, N)) / 8.0, rng.integers(-8, 9, (S, N)) / 8.0
    Y = np.round(X @ A.T * 2) / 2
    return A, X, Y


def brain(array):
    return array.astype(pytest.importorskip("ml_dtypes", reason="needs ml_dtypes").bfloat16)


def equal(f, g):
    for name in ("d1", "d2", "d3"):
        np.testing.assert_array_equal(getattr(f, name), getattr(g, name))
    np.testing.assert_array_equal(f.b1.words, g.b1.words)


def test_bfloat16_is_taken_wherever_numbers_are(problem):
    A, X, _ = problem
    f = dn.factorize(A.astype(np.float32), k=8, inputs=X.astype(np.float32))
    equal(f, dn.factorize(brain(A), k=8, inputs=brain(X)))
    gram = np.round(X.T @ X)
    w = np.arange(1, M + 1) / 8
    g = dn.factorize(A, k=8, gram=gram.astype(np.float32), output_weight=w)
    equal(
        g, dn.factorize(brain(A), k=8, gram=brain(gram).astype(np.float32), output_weight=brain(w))
    )
    W = np.diag(w)
    equal(dn.factorize(A, k=8, output_weight=W), dn.factorize(A, k=8, output_weight=brain(W)))
    assert dn.snr_db(brain(A), f) == dn.snr_db(A, f)
    assert output_snr_db(brain(A), f, brain(X)) == output_snr_db(A, f, X)
    assert dn.PackedBits(brain(np.eye(3))).to_dense().tolist() == np.eye(3).tolist()
    h = dn.DiBAFactors(brain(np.ones(2)), np.eye(2), brain(np.ones(2)), np.eye(2), [1.0, 2.0])
    np.testing.assert_array_equal(h.to_dense(), np.diag([1.0, 2.0]))
    rounded = methods.fit("rtn", brain(A), 4.0, inputs=brain(X))
    np.testing.assert_array_equal(
        rounded.to_dense(), methods.fit("rtn", A, 4.0, inputs=X).to_dense()
    )


def test_retune_and_layers_take_bfloat16(problem):
    A, X, Y = problem
    f = dn.factorize(A, k=8)
    equal(dn.retune(f, X, Y), dn.retune(f, brain(X), brain(Y)))
    layer = dn.DiBALinear(f, bias=brain(np.ones(M)))
    np.testing.assert_array_equal(layer.forward(brain(X)), layer.forward(X.astype(np.float32)))
    assert layer.backward(brain(np.ones((S, M)))).shape == (S, N)

    def fit(name, target, gram):
        return dn.factorize(target, k=8, gram=gram)

    stages = [lambda state, linear: linear("a", state)]
    wide, narrow = (
        compress_layers(stages, {"a": weight}, [batch, batch], fit).layers["a"].to_matrix()
        for weight, batch in ((A.astype(np.float32), X.astype(np.float32)), (brain(A), brain(X)))
    )
    equal(wide, narrow)


def test_longdouble_becomes_float64_and_may_not_overflow_it(problem):
    A, _, _ = problem
    equal(dn.factorize(A, k=8), dn.factorize(A.astype(np.longdouble), k=8))
    if np.finfo(np.longdouble).max > np.finfo(np.float64).max:
        with pytest.raises(ValueError, match="A contains 1 non-finite entry"):
            as_matrix(np.array([[np.longdouble(10) ** 400]]))


@pytest.mark.parametrize("kind", [object, complex, "U2", "M8[s]", [("a", float)]])
def test_what_is_no_real_number_is_named(kind):
    for check in (as_real, as_matrix):
        with pytest.raises(TypeError, match="B must be an array of real numbers, got dtype"):
            check(np.zeros((2, 2), kind), "B")


# -- leading axes are samples ----------------------------------------------------------------------


def test_leading_axes_are_samples_in_every_fit(problem):
    A, X, Y = problem
    shaped, targets = X.reshape(5, 8, N), Y.reshape(5, 8, M)
    equal(dn.factorize(A, k=8, inputs=X), dn.factorize(A, k=8, inputs=shaped))
    f = dn.factorize(A, k=8)
    equal(dn.retune(f, X, Y), dn.retune(f, shaped, targets))
    assert output_snr_db(A, f, shaped) == output_snr_db(A, f, X)
    for label in ("gptq4", "rtn"):
        if label in methods.METHODS:
            flat, deep = (methods.fit(label, A, 6.0, inputs=inputs) for inputs in (X, shaped))
            np.testing.assert_array_equal(flat.to_dense(), deep.to_dense())
    rows, more = (
        dn.compare(A, bits=4.0, methods=["diba", "dbf"], inputs=inputs) for inputs in (X, shaped)
    )
    assert [row.output_snr for row in rows] == [row.output_snr for row in more]


def test_a_memory_map_of_three_axes_stays_one(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.zeros((2, 3, 4)))
    assert isinstance(as_samples(np.load(path, mmap_mode="r"), "X", 4), np.memmap)


@pytest.mark.parametrize("shape", [(5,), (5, 4), (2, 5, 4), ()])
def test_a_last_axis_of_another_width_is_named(shape):
    with pytest.raises(ValueError, match=r"X must have shape \(N, 5\), one sample a row, got"):
        as_samples(np.ones(shape), "X", 5)
