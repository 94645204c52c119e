"""Adam: the published recursion, and in place."""

import numpy as np
import pytest

from diba_np import DiBALinear, factorize
from diba_np.training.optimisers import Adam, gather, minimise, share_of_rate


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


def test_state_put_back_goes_on_as_if_never_left(rng):
    gradients = [{"w": rng.normal(size=3)} for _ in range(6)]
    start = rng.normal(size=3)
    whole, again = (Adam({"w": start.copy()}, 0.1) for _ in range(2))
    for gradient in gradients[:3]:
        whole.step(gradient)
    again.steps = whole.steps
    for name in whole.parameters:
        again.parameters[name][...] = whole.parameters[name]
        again.first[name][...] = whole.first[name]
        again.second[name][...] = whole.second[name]
    for gradient in gradients[3:]:
        whole.step(gradient)
        again.step(gradient)
    np.testing.assert_array_equal(again.parameters["w"], whole.parameters["w"])


def test_decay_is_apart_from_the_gradient_and_of_named_arrays_alone():
    values = {"a": np.full(3, 2.0), "b": np.full(3, 2.0)}
    optimiser = Adam(values, 0.1, relative=False, decay={"a": 0.5})
    optimiser.step({name: np.ones(3) for name in values}, share=0.5)
    step = 2.0 - values["b"][0]
    assert step == pytest.approx(0.05)
    np.testing.assert_allclose(values["a"], 2.0 * (1 - 0.05 * 0.5) - step)


def test_clip_bounds_the_norm_of_all_gradients_together():
    values = {"a": np.full(3, 2.0), "b": np.full(4, 0.5)}
    gradients = {"a": np.full(3, 5.0), "b": np.full(4, -1.0)}
    for relative, norm in ((False, np.sqrt(75 + 4)), (True, np.sqrt(4 * 75 + 4 / 4))):
        clipped, plain = (
            Adam({n: v.copy() for n, v in values.items()}, relative=relative, clip=clip)
            for clip in (norm / 10, None)
        )
        assert clipped.norm(gradients) == pytest.approx(norm)
        clipped.step(gradients)
        plain.step({name: g / 10 for name, g in gradients.items()})
        for name in values:
            np.testing.assert_allclose(clipped.parameters[name], plain.parameters[name])


def test_schedules():
    assert [share_of_rate("constant", d) for d in (0.0, 1.0)] == [1.0, 1.0]
    shares = [share_of_rate("cosine", d) for d in (0.0, 0.5, 1.0, 2.0)]
    assert shares == pytest.approx([1.0, 0.5, 0.0, 0.0])
    shares = [share_of_rate("cosine", d, 0.1) for d in (0.0, 0.5, 1.0)]
    assert shares == pytest.approx([1.0, 0.55, 0.1])
    with pytest.raises(ValueError, match="schedule must be one of cosine, constant, got 'warm'"):
        share_of_rate("warm", 0.0)


def test_minimise_trains_two_layers_and_an_array_of_ones_own(rng):
    """A two-layer network written by hand, with a scale that is no layer's."""
    teacher = rng.normal(size=(2, 6, 6))
    layers = {f"l{i}": DiBALinear(factorize(A, k=8, max_sweeps=20)) for i, A in enumerate(teacher)}
    parameters, gradients = gather(layers)
    scale = parameters["scale"] = np.ones(6, np.float32)
    gradients["scale"] = np.zeros(6, np.float32)
    assert parameters["l0.d2"] is layers["l0"].parameters["d2"]
    X = rng.normal(size=(200, 6)).astype(np.float32)
    Y = np.maximum(X @ teacher[0].T, 0) @ teacher[1].T

    def loss(rows):
        hidden = layers["l0"].forward(X[rows])
        active = np.maximum(hidden, 0) * scale
        away = layers["l1"].forward(active) - Y[rows]
        upstream = layers["l1"].backward(2 * away / len(rows))
        gradients["scale"] += np.sum(upstream * np.maximum(hidden, 0), axis=0)
        layers["l0"].backward(upstream * scale * (hidden > 0))
        return float(np.sum(away**2)) / len(rows)

    seen = []
    history = minimise(
        loss, parameters, gradients, lambda epoch: np.split(rng.permutation(200), 4),
        steps_per_epoch=4, epochs=60, learning_rate=0.02, clip=1e3,
        ended=lambda epoch, value: seen.append(value) or epoch == 39,
    )  # fmt: skip
    assert history == seen
    assert len(history) == 40
    assert history[-1] < 0.5 * history[0]
    assert np.abs(scale - 1).max() > 1e-3
    with pytest.raises(ValueError, match="at least one batch, got none in epoch 0"):
        minimise(loss, parameters, gradients, lambda epoch: [], steps_per_epoch=1)


def test_what_is_not_finite_is_told_before_a_step_is_taken(rng):
    layer = DiBALinear(factorize(rng.normal(size=(6, 5)), k=4))
    parameters, gradients = gather({"l": layer})
    X = rng.normal(size=(3, 8, 5)).astype(np.float32)
    X[2, 1, 1] = np.nan
    seen = []

    def loss(x):
        seen.append({name: value.copy() for name, value in parameters.items()})
        y = layer.forward(x)
        layer.backward(y)
        return float(np.vdot(y, y))

    with pytest.raises(FloatingPointError, match="epoch 0, batch 2: the loss is nan; look"):
        minimise(loss, parameters, gradients, lambda epoch: X, steps_per_epoch=3)
    assert not np.array_equal(seen[0]["l.d1"], seen[2]["l.d1"])
    for name, value in parameters.items():
        np.testing.assert_array_equal(value, seen[2][name])

    def overflow(x):
        gradients["l.d1"][0] = np.inf
        return 1.0

    with pytest.raises(FloatingPointError, match=r"batch 0: the gradient of l\.d1 is not finite"):
        minimise(overflow, parameters, gradients, lambda epoch: X[:1], steps_per_epoch=1)
