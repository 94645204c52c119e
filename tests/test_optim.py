"""Adam: the published recursion, and in place."""

import numpy as np
import pytest

from diba_np.optim import Adam


def test_steps_follow_the_published_algorithm(rng):
    start = rng.normal(size=3)
    value = start.copy()
    optimiser = Adam({"w": value}, learning_rate=0.1)
    rate = 0.1 * np.sqrt(np.mean(start**2))
    first = second = np.zeros(3)
    expected = start.copy()
    for t in range(1, 6):
        gradient = rng.normal(size=3)
        optimiser.step({"w": gradient})
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        step = first / (1 - 0.9**t) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
        expected = expected - rate * step
        np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_minimises_a_bowl_whatever_the_units():
    for unit in (1e-4, 1.0, 1e4):
        value = np.array([3.0, -2.0]) * unit
        optimiser = Adam({"w": value}, learning_rate=0.02)
        for _ in range(2000):
            optimiser.step({"w": 2 * (value - unit)})
        np.testing.assert_allclose(value, unit, rtol=0.02)


def test_share_scales_the_step():
    a, b = np.ones(1), np.ones(1)
    Adam({"w": a}).step({"w": np.ones(1)})
    Adam({"w": b}).step({"w": np.ones(1)}, share=0.5)
    assert 1 - b[0] == pytest.approx((1 - a[0]) / 2)
