"""What networks are for: outputs, losses and gradients of each task; tokens that are masked."""

import numpy as np
import pytest
from small_networks import PATCHES, inputs_of, network
from test_texts import packed, words

from diba_np import networks
from diba_np.errors import BudgetError
from diba_np.networks import code_training
from diba_np.networks.calibration import calibration
from diba_np.networks.distillation import taught, trained
from diba_np.networks.evaluation import evaluate
from diba_np.networks.importance import EVEN, importance, pulled
from diba_np.networks.inputs import batches, padded
from diba_np.networks.masking import drawn_tokens
from diba_np.networks.shares import LEAST, shares
from diba_np.networks.tasks import CLASSES, LABELS, MASKED, NEXT, SCORES, SENTENCES, task_of

TASKS = {  # task -> kind and head of a small network
    NEXT: ("llama", None),
    MASKED: ("bert", "masked"),
    CLASSES: ("bert", "classes"),
    LABELS: ("bert", "classes"),
    SCORES: ("bert", "score"),
    SENTENCES: ("bert", "none"),
}
WHOLE_ROWS = (CLASSES, LABELS, SCORES)
SMALLEST = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
BITS = {"diba": 3.0, "gptq": 3.0, "qswd": 4.0, "mesa": 4.0, "bitat": 1.2, "random": 3.0}


def small(task, dtype=np.float32, **more):
    kind, head = TASKS[task]
    if task is LABELS:
        more["problem_type"] = "multi_label_classification"
    return network(kind, head, dtype=dtype, **more)


@pytest.fixture(params=TASKS, ids=lambda task: task.name)
def task(request):
    return request.param


def test_a_network_has_the_task_of_its_head(task):
    assert task_of(small(task)) is task
    assert task_of(network("vit")) is CLASSES
    assert task_of(network("vit", problem_type="regression")) is SCORES
    assert task_of(network("vit", problem_type="single_label_classification")) is CLASSES


def test_gradients_of_a_lesson_are_central_differences(task):
    net, rng = small(task, np.float64), np.random.default_rng(0)
    x, aim, turn = rng.normal(size=(3, 3, 5, 8))
    mask = np.arange(5) < np.array([[5], [3], [4]])
    asked = mask & (np.arange(5) % 2 == 0)

    def value(x):
        return taught(net, net, x, aim, mask, asked, back=False)[0]

    gradient, step = taught(net, net, x, aim, mask, asked)[1], 1e-5
    slope = (value(x + step * turn) - value(x - step * turn)) / (2 * step)
    assert np.isclose(slope, np.vdot(gradient, turn), rtol=1e-5)
    assert not gradient[~mask].any()
    assert value(x) > 0
    assert abs(value(aim)) < 1e-12


def test_the_loss_is_a_mean_over_targets(task):
    """A batch counts as much as its rows do, one by one."""
    net, rng = small(task, np.float64), np.random.default_rng(1)
    x, aim = rng.normal(size=(2, 3, 5, 8))
    mask = np.arange(5) < np.array([[5], [3], [4]])
    parts = [taught(net, net, *(a[i : i + 1] for a in (x, aim, mask)))[0] for i in range(3)]
    sizes = [task.count(mask[i : i + 1]) for i in range(3)]
    assert taught(net, net, x, aim, mask)[0] == pytest.approx(np.average(parts, weights=sizes))


def test_outputs_are_those_that_the_network_gives(task):
    net = small(task, np.float64)
    ids, mask = inputs_of(TASKS[task][0])
    mask = np.ones(ids.shape, bool) if mask is None else mask
    y, _ = task.outputs(net, net.last_hidden(ids, mask), mask, mask)
    if task is SENTENCES:
        expected = net.embed([list(row[at]) for row, at in zip(ids, mask, strict=True)])
    else:
        expected = net.logits(ids, mask)
        expected = expected if task in WHOLE_ROWS else expected[mask]
    np.testing.assert_allclose(y, expected, atol=1e-10)


