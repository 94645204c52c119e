"""QSWD as a layer: its gradients, what its estimators equal, its way into a file and back."""

import numpy as np
import pytest

from diba_np.layers.qswd_linear import LatentQSWDLinear, QSWDLinear
from diba_np.layers.registry import as_layer
from diba_np.layers.straight_through import inward
from diba_np.matrix.files import load
from diba_np.methods.qswd import QSWD
from diba_np.training.moments import moments
from diba_np.training.optimisers import gather, minimise

# (d, r, s, c_bits, z_bits): one nonzero of +1, signs, several levels, a full support; 22 rows are
# no multiple of d
SETTINGS = [(4, 9, 1, 6, 0), (4, 9, 2, 6, 1), (5, 7, 3, 4, 3), (22, 5, 5, 4, 4), (22, 6, 2, 2, 2)]
SHAPE = (22, 17)


def decomposed(rng, setting=SETTINGS[1], shape=SHAPE):
    A = rng.normal(size=shape)
    return A, QSWD.fit(A, 64.0, setting=setting)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("how", ["scales", "free", "fixed"])
def test_a_layer_computes_what_its_matrix_does(rng, setting, how):
    A, matrix = decomposed(rng, setting)
    bias = rng.normal(size=22)
    if how == "scales":
        layer = QSWDLinear(matrix, bias, np.float64)
    else:
        layer = LatentQSWDLinear(matrix, bias, np.float64, weight=A, support=how)
        if layer.free:
            assert layer.parameters["weights"].shape == (matrix.setting.p, setting[0])
        else:
            assert layer.parameters["z"].shape == matrix.sets.shape
    x = rng.normal(size=(2, 3, 17))
    expected = x @ matrix.to_dense().astype(float).T + bias
    for y in (layer.forward(x), layer(x), layer.frozen()(x), layer.rounded()(x)):
        np.testing.assert_allclose(y, expected, atol=1e-5)
    stored = layer.to_matrix()
    assert stored.record == matrix.record
    np.testing.assert_array_equal(stored.to_dense(), matrix.to_dense())


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("latent", [False, True])
def test_smooth_gradients_equal_central_differences(rng, setting, latent):
    _, matrix = decomposed(rng, setting)
    layer = as_layer(matrix, rng.normal(size=22), np.float64, latent=latent)
    x, weight = rng.normal(size=(6, 17)), rng.normal(size=(6, 22))

    def loss():
        return float(np.sum(weight * layer(x) ** 2))

    gx = layer.backward(2 * weight * layer.forward(x))
    smooth = [(layer.parameters[n], layer.gradients[n]) for n in ("scales", "bias")]
    for array, gradient in (*smooth, (x, gx)):
        for at in list(np.ndindex(array.shape))[:30]:
            start, around = array[at], []
            for step in (1e-6, -1e-6):
                array[at] = start + step
                around.append(loss() / (2 * step))
            array[at] = start
            assert gradient[at] == pytest.approx(sum(around), rel=1e-5, abs=1e-5)


