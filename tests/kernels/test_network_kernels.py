"""Kernels of networks against plain NumPy."""

import naive
import numpy as np
import pytest

from diba_np.kernels import activations, norms, softmax, token

KINDS = (np.float32, np.float64)


def close(one, other, dtype):
    tolerance = 2e-5 if dtype == np.float32 else 1e-12
    assert one.dtype == dtype
    assert np.allclose(one, other, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=KINDS)
def dtype(request):
    return np.dtype(request.param)


@pytest.fixture
def draw(rng, dtype):
    return lambda *shape: rng.normal(size=shape).astype(dtype)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 64), (2, 65)])
def test_layer_norm(draw, dtype, shape):
    x, factor, shift, g = draw(*shape), draw(shape[1]), draw(shape[1]), draw(*shape)
    epsilon = dtype.type(1e-3)
    unit, y, inverse = np.empty_like(x), np.empty_like(x), np.empty(len(x), dtype)
    norms.layer_norm(x, factor, shift, epsilon, unit, inverse, y)
    expected = naive.layer_norm(x.astype(float), factor, shift, epsilon)
    for one, other in zip((unit, inverse, y), expected, strict=True):
        close(one, other, dtype)
    out, sums = np.empty_like(x), [np.ones(shape[1], dtype) for _ in range(2)]
    norms.layer_norm_back(g, factor, unit, inverse, out, *sums)
    expected = naive.layer_norm_back(*(a.astype(float) for a in (g, factor, unit, inverse)))
    for one, other, start in zip((out, *sums), expected, (0, 1, 1), strict=True):
        close(one, other + start, dtype)  # sums are added to


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 64), (2, 65)])
def test_rms_norm(draw, dtype, shape):
    x, factor, g = draw(*shape), draw(shape[1]), draw(*shape)
    epsilon = dtype.type(1e-3)
    y, inverse = np.empty_like(x), np.empty(len(x), dtype)
    norms.rms_norm(x, factor, epsilon, inverse, y)
    for one, other in zip((inverse, y), naive.rms_norm(x, factor, epsilon), strict=True):
        close(one, other, dtype)
    out, total = np.empty_like(x), np.ones(shape[1], dtype)
    norms.rms_norm_back(g, factor, x, inverse, out, total)
    expected = naive.rms_norm_back(*(a.astype(float) for a in (g, factor, x, inverse)))
    close(out, expected[0], dtype)
    close(total, expected[1] + 1, dtype)


@pytest.mark.parametrize("causal", [False, True])
def test_softmax(draw, dtype, causal):
    scores, keys = draw(2, 3, 4, 4), np.zeros((2, 4), dtype)
    keys[1, 3] = -1e9
    last = np.arange(1, 5) if causal else np.full(4, 4)
    first = np.array([0, 0, 1, 2]) if causal else np.zeros(4, int)
    scale, hidden = dtype.type(0.3), dtype.type(-1e9)
    p = scores.copy()
    softmax.below_the_most(p, scale, keys, first, last, hidden)
    close(p, naive.below_the_most(scores, scale, keys, first, last, hidden), dtype)
    p = np.exp(p).reshape(-1, 4)
    one = p.copy()
    softmax.to_unit_sum(one)
    close(one, naive.to_unit_sum(p), dtype)
    g = draw(*one.shape)
    out = g.copy()
    softmax.softmax_back(one, scale, out)
    close(out, naive.softmax_back(one, scale, g), dtype)


def test_gelu():
    x = np.linspace(-6, 6, 97, dtype=np.float32)
    y, slope = np.empty_like(x), np.empty_like(x)
    activations.gelu(x, np.exp(-x * x / 2), y, slope)
    expected = naive.gelu(x.astype(float))
    assert np.allclose(y, expected[0], atol=2e-6)
    assert np.allclose(slope, expected[1], atol=2e-6)


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("first", [0, 2])
def test_attend_token(draw, dtype, turned, first):
    heads, groups, d, capacity, at = 4, 2, 6, 7, 3
    joined, keys, values = draw((heads + 2 * groups) * d), *draw(2, groups, capacity, d)
    angle = draw(d // 2) if turned else draw(0)
    cos, sin = np.cos(angle), np.sin(angle)
    expected = naive.attend_token(joined, cos, sin, keys, values, first, at, heads)
    mixed, scores = np.empty(heads * d, dtype), np.empty(capacity, dtype)
    token.attend_token(joined, cos, sin, keys, values, first, at, heads, scores, mixed)
    for one, other in zip((mixed, keys, values), expected, strict=True):
        close(one, other, dtype)


def test_gate_token(draw, dtype):
    both, out = draw(10) * 5, np.empty(5, dtype)
    token.gate_token(both, out)
    close(out, naive.gate_token(both), dtype)
