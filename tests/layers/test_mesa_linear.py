"""MESALinear: gradients, closed forms, codes that are shared, and what is stored."""

import numpy as np
import pytest

from diba_np import factorize
from diba_np.layers.mesa_linear import LEVELS, MESALinear, penalise
from diba_np.layers.registry import as_layer
from diba_np.methods import fit
from diba_np.methods.mesa import MESA
from diba_np.training.moments import moments

ORDERS = ["natural", "stride", "arrays"]


def layer_of(rng, order="natural", levels=None, dtype=np.float64, scale=1.0):
    """Three blocks of 3 x 4 in 11 x 14: a row in five and two columns are covered by none."""
    if order == "arrays":
        order = (rng.permutation(11)[:9], rng.permutation(14)[:12])
    blocks = rng.normal(size=(3, 3, 4)).astype(np.float32)
    matrix = MESA((11, 14), blocks, None, False, order, scale=scale)
    layer = MESALinear(matrix, rng.normal(size=11), dtype)
    return layer if levels is None else layer.quantized(levels)


@pytest.mark.parametrize("levels", [None, 5])
@pytest.mark.parametrize("order", ORDERS)
def test_gradients_equal_central_differences(rng, order, levels):
    layer = layer_of(rng, order, levels)
    x, weight = rng.normal(size=(2, 3, 14)), rng.normal(size=(2, 3, 11))
    expected = x @ layer.to_matrix().to_dense().astype(float).T + layer.parameters["bias"]
    np.testing.assert_allclose(layer.forward(x), expected, atol=1e-5)

    def loss():
        return float(np.sum(weight * layer(x) ** 2)) + 0.7 * plain_penalty(layer)

    gx = layer.backward(2 * weight * layer.forward(x))
    assert layer.penalise(0.7) == pytest.approx(0.7 * plain_penalty(layer))
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


@pytest.mark.parametrize("unit", [1e-8, 1e7])
def test_values_that_are_shared_know_no_units(rng, unit):
    state = rng.bit_generator.state
    found = []
    for scale in (1.0, unit):
        rng.bit_generator.state = state
        whole = layer_of(rng)
        whole.parameters["blocks"] *= scale
        shared = whole.quantized(8).to_matrix().to_dense() / scale
        found.append(shared)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-2, atol=1e-2 * np.abs(found[0]).max())


def plain_penalty(layer):
    """Mean squared distance of neighbouring blocks; of codes there is none."""
    if layer.coded:
        return 0.0
    blocks = layer.parameters["blocks"]
    return sum(np.sum((blocks[j + 1] - blocks[j]) ** 2) for j in range(len(blocks) - 1)) / (
        len(blocks) - 1
    )


def test_the_penalty_is_shared_among_layers_and_none_of_one_block(rng):
    layers = [layer_of(rng), layer_of(rng)]
    total = penalise(layers, 0.5)
    assert total == pytest.approx(0.25 * sum(map(plain_penalty, layers)))
    single = MESALinear.cut(rng.normal(size=(4, 5)), 1.0)
    assert penalise([single], 0.5) == 0.0
    assert not single.gradients["blocks"].any()


@pytest.mark.parametrize("levels", [None, 6])
@pytest.mark.parametrize("order", ORDERS)
def test_rows_of_a_table_and_their_gradients(rng, order, levels):
    layer = layer_of(rng, order, levels)
    ids = np.array([[0, 3, 10], [3, 8, 9]])
    rows, back = layer.lookup(ids)
    dense = layer.to_matrix().to_dense()
    np.testing.assert_allclose(rows, dense[ids], atol=1e-6)
    back(np.ones_like(rows))
    own = next(name for name in layer.parameters if name != "bias")
    found = layer.gradients[own].copy()
    # a row that is looked up twice is as one of weight two
    layer.zero_grad()
    layer.forward(np.ones((1, 14)))
    layer.backward(np.bincount(ids.ravel(), minlength=11)[None].astype(float))
    np.testing.assert_allclose(found, layer.gradients[own], atol=1e-9)


@pytest.mark.parametrize("levels", [None, 7])
def test_refit_leaves_nothing_better(rng, levels):
    layer = layer_of(rng, "stride", levels)
    X = rng.normal(size=(300, 14)) @ rng.normal(size=(14, 14)) + 0.5
    Y = X @ rng.normal(size=(14, 11)) + 1.0
    before = np.sum((layer(X) - Y) ** 2)
    layer.refit(moments([(X, Y)], True, np.zeros(11)))
    best = np.sum((layer(X) - Y) ** 2)
    assert best < before
    layer.forward(X)
    layer.backward(2 * (layer(X) - Y))
    for name, gradient in layer.gradients.items():
        assert np.abs(gradient * np.abs(layer.parameters[name]).max()).max() < 1e-4 * best, name


