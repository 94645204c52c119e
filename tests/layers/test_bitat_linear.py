"""Signs as a layer: gradients, what the estimators equal, one-bit inputs, files."""

import numpy as np
import pytest

from diba_np.layers.bitat_linear import BOUND, BiTATLinear
from diba_np.layers.registry import as_layer
from diba_np.matrix.files import load
from diba_np.methods.binary_bitat import BinaryBiTAT, SignProduct, one_bit_inputs
from diba_np.methods.bitat import BiTAT
from diba_np.training.moments import moments
from diba_np.training.optimisers import gather, minimise

M, N = 7, 70


def binarized(rng, one_bit=False, bits=32.0):
    A = rng.normal(size=(M, N))
    matrix = BiTAT.fit(A, bits)
    if one_bit:
        matrix = BinaryBiTAT.of(matrix, 0.3 * rng.normal(size=N), 0.8)
    return A, matrix


def plain(layer, x, signs=None, inputs=None):
    """The formula, with the signs of latent values and inputs or what stands in their place."""
    p, kept = layer.parameters, layer.matrix.kept
    S = np.where(p["signs"] >= 0, 1.0, -1.0) if signs is None else signs
    x = x[..., kept]
    if layer.reads_signs:
        size = p["input_scale"][0]
        x = size * np.where(x >= p["thresholds"], 1.0, -1.0) if inputs is None else inputs
    return x @ (S * p["scales"][:, None]).T + p["bias"]


def central(loss, array, at):
    start, around = array[at], []
    for step in (1e-6, -1e-6):
        array[at] = start + step
        around.append(loss() / (2 * step))
    array[at] = start
    return sum(around)


@pytest.mark.parametrize("one_bit", [False, True])
@pytest.mark.parametrize("bits", [32.0, 1.2])  # all columns; some are not stored
@pytest.mark.parametrize("with_weight", [False, True])
def test_it_computes_what_its_matrix_does(rng, one_bit, bits, with_weight, tmp_path):
    A, matrix = binarized(rng, one_bit, bits)
    assert matrix.kept.all() == (bits == 32.0)
    bias = rng.normal(size=M)
    layer = BiTATLinear(matrix, bias, np.float64, A if with_weight else None)
    x = rng.normal(size=(2, 5, N))
    read = x
    if one_bit:
        thresholds = np.zeros(N)
        thresholds[matrix.kept] = matrix.thresholds
        read = np.where(x >= thresholds, 0.8, -0.8)
    expected = read @ matrix.to_dense().astype(float).T + bias
    for y in (layer.forward(x), layer(x), layer.frozen()(x), layer.rounded()(x), plain(layer, x)):
        np.testing.assert_allclose(y, expected, atol=1e-5)
    stored = layer.to_matrix()
    assert stored.record == matrix.record and "retuned" not in stored.record
    assert stored.storage_bits() == matrix.storage_bits()
    np.testing.assert_array_equal(stored.to_dense(), matrix.to_dense())
    stored.save(tmp_path / "a.h5")
    again = as_layer(load(tmp_path / "a.h5"), bias, "float64", latent=True)
    assert again.reads_signs == one_bit
    np.testing.assert_allclose(again(x), expected, atol=1e-5)


