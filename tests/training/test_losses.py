"""Losses: values by definition, gradients by central differences."""

import numpy as np
import pytest
from scipy.special import log_softmax

from diba_np.training.losses import cross_entropy, mse

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
    ("loss", "y"), [(mse, SOFT), (cross_entropy, SOFT), (cross_entropy, LABELS)]
)
def test_gradients(loss, y):
    gradient = loss(P, y)[1]
    for at in np.ndindex(P.shape):
        step = np.zeros_like(P)
        step[at] = 1e-6
        slope = (loss(P + step, y)[0] - loss(P - step, y)[0]) / 2e-6
        assert gradient[at] == pytest.approx(slope, abs=1e-7)
