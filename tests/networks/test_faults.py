"""Faults in what layers read: the sentence names the layer and the batch."""

import numpy as np
import pytest

import diba_np as dn
from diba_np.networks.capture import capture
from diba_np.networks.layerwise import compress_layers

N = 8


@pytest.fixture
def network(rng):
    weights = {"a": rng.normal(size=(N, N)), "b": rng.normal(size=(N, N))}
    batches = [rng.normal(size=(12, N)) for _ in range(3)]
    return weights, batches


def quick(name, A, gram):
    return dn.factorize(A, k=N, gram=gram, effort="fast")


def stage(x, linear):
    return linear("b", np.tanh(linear("a", x)))


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "infinity")])
def test_a_number_that_is_not_finite_is_named(network, value, word):
    weights, batches = network
    batches[1][3, 2] = value
    words = f"'a' reads {word} in batch 1 of the dense network, in row 3"
    with pytest.raises(ValueError, match=words):
        compress_layers([stage], weights, batches, quick)
    with pytest.raises(ValueError, match=words):
        capture(stage, weights, batches)


def test_what_is_added_is_looked_at_too(network):
    weights, batches = network

    def residual(x, linear):
        return linear("a", np.ones_like(x), added=x)

    batches[2][0] = np.nan
    with pytest.raises(ValueError, match="'a' is added to NaN in batch 2"):
        compress_layers([residual], {"a": weights["a"]}, batches, quick)


def test_masks_that_differ_between_the_networks_are_named(network):
    weights, batches = network

    def routed(x, linear):
        y = linear("a", x)
        return linear("b", y, keep=y[:, 0] > np.median(y[:, 0]) - 0.3 * y[0, 1])

    with pytest.raises(ValueError, match="'b' must read the same rows in both networks, but its"):
        compress_layers([routed], weights, batches, lambda n, A, H: dn.factorize(A, k=1, gram=H))


def test_a_fit_that_returns_nothing_is_named(network):
    weights, batches = network
    with pytest.raises(TypeError, match=r"what fit returns must be .* got NoneType for 'a'"):
        compress_layers([stage], weights, batches, lambda *_: None)