def test_the_layer_of_a_fitted_matrix_multiplies_like_it(rng):
    matrix = fit("mesa", rng.normal(size=(24, 30)) * 100, 2.0)
    assert matrix.scale != 1.0
    layer = as_layer(matrix, np.arange(24.0))
    assert isinstance(layer, MESALinear) and layer.coded
    x = rng.normal(size=(5, 30)).astype(np.float32)
    np.testing.assert_allclose(layer(x), (matrix @ x.T).T + np.arange(24), rtol=1e-4, atol=1e-2)
    assert layer.to_matrix().storage_bits() == matrix.storage_bits()
    np.testing.assert_allclose(
        layer.uncoded().to_matrix().to_dense(), matrix.to_dense(), rtol=1e-6, atol=1e-6
    )


def test_centroids_that_change_places_are_stored_in_order(rng, tmp_path):
    layer = layer_of(rng, levels=6, dtype=np.float32)
    layer.parameters["centroids"][...] = [3.0, -1.0, 0.5, 0.5, 2.0, -4.0]
    before = layer.values()
    stored = layer.to_matrix()
    np.testing.assert_array_equal(stored.centroids, [-4.0, -1.0, 0.5, 2.0, 3.0])
    np.testing.assert_array_equal(stored.centroids[stored.blocks], before)
    stored.save(tmp_path / "a.h5")
    again = MESA.load(tmp_path / "a.h5")
    np.testing.assert_array_equal(again.to_dense(), stored.to_dense())
    np.testing.assert_array_equal(layer.rounded().values(), before)


def test_quantized_keeps_to_its_levels_and_to_a_budget(rng):
    A = rng.normal(size=(60, 80))
    layer = MESALinear.cut(A, 0.25)
    np.testing.assert_array_equal(layer.to_matrix().to_dense()[:15, :20], A[:15, :20].astype("f4"))
    assert np.count_nonzero(layer.to_matrix().to_dense()) == 4 * 15 * 20
    for levels in (2, 8):
        coded = layer.quantized(levels)
        assert len(np.unique(coded.values())) == levels
    errors = []
    for bits in (0.4, 0.8, 1.6):
        coded = layer.quantized(bits=bits)
        assert coded.matrix.bits_per_weight <= bits
        larger = [r for r in LEVELS if r > len(coded.matrix.centroids)]
        assert layer.quantized(larger[-1]).matrix.bits_per_weight > bits
        errors.append(np.sum((coded.values() - layer.values()) ** 2))
    assert errors[0] > errors[1] > errors[2]
    # blocks that are alike cost next to nothing behind the first
    same = np.tile(rng.normal(size=(1, 15, 20)), (4, 1, 1)).astype(np.float32)
    alike = MESALinear(MESA((60, 80), same, None, False)).quantized(16).matrix.storage_bits()
    assert alike < 0.5 * layer.quantized(16).matrix.storage_bits()


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda a: a.quantized(), TypeError, "exactly one of levels and bits"),
        (lambda a: a.quantized(2, bits=1.0), TypeError, "exactly one of levels and bits"),
        (lambda a: a.quantized(0), ValueError, "levels must be at least 1, got 0"),
        (lambda a: a.quantized(2.5), TypeError, "levels must be an int, got float"),
        (lambda a: a.quantized(bits=1e-6), ValueError, "bits must be at least .* keep a smaller"),
        (lambda a: a.quantized(bits=-1), ValueError, "bits must be finite and above 0"),
        (lambda a: MESALinear.cut(np.ones((4, 4)), 0.0), ValueError, "p must lie in"),
        (lambda a: MESALinear.cut(np.ones((4, 4)), 0.1), ValueError, "p must leave blocks"),
        (lambda a: MESALinear.cut(np.ones((4, 4)), "x"), TypeError, "p must be a number"),
        (lambda a: MESALinear.cut(np.ones((4, 4)), 1.0, order="x"), ValueError, "order must be"),
        (lambda a: MESALinear.cut([[np.nan]], 1.0), ValueError, "A contains 1 non-finite"),
        (lambda a: MESALinear(factorize(np.eye(3), k=2)), TypeError, "must be a MESA, got DiBA"),
    ],
)
def test_bad_arguments_are_named(rng, call, kind, text):
    with pytest.raises(kind, match=text):
        call(layer_of(rng))