def test_drawn_gradients_lean_to_no_side(task):
    rng = np.random.default_rng(0)
    y = np.random.default_rng(1).normal(size=(1, 1 if task is SCORES else 6))
    drawn = task.drawn(np.repeat(y, 20000, axis=0), rng)
    assert np.abs(drawn.mean(axis=0)).max() < 0.03
    assert np.square(drawn).mean() > 0.1
    if task is NEXT:  # the Fisher information of the softmax
        p = np.exp(y[0]) / np.exp(y).sum()
        np.testing.assert_allclose(drawn.T @ drawn / 20000, np.diag(p) - np.outer(p, p), atol=0.02)


def test_labels_are_held_one_by_one():
    """Unlike classes: what is added to all outputs changes every label."""
    y = np.array([[0.5, -1.0, 2.0], [0.0, 3.0, -2.0]])
    p, q = (1 / (1 + np.exp(-x)) for x in (y, y + 1))
    apart = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum()
    value, gradient = LABELS.loss(y + 1, y)
    assert value == pytest.approx(apart)
    np.testing.assert_allclose(gradient, q - p)
    assert CLASSES.loss(y + 1, y)[0] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("task", [MASKED, CLASSES, LABELS], ids=lambda task: task.name)
def test_certain_targets_matter_too(task):
    y = np.array([[40.0, 0.0, 0.0]])
    assert np.abs(task.drawn(np.repeat(y, 50, axis=0), np.random.default_rng(0))).mean() > 0.3


def test_batches_hold_like_lengths_and_every_row_once():
    texts = [[0] * length for length in (3, 9, 1, 4, 9, 2)]
    cut = list(batches(texts, 12))
    assert sorted(np.concatenate(cut)) == list(range(6))
    assert all(len(rows) * max(len(texts[i]) for i in rows) <= 12 for rows in cut)
    assert [len(texts[i]) for rows in cut for i in rows] == [1, 2, 3, 4, 9, 9]


# -- importance ------------------------------------------------------------------------------------


def test_importance_is_that_of_tokens_and_outputs(task):
    net = small(task)
    rows = [list(np.random.default_rng(i).integers(2, 19, 3 + i % 6)) for i in range(24)]
    data = calibration(net, rows, tokens=60)
    masks = [data.read(places)[1] for places in data.places]
    found = dict(importance(net, data))
    assert set(found) == set(net.weights)
    for each in found.values():
        for weights, mask in zip(each.tokens, masks, strict=True):
            assert not weights[~mask].any()
            assert (weights[mask] > 0).all()
        count = sum(mask.sum() for mask in masks)
        assert sum(weights.sum() for weights in each.tokens) == pytest.approx(count, rel=1e-4)
        assert np.diag(each.outputs).mean() == pytest.approx(1)
        assert np.linalg.eigvalsh(each.outputs)[0] > 0.99 * EVEN
    if task in WHOLE_ROWS:  # only the first token is read at the end
        last = found["bert.encoder.layer.1.output.dense"].tokens
        assert max(part[:, 1:].max() for part in last) < 2 * EVEN  # what follows no gradient
        assert np.mean([part[:, 0].mean() for part in last]) > 10 * EVEN


def test_tokens_that_are_asked_for_alone_pull():
    net = small(MASKED)
    ids, mask = inputs_of("bert")
    asked = np.zeros(mask.shape, bool)
    asked[0, 2] = True
    g = pulled(net, net.last_hidden(ids, mask), mask, asked, np.random.default_rng(0))
    assert g[0, 2].any()
    assert not g[~asked].any()


# -- tokens that are masked ------------------------------------------------------------------------


def test_texts_are_masked_for_a_network_that_tells_masked_tokens():
    net = small(MASKED)
    net.tokenizer = words()
    hidden = net.tokenizer.id_of("[MASK]")
    rows = [[4 + (i + j) % 9 for j in range(4 + i)] for i in range(12)]
    rows.append([4, hidden, 5])
    data = calibration(net, rows)
    ids, mask = padded(rows, net.config.padding)
    asked = data.asked(data.inputs, data.mask)
    assert data.hidden == hidden
    assert asked.sum(axis=1).tolist() == [max(1, round(0.15 * len(row))) for row in rows[:-1]] + [1]
    assert (asked <= mask).all()
    assert np.flatnonzero(asked[-1]).tolist() == [1]
    np.testing.assert_array_equal(data.inputs[~asked], ids[~asked])
    assert (data.inputs[asked] == hidden).all()
    np.testing.assert_array_equal(calibration(net, rows).inputs, data.inputs)
    assert (calibration(net, rows, seed=1).inputs != data.inputs).any()
    part = data.drawn(20, 0)
    assert part.hidden == hidden and part.lengths.sum() >= 20


