"""Judging networks: alone, and against another."""

import numpy as np
import pytest
from small_networks import inputs_of, network
from test_texts import packed, words

from diba_np.networks import evaluation
from diba_np.networks.evaluation import evaluate
from diba_np.networks.masking import drawn_tokens
from diba_np.networks.network import Network

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
    told = [evaluate(small, np.array([[3, 4, 5]])), evaluate(small, inputs=np.array([[3, 4, 5]]))]
    assert {one["perplexity"] for one in told} == {told[0]["perplexity"]}
    same = evaluate(dense, ROWS, against=dense)
    assert same["agreement"] == 1
    assert abs(same["kl"]) < 1e-7


def test_encoders_are_judged_by_masked_tokens():
    net = network("bert", dtype=np.float32)
    with pytest.raises(ValueError, match="tokenizer with a mask, the network has no tokenizer"):
        evaluate(net, ROWS)
    net.tokenizer = words()
    found = evaluate(net, ["a b c d e f g", "h i", "j"], against=packed(net))
    assert found["task"] == "masked tokens"
    assert found["targets"] == 1 + 1 + 1
    assert 0 <= found["accuracy"] <= 1 <= found["perplexity"]
    assert evaluate(net, inputs=ROWS, seed=1)["targets"] == 4


@pytest.mark.parametrize("kind", ["vit", "audio-spectrogram-transformer"])
def test_classes_are_judged_by_labels(kind):
    net = network(kind, dtype=np.float32)
    inputs, _ = inputs_of(kind)
    labels = net.logits(inputs).argmax(axis=1)
    found = evaluate(net, inputs=inputs, labels=labels, against=net)
    assert found["accuracy"] == found["agreement"] == 1
    assert evaluate(net, inputs=inputs, labels=(labels + 1) % 3)["accuracy"] == 0
    with pytest.raises(TypeError, match="reads arrays: give inputs= in the place of texts"):
        evaluate(net, ROWS, labels=labels)
    with pytest.raises(TypeError, match="classes give labels"):
        evaluate(network("bert", "classes"), ROWS)
    with pytest.raises(ValueError, match=r"labels must be ints of shape \(3,\)"):
        evaluate(net, inputs=inputs, labels=labels[:2])
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\]"):
        evaluate(net, inputs=inputs, labels=labels + 3)
    with pytest.raises(TypeError, match="classes give labels=, with texts= or inputs="):
        evaluate(net, inputs=inputs)
    with pytest.raises(TypeError, match="classes give labels=, with texts= or inputs="):
        evaluate(net)


def test_networks_that_do_not_fit_together():
    with pytest.raises(ValueError, match="same kind and vocabulary"):
        evaluate(network("llama"), ROWS, against=network("bert"))
    with pytest.raises(ValueError, match="2 tokens or more"):
        evaluate(network("llama"), [[3]])


@pytest.mark.parametrize(
    ("net", "against", "match"),
    [
        (("bert", "classes"), ("bert", "masked"), "a network for classes, got one for masked"),
        (("bert", "masked"), ("bert", "classes"), "a network for masked tokens, got one for cl"),
        (("bert", "masked"), ("bert", "none"), "a network for masked tokens, got one for sent"),
        (("bert", "none"), ("bert", "masked"), "a network for sentences, got one for masked"),
        (("bert", "classes"), ("bert", "score"), "a network for classes, got one for scores"),
        (("bert", "none"), ("wide", "none"), "must have 8 outputs, as the network, got 16"),
        (("vit", "classes"), ("large", "classes"), r"arrays of 2 channels of \(8, 8\)"),
    ],
)
def test_against_is_a_network_of_the_same_task_and_sizes(net, against, match):
    others = {"wide": ("bert", {"hidden_size": 16}), "large": ("vit", {"image_size": 12})}
    kind, more = others.get(against[0], (against[0], {}))
    own = network(*net, dtype=np.float32)
    own.tokenizer = words()
    given = {"labels": [0, 1]} if net[1] == "classes" else {}
    rows = {"inputs": inputs_of("vit")[0][:2]} if net[0] == "vit" else {"texts": ["a b", "c"]}
    with pytest.raises(ValueError, match=match):
        evaluate(own, **rows, **given, against=network(kind, against[1], **more))


@pytest.mark.parametrize(("kind", "head"), [("llama", None), ("bert", "none"), ("vit", None)])
def test_what_is_done_once_is_not_timed(kind, head, monkeypatch):
    """Of each network the first batch is slow: kernels are compiled, weights are read."""
    clock, seen = [0.0], set()
    monkeypatch.setattr(evaluation.time, "process_time", lambda: clock[0])
    run = Network.last_hidden

    def slow_at_first(net, inputs, mask=None, linear=None):
        clock[0] += 1.0 if net in seen else 1000.0
        seen.add(net)
        return run(net, inputs, mask, linear)

    monkeypatch.setattr(Network, "last_hidden", slow_at_first)
    one, two = (network(kind, head, dtype=np.float32) for _ in range(2))
    if kind == "vit":
        inputs, _ = inputs_of(kind)
        found = evaluate(one, inputs=inputs, labels=[0, 1, 2], against=two)
        tokens = 3 * (4 + 1)
    else:
        found = evaluate(one, ROWS, against=two)
        tokens = 6 + 2 + 3 + (head == "none")
    assert found["tokens_per_second"] == tokens
    assert found.get("against", found)["tokens_per_second"] == tokens