def stored_factors(layer):
    """Return C in units of its codes and the transpose of Z (p, r), as a file would hold them."""
    stored = layer.to_matrix()
    Z = np.zeros((stored.setting.p, stored.setting.r))
    np.put_along_axis(Z, stored.sets, stored.values.astype(float), axis=1)
    return stored.c.astype(float), Z


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("support", ["free", "fixed"])
def test_a_latent_gradient_is_that_of_the_number_it_is_projected_to(rng, setting, support):
    _, matrix = decomposed(rng, setting)
    layer = LatentQSWDLinear(matrix, None, np.float64, support=support)
    for name in {"c", "z", "weights"} & set(layer.parameters):
        layer.parameters[name] += 0.7 * rng.normal(size=layer.parameters[name].shape)
    x, weight = rng.normal(size=(6, 17)), rng.normal(size=(6, 22))
    layer.backward(2 * weight * layer.forward(x))
    d, _, _, c_bits, _ = setting
    C, Z = stored_factors(layer)
    scales = layer.parameters["scales"]
    bands, sets = -(-22 // d), layer.to_matrix().sets
    added = np.zeros((matrix.setting.p, d))  # to the columns of the matrix

    def loss():
        V = Z @ (C * scales).T + added
        W = np.concatenate([V[b * 17 : (b + 1) * 17].T for b in range(bands)])[:22]
        return float(np.sum(weight * (x @ W.T) ** 2))

    def difference(array, at):
        start, around = array[at], []
        for step in (1e-6, -1e-6):
            array[at] = start + step
            around.append(loss() / (2 * step))
        array[at] = start
        return sum(around)

    most = {"c": 2 ** (c_bits - 1) - 1, "z": max(matrix.setting.z_max, 1), "weights": np.inf}
    beyond = 0
    for name, array in (("c", C), ("weights", added) if layer.free else ("z", Z)):
        latent = layer.parameters[name]
        for at in list(np.ndindex(latent.shape))[:60]:
            place = (at[0], sets[at]) if name == "z" else at
            expected = difference(array, place)
            if abs(latent[at]) > most[name] and expected * latent[at] < 0:
                expected, beyond = 0.0, beyond + 1
            assert layer.gradients[name][at] == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert beyond or layer.free


@pytest.mark.parametrize("setting", SETTINGS[:2])
def test_of_all_codes_those_stand_for_latent_weights_that_are_nearest(rng, setting):
    """One nonzero: the nearest of all. Two: no exchange of one of them is nearer."""
    _, r, s, _, z_bits = setting
    _, matrix = decomposed(rng, setting)
    layer = LatentQSWDLinear(matrix, None, np.float64)
    layer.parameters["weights"] += 0.3 * rng.normal(size=layer.parameters["weights"].shape)
    C, Z = stored_factors(layer)
    C = C * layer.parameters["scales"]
    signs = (1, -1) if z_bits else (1,)
    for v, z in zip(layer.parameters["weights"], Z, strict=True):
        reached = np.sum((v - C @ z) ** 2)
        places = np.flatnonzero(z)
        assert len(places) == s
        for place in places:
            rest = z.copy()
            rest[place] = 0
            others = [j for j in range(r) if not rest[j]]
            errors = [np.sum((v - C @ rest - q * C[:, j]) ** 2) for j in others for q in signs]
            assert reached <= min(errors) * (1 + 1e-9)


@pytest.mark.parametrize("setting", SETTINGS[:3])
def test_refit_changes_scales_and_no_code(rng, setting):
    A, matrix = decomposed(rng, setting)
    X = rng.normal(size=(300, 17)) * np.linspace(0.1, 3, 17)
    data = moments([(X, X @ A.T)], True, np.zeros(22))
    layer = LatentQSWDLinear(matrix, None, np.float64, weight=A, support="free")
    plain = QSWDLinear(matrix, None, np.float64)
    layer.refit(data)
    plain.refit(data)
    np.testing.assert_allclose(layer.parameters["scales"], plain.parameters["scales"])
    np.testing.assert_allclose(layer(X), plain(X))
    made = layer.to_matrix()
    np.testing.assert_array_equal(made.c, matrix.c)
    np.testing.assert_array_equal(made.to_dense(), plain.to_matrix().to_dense())


def test_gradients_that_lead_further_out_are_left_out():
    latent = np.array([2.0, 2.0, -2.0, -2.0, 0.5, 1.0])
    gradient = np.array([1.0, -1.0, 1.0, -1.0, -1.0, -1.0])
    np.testing.assert_array_equal(inward(gradient, latent, 1.0), [1, 0, 0, -1, -1, -1])


@pytest.mark.parametrize("latent", [False, True])
def test_a_lookup_and_its_gradient_are_those_of_rows(rng, latent):
    _, matrix = decomposed(rng)
    layer = as_layer(matrix, dtype=np.float64, latent=latent)
    ids = np.array([[3, 0], [3, 21]])
    rows, back = layer.lookup(ids)
    np.testing.assert_allclose(rows, matrix.to_dense()[ids], atol=1e-6)
    gradient = rng.normal(size=rows.shape)
    back(gradient)
    got = {name: value.copy() for name, value in layer.gradients.items()}
    layer.zero_grad()
    chosen = np.zeros((4, 22))
    chosen[np.arange(4), ids.ravel()] = 1
    layer.forward(np.eye(17))
    layer.backward((chosen.T @ gradient.reshape(4, 17)).T)
    for name in set(got) - {"bias"}:
        np.testing.assert_allclose(got[name], layer.gradients[name], atol=1e-10)


@pytest.mark.parametrize("setting", SETTINGS)
def test_refit_leaves_no_better_scale_or_bias(rng, setting):
    A, matrix = decomposed(rng, setting)
    X = rng.normal(size=(300, 17)) @ rng.normal(size=(17, 17)) + 0.5
    Y = X @ A.T + 1.0
    layer = QSWDLinear(matrix, dtype=np.float64)
    before = np.sum((layer(X) - Y) ** 2)
    layer.refit(moments([(X, Y)], True, np.zeros(22)))
    best = np.sum((layer(X) - Y) ** 2)
    assert best < before
    layer.backward(2 * (layer.forward(X) - Y))
    for name, gradient in layer.gradients.items():
        size = np.abs(layer.parameters[name]).max()
        assert np.abs(gradient * size).max() < 1e-4 * best, name


@pytest.mark.parametrize("setting", SETTINGS)
def test_training_moves_codes_and_a_file_gives_back_what_was_trained(rng, setting, tmp_path):
    A, matrix = decomposed(rng, setting)
    X = rng.normal(size=(256, 17))
    X[:, 0] *= 5
    Y = X @ A.T
    layer = as_layer(matrix, latent=True, weight=A)
    parameters, gradients = gather({"layer": layer})

    def loss(rows):
        difference = layer.forward(X[rows]) - Y[rows]
        layer.backward(2 * difference / len(rows))
        return float(np.mean(np.sum(difference**2, axis=1)))

    start = float(np.mean(np.sum((layer(X) - Y) ** 2, axis=1)))
    history = minimise(
        loss,
        parameters,
        gradients,
        lambda epoch: np.split(np.random.default_rng(epoch).permutation(256), 8),
        steps_per_epoch=8,
        epochs=60,
        learning_rate=0.005,
    )
    assert min(history) < 0.85 * start
    made = layer.to_matrix()
    assert made.record["retuned"]
    assert made.storage_bits() == matrix.storage_bits() == matrix.setting.bits()
    moved = [not np.array_equal(getattr(made, n), getattr(matrix, n)) for n in ("c", "values")]
    assert any(moved)
    made.save(tmp_path / "a.h5")
    read = load(tmp_path / "a.h5")
    np.testing.assert_array_equal(read.to_dense(), made.to_dense())
    # no further than the rounding of its scales
    np.testing.assert_allclose(
        (read @ X.T).T + layer.parameters["bias"], layer(X), rtol=5e-3, atol=5e-2
    )
    again = as_layer(read, layer.parameters["bias"], latent=True)
    np.testing.assert_allclose(again(X), layer.rounded()(X), rtol=1e-5, atol=1e-4)


def test_a_matrix_of_zeros_stays_one_and_can_be_trained():
    layer = as_layer(QSWD.fit(np.zeros((6, 8)), 4.0, setting=(3, 2, 1, 4, 1)), latent=True)
    y = layer.forward(np.ones((2, 8)))
    layer.backward(np.ones_like(y))
    assert not y.any()
    assert all(np.isfinite(gradient).all() for gradient in layer.gradients.values())
    assert not layer.to_matrix().to_dense().any()


@pytest.mark.parametrize("bad", [np.eye(3), None])
def test_only_qswd_is_taken(bad):
    for layer in (QSWDLinear, LatentQSWDLinear):
        with pytest.raises(TypeError, match="matrix must be a QSWD, got"):
            layer(bad)


def test_bad_arguments_are_named(rng):
    _, matrix = decomposed(rng)
    with pytest.raises(ValueError, match=r"weight must have shape \(22, 17\), got \(17, 22\)"):
        LatentQSWDLinear(matrix, weight=np.ones((17, 22)))
    with pytest.raises(ValueError, match="weight contains 1 non-finite"):
        LatentQSWDLinear(matrix, weight=np.where(np.arange(17) == 3, np.nan, np.ones((22, 1)))[:1])
    with pytest.raises(ValueError, match="support must be one of free, fixed, auto, got 'some'"):
        LatentQSWDLinear(matrix, support="some")
    with pytest.raises(ValueError, match=r"bias must have shape \(22,\)"):
        LatentQSWDLinear(matrix, np.ones(3))
    with pytest.raises(TypeError, match="dtype must be float32 or float64"):
        QSWDLinear(matrix, dtype=np.float16)
