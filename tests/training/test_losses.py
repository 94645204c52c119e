"""Losses: values by definition, gradients by central differences."""

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from diba_np.training.losses import cross_entropy, mse, softened_cross_entropy

P = np.random.default_rng(0).normal(size=(5, 4))
SOFT = np.abs(np.random.default_rng(1).normal(size=(5, 4)))
LABELS = np.array([0, 3, 1, 1, 2])


def test_values():
    assert mse(P, SOFT)[0] == pytest.approx(np.mean(np.sum((P - SOFT) ** 2, axis=1)))
    logs = log_softmax(P, axis=1)
    assert cross_entropy(P, LABELS)[0] == pytest.approx(-np.mean(logs[np.arange(5), LABELS]))
    assert cross_entropy(P, SOFT)[0] == pytest.approx(-np.mean(np.sum(SOFT * logs, axis=1)))
    assert np.isfinite(cross_entropy(P * 1e4, LABELS)[0])


@pytest.mark.parametrize(
    ("loss", "y"),
    [
        (mse, SOFT),
        (cross_entropy, SOFT),
        (cross_entropy, LABELS),
        (softened_cross_entropy(4.0), SOFT),
    ],
)
def test_gradients(loss, y):
    gradient = loss(P, y)[1]
    for at in np.ndindex(P.shape):
        step = np.zeros_like(P)
        step[at] = 1e-6
        slope = (loss(P + step, y)[0] - loss(P - step, y)[0]) / 2e-6
        assert gradient[at] == pytest.approx(slope, abs=1e-7)


def test_softened_scores():
    plain = cross_entropy(P, softmax(SOFT, axis=1))
    value, gradient = softened_cross_entropy(1.0)(P, SOFT)
    assert value == pytest.approx(plain[0])
    np.testing.assert_allclose(gradient, plain[1])
    expected = -9 * np.mean(np.sum(softmax(SOFT / 3, axis=1) * log_softmax(P / 3, axis=1), axis=1))
    assert softened_cross_entropy(3.0)(P, SOFT)[0] == pytest.approx(expected)
    # far above the scores what is left is the squared error of scores about their means
    apart = P - SOFT - (P - SOFT).mean(axis=1, keepdims=True)
    gradient = softened_cross_entropy(1e4)(P, SOFT)[1]
    np.testing.assert_allclose(gradient, apart / P.shape[1] / len(P), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("bad", [0, -1.0, np.nan])
def test_a_temperature_must_be_above_zero(bad):
    with pytest.raises(ValueError, match="temperature must be"):
        softened_cross_entropy(bad)
