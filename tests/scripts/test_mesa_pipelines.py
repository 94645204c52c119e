"""MESA by training: the paper's rates, the trainer's gradients, the pipelines."""

import sys
from pathlib import Path

import numpy as np
import pytest

from diba_np.methods.entropy_coding import entropy

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import digits
from mesa_pipelines import PIPELINES, Outcome, block_penalty, delta_entropy, run_pipeline
from mlp import MLP


@pytest.mark.parametrize(
    ("p", "average", "rate"),
    [(0.0625, 1.5, 341), (0.25, 4.2, 30.5), (0.5, 2.3, 27.8), (0.1, 2.3, 139)],
)
def test_vectors_of_the_compression_rate(p, average, rate):
    W = np.zeros((160, 160), np.float32)
    network = MLP((160, 160), np.random.default_rng(0))
    network.weights = [W]
    kept = int(p * W.size)
    made = Outcome("MESA", 1.0, network, [], kept, average * kept)
    assert abs(made.compression - rate) < 0.5
    assert np.isclose(made.compression, 32 / (p * average), rtol=1e-3)


def test_vector_of_the_lenet_5_total():
    network = MLP((800, 500, 10), np.random.default_rng(0))
    made = Outcome("MESA", 1.0, network, [], 40500, 40000 * 2.3 + 500 * 6.7)
    # the paper's sizes: 400,000 and 5,000 weights
    assert abs(32 * 405000 / made.bits - 135.9) < 0.1
    assert abs(made.average_bits - 2.354) < 0.01


def test_gradients_equal_central_differences(rng):
    network = MLP((5, 7, 4), rng)
    network.weights = [W.astype(np.float64) for W in network.weights]
    network.biases = [rng.standard_normal(len(b)) for b in network.biases]
    X, y = rng.standard_normal((6, 5)), rng.integers(0, 4, 6)
    _, grad_w, grad_b = network.loss_and_gradients(X, y)
    for parameters, gradients in ((network.weights, grad_w), (network.biases, grad_b)):
        for value, gradient in zip(parameters, gradients, strict=True):
            for at in list(np.ndindex(value.shape))[::3]:
                keep = value[at]
                sides = []
                for step in (1e-6, -1e-6):
                    value[at] = keep + step
                    sides.append(network.loss_and_gradients(X, y)[0])
                value[at] = keep
                assert np.isclose((sides[0] - sides[1]) / 2e-6, gradient[at], atol=1e-6)


def test_penalty_gradient_equals_central_differences(rng):
    weights = [rng.standard_normal((6, 9)), rng.standard_normal((4, 6))]
    orders = [
        (np.arange(6).reshape(3, 2), np.arange(9).reshape(3, 3)),
        (np.arange(4).reshape(2, 2), rng.permutation(6).reshape(2, 3)),
    ]
    value, gradients = block_penalty(weights, orders, 0.7)
    B = [weights[0][2 * j : 2 * j + 2, 3 * j : 3 * j + 3] for j in range(3)]
    C = [weights[1][np.ix_(*(o[j] for o in orders[1]))] for j in range(2)]
    plain = sum(np.sum((B[j + 1] - B[j]) ** 2) for j in range(2)) / 2 + np.sum((C[1] - C[0]) ** 2)
    assert np.isclose(value, 0.7 * plain / 2)
    for W, gradient in zip(weights, gradients, strict=True):
        for at in np.ndindex(W.shape):
            keep = W[at]
            W[at] = keep + 1e-5
            up = block_penalty(weights, orders, 0.7)[0]
            W[at] = keep - 1e-5
            down = block_penalty(weights, orders, 0.7)[0]
            W[at] = keep
            assert np.isclose((up - down) / 2e-5, gradient[at], atol=1e-6)


def test_masks_and_shared_values_hold(rng):
    mask = [rng.random((7, 5)) < 0.5, np.ones((3, 7), bool)]
    network = MLP((5, 7, 3), rng, mask)
    X, y = rng.standard_normal((50, 5)).astype(np.float32), rng.integers(0, 3, 50)
    losses = network.train(X, y, rng, 6, rate=1e-2)
    assert losses[-1] < losses[0]
    assert not network.weights[0][~mask[0]].any()
    share = [np.where(mask[0], rng.integers(1, 4, (7, 5)), 0), rng.integers(1, 5, (3, 7))]
    network.train(X, y, rng, 2, share=share)
    for W, indices in zip(network.weights, share, strict=True):
        for j in np.unique(indices):
            assert len(np.unique(W[indices == j])) == 1
    assert not network.weights[0][~mask[0]].any()


def patterns(count):
    """Ten noisy patterns of 784 pixels: (X_train, y_train, X_test, y_test)."""
    parts = digits.split(digits.drawn_digits(count))
    return (*parts["fit"], *parts["test"])


def test_pipelines_store_what_they_say(tmp_path):
    data = patterns(800)
    outcomes = {
        name: run_pipeline(
            name,
            data,
            sizes=(784, 60, 10),
            p=(0.1, 0.2),
            epochs=2,
            retrain=1,
            alpha=1.0,
            order="stride",
        )
        for name in PIPELINES
    }
    dense = 784 * 60 + 60 * 10
    assert outcomes["FC"].bits == 32 * dense and outcomes["FC"].compression == 1
    for name, made in outcomes.items():
        for index, layer in enumerate(made.layers):
            layer.save(tmp_path / "a.h5")
            np.testing.assert_array_equal(
                type(layer).load(tmp_path / "a.h5").to_dense(), made.network.weights[index]
            )
            if name not in ("MPDC",):
                assert len(np.unique(made.network.weights[index])) <= 2**5 + 1
        assert np.isclose(made.compression, 32 * dense / made.bits)
    assert outcomes["FC+Q+H"].kept == dense
    assert outcomes["MESA"].kept == outcomes["M+Q+H"].kept == outcomes["MPDC"].kept
    assert (
        outcomes["MESA"].bits
        < outcomes["M+Q+H"].bits
        < outcomes["DeepC"].bits
        < outcomes["FC+Q+H"].bits
    )


def test_delta_entropy_falls_as_alpha_grows():
    data = patterns(1200)
    reached = []
    for alpha in (0.0, 0.1, 1.0):
        made = run_pipeline(
            "MESA",
            data,
            sizes=(784, 60, 10),
            p=(0.1, 0.2),
            epochs=6,
            retrain=1,
            alpha=alpha,
            order="stride",
        )
        reached.append(delta_entropy(made.layers[0])[1])
        assert delta_entropy(made.layers[0])[0] == entropy(made.layers[0].blocks)
    assert reached[0] > reached[1] > reached[2]


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"name": "X"}, "name must be one of"),
        ({"p": (0.1,)}, "p must have 3 entries"),
        ({"q": 0}, r"q must lie in \[1, 8\]"),
        ({"order": "random"}, "order must be stride or natural"),
    ],
)
def test_bad_settings_are_named(kwargs, text):
    with pytest.raises(ValueError, match=text):
        run_pipeline(**{"name": "MESA", "data": (None,) * 4, **kwargs})
