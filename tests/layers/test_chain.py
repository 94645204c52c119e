"""A chain of layers: what it computes, its gradients, what it refuses."""

from itertools import pairwise

import numpy as np
import pytest

import diba_np as dn
from diba_np.layers.chain import Chain
from diba_np.layers.registry import as_layer
from diba_np.methods import fit


def dense(rng, sizes=(7, 9, 6, 4)):
    weights = {f"l{i}": rng.normal(size=(m, n)) for i, (n, m) in enumerate(pairwise(sizes))}
    return weights, {name: rng.normal(size=len(A)) for name, A in weights.items()}


def test_it_computes_what_the_formula_says(rng):
    weights, biases = dense(rng)
    chain = Chain.of_dense(weights, biases, np.float64)
    x = rng.normal(size=(2, 5, 7))
    value, after = x, []
    for name, A in weights.items():
        value = value @ A.T + biases[name]
        if name != "l2":
            value = np.maximum(value, 0)
        after.append(value)
    for y in (chain.forward(x), chain(x), chain.frozen()(x), chain.rounded()(x)):
        np.testing.assert_allclose(y, value, atol=1e-12)
    for one, other in zip(chain.outputs(x), after, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)


def test_gradients_equal_central_differences(rng):
    weights, biases = dense(rng)
    chain = Chain.of_dense(weights, biases, np.float64, trained=True)
    chain = chain.with_layers(
        {"l1": as_layer(dn.factorize(weights["l1"], k=5, threads=1), biases["l1"], np.float64)}
    )
    x, weight = rng.normal(size=(5, 7)), rng.normal(size=(5, 4))
    parameters, gradients = chain.gather()
    assert {"l0.weight", "l1.d2", "l2.bias"} <= set(parameters)
    assert set(chain.gather(["l1"])[0]) == {"l1.d1", "l1.d2", "l1.d3", "l1.bias"}

    def loss():
        return float(np.sum(weight * chain(x) ** 2))

    y = chain.forward(x)
    chain(rng.normal(size=(3, 7)))  # keeps nothing
    gx = chain.backward(2 * weight * y)
    for array, gradient in (*((parameters[n], gradients[n]) for n in parameters), (x, gx)):
        for at in list(np.ndindex(array.shape))[:12]:
            start, around = array[at], []
            for step in (1e-6, -1e-6):
                array[at] = start + step
                around.append(loss() / (2 * step))
            array[at] = start
            assert gradient[at] == pytest.approx(sum(around), rel=1e-4, abs=1e-4)
    chain.zero_grad()
    assert not any(gradient.any() for gradient in gradients.values())


def test_what_does_not_fit_together_is_named(rng):
    weights, biases = dense(rng)
    with pytest.raises(ValueError, match="layers must hold at least one layer, got none"):
        Chain({})
    with pytest.raises(ValueError, match="'b' must read what 'a' gives, 9 numbers, it reads 6"):
        Chain.of_dense({"a": weights["l0"], "b": weights["l2"]})
    chain = Chain.of_dense(weights, biases)
    with pytest.raises(KeyError, match="the chain has no layer 'x', it has l0, l1, l2"):
        chain.with_layers({"x": as_layer(fit("sign", np.eye(3), 20.0))})
    with pytest.raises(ValueError, match="backward needs a forward before it"):
        chain.backward(np.ones((1, 4)))
