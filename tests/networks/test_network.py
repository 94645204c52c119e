"""Whole small networks of every kind: gradients, masks, stages, other layers in them."""

import numpy as np
import pytest
from small_networks import CONFIGS, DECODERS, PATCHES, TOKENS, inputs_of, network

import diba_np as dn
from diba_np import methods, networks
from diba_np.networks.layerwise import compress_layers


def factors(rng, m, n, k=5):
    b1, b2 = (rng.integers(0, 2, shape, np.uint8) for shape in ((m, k), (k, n)))
    return dn.DiBAFactors(rng.normal(size=m) / 3, b1, rng.normal(size=k), b2, rng.normal(size=n))


def outputs(net, kind):
    """Logits and one hidden state, with the step back from gradients of both."""
    inputs, mask = inputs_of(kind)
    hidden, back = net.forward(inputs, mask)
    y, back_head = net.head(hidden[-1])
    return y, hidden, lambda gy, gh: back({1: gh, -1: back_head(gy)})


def check_slopes(net, kind, rng, entries=2):
    y, hidden, back = outputs(net, kind)
    gy, gh = rng.normal(size=y.shape), rng.normal(size=hidden[1].shape)
    mask = inputs_of(kind)[1]
    if mask is not None:  # what padding gives is nobody's business
        gh[~mask] = 0
        if gy.ndim == 3:
            gy[~mask] = 0
    net.zero_grad()
    back(gy, gh)
    gradients = net.gradients
    assert set(gradients) == set(net.parameters)

    def value():
        y, hidden, _ = outputs(net, kind)
        return np.vdot(y, gy) + np.vdot(hidden[1], gh)

    for name, parameter in net.parameters.items():
        for _ in range(entries):
            at = tuple(int(rng.integers(side)) for side in parameter.shape)
            start, step = parameter[at], 1e-6
            parameter[at] = start + step
            above = value()
            parameter[at] = start - step
            slope = (above - value()) / (2 * step)
            parameter[at] = start
            assert gradients[name][at] == pytest.approx(slope, rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("kind", CONFIGS)
def test_gradients_are_central_differences(kind, rng):
    net = network(kind)
    every = [name for i, name in enumerate(net.layers) if i % 2 == 0]
    net = net.replaced(
        {n: dn.DiBALinear(factors(rng, *net.layers[n].shape), dtype=np.float64) for n in every}
    )
    check_slopes(net, kind, rng)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta"])
def test_gradients_through_the_head_for_classes(kind, rng):
    check_slopes(network(kind, "classes"), kind, rng)


@pytest.mark.parametrize("kind", TOKENS)
def test_padding_changes_nothing(kind):
    net = network(kind)
    ids, mask = inputs_of(kind)
    whole = net.hidden(ids, mask)[-1]
    for row, kept in enumerate(mask):
        alone = net.hidden(ids[row][kept])[-1]
        assert np.allclose(whole[row][kept], alone[0], atol=1e-10)


@pytest.mark.parametrize("kind", DECODERS)
def test_no_token_looks_ahead(kind):
    net = network(kind)
    ids, _ = inputs_of(kind)
    other = ids.copy()
    other[:, 4:] = 5
    one, two = net.logits(ids), net.logits(other)
    assert np.allclose(one[:, :4], two[:, :4], atol=1e-12)
    assert not np.allclose(one[:, 4:], two[:, 4:])


@pytest.mark.parametrize("kind", CONFIGS)
def test_float32_is_float64_rounded(kind):
    inputs, mask = inputs_of(kind)
    one, two = (network(kind, dtype=d).logits(inputs, mask) for d in (np.float32, np.float64))
    assert one.dtype == np.float32
    if mask is not None and one.ndim == 3:
        one, two = one[mask], two[mask]
    assert np.allclose(one, two, atol=1e-4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_stages_are_the_trunk(kind):
    net = network(kind, dtype=np.float32)
    inputs, mask = inputs_of(kind)
    state = net.begin(inputs, mask)
    seen = []

    def linear(name, x, added=None, keep=None):
        seen.append(name)
        y = x @ net.weights[name].T + net.biases.get(name, np.float32(0))
        return y if added is None else y + added

    for stage in net.stages():
        state = stage(state, linear)
    assert seen == list(net.weights)
    end = net.tensors.find("end_norm")
    x = state["x"] if end is None else net.blocks[end].forward(state["x"])[0]
    assert np.allclose(x, net.hidden(inputs, mask)[-1], atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "vit"])
def test_compress_layers_takes_the_stages(kind):
    net = network(kind, dtype=np.float32)
    first = [net.begin(*inputs_of(kind, seed)) for seed in range(4)]
    result = compress_layers(
        net.stages(),
        net.weights,
        first,
        lambda name, A, gram: methods.fit("rtn", A, 12.0),
        biases=net.biases,
    )
    assert list(result.layers) == list(net.weights)
    small = net.replaced(result.layers)
    inputs, mask = inputs_of(kind, 9)
    difference = small.logits(inputs, mask) - net.logits(inputs, mask)
    assert 0 < np.abs(difference).mean() < np.abs(net.logits(inputs, mask)).mean()


def test_replaced_leaves_the_network_alone(rng):
    net = network("bert")
    ids, mask = inputs_of("bert")
    before = net.logits(ids, mask)
    name = next(iter(net.weights))
    other = net.replaced({name: dn.DiBALinear(factors(rng, *net.layers[name].shape))})
    for value in other.parameters.values():
        value[...] = 0
    assert list(other.compressed) == [name]
    assert np.array_equal(net.logits(ids, mask), before)
    with pytest.raises(KeyError, match="no linear layer 'nothing'"):
        net.replaced({"nothing": net.layers[name]})
    with pytest.raises(TypeError, match="must be a Layer"):
        net.layers[name] = np.eye(8)


@pytest.mark.parametrize(
    ("ids", "error", "match"),
    [
        ([[0.5]], TypeError, "ids must be ints"),
        ([[0, 19]], ValueError, r"ids must lie in \[0, 18\], got 19; a tokenizer that"),
        ([[-1]], ValueError, "got -1"),
        (np.zeros((1, 17), int), ValueError, "at most 16 tokens, got 17"),
        (np.zeros((1, 2, 3), int), ValueError, r"shape \(S, T\)"),
        ([[]], TypeError, "ids must be ints"),
        ([[1, 2], [3]], ValueError, "rows of ids must have one length; fill them up, mask="),
        (np.zeros((0, 3), int), ValueError, r"shape \(S, T\)"),
    ],
)
def test_bad_ids(ids, error, match):
    with pytest.raises(error, match=match):
        network("bert").logits(ids)


def test_bad_masks_and_patches():
    net = network("bert")
    with pytest.raises(ValueError, match=r"mask must have shape \(1, 2\)"):
        net.logits([[1, 2]], [[True]])
    with pytest.raises(ValueError, match="at least one token of each row"):
        net.logits([[1, 2]], [[False, False]])
    for kind, shape in (("vit", "2, 8, 8"), ("audio-spectrogram-transformer", "10, 8")):
        with pytest.raises(ValueError, match=rf"shape \(S, {shape}\)"):
            network(kind).logits(np.zeros((1, 3, 3)))
        with pytest.raises(TypeError, match="real numbers"):
            network(kind).logits(np.array([["a"]]))
        assert kind in PATCHES
    with pytest.raises(ValueError, match="need a head"):
        network("bert", "none").logits([[1, 2]])


def test_a_decoder_without_its_own_head_has_hidden_states_alone(tmp_path):
    """The table of tokens is no head where the configuration says so."""
    net = network("qwen2", tie_word_embeddings=False)
    assert net.head_name is None
    for call in (net.logits, lambda ids: net.generate(ids[0], 2), net.perplexity):
        with pytest.raises(ValueError, match="logits need a head over the vocabulary"):
            call([[1, 2, 3]])
    small = networks.compress(net, [[1, 2, 3, 4]] * 8, bits=8.0, method="rtn")
    small.save(tmp_path / "s.h5")
    for each in (small, networks.load(tmp_path / "s.h5")):
        cosines = (each.embed([[5, 6, 7]]) * net.embed([[5, 6, 7]])).sum()
        assert cosines > 0.99
