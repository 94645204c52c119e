"""Judging networks: alone, and against another."""

import numpy as np
import pytest
from small_networks import inputs_of, network
from test_texts import packed, words

from diba_np.networks.evaluation import evaluate

ROWS = [[3, 4, 5, 6, 2, 7], [7, 8], [9], [2, 3, 4]]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_decoders_are_judged_by_the_next_token(kind):
    dense = network(kind, dtype=np.float32)
    small = packed(dense)
    found = evaluate(small, ROWS, against=dense)
    assert found["task"] == "next tokens"
    assert found["targets"] == 5 + 1 + 2
    assert found["perplexity"] == pytest.approx(small.perplexity(ROWS), rel=1e-5)
    assert found["against"]["perplexity"] == pytest.approx(dense.perplexity(ROWS), rel=1e-5)
    right = agreed = divergence = 0
    for row in ROWS:
        one, two = (net.logits([row])[0, :-1].astype(float) for net in (small, dense))
        right += (one.argmax(-1) == row[1:]).sum()
        agreed += (one.argmax(-1) == two.argmax(-1)).sum()
        p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (two, one))
        divergence += (p * np.log(p / q)).sum()
    assert found["accuracy"] == pytest.approx(right / 8)
    assert found["agreement"] == pytest.approx(agreed / 8)
    assert found["kl"] == pytest.approx(divergence / 8, rel=1e-4)
    same = evaluate(dense, ROWS, against=dense)
    assert same["agreement"] == 1
    assert abs(same["kl"]) < 1e-7


def test_encoders_are_judged_by_masked_tokens():
    net = network("bert", dtype=np.float32)
    with pytest.raises(ValueError, match="texts need a tokenizer"):
        evaluate(net, ROWS)
    net.tokenizer = words()
    found = evaluate(net, ["a b c d e f g", "h i", "j"], against=packed(net))
    assert found["task"] == "masked tokens"
    assert found["targets"] == 1 + 1 + 1
    assert 0 <= found["accuracy"] <= 1 <= found["perplexity"]
    assert evaluate(net, ROWS, seed=1)["targets"] == 4


@pytest.mark.parametrize("kind", ["vit", "audio-spectrogram-transformer"])
def test_classes_are_judged_by_labels(kind):
    net = network(kind, dtype=np.float32)
    inputs, _ = inputs_of(kind)
    labels = net.logits(inputs).argmax(axis=1)
    found = evaluate(net, inputs=inputs, labels=labels, against=net)
    assert found["accuracy"] == found["agreement"] == 1
    assert evaluate(net, inputs=inputs, labels=(labels + 1) % 3)["accuracy"] == 0
    with pytest.raises(TypeError, match="classes give labels"):
        evaluate(net, ROWS)
    with pytest.raises(ValueError, match=r"labels must be ints of shape \(3,\)"):
        evaluate(net, inputs=inputs, labels=labels[:2])
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\]"):
        evaluate(net, inputs=inputs, labels=labels + 3)
    with pytest.raises(TypeError, match="classes give labels, with texts or inputs"):
        evaluate(net, inputs=inputs)
    with pytest.raises(TypeError, match="classes give labels, with texts or inputs"):
        evaluate(net)


def test_networks_that_do_not_fit_together():
    with pytest.raises(ValueError, match="same kind and vocabulary"):
        evaluate(network("llama"), ROWS, against=network("bert"))
    with pytest.raises(ValueError, match="2 tokens or more"):
        evaluate(network("llama"), [[3]])
