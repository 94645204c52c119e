"""Blocks: outputs against plain formulas, gradients against central differences in float64."""

import numpy as np
import pytest

import diba_np as dn
from diba_np.layers.coded_linear import CodedLinear
from diba_np.layers.dense_linear import DenseLinear
from diba_np.methods.scalar import ScalarQuantized
from diba_np.networks.blocks.activations import ACTIVATIONS, gelu
from diba_np.networks.blocks.attention import attend
from diba_np.networks.blocks.embedding import Embedding
from diba_np.networks.blocks.gated import gated
from diba_np.networks.blocks.layer_norm import LayerNorm
from diba_np.networks.blocks.linear import linear
from diba_np.networks.blocks.rms_norm import RMSNorm
from diba_np.networks.blocks.rotary import Rotary, frequencies


def slopes(run, arrays, upstream, step=1e-6):
    """Central differences of ``sum(run() upstream)`` with respect to every entry of arrays."""
    for array in arrays:
        found = np.empty_like(array)
        for at in np.ndindex(array.shape):
            start = array[at]
            array[at] = start + step
            above = np.vdot(run(), upstream)
            array[at] = start - step
            found[at] = (above - np.vdot(run(), upstream)) / (2 * step)
            array[at] = start
        yield found


def check(run, back, arrays, gradients, rng):
    """`run` gives the output anew; `back` fills `gradients` from one of the output."""
    upstream = rng.normal(size=run().shape)
    given = gradients(back(upstream))
    for one, other in zip(given, slopes(run, arrays, upstream), strict=True):
        assert np.allclose(one, other, rtol=1e-6, atol=1e-7)


def coded(rng, m, n):
    codes, scales = rng.integers(0, 5, (m, n), np.uint8), rng.normal(size=(m, 2))
    table, kept = np.arange(-2.0, 3.0), np.ones(n, bool)
    return ScalarQuantized((m, n), codes, 5, n // 2, scales, kept, table, 1.0, {})


def layers(rng, m=5, n=4):
    b1, b2 = (rng.integers(0, 2, shape, np.uint8) for shape in ((m, 3), (3, n)))
    diagonals = (rng.normal(size=size) for size in (m, 3, n))
    d1, d2, d3 = diagonals
    shifted = dn.DiBAFactors(d1, b1, d2, b2, d3, 0.5)
    bias = rng.normal(size=m)
    return {
        "dense": DenseLinear(rng.normal(size=(m, n)), bias, np.float64, trained=True),
        "diba": dn.DiBALinear(dn.DiBAFactors(d1, b1, d2, b2, d3), bias, np.float64),
        "shifted": dn.DiBALinear(shifted, bias, np.float64),
        "terms": dn.DiBALinear(
            dn.DiBAFactors.from_terms([shifted, dn.DiBAFactors(-d1, 1 - b1, d2, b2, d3, 0.5)]),
            bias,
            np.float64,
        ),
        "coded": CodedLinear(coded(rng, m, n), bias, np.float64),
    }


def values_of(layer):
    """The matrix with the present parameters."""
    return (layer(np.eye(layer.shape[1])) - layer.parameters["bias"]).T


KINDS = ["dense", "diba", "shifted", "terms", "coded"]


@pytest.mark.parametrize("kind", KINDS)
def test_linear(rng, kind):
    layer = layers(rng)[kind]
    x, added = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 3, 5))
    y, back = linear(layer, x, added)
    assert np.allclose(y, x @ values_of(layer).T + layer.parameters["bias"] + added)
    names = list(layer.parameters)
    check(
        lambda: linear(layer, x, added)[0],
        back,
        [x, *(layer.parameters[name] for name in names)],
        lambda gx: [gx, *(layer.gradients[name] for name in names)],
        rng,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_lookup_gives_rows_of_the_matrix(rng, kind):
    layer = layers(rng)[kind]
    ids = np.array([[0, 4, 1], [1, 1, 2]])
    rows, back = layer.lookup(ids)
    assert np.allclose(rows, values_of(layer)[ids])
    names = [name for name in layer.parameters if name != "bias"]
    check(
        lambda: layer.lookup(ids)[0],
        back,
        [layer.parameters[name] for name in names],
        lambda _: [layer.gradients[name] for name in names],
        rng,
    )


def test_a_layer_at_two_places_adds_its_gradients(rng):
    layer = layers(rng)["diba"]
    ids, x = np.array([1, 3]), rng.normal(size=(2, 4))

    def run():
        rows, one = layer.lookup(ids)
        y, other = linear(layer, rows + x)
        return y, lambda g: one(other(g))

    names = list(layer.parameters)
    check(
        lambda: run()[0],
        run()[1],
        [layer.parameters[name] for name in names],
        lambda _: [layer.gradients[name] for name in names],
        rng,
    )


@pytest.mark.parametrize("form", [LayerNorm, RMSNorm])
def test_norms(rng, form):
    parts = [rng.normal(size=6) for _ in range(2 if form is LayerNorm else 1)]
    block = form(*parts, 1e-3, np.float64)
    x = rng.normal(size=(2, 3, 6))
    y, back = block.forward(x)
    p = block.parameters
    if form is LayerNorm:
        unit = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3)
        assert np.allclose(y, unit * p["weight"] + p["bias"])
    else:
        assert np.allclose(y, x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-3) * p["weight"])
    check(
        lambda: block.forward(x)[0],
        back,
        [x, *p.values()],
        lambda gx: [gx, *block.gradients.values()],
        rng,
    )
    block.zero_grad()
    assert not any(g.any() for g in block.gradients.values())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(rng, name):
    x = rng.normal(size=(3, 4)) * 2
    y, back = ACTIVATIONS[name](x)
    check(lambda: ACTIVATIONS[name](x)[0], back, [x], lambda gx: [gx], rng)
    narrow = ACTIVATIONS[name](x.astype(np.float32))[0]
    assert narrow.dtype == np.float32
    assert np.allclose(narrow, y, atol=1e-6)


