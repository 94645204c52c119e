"""DiBALinear: its gradients are the central differences of its own output."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import factors, sums

from diba_np import DiBAFactors, DiBALinear, factorize
from diba_np.matrix.quality import without_figures

SMALL = st.integers(1, 7)


@given(factors(SMALL) | sums(SMALL), st.integers(0, 10**6))
def test_forward_is_the_product_plus_bias(f, seed):
    rng = np.random.default_rng(seed)
    layer = DiBALinear(f, bias=rng.normal(size=f.shape[0]), dtype=np.float64)
    x = rng.normal(size=(2, 3, f.shape[1]))
    expected = x @ f.to_dense().astype(float).T + layer.parameters["bias"]
    np.testing.assert_allclose(layer.forward(x), expected, atol=1e-5)
    np.testing.assert_allclose(layer.forward(x[0, 0]), expected[0, 0], atol=1e-5)


@given(factors(SMALL) | sums(SMALL), st.integers(0, 10**6))
def test_gradients_equal_central_differences(f, seed):
    rng = np.random.default_rng(seed)
    layer = DiBALinear(f, bias=rng.normal(size=f.shape[0]), dtype=np.float64)
    x, weight = rng.normal(size=(4, f.shape[1])), rng.normal(size=(4, f.shape[0]))

    def loss():
        y = layer.forward(x)
        return float(np.sum(weight * y**2))

    gx = layer.backward(2 * weight * layer.forward(x))
    for name, array in (*layer.parameters.items(), ("x", x)):
        gradient = gx if name == "x" else layer.gradients[name]
        for at in np.ndindex(array.shape):
            kept, step = array[at], 1e-6
            array[at] = kept + step
            above = loss()
            array[at] = kept - step
            below = loss()
            array[at] = kept
            slope = (above - below) / (2 * step)
            assert gradient[at] == pytest.approx(slope, rel=1e-5, abs=1e-6 * max(1, abs(loss())))


def test_gradients_add_up_until_zeroed(rng):
    layer = DiBALinear(factorize(rng.normal(size=(5, 4)), k=3))
    x, g = rng.normal(size=(2, 4)), rng.normal(size=(2, 5))
    layer.forward(x)
    layer.backward(g)
    once = {name: value.copy() for name, value in layer.gradients.items()}
    layer.backward(g)
    for name, value in once.items():
        np.testing.assert_allclose(layer.gradients[name], 2 * value, rtol=1e-5, atol=1e-6)
    layer.zero_grad()
    assert not any(value.any() for value in layer.gradients.values())


def test_to_factors_keeps_the_bits_and_carries_the_bias(rng):
    f = factorize(rng.normal(size=(6, 5)), k=3)
    layer = DiBALinear(f)
    assert layer.to_factors().bias is None
    assert layer.to_factors().record == f.record
    layer.parameters["bias"][:] = 0.25
    layer.parameters["d1"] *= 3
    g = layer.to_factors()
    assert g.b1 == f.b1
    assert g.scale_bits == 16
    assert g.record == without_figures(f.record) | {"retuned": True}
    np.testing.assert_array_equal(g.bias, np.full(6, 0.25, np.float32))
    np.testing.assert_allclose(g.to_dense(), 3 * f.to_dense(), rtol=2e-3)
    np.testing.assert_array_equal(DiBALinear(g).parameters["bias"], g.bias)


@given(factors(), st.integers(0, 10**6))
def test_what_has_been_rounded_stays_as_it_is(f, seed):
    layer = DiBALinear(f)
    rng = np.random.default_rng(seed)
    for name in ("d1", "d2", "d3"):
        layer.parameters[name] *= rng.uniform(0.5, 2)
    once = layer.rounded()
    np.testing.assert_array_equal(
        once.rounded().to_matrix().to_dense(), once.to_matrix().to_dense()
    )


def test_to_factors_keeps_the_widths_of_coded_diagonals(rng):
    f = factorize(rng.normal(size=(30, 25)), k=20, scale_bits=(5, 4, 5), max_sweeps=30)
    layer = DiBALinear(f)
    same = layer.to_factors()
    assert same.grids == f.grids
    np.testing.assert_array_equal(same.to_dense(), f.to_dense())
    layer.parameters["d1"] *= 3
    g = layer.to_factors()
    assert (g.scale_bits, g.storage_bits()) == (f.scale_bits, f.storage_bits())
    assert np.linalg.norm(g.d1 - 3 * f.d1) < 0.1 * np.linalg.norm(3 * f.d1)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda f: DiBALinear(3), TypeError, "factors must be a DiBAFactors, got int"),
        (lambda f: DiBALinear(f, bias=[1]), ValueError, r"bias must have shape \(2,\), got \(1,\)"),
        (lambda f: DiBALinear(f, dtype=int), TypeError, "dtype must be float32 or float64"),
        (lambda f: DiBALinear(f, unpack=3), ValueError, "unpack must be True, False or"),
        (lambda f: DiBALinear(f).forward(np.ones(3)), ValueError, r"x must have shape \(..., 2\)"),
        (
            lambda f: DiBALinear(f).forward([1j, 1]),
            TypeError,
            "x must hold real numbers, got dtype",
        ),
        (
            lambda f: DiBALinear(f, bias=[np.nan, 1]),
            ValueError,
            "bias must hold finite real numbers",
        ),
        (lambda f: DiBALinear(f).backward(np.ones(2)), ValueError, "needs a forward before"),
    ],
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call(DiBAFactors([1, 1], np.eye(2), [1, 1], np.eye(2), [1, 1]))


def test_backward_wants_as_many_samples(rng):
    layer = DiBALinear(factorize(rng.normal(size=(3, 3)), k=2))
    layer.forward(np.ones((2, 3)))
    with pytest.raises(ValueError, match="must hold 2 samples as x did, got 3"):
        layer.backward(np.ones((3, 3)))


@given(factors(), st.integers(0, 10**6))
def test_unpacked_and_packed_products_agree(f, seed):
    rng = np.random.default_rng(seed)
    x, g = (rng.normal(size=(5, size)) for size in f.shape[::-1])
    layers = [DiBALinear(f, dtype=np.float64, unpack=unpack) for unpack in (True, False)]
    assert [layer.unpacks(5) for layer in layers] == [True, False]
    outputs = [(layer.forward(x), layer.backward(g)) for layer in layers]
    for one, other in zip(*outputs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)
    for name, gradient in layers[0].gradients.items():
        np.testing.assert_allclose(gradient, layers[1].gradients[name], rtol=1e-9, atol=1e-8)


def test_auto_unpacks_small_layers_only(rng):
    def layer(size, k, **options):
        b = rng.integers(0, 2, (size, k))
        return DiBALinear(DiBAFactors(np.ones(size), b, np.ones(k), b.T, np.ones(size)), **options)

    assert [layer(256, 100).unpacks(size) for size in (1, 8)] == [True, False]
    assert [layer(256, 150).unpacks(size) for size in (256, 2048)] == [False, True]
    assert not layer(1024, 600).unpacks(10**6)
    assert layer(256, 1000, dtype=np.float64).unpacks(1)
    made = layer(256, 150)
    x = rng.normal(size=(2048, 256)).astype(np.float32)
    np.testing.assert_allclose(made(x)[:100], made(x[:100]), rtol=1e-4, atol=1e-2)


def test_twins_share_parameters_and_remember_their_own_inputs(rng):
    layer = DiBALinear(factorize(rng.normal(size=(4, 4)), k=3), dtype=np.float64)
    places = [layer, layer.twin()]
    x = rng.normal(size=(2, 3, 4))
    for place, part in zip(places, x, strict=True):
        place.forward(part)
    for place in places:
        place.backward(np.ones((3, 4)))
    both = DiBALinear(layer.factors, dtype=np.float64)
    both.forward(x)
    both.backward(np.ones((2, 3, 4)))
    for name, gradient in both.gradients.items():
        np.testing.assert_allclose(layer.gradients[name], gradient)
    np.testing.assert_array_equal(places[1](x[0]), layer(x[0]))
    layer.backward(np.ones((3, 4)))  # a call has kept nothing and forgotten nothing


def test_a_pickle_holds_no_batch(rng):
    layer = DiBALinear(factorize(rng.normal(size=(4, 4)), k=3))
    x = rng.normal(size=(5000, 4))
    layer.forward(x)
    kept = pickle.dumps(layer)
    assert len(kept) < 20_000  # the batch alone takes 80,000 bytes
    other = pickle.loads(kept)
    np.testing.assert_array_equal(other(x), layer(x))
    with pytest.raises(ValueError, match="backward needs a forward"):
        other.backward(np.ones((5000, 4)))
    layer.backward(np.ones((5000, 4)))  # the layer itself goes on


@pytest.mark.parametrize("k", [4, 60])
def test_frozen_layers_give_the_same(rng, k):
    A = rng.normal(size=(20, 30))
    layer = DiBALinear(factorize(A, k=k, shift=0.5), np.arange(20.0))
    x = rng.normal(size=(2, 7, 30)).astype(np.float32)
    apply = layer.frozen()
    assert (apply is not layer) == (k * (20 + 30) > 20 * 30)
    np.testing.assert_allclose(apply(x), layer(x), rtol=1e-4, atol=1e-4)


def test_terms_have_parameters_of_their_own(rng):
    A = rng.normal(size=(9, 8))
    first = factorize(A, k=6, scale_bits=4)
    f = DiBAFactors.from_terms([first, factorize(A - first.to_dense(), k=5)], {"a": 1})
    for dtype, unpack in ((np.float32, True), (np.float32, False), (np.float64, "auto")):
        layer = DiBALinear(f, bias=np.ones(9), dtype=dtype, unpack=unpack)
        names = [f"{name}.{i}" for i in range(2) for name in ("d1", "d2", "d3")]
        assert list(layer.parameters) == [*names, "bias"]
        x = rng.normal(size=(6, 8))
        expected = x @ f.to_dense().T.astype(float) + 1
        np.testing.assert_allclose(layer.forward(x), expected, atol=1e-5)
        np.testing.assert_allclose(layer.frozen()(x), expected, atol=1e-5)
    same = layer.to_factors()
    assert same.record == {"a": 1}
    for one, other in zip(f.terms, same.terms, strict=True):
        assert (one.b1, one.b2, one.scale_bits) == (other.b1, other.b2, other.scale_bits)
        np.testing.assert_array_equal(one.d2, other.d2)
    np.testing.assert_array_equal(same.bias, np.ones(9))
    layer.parameters["d1.1"] *= 2
    moved = layer.rounded().to_factors()
    assert moved.terms[0].scale_bits == (4, 4, 4)
    twice = f.terms[0].to_dense() + 2 * f.terms[1].to_dense()
    np.testing.assert_allclose(moved.to_dense(), twice, atol=2e-3 * np.abs(twice).max())