def test_without_a_tokenizer_every_token_is_asked_for():
    data = calibration(small(MASKED), [[3, 4, 5], [6, 7]])
    assert data.hidden is None
    np.testing.assert_array_equal(data.asked(data.inputs, data.mask), data.mask)


def test_special_tokens_are_never_masked():
    net = small(MASKED)
    net.tokenizer = words()
    special = [net.tokenizer.id_of(token) for token in ("[CLS]", "[SEP]", "[UNK]")]
    special = [number for number in special if number is not None]
    assert special
    ids = np.array([special + [9]] * 20)
    asked = drawn_tokens(net, ids, np.ones(ids.shape, bool), np.random.default_rng(0))
    assert (asked.sum(axis=1) == 1).all()
    assert asked[:, -1].all()
    none = np.array([special])
    assert not drawn_tokens(net, none, np.ones(none.shape, bool), np.random.default_rng(0)).any()


def test_rows_in_which_nothing_can_be_masked_are_left_out():
    net = small(MASKED)
    net.tokenizer = words()
    texts = ["a b c d e"] * 6 + ["", "[UNK]", "§ §"] * 30
    data = calibration(net, texts, tokens=16)
    assert len(data) == 6
    asked = [data.asked(*data.read(rows)) for rows in data.places]
    assert all(part.any(axis=1).all() for part in asked)
    for nothing in (["§"], ["[UNK] §", "[CLS]"]):
        with pytest.raises(ValueError, match="hold a token that can be masked, got none"):
            calibration(net, nothing)
        with pytest.raises(ValueError, match="hold a token that can be masked, got none"):
            evaluate(net, nothing)
    how = {"bits": 4.0, "method": "rtn", "embeddings": False}
    assert networks.compress(net, texts, **how).compressed


# -- arrays that patches are cut from --------------------------------------------------------------


@pytest.mark.parametrize("kind", PATCHES)
def test_tokens_of_arrays_are_those_that_the_network_makes(kind):
    net = network(kind, dtype=np.float32)
    inputs, _ = inputs_of(kind, rows=40)
    each = net.last_hidden(inputs[:1]).shape[1]
    data = calibration(net, inputs, tokens=3 * each)
    assert data.lengths.tolist() == [each] * 40
    assert {len(rows) for rows in data.places[:-1]} == {3}
    assert len(data.drawn(5 * each + 1, 0)) == 5
    assert {len(rows) for rows in data.batched(2 * each).places} == {2}


def test_integers_are_arrays_as_floats_are():
    net = network("vit", dtype=np.float32)
    ints = np.random.default_rng(0).integers(0, 9, (8, 2, 8, 8)).astype(np.uint8)
    how = {"bits": 4.0, "method": "rtn", "embeddings": False}
    with pytest.warns(UserWarning, match="inputs are uint8"):
        one = networks.compress(net, ints, **how)
        found = evaluate(one, inputs=ints, labels=np.zeros(8, int))
    two = networks.compress(net, ints.astype(np.float32), **how)
    assert (
        found["perplexity"]
        == evaluate(two, inputs=ints.astype(np.float32), labels=np.zeros(8, int))["perplexity"]
    )


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (np.array([[1.0, 2.0], [np.nan, 3.0]]), "inputs must be finite, got NaN in row 1"),
        (np.array([[np.inf, 2.0], [2.0, 3.0]]), "inputs must be finite, got infinity in row 0"),
        (np.zeros((0, 2)), "inputs must hold at least one array, got shape"),
    ],
)
def test_arrays_that_cannot_be_read(wrong, match):
    net = network("vit", dtype=np.float32)
    inputs = np.ones((len(wrong), 2, 8, 8)) * (wrong[:, :, None, None])
    labels = np.zeros(len(inputs), int)
    for ask in (
        net.logits,
        lambda x: calibration(net, x),
        lambda x: networks.compress(net, x),
        lambda x: evaluate(net, inputs=x, labels=labels),
    ):
        with pytest.raises(ValueError, match=match):
            ask(inputs)
    for ask in (net.logits, lambda x: calibration(net, x)):
        with pytest.raises(TypeError, match="inputs must be real numbers"):
            ask(["a", "b"])