@pytest.mark.parametrize("one_bit", [False, True])
def test_smooth_gradients_equal_central_differences(rng, one_bit):
    A, matrix = binarized(rng, one_bit)
    layer = BiTATLinear(matrix, rng.normal(size=M), np.float64, A)
    x, weight = rng.normal(size=(9, N)), rng.normal(size=(9, M))

    def loss():
        return float(np.sum(weight * layer(x) ** 2))

    gx = layer.backward(2 * weight * layer.forward(x))
    smooth = {"scales", "bias"} | ({"input_scale"} if one_bit else set())
    arrays = [(layer.parameters[name], layer.gradients[name]) for name in smooth]
    for array, gradient in (*arrays, *(() if one_bit else ((x, gx),))):
        for at in list(np.ndindex(array.shape))[:30]:
            assert gradient[at] == pytest.approx(central(loss, array, at), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("one_bit", [False, True])
def test_the_gradient_of_a_latent_value_is_that_of_the_sign_it_gives(rng, one_bit):
    A, matrix = binarized(rng, one_bit)
    layer = BiTATLinear(matrix, None, np.float64, A)
    layer.parameters["signs"] *= 1.5
    x, weight = rng.normal(size=(9, N)), rng.normal(size=(9, M))
    layer.backward(2 * weight * layer.forward(x))
    S = np.where(layer.parameters["signs"] >= 0, 1.0, -1.0)

    def loss():
        return float(np.sum(weight * plain(layer, x, signs=S) ** 2))

    beyond = 0
    for at in list(np.ndindex(S.shape))[:200]:
        latent, expected = layer.parameters["signs"][at], central(loss, S, at)
        if abs(latent) > BOUND and expected * latent < 0:
            expected, beyond = 0.0, beyond + 1
        assert layer.gradients["signs"][at] == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert beyond


def test_the_gradient_of_one_bit_inputs_is_that_of_a_clipped_line(rng):
    A, matrix = binarized(rng, True)
    layer = BiTATLinear(matrix, None, np.float64, A)
    x, weight = rng.normal(size=(9, N)), rng.normal(size=(9, M))
    g = 2 * weight * layer.forward(x)  # the loss's gradient is taken where the signs are
    gx = layer.backward(g)
    thresholds, size = layer.parameters["thresholds"], layer.parameters["input_scale"][0]

    def loss():
        return float(np.sum(g * plain(layer, x, inputs=np.clip(x - thresholds, -size, size))))

    for array, gradient in ((x, gx), (thresholds, layer.gradients["thresholds"])):
        for at in list(np.ndindex(array.shape))[:80]:
            assert gradient[at] == pytest.approx(central(loss, array, at), rel=1e-5, abs=1e-5)
    assert (gx == 0).any() and gx.any()


@pytest.mark.parametrize("n", [1, 63, 64, 65, 127, 130])
def test_packed_products_equal_plain_ones(rng, n):
    signs, x = rng.choice([-1, 1], size=(5, n)), rng.normal(size=(2, 3, n))
    thresholds, scales, bias = rng.normal(size=n), rng.normal(size=5), rng.normal(size=5)
    product = SignProduct(signs, thresholds, scales, bias)
    sides = np.where(x.astype(np.float32) >= thresholds.astype(np.float32), 1, -1)
    np.testing.assert_allclose(product(x), sides @ signs.T * scales + bias, rtol=1e-5, atol=1e-4)
    assert product(x[:0]).shape == (0, 3, 5)


def test_one_bit_inputs_are_the_best_of_their_kind(rng):
    X = np.abs(rng.normal(size=(500, 6))) * np.arange(1, 7)
    thresholds, size = one_bit_inputs(X)

    def error(size):
        return np.sum((X - thresholds - size * np.where(X >= thresholds, 1, -1)) ** 2)

    assert error(size) < min(error(0.99 * size), error(1.01 * size))
    assert one_bit_inputs(np.zeros((3, 2)))[1] == 1.0


def test_a_matrix_that_reads_signs_counts_its_thresholds_and_keeps_its_budget(rng, tmp_path):
    A = rng.normal(size=(40, 64))
    X = np.abs(rng.normal(size=(900, 64)) @ rng.normal(size=(64, 64))) / 8
    made = BinaryBiTAT.fit(A, 32.0, X)
    assert made.storage_bits() == 40 * 64 + 16 * 40 + 16 * 64
    tight = BinaryBiTAT.fit(A, 1.4, X)
    assert tight.storage_bits() <= 1.4 * A.size and not tight.kept.all()
    made.save(tmp_path / "a.h5")
    read = load(tmp_path / "a.h5")
    assert type(read) is BinaryBiTAT
    np.testing.assert_array_equal(read.outputs(X), made.outputs(X))
    b = made.input_scale * np.where(X >= made.thresholds.astype(float), 1.0, -1.0)
    np.testing.assert_allclose(made.outputs(X), b @ made.to_dense().T, rtol=1e-4, atol=1e-3)
    # what a sign tells of an input is most of it
    centred = (X - X.mean(axis=0)) @ A.T
    got = made.outputs(X)
    assert np.sum((got - got.mean(axis=0) - centred) ** 2) < 0.6 * np.sum(centred**2)
    white = BinaryBiTAT.fit(A, 32.0)
    assert not white.thresholds.any() and white.input_scale == 1.0


@pytest.mark.parametrize("power", [-30, 0, 20])
def test_the_unit_of_what_is_read_by_its_signs_matters_to_nothing(rng, tmp_path, power):
    A, X = rng.normal(size=(20, 32)), rng.normal(size=(200, 32)) + 1.5
    X[:, 0] *= 1e-3
    usual, made = BinaryBiTAT.fit(A, 32.0, X), BinaryBiTAT.fit(A, 32.0, np.ldexp(X, power))
    assert usual.storage_bits() == made.storage_bits()
    expected = usual.outputs(X)
    np.testing.assert_allclose(np.ldexp(made.outputs(np.ldexp(X, power)), -power), expected)
    made.save(tmp_path / "a.h5")
    layer = BiTATLinear(load(tmp_path / "a.h5"), None, np.float64)
    np.testing.assert_allclose(np.ldexp(layer(np.ldexp(X, power)), -power), expected, rtol=1e-5)
    layer.parameters["thresholds"] *= 2.0**40  # further than one unit reaches
    moved = layer.to_matrix()
    np.testing.assert_allclose(moved.sides(), 2.0**40 * made.sides(), rtol=1e-3)


@pytest.mark.parametrize("one_bit", [False, True])
def test_refit_leaves_no_better_scale_or_bias(rng, one_bit):
    A, matrix = binarized(rng, one_bit)
    X = rng.normal(size=(400, N)) @ rng.normal(size=(N, N)) / 8 + 0.5
    Y = X @ A.T + 1.0
    layer = BiTATLinear(matrix, None, np.float64)
    read = X
    if one_bit:
        read = 0.8 * np.where(X >= layer.parameters["thresholds"], 1.0, -1.0)
    before = np.sum((layer(X) - Y) ** 2)
    layer.refit(moments([(read, Y)], True, np.zeros(M)))
    best = np.sum((layer(X) - Y) ** 2)
    assert best < before
    layer.backward(2 * (layer.forward(X) - Y))
    if one_bit:  # the scale of a row takes up that of the inputs
        np.testing.assert_allclose(layer.parameters["input_scale"], 0.8, rtol=1e-3)
    for name in ("scales", "bias"):
        size = np.abs(layer.parameters[name]).max()
        assert np.abs(layer.gradients[name] * size).max() < 1e-4 * best, name


@pytest.mark.parametrize("one_bit", [False, True])
def test_training_flips_signs_for_the_better(rng, one_bit):
    A, matrix = binarized(rng, one_bit)
    X = rng.normal(size=(512, N)) @ (rng.normal(size=(N, N)) / np.arange(1, N + 1)[:, None])
    Y = X @ A.T
    layer = as_layer(matrix, latent=True, weight=A)
    parameters, gradients = gather({"layer": layer})

    def loss(rows):
        difference = layer.forward(X[rows]) - Y[rows]
        layer.backward(2 * difference / len(rows))
        return float(np.mean(np.sum(difference**2, axis=1)))

    history = minimise(
        loss,
        parameters,
        gradients,
        lambda epoch: np.split(np.random.default_rng(epoch).permutation(512), 16),
        steps_per_epoch=16,
        epochs=30,
        learning_rate=0.02,
    )
    assert history[-1] < (0.8 if one_bit else 0.3) * history[0]
    made = layer.to_matrix()
    assert made.record["retuned"] and made.storage_bits() == matrix.storage_bits()
    assert (made.codes != matrix.codes).mean() > 0.01
    # a rounded threshold may change the side of an input that is near
    near = np.isclose(layer.rounded()(X), layer(X), rtol=1e-2, atol=0.05)
    assert near.mean() > 0.98


def test_a_lookup_and_its_gradient_are_those_of_rows(rng):
    A, matrix = binarized(rng)
    layer = BiTATLinear(matrix, None, np.float64, A)
    ids = np.array([[3, 0], [3, 6]])
    rows, back = layer.lookup(ids)
    np.testing.assert_allclose(rows, matrix.to_dense()[ids], atol=1e-6)
    gradient = rng.normal(size=rows.shape)
    back(gradient)
    got = {name: value.copy() for name, value in layer.gradients.items()}
    layer.zero_grad()
    chosen = np.zeros((4, M))
    chosen[np.arange(4), ids.ravel()] = 1
    layer.forward(np.eye(N))
    layer.backward((chosen.T @ gradient.reshape(4, N)).T)
    for name in ("signs", "scales"):
        np.testing.assert_allclose(got[name], layer.gradients[name], atol=1e-10)


def test_zeros_stay_zeros_and_can_be_trained():
    for matrix in (BiTAT.fit(np.zeros((3, 4)), 32.0), BinaryBiTAT.fit(np.zeros((3, 4)), 32.0)):
        layer = as_layer(matrix, latent=True, weight=np.zeros((3, 4)))
        y = layer.forward(np.ones((2, 4)))
        layer.backward(np.ones_like(y))
        assert not y.any() and not layer.to_matrix().to_dense().any()
        assert all(np.isfinite(gradient).all() for gradient in layer.gradients.values())


def test_bad_arguments_are_named(rng, tmp_path):
    A, matrix = binarized(rng)
    with pytest.raises(TypeError, match="matrix must be a BiTAT, got ndarray"):
        BiTATLinear(A)
    with pytest.raises(TypeError, match="matrix must be a BiTAT, got ndarray"):
        BinaryBiTAT.of(A)
    with pytest.raises(ValueError, match=r"weight must have shape \(7, 70\), got \(70, 7\)"):
        BiTATLinear(matrix, weight=A.T)
    with pytest.raises(ValueError, match=r"thresholds must have shape \(70,\), got \(3,\)"):
        BinaryBiTAT.of(matrix, np.zeros(3))
    with pytest.raises(ValueError, match=r"bits must be at least .* for bitat-binary .*, got 0\.1"):
        BinaryBiTAT.fit(A, 0.1)
    with pytest.raises(TypeError, match="matrix must be a matrix of one of the methods"):
        as_layer(BinaryBiTAT.of(matrix))  # its scales alone are trained by none
    layer = BiTATLinear(BinaryBiTAT.of(matrix))
    for apply in (layer, layer.frozen()):
        with pytest.raises((ValueError, IndexError)):
            apply(np.ones((2, 3)))
