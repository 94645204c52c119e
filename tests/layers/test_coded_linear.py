"""CodedLinear and the random control: gradients, closed forms, and where they stand."""

import numpy as np
import pytest

from diba_np import DiBAFactors, factorize
from diba_np.layers.coded_linear import CodedLinear
from diba_np.methods import fit
from diba_np.methods.random_bits import random_factors
from diba_np.training.moments import moments


@pytest.mark.parametrize(
    ("label", "bits", "several"),
    [
        ("rtn", 2.0, False),
        ("rtn", 1.0, False),
        ("nf", 3.0, False),
        ("sign", 1.5, False),
        ("gptq", 2.5, False),
        ("rtn", 6.0, True),
        ("gptq", 8.0, True),
    ],
)
def test_gradients_equal_central_differences(rng, label, bits, several):
    coded = fit(label, rng.normal(size=(6, 48)), bits)
    assert (coded.scales.shape[1] > 1) == several
    layer = CodedLinear(coded, bias=rng.normal(size=6), dtype=np.float64)
    x, weight = rng.normal(size=(2, 3, 48)), rng.normal(size=(2, 3, 6))
    expected = x @ coded.to_dense().astype(float).T + layer.parameters["bias"]
    np.testing.assert_allclose(layer.forward(x), expected, atol=1e-5)

    def loss():
        return float(np.sum(weight * layer(x) ** 2))

    gx = layer.backward(2 * weight * layer.forward(x))
    for array, gradient in (
        *((layer.parameters[n], layer.gradients[n]) for n in layer.parameters),
        (x, gx),
    ):
        for at in list(np.ndindex(array.shape))[:40]:
            kept, around = array[at], []
            for step in (1e-6, -1e-6):
                array[at] = kept + step
                around.append(loss() / (2 * step))
            array[at] = kept
            assert gradient[at] == pytest.approx(sum(around), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(("label", "bits"), [("rtn", 3.0), ("sign", 1.3)])
def test_refit_leaves_no_better_scale_or_bias(rng, label, bits):
    A = rng.normal(size=(5, 40))
    X = rng.normal(size=(300, 40)) @ rng.normal(size=(40, 40)) + 0.5
    Y = X @ A.T + 1.0
    layer = CodedLinear(fit(label, A, bits), dtype=np.float64)
    before = np.sum((layer(X) - Y) ** 2)
    layer.refit(moments([(X, Y)], True, np.zeros(5)))
    best = np.sum((layer(X) - Y) ** 2)
    assert best < before
    layer.forward(X)
    layer.backward(2 * (layer(X) - Y))
    for name, gradient in layer.gradients.items():
        size = np.abs(layer.parameters[name]).max()
        assert np.abs(gradient * size).max() < 1e-4 * best, name


def test_to_matrix_keeps_codes_and_carries_scales(rng, tmp_path):
    coded = fit("rtn", rng.normal(size=(6, 32)), 2.0)
    layer = CodedLinear(coded)
    layer.parameters["scales"] *= 2
    made = layer.to_matrix()
    np.testing.assert_array_equal(made.codes, coded.codes)
    np.testing.assert_allclose(made.to_dense(), 2 * coded.to_dense(), rtol=1e-3)
    assert made.storage_bits() == coded.storage_bits()
    made.save(tmp_path / "a.h5")
    np.testing.assert_array_equal(type(made).load(tmp_path / "a.h5").to_dense(), made.to_dense())


@pytest.mark.parametrize(("label", "bits"), [("rtn", 3.0), ("rtn", 0.6), ("sign", 1.3)])
def test_frozen_codes_give_the_same(rng, label, bits):
    layer = CodedLinear(fit(label, rng.normal(size=(20, 120)), bits), np.arange(20.0))
    x = rng.normal(size=(2, 7, 120)).astype(np.float32)
    apply = layer.frozen()
    np.testing.assert_allclose(apply(x), layer(x), rtol=1e-4, atol=1e-4)


def test_only_scalar_codes_are_taken(rng):
    with pytest.raises(TypeError, match="coded must be a ScalarQuantized, got DiBAFactors"):
        CodedLinear(factorize(rng.normal(size=(3, 3)), k=2))


def test_random_bits_have_the_size_of_a_factorization_and_are_worse(rng):
    A = rng.normal(size=(48, 40))
    made = random_factors(A, bits=2.0, seed=3)
    found = factorize(A, bits=2.0, scale_bits=16)
    assert isinstance(made, DiBAFactors)
    assert (made.k, made.storage_bits()) == (found.k, found.storage_bits())
    assert 0.4 < made.b1.to_dense().mean() < 0.6
    assert 0.0 < made.snr(A) < found.snr(A) - 3
    assert random_factors(A, bits=2.0, seed=3).b1 == made.b1


def test_random_bits_know_the_inputs(rng):
    A = rng.normal(size=(20, 16))
    mixing = rng.normal(size=(16, 16)) / np.arange(1, 17)[:, None] ** 2
    H = mixing.T @ mixing

    def error(f):
        E = A - f.to_dense()
        return np.vdot(E @ H, E)

    assert error(random_factors(A, bits=5.1, gram=H)) < 0.7 * error(random_factors(A, bits=5.1))
    with pytest.raises(ValueError, match=r"gram must have shape \(16, 16\), got \(2, 2\)"):
        random_factors(A, bits=5.1, gram=np.eye(2))