def test_scores_are_judged_by_squared_errors():
    dense = network("bert", "score", dtype=np.float32)
    small = packed(dense)
    one, two = (np.array([net.logits([row])[0, 0] for row in ROWS]) for net in (small, dense))
    found = evaluate(small, ROWS, against=dense)
    assert (found["task"], found["targets"]) == ("scores", 4)
    assert found["squared_difference"] == pytest.approx(np.square(one - two).mean(), rel=1e-4)
    assert not {"squared_error", "accuracy", "perplexity"} & (found.keys() | found["against"])
    labels = np.array([0.5, 1, -2, 0])
    found = evaluate(small, ROWS, labels=labels, against=dense)
    squares = np.square(one - labels)
    assert found["squared_error"] == pytest.approx(squares.mean(), rel=1e-4)
    assert found["squared_error_error"] == pytest.approx(squares.std() / 2, rel=1e-4)
    expected = np.square(two - labels).mean()
    assert found["against"]["squared_error"] == pytest.approx(expected, rel=1e-4)
    assert evaluate(dense, ROWS, labels=two)["squared_error"] < 1e-10
    with pytest.raises(TypeError, match="scores give labels=, with texts= or inputs=; against="):
        evaluate(dense, ROWS)
    for wrong in ([1.0, 2.0], [1.0, 2.0, 3.0, np.nan]):
        with pytest.raises(ValueError, match=r"labels must be finite numbers of shape \(4,\)"):
            evaluate(dense, ROWS, labels=wrong)


def test_several_scores_of_a_row_are_judged_together():
    dense = network("bert", "classes", dtype=np.float32, problem_type="regression")
    small = packed(dense)
    one, two = (np.array([net.logits([row])[0] for row in ROWS]) for net in (small, dense))
    labels = np.random.default_rng(0).normal(size=(4, 3))
    found = evaluate(small, ROWS, labels=labels, against=dense)
    assert (found["task"], found["targets"]) == ("scores", 4)
    squares = np.square(one - labels).mean(axis=1)
    assert found["squared_error"] == pytest.approx(squares.mean(), rel=1e-4)
    assert found["squared_error_error"] == pytest.approx(squares.std() / 2, rel=1e-4)
    assert found["squared_difference"] == pytest.approx(np.square(one - two).mean(), rel=1e-4)
    with pytest.raises(ValueError, match=r"labels must be finite numbers of shape \(4, 3\)"):
        evaluate(dense, ROWS, labels=labels[:, 0])


def test_labels_are_judged_one_by_one():
    problem = {"problem_type": "multi_label_classification"}
    dense = network("bert", "classes", dtype=np.float32, **problem)
    small = packed(dense)
    one, two = (np.array([net.logits([row])[0] for row in ROWS]) for net in (small, dense))
    labels = np.array([[0, 1, 1], [0, 0, 0], [1, 0, 1], [1, 1, 0]])
    found = evaluate(small, ROWS, labels=labels, against=dense)
    assert (found["task"], found["targets"]) == ("labels", 12)
    p, q = (1 / (1 + np.exp(-y.astype(np.float64))) for y in (two, one))
    assert found["accuracy"] == pytest.approx(np.mean((q > 0.5) == labels))
    rights = ((q > 0.5) == labels).mean(axis=1)
    assert found["accuracy_error"] == pytest.approx(rights.std() / 2)  # a row's taken together
    loss = -np.log(np.where(labels, q, 1 - q)).mean()
    assert found["perplexity"] == pytest.approx(np.exp(loss), rel=1e-5)
    apart = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    assert found["kl"] == pytest.approx(apart.mean(), rel=1e-4)
    assert found["agreement"] == pytest.approx(np.mean((p > 0.5) == (q > 0.5)))
    for wrong, got in ((labels[:, 0], r"shape \(4,\)"), (labels + 1, "2"), (labels / 2, "0.5")):
        with pytest.raises(ValueError, match=rf"must be 0 or 1 of shape \(4, 3\), got {got}$"):
            evaluate(dense, ROWS, labels=wrong)
    with pytest.raises(ValueError, match="a network for labels, got one for classes"):
        evaluate(dense, ROWS, labels=labels, against=network("bert", "classes"))


def test_vectors_of_arrays_are_held_against_anothers():
    dense = network("vit", "none", dtype=np.float32)
    inputs, _ = inputs_of("vit")
    small = packed(dense)
    found = evaluate(small, inputs=inputs, against=dense)
    assert (found["task"], found["targets"]) == ("sentences", 3)
    one, two = (net.last_hidden(inputs).mean(axis=1, dtype=np.float64) for net in (small, dense))
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1)
    assert found["cosine"] == pytest.approx(((one * two).sum(axis=1) / lengths).mean(), rel=1e-4)
    with pytest.raises(TypeError, match="judged on inputs=, which is missing"):
        evaluate(small, against=dense)


def test_a_mask_that_stands_in_a_text_is_not_asked_for():
    net = network("bert", dtype=np.float32)
    net.tokenizer = words()
    assert evaluate(net, ["a [MASK] [MASK] [MASK]"] * 20)["targets"] == 20
    ids, mask = np.array([[4, 1, 1, 1]] * 20), np.ones((20, 4), bool)
    asked = drawn_tokens(net, ids, mask, np.random.default_rng(0))
    assert asked[:, 0].all()
    assert not asked[:, 1:].any()
