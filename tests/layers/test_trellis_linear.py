"""TrellisLinear: gradients, closed forms, what is stored."""

import numpy as np
import pytest

from diba_np.layers.trellis_linear import TrellisLinear
from diba_np.methods import fit
from diba_np.methods.linear_trellis import LinearTrellis
from diba_np.methods.trellis_fit import ROTATIONS
from diba_np.training.moments import moments

CASES = [
    (rotation, inputs, bits)
    for rotation in ROTATIONS
    for inputs, bits in ((False, 2.3), (True, 1.6), (False, 3.4))
]


def make(rng, rotation, inputs, bits, shape=(36, 24), scale_bits=2):
    A = rng.normal(size=shape) * np.exp(0.5 * rng.normal(size=(shape[0], 1)))
    if bits > 3.0:  # part of it is of low rank
        A += 9.0
    X = rng.normal(size=(200, shape[1])) if inputs else None
    made = LinearTrellis.fit(A, bits, X, rotation=rotation, scale_bits=scale_bits)
    return A, made


def differences(loss, array, step=1e-6):
    """Central differences of a loss in the entries of an array."""
    found = np.empty_like(array)
    for at in np.ndindex(array.shape):
        kept, around = array[at], []
        for sign in (1, -1):
            array[at] = kept + sign * step
            around.append(sign * loss() / (2 * step))
        array[at] = kept
        found[at] = sum(around)
    return found


@pytest.mark.parametrize(("rotation", "inputs", "bits"), CASES)
def test_gradients_equal_central_differences(rng, rotation, inputs, bits):
    _, made = make(rng, rotation, inputs, bits)
    layer = TrellisLinear(made, bias=rng.normal(size=36), dtype=np.float64)
    turned = ROTATIONS[rotation]
    names = {"bias"} | ({"d1"} if not turned[1] else set())
    names |= {"d3"} if inputs or not turned[0] else set()
    assert set(layer.parameters) == (names if len(names) > 1 else {"bias", "gain"})
    x, weight = rng.normal(size=(2, 3, 24)), rng.normal(size=(2, 3, 36))
    expected = x @ made.to_dense().astype(float).T + layer.parameters["bias"]
    size = np.abs(expected).max()
    np.testing.assert_allclose(layer.forward(x), expected, atol=1e-5 * size)

    def loss():
        return float(np.sum(weight * layer(x) ** 2))

    gx = layer.backward(2 * weight * layer.forward(x))
    for array, gradient in (
        *((layer.parameters[n], layer.gradients[n]) for n in layer.parameters),
        (x, gx),
    ):
        near = differences(loss, array)
        np.testing.assert_allclose(gradient, near, atol=1e-6 * np.abs(near).max())


@pytest.mark.parametrize(("rotation", "inputs", "bits"), CASES)
def test_rows_that_are_looked_up_pass_their_gradients_on(rng, rotation, inputs, bits):
    _, made = make(rng, rotation, inputs, bits)
    layer = TrellisLinear(made, dtype=np.float64)
    ids = np.array([[3, 0, 35], [3, 17, 1]])
    weight = rng.normal(size=(2, 3, 24))
    rows, back = layer.lookup(ids)
    size = np.abs(rows).max()
    np.testing.assert_allclose(rows, made.to_dense()[ids], atol=1e-5 * size)
    back(2 * weight * rows)

    def loss():
        return float(np.sum(weight * layer.lookup(ids)[0] ** 2))

    for name, array in layer.parameters.items():
        near = differences(loss, array)
        np.testing.assert_allclose(layer.gradients[name], near, atol=1e-6 * size**2)


@pytest.mark.parametrize(("rotation", "inputs", "bits"), CASES)
def test_refit_leaves_no_better_scale_or_bias(rng, rotation, inputs, bits):
    A, made = make(rng, rotation, inputs, bits)
    X = rng.normal(size=(300, 24)) @ rng.normal(size=(24, 24)) + 0.5
    Y = X @ A.T + 1.0
    layer = TrellisLinear(made, dtype=np.float64)
    before = np.sum((layer(X) - Y) ** 2)
    for _ in range(10):
        layer.refit(moments([(X, Y)], True, np.zeros(36)))
    best = np.sum((layer(X) - Y) ** 2)
    assert best < before
    layer.forward(X)
    layer.backward(2 * (layer(X) - Y))
    for name, gradient in layer.gradients.items():
        size = np.abs(layer.parameters[name]).max()
        assert np.abs(gradient * size).max() < 1e-3 * best, name


@pytest.mark.parametrize("rotation", list(ROTATIONS))
def test_what_is_stored_has_the_same_bits(rng, rotation, tmp_path):
    _, made = make(rng, rotation, True, 2.5, scale_bits=8)
    layer = TrellisLinear(made)
    assert layer.to_matrix() is made
    for name in layer.parameters.keys() - {"bias"}:
        layer.parameters[name] *= 1.0 + 0.2 * rng.random(layer.parameters[name].shape)
    stored = layer.to_matrix()
    assert stored.storage_bits() == made.storage_bits()
    np.testing.assert_array_equal(stored.coded.codes[-1], made.coded.codes[-1])
    x = rng.normal(size=(5, 24)).astype(np.float32)
    near = layer(x)
    rounded = layer.rounded()
    np.testing.assert_allclose(rounded(x), near, atol=0.02 * np.abs(near).max())
    np.testing.assert_allclose(layer.frozen()(x), near, atol=1e-5 * np.abs(near).max())
    stored.save(tmp_path / "a.h5")
    again = LinearTrellis.load(tmp_path / "a.h5")
    np.testing.assert_array_equal(again.to_dense(), rounded.to_matrix().to_dense())


def test_only_linear_trellises_are_taken(rng):
    with pytest.raises(TypeError, match="matrix must be a LinearTrellis, got Trellis"):
        TrellisLinear(fit("trellis", rng.normal(size=(32, 32)), 3.0))


def test_zeros_can_be_trained_away_from(rng):
    layer = TrellisLinear(fit("linear-trellis", np.zeros((32, 32)), 3.0), dtype=np.float64)
    assert not layer(np.ones((1, 32))).any()
    layer.parameters["d1" if "d1" in layer.parameters else "gain"] += 0.5
    again = layer.rounded()
    np.testing.assert_allclose(again(np.eye(32)), layer(np.eye(32)), rtol=0.1, atol=0.1)
