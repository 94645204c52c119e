"""Rates of layers: the budget, what moves bits, the errors they are to lower, bad input."""

import math

import numpy as np
import pytest

import diba_np as dn
from diba_np.rates import measure_rates

SHAPES = {"first": (40, 48), "second": (48, 32), "last": (36, 40)}


@pytest.fixture
def network(rng):
    weights = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    grams = {}
    for name, (_, n) in SHAPES.items():
        X = rng.normal(size=(3 * n, n)) * np.linspace(0.1, 2.0, n)
        grams[name] = X.T @ X / len(X)
    return weights, grams


def test_the_budget_is_kept_and_used(network):
    weights, grams = network
    measured = measure_rates(weights, grams, dict.fromkeys(weights, 1.0), threads=1)
    for bits in (2.0, 4.0):
        rates = measured.share(bits)
        made = {
            name: dn.factorize(weights[name], bits=rates[name], effort="fast") for name in rates
        }
        used = sum(f.storage_bits() for f in made.values())
        budget = bits * sum(math.prod(shape) for shape in SHAPES.values())
        one_component = max(m + n + 16 for m, n in SHAPES.values())
        assert budget - one_component < used <= budget


def test_shared_rates_lower_the_weighted_error(network):
    weights, grams = network
    sensitivities = {"first": 1.0, "second": 30.0, "last": 0.05}
    rates = measure_rates(weights, grams, sensitivities, threads=1).share(2.5)

    def error(rates):
        total = 0.0
        for name, A in weights.items():
            f = dn.factorize(A, bits=rates[name], gram=grams[name], effort="fast", threads=1)
            off = A - f.to_dense()
            total += sensitivities[name] * np.vdot(off, off @ grams[name])
        return total

    assert rates["last"] < 2.5 < rates["second"]
    assert error(rates) < 0.8 * error(dict.fromkeys(weights, 2.5))


def test_outputs_that_count_more_bring_their_layer_more_bits(network):
    weights, grams = network
    alike = dict.fromkeys(weights, 1.0)
    even = measure_rates(weights, grams, alike, threads=1).share(2.5)
    more = {"first": np.full(40, 9.0)}
    heavy = measure_rates(weights, grams, alike, more, threads=1).share(2.5)
    assert heavy["first"] > even["first"]
    # a weight that all outputs have is a sensitivity
    told = measure_rates(weights, grams, alike | {"first": 9.0}, threads=1).share(2.5)
    assert told == pytest.approx(heavy, abs=0.05)


def test_bad_input(network):
    weights, grams = network
    alike = dict.fromkeys(weights, 1.0)
    with pytest.raises(KeyError, match="last"):
        measure_rates(weights, {k: v for k, v in grams.items() if k != "last"}, alike)
    with pytest.raises(KeyError, match="last"):
        measure_rates(weights, grams, {"first": 1.0, "second": 1.0})
    with pytest.raises(ValueError, match=r"grams\['first'\] must have shape \(48, 48\)"):
        measure_rates(weights, grams | {"first": np.eye(3)}, alike)
    with pytest.raises(ValueError, match=r"sensitivities\['first'\] must be .*-1"):
        measure_rates(weights, grams, alike | {"first": -1.0})
    with pytest.raises(ValueError, match=r"output_weight must have shape \(40,\)"):
        measure_rates(weights, grams, alike, {"first": np.ones(3)})
    with pytest.raises(ValueError, match="scale_bits"):
        measure_rates(weights, grams, alike, scale_bits=5000)
    measured = measure_rates(weights, grams, alike, threads=1)
    with pytest.raises(ValueError, match="bits is too small"):
        measured.share(0.1)
    with pytest.raises(ValueError, match="bits must be"):
        measured.share(-1.0)