# -- judged ----------------------------------------------------------------------------------------


def test_classes_of_rows_of_tokens_are_judged_without_their_padding():
    net = small(CLASSES)
    rows = [[3, 4, 5, 6], [7], [8, 9], [4, 3, 2]]
    labels = np.array([int(net.logits([row]).argmax()) for row in rows])
    found = evaluate(net, rows, labels=labels, against=packed(net))
    assert (found["task"], found["targets"], found["accuracy"]) == ("classes", 4, 1.0)
    labels[0] = (labels[0] + 1) % 3
    half = evaluate(net, rows, labels=labels)
    assert half["accuracy"] == 0.75
    assert half["accuracy_error"] == pytest.approx(np.sqrt(3 / 16) / 2)
    with pytest.raises(ValueError, match="one token each, got none in text 1"):
        evaluate(net, [[3, 4], [], [5]], labels=[0, 1, 2])
    with pytest.raises(TypeError, match="give labels=, with texts= or inputs="):
        evaluate(net, rows, inputs=padded(rows)[0], labels=labels)
    with pytest.raises(
        TypeError, match="masked tokens are judged on texts= or inputs=; leave labels= out"
    ):
        evaluate(small(MASKED), rows, labels=labels)
    with pytest.raises(ValueError, match=r"tokenizer with a mask, the network has no tokenizer"):
        evaluate(small(MASKED), rows)


def test_standard_errors_take_the_targets_of_a_row_together():
    net = network("llama", dtype=np.float32)
    rows = [[3, 4, 5, 6, 2, 7], [7, 8, 9], [2, 3, 4, 5]]
    right = [net.logits([row])[0, :-1].argmax(-1) == row[1:] for row in rows]
    mean = np.concatenate(right).mean()
    apart = [(part - mean).sum() for part in right]
    found = evaluate(net, rows)
    assert found["accuracy_error"] == pytest.approx(np.sqrt(np.square(apart).sum()) / 10)
    assert np.isnan(evaluate(net, rows[:1])["accuracy_error"])  # one row does not tell


def test_vectors_of_sentences_are_judged_by_their_cosines():
    dense = small(SENTENCES)
    rows = [[3, 4, 5, 6], [7], [8, 9], [4, 3, 2]]
    other = packed(dense)
    found = evaluate(other, rows, against=dense)
    cosines = np.einsum("ij,ij->i", other.embed(rows), dense.embed(rows))
    assert found["cosine"] == pytest.approx(cosines.mean(), abs=1e-6)
    assert found["cosine_error"] == pytest.approx(cosines.std() / 2, abs=1e-6)
    assert np.isnan(evaluate(other, rows[:1], against=dense)["cosine_error"])
    assert evaluate(dense, rows, against=dense)["cosine"] == pytest.approx(1)
    with pytest.raises(TypeError, match="judged against another"):
        evaluate(dense, rows)


# -- compressed ------------------------------------------------------------------------------------


def test_every_task_is_nearer_after_activations_and_training(task, tmp_path):
    kind, head = TASKS[task]
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    net = network(kind, head, dtype=np.float32, seed=2, **sizes)
    rows = np.random.default_rng(0).integers(2, 19, (120, 10))
    held = np.random.default_rng(1).integers(2, 19, (40, 10))
    mask = np.ones(held.shape, bool)

    def apart(other):
        last, aim = (one.last_hidden(held, mask) for one in (other, net))
        return taught(other, net, last, aim, mask, back=False)[0]

    how = {"bits": 2.0, "method": "gptq", "embeddings": False}
    alone = networks.compress(net, rows, activations=False, epochs=0, **how)
    fitted = networks.compress(net, rows, epochs=0, folder=tmp_path, **how)
    done = networks.compress(net, rows, epochs=8, rate=5e-3, folder=tmp_path, **how)
    assert apart(done) < apart(fitted) < apart(alone)


