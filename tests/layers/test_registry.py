"""Which layer trains which method's matrices."""

import numpy as np
import pytest

import diba_np as dn
from diba_np.layers.linear import Layer
from diba_np.layers.registry import LATENT, LAYERS, as_layer
from diba_np.matrix.quality import FIGURES
from diba_np.matrix.registry import CLASSES, class_of, resolve
from diba_np.methods import fit


def test_every_entry_is_a_method_and_a_layer():
    for table in (LAYERS, LATENT):
        assert set(table) <= set(CLASSES)
        assert all(issubclass(resolve(place), Layer) for place in table.values())


@pytest.mark.parametrize("method", ["diba", "rtn", "sign", "mesa", "qswd", "linear-trellis"])
def test_a_layer_multiplies_like_its_matrix_and_adds_the_bias(method, rng):
    A, bias = rng.normal(size=(20, 30)), rng.normal(size=20)
    matrix = dn.factorize(A, bits=2.0, threads=1) if method == "diba" else fit(method, A, 2.0)
    x = rng.normal(size=(5, 30)).astype(np.float32)
    layer = as_layer(matrix, bias)
    np.testing.assert_allclose(layer(x), (matrix @ x.T).T + bias, rtol=1e-3, atol=1e-3)
    # a bias is the layer's: its matrix is stored without
    stored = layer.to_matrix()
    assert getattr(stored, "bias", None) is None
    assert stored.storage_bits() == matrix.storage_bits()


@pytest.mark.parametrize("method", ["diba", *LAYERS])
def test_no_samples_and_no_rows_give_none(method, rng):
    A = rng.normal(size=(40, 32))
    made = dn.factorize(A, bits=3.0) if method == "diba" else class_of(method).fit(A, 3.0)
    layer = as_layer(made, np.ones(40))
    assert layer.forward(np.zeros((0, 32))).shape == (0, 40)
    assert layer.backward(np.zeros((0, 40))).shape == (0, 32)
    rows, back = layer.lookup(np.zeros((2, 0), int))
    assert rows.shape == (2, 0, 32)
    back(rows)
    assert not any(gradient.any() for gradient in layer.gradients.values())


@pytest.mark.parametrize("method", ["diba", *LAYERS])
def test_what_was_trained_keeps_no_figures_of_what_it_was(method, rng, tmp_path):
    A = rng.normal(size=(24, 32))
    matrix = dn.factorize(A, bits=3.0) if method == "diba" else class_of(method).fit(A, 4.0)
    layer = as_layer(matrix)
    assert layer.to_matrix().record == matrix.record
    for name in layer.parameters.keys() - {"blocks", "bias"}:
        layer.parameters[name] *= 3.0
    made = layer.to_matrix()
    assert made.record["retuned"] is True
    assert not set(FIGURES) & set(made.record)
    made.save(tmp_path / "a.h5")
    assert dn.load(tmp_path / "a.h5").record == made.record


@pytest.mark.parametrize("method", ["rtn", "mesa", "qswd", "bitat"])
def test_scales_may_go_where_float16_times_their_unit_does_not(method, rng):
    layer = as_layer(class_of(method).fit(rng.normal(size=(24, 32)), 4.0), dtype=np.float64)
    before, names = layer.to_matrix().to_dense(), {"scales", "centroids"} & set(layer.parameters)
    for name in names:
        layer.parameters[name] *= 2.0**30
    np.testing.assert_allclose(layer.to_matrix().to_dense(), 2.0**30 * before, rtol=2e-3)


@pytest.mark.parametrize("matrix", [np.ones((3, 3)), None, fit("svd8", np.eye(40), 2.0)])
def test_other_matrices_are_refused(matrix):
    with pytest.raises(TypeError, match="matrix must be a matrix of one of the methods diba, sign"):
        as_layer(matrix)


@pytest.mark.parametrize("method", list(LATENT))
def test_latent_values_start_where_the_matrix_is(method, rng):
    A, bias = rng.normal(size=(20, 30)), rng.normal(size=20)
    matrix = class_of(method).fit(A, 2.5)
    x = rng.choice([-1.0, 1.0], size=(5, 30)).astype(np.float32)  # also for what reads signs
    for weight in (None, A):
        layer = as_layer(matrix, bias, latent=True, weight=weight)
        np.testing.assert_allclose(layer(x), (matrix @ x.T).T + bias, rtol=1e-3, atol=1e-3)
        assert layer.to_matrix().storage_bits() == matrix.storage_bits()


def test_what_latent_takes(rng):
    with pytest.raises(TypeError, match="matrix must be a matrix of one of the methods "):
        as_layer(dn.factorize(np.eye(3), k=2), latent=True)
    with pytest.raises(ValueError, match="weight is where latent values start: pass latent=True"):
        as_layer(fit("sign", np.eye(3), 20.0), weight=np.eye(3))
