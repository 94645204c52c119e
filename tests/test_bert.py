"""The scripts' network: its gradients against central differences, and what padding may not do."""

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.special import erf
from scipy.stats import norm

import diba_np as dn

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import bert
import network_weights

WIDTH = 8


def factors(rng, m, n, k=5):
    bits = (rng.integers(0, 2, shape, np.uint8) for shape in ((m, k), (k, n)))
    b1, b2 = bits
    return dn.DiBAFactors(rng.normal(size=m), b1, rng.normal(size=k), b2, rng.normal(size=n))


@pytest.fixture
def net(rng):
    made = bert.Bert(bert.random_tensors(0), heads=2, dtype=np.float64)
    for name in made.encoder_names():
        m, n = made.weights[name].matrix.shape
        made.replace({name: network_weights.DiBAWeight(factors(rng, m, n), np.float64)})
    name = "encoder.layer.1.attention.output.dense"
    codes = rng.integers(-2, 3, (WIDTH, WIDTH)).astype(float)
    group = np.repeat([0, 1], WIDTH // 2)
    made.replace({name: network_weights.CodeWeight(codes, rng.normal(size=(WIDTH, 2)), group)})
    return made


IDS, MASK = bert.padded([[1, 5, 3, 2], [4, 2], [7, 8, 6]])


def outputs(net, head):
    """Outputs of a head beside a look at every hidden state, and the step back."""
    hidden, back = net.encode(IDS, MASK)
    places = np.array([1, 4, 9])
    y, back_head = {
        "classify": lambda x: net.classify(x, MASK),
        "predict": lambda x: net.predict(x, places),
        "mean": lambda x: net.mean(x, MASK),
    }[head](hidden[-1])
    return y, hidden, lambda gy, gh: back({1: gh, -1: back_head(gy)})


@pytest.mark.parametrize("head", ["classify", "predict", "mean"])
def test_gradients_are_central_differences(net, rng, head):
    y, hidden, back = outputs(net, head)
    gy, gh = rng.normal(size=y.shape), rng.normal(size=hidden[1].shape)
    net.zero_grad()
    back(gy, gh)
    gradients = net.settle()
    assert set(gradients) == set(net.parameters)

    def value():
        net.refresh()
        y, hidden, _ = outputs(net, head)
        return np.vdot(y, gy) + np.vdot(hidden[1], gh)

    for name, parameter in net.parameters.items():
        at = tuple(rng.integers(parameter.shape))
        start, step = parameter[at], 1e-5
        parameter[at] = start + step
        above = value()
        parameter[at] = start - step
        slope = (above - value()) / (2 * step)
        parameter[at] = start
        assert gradients[name][at] == pytest.approx(slope, rel=1e-5, abs=1e-7), name


def test_gradients_add_up_over_batches(net, rng):
    gradient = {}
    for times in (1, 2):
        net.zero_grad()
        for _ in range(times):
            y, hidden, back = outputs(net, "classify")
            back(np.ones_like(y), np.zeros_like(hidden[1]))
        gradient[times] = net.settle()
    for name, value in gradient[1].items():
        np.testing.assert_allclose(gradient[2][name], 2 * value, rtol=1e-9, atol=1e-12)


def test_padding_changes_nothing(net):
    together = outputs(net, "classify")[0]
    for row, length in enumerate(MASK.sum(axis=1)):
        ids, mask = IDS[row : row + 1, :length], MASK[row : row + 1, :length]
        hidden, _ = net.encode(ids, mask)
        np.testing.assert_allclose(net.classify(hidden[-1], mask)[0][0], together[row], atol=1e-10)


def test_weights_are_the_matrices_that_they_stand_for(rng):
    f = factors(rng, 7, 6)
    np.testing.assert_allclose(
        network_weights.DiBAWeight(f).matrix, f.to_dense(), rtol=1e-5, atol=1e-6
    )
    weight = network_weights.CodeWeight(
        np.ones((2, 3)), np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([0, 0, 1])
    )
    np.testing.assert_array_equal(weight.matrix, [[1, 1, 2], [3, 3, 4]])
    np.testing.assert_array_equal(weight.pull(weight.codes)["scales"], [[2, 1], [2, 1]])


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_a_stored_weight_comes_back_whole(rng, shift):
    bits = rng.random((7, 5)) < 0.5, rng.random((5, 6)) < 0.5
    f = dn.DiBAFactors(rng.normal(size=7), bits[0], np.ones(5), bits[1], np.ones(6), shift=shift)
    weight = network_weights.restore(network_weights.store(network_weights.DiBAWeight(f)))
    np.testing.assert_allclose(weight.matrix, f.to_dense(), rtol=1e-5, atol=1e-6)
    assert weight.factors.shift == shift
    np.testing.assert_allclose(weight.factors.to_dense(), weight.matrix, rtol=1e-5, atol=1e-6)


def test_the_normal_law_in_both_precisions(rng):
    x = np.linspace(-9, 9, 2001)
    below, density = bert.normal_law(x)
    np.testing.assert_allclose(below, 0.5 * (1 + erf(x / np.sqrt(2))), atol=1e-15)
    np.testing.assert_allclose(density, norm.pdf(x), atol=1e-15)
    for exact, single in zip((below, density), bert.normal_law(x.astype(np.float32)), strict=True):
        np.testing.assert_allclose(single, exact, atol=4e-7)


def test_batches_hold_like_lengths_and_every_row_once():
    texts = [[0] * length for length in (3, 9, 1, 4, 9, 2)]
    made = list(bert.batches(texts, 12))
    assert sorted(np.concatenate(made)) == list(range(6))
    assert all(len(rows) * max(len(texts[i]) for i in rows) <= 12 for rows in made)
    assert [len(texts[i]) for rows in made for i in rows] == [1, 2, 3, 4, 9, 9]