@pytest.mark.parametrize("method", list(BITS))
def test_layers_of_every_method_are_compressed_and_trained(method):
    net = small(CLASSES, **SMALLEST)
    rows = np.random.default_rng(0).integers(2, 19, (40, 8))
    how = {"bits": BITS[method], "method": method, "effort": "fast", "embeddings": False}
    made = networks.compress(net, rows, epochs=2, codes=True, **how)
    assert set(made.compressed) == set(net.weights)
    matrices = [layer.to_matrix() for layer in made.compressed.values()]
    bits = sum(matrix.storage_bits() for matrix in matrices)
    assert bits <= 1.02 * BITS[method] * sum(A.size for A in net.weights.values())
    assert np.isfinite(made.logits(rows[:2])).all()


def test_blocks_are_trained_and_come_to_share_values(tmp_path):
    net = small(SENTENCES, **SMALLEST)
    rows = np.random.default_rng(0).integers(2, 19, (60, 8))
    how = {"bits": BITS["mesa"], "method": "mesa", "embeddings": False, "folder": tmp_path}
    start, stay, move, again = (
        networks.compress(net, rows, epochs=epochs, codes=codes, rate=1e-2, **how)
        for epochs, codes in ((0, False), (4, False), (4, True), (4, True))
    )

    def dense(of):
        return {name: layer.to_matrix().to_dense() for name, layer in of.compressed.items()}

    first, second, third, fourth = map(dense, (start, stay, move, again))
    for other in (first, second):
        assert any(not np.array_equal(other[name], third[name]) for name in first)
    assert all(np.array_equal(third[name], fourth[name]) for name in third)
    assert all(layer.coded for layer in move.compressed.values())


@pytest.mark.parametrize("method", ["qswd", "bitat"])
def test_codes_are_trained_by_latent_values_where_asked(method, monkeypatch):
    seen = {}

    def distil(student, teacher, data, **how):
        seen.update(trained(student, teacher))
        return student

    monkeypatch.setattr(code_training, "distil", distil)
    net = small(SENTENCES, **SMALLEST)
    rows = np.random.default_rng(0).integers(2, 19, (8, 6))
    how = {"bits": BITS[method], "method": method, "embeddings": False}
    start = networks.compress(net, rows, epochs=0, **how)
    made = networks.compress(net, rows, codes=True, **how)
    for name, layer in start.compressed.items():
        latent = {key for key, value in seen.items() if key.startswith(name) and value.ndim > 1}
        assert latent > {key for key in latent if key in start.parameters}
        # they start where the codes were
        one, other = (x.to_matrix().to_dense() for x in (layer, made.compressed[name]))
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_scales_of_groups_are_trained():
    net = small(MASKED, hidden_size=16, intermediate_size=24)
    rows = np.random.default_rng(0).integers(2, 19, (20, 8))
    made = networks.compress(net, rows, bits=6.0, method="rtn", embeddings=False, epochs=0)
    scales = {name for name in made.parameters if name.endswith(".scales")}
    assert len(scales) == len(net.weights)
    assert scales <= set(trained(made, net))
    tables = {"bert.embeddings.position_embeddings.weight"}
    assert tables.isdisjoint(trained(made, net))


def test_layers_are_chosen_by_patterns():
    net = small(MASKED)
    rows = np.random.default_rng(0).integers(2, 19, (8, 6))
    how = {"bits": 4.0, "method": "rtn", "embeddings": False, "epochs": 0}
    for include, chosen in (
        (["*.attention.*"], ".attention."),
        (["*layer.1.intermediate.dense.weight"], "layer.1.intermediate"),
    ):
        for activations in (True, False):
            made = networks.compress(net, rows, include=include, activations=activations, **how)
            assert set(made.compressed) == {name for name in net.weights if chosen in name}
    with pytest.raises(ValueError, match=r"'\*\.gate' matches none"):
        networks.compress(net, rows, include=["*.attention.*", "*.gate"], **how)
    with pytest.raises(TypeError, match="include must be a sequence of patterns"):
        networks.compress(net, rows, include="*.attention.*", **how)