def test_gelu_against_the_normal_law():
    from scipy.stats import norm

    x = np.linspace(-8, 8, 401)
    assert np.allclose(gelu(x)[0], x * norm.cdf(x))


def test_gated(rng):
    gate, value = rng.normal(size=(2, 3, 4))
    y, back = gated(gate, value, ACTIVATIONS["silu"])
    assert np.allclose(y, gate / (1 + np.exp(-gate)) * value)
    check(lambda: gated(gate, value, ACTIVATIONS["silu"])[0], back, [gate, value], list, rng)


def test_rotary_turns_pairs(rng):
    rotary = Rotary(frequencies(6, 100.0), np.float64)
    x = rng.normal(size=(2, 5, 12))
    y, back = rotary.forward(x)
    for token in range(5):
        for head in range(2):
            for j in range(3):
                one, other = 6 * head + j, 6 * head + j + 3
                turn = np.exp(1j * token * 100.0 ** (-2 * j / 6))
                turned = (x[:, token, one] + 1j * x[:, token, other]) * turn
                assert np.allclose(y[:, token, one], turned.real)
                assert np.allclose(y[:, token, other], turned.imag)
    check(lambda: rotary.forward(x)[0], back, [x], lambda gx: [gx], rng)


def test_rotary_scaling():
    plain = frequencies(8, 10000.0)
    assert np.allclose(frequencies(8, 10000.0, {"type": "linear", "factor": 4}), plain / 4)
    three = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    found = frequencies(8, 10000.0, three)
    turns = 64 * plain / (2 * np.pi)
    assert np.allclose(found[turns >= 4], plain[turns >= 4])
    assert np.allclose(found[turns <= 1], plain[turns <= 1] / 8)
    assert ((found <= plain) & (found >= plain / 8)).all()
    with pytest.raises(ValueError, match="rope_scaling must be"):
        frequencies(8, 1.0, {"rope_type": "yarn"})


def plain_attention(q, k, v, heads, groups, seen):
    """By loops: `seen` (S, T, T) tells which tokens look at which."""
    texts, tokens, _ = q.shape
    d = q.shape[2] // heads
    out = np.zeros_like(q)
    for s in range(texts):
        for h in range(heads):
            own, shared = slice(h * d, (h + 1) * d), h * groups // heads
            other = slice(shared * d, (shared + 1) * d)
            for i in range(tokens):
                scores = k[s, :, other] @ q[s, i, own] / np.sqrt(d)
                p = np.exp(scores - scores.max()) * seen[s, i]
                out[s, i, own] = p @ v[s, :, other] / p.sum()
    return out


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 2)])
def test_attention(rng, groups, causal, window):
    heads, d, tokens = 4, 3, 5
    q = rng.normal(size=(2, tokens, heads * d))
    k, v = rng.normal(size=(2, 2, tokens, groups * d))
    mask = np.array([[True] * 5, [True] * 3 + [False] * 2])
    if causal:
        mask[1] = True
    how = {"groups": groups, "mask": mask, "causal": causal, "window": window}
    i, j = np.indices((tokens, tokens))
    seen = (j <= i) & (j > i - (window or tokens)) if causal else np.ones((tokens, tokens), bool)
    y, back = attend(q, k, v, heads, **how)
    expected = plain_attention(q, k, v, heads, groups, seen & mask[:, None])
    assert np.allclose(y, expected)
    check(lambda: attend(q, k, v, heads, **how)[0], back, [q, k, v], list, rng)


def test_embedding(rng):
    block = Embedding(rng.normal(size=(4, 3)), np.float64)
    ids = np.array([[0, 2], [2, 2]])
    rows, back = block.forward(ids)
    assert np.array_equal(rows, block.parameters["weight"][ids])
    check(
        lambda: block.forward(ids)[0],
        back,
        [block.parameters["weight"]],
        lambda _: [block.gradients["weight"]],
        rng,
    )