def test_shares_end_at_one_error_a_weight():
    """Four times the energy a weight is a bit more, where no bound is in the way."""
    energies = {"a": 1.0, "b": 4.0, "c": 16.0 * 3, "d": 1e-9}
    sizes = {"a": 1000, "b": 1000, "c": 3000, "d": 500}
    smallest = dict.fromkeys(energies, 10)
    found = shares(energies, sizes, 2.0, smallest)
    assert found["b"] - found["a"] == pytest.approx(1.0)
    assert found["c"] - found["b"] == pytest.approx(1.0)
    assert found["d"] == pytest.approx(LEAST * 2.0)
    assert sum(found[name] * sizes[name] for name in found) == pytest.approx(2.0 * 5500)
    huge = shares(energies | {"c": 1e12}, sizes, 2.0, smallest | {"d": 800})
    assert (huge["c"], huge["d"]) == (pytest.approx((11000 - 1000 - 800) / 3000, rel=1e-6), 1.6)
    with pytest.raises(ValueError, match="bits is too small: k=1 of every matrix takes"):
        shares(energies, sizes, 2.0, dict.fromkeys(energies, 4000))


@pytest.mark.parametrize(("task", "what"), [(MASKED, r"'bert\.encoder.*'"), (NEXT, "every matrix")])
def test_a_budget_too_small_leaves_nothing_behind(task, what, tmp_path):
    rows = np.random.default_rng(0).integers(2, 19, (8, 6))
    with pytest.raises(ValueError, match=f"bits is too small: k=1 of {what} takes"):
        networks.compress(small(task), rows, bits=0.1, folder=tmp_path / "parts")
    assert not (tmp_path / "parts").exists()


@pytest.mark.parametrize(
    ("task", "bits", "more", "words"),
    [
        (MASKED, 0.1, {"method": "rtn"}, r"bert\.\S*query: bits must be at least \S* for rtn on"),
        (
            NEXT,
            0.1,
            {"method": "linear-trellis"},
            "every matrix takes at least .* by the method linear",
        ),
        (NEXT, 0.5, {"include": ["*.q_proj"], "hidden_size": 64}, r"k=1 of 'model.embed_tokens'"),
        (NEXT, 1e5, {}, r"bits=100000 is too large .*; give bits of at most 32"),
    ],
)
def test_bits_of_every_method_are_checked_before_gradients(task, bits, more, words, tmp_path):
    rows = np.random.default_rng(0).integers(2, 19, (8, 6))
    sizes = {key: more.pop(key) for key in list(more) if key == "hidden_size"}
    with pytest.raises(ValueError, match=words):
        networks.compress(small(task, **sizes), rows, bits=bits, folder=tmp_path / "p", **more)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("method", ["rtn", "mesa", "random"])
def test_a_matrix_whose_bits_are_too_few_is_named(method):
    rows = np.random.default_rng(0).integers(2, 19, (4, 6))
    how = {"bits": 0.1, "method": method, "embeddings": False}
    with pytest.raises(
        BudgetError, match=r"^bert\.encoder\.layer\.0\.attention\.self\.query: bits"
    ):
        networks.compress(small(CLASSES), rows, **how)


@pytest.mark.parametrize(("task", "even"), [(MASKED, True), (NEXT, False)])
def test_the_budget_of_chosen_layers_is_spent(task, even):
    """Layers of an encoder get the same each, those of a decoder by what they matter."""
    net = small(task, hidden_size=24, intermediate_size=32)
    rows = np.random.default_rng(0).integers(2, 19, (40, 8))
    include = list(net.weights)[3:6]
    made = networks.compress(net, rows, bits=3.0, include=include, embeddings=False, epochs=0)
    matrices = [layer.to_matrix() for layer in made.compressed.values()]
    rates = [matrix.bits_per_weight for matrix in matrices]
    weights = [np.prod(matrix.shape) for matrix in matrices]
    assert list(made.compressed) == include
    assert 2.7 < np.average(rates, weights=weights) <= 3.0
    assert (max(rates) < 3.01) == even
