"""The studies of whole networks on small made ones, and the steps that they are built of."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import bert
import network_fit as nf
import network_study
import reactions
import study_classes
import study_masked_tokens
import study_sentences
from network_train import Teacher, matched, train

from diba_np.layers.registry import as_layer
from diba_np.networks.inputs import batches

STUDIES = (study_classes, study_masked_tokens, study_sentences)

# what no refit changes
STAY = {
    "diba": ("b1", "b2"),
    "random": ("b1", "b2"),
    "codes": ("codes",),
    "bitat": ("codes",),
    "qswd": ("c", "sets", "values"),
    "mesa": (),
}


@pytest.mark.parametrize("study", STUDIES, ids=lambda module: module.__name__)
def test_a_study_runs_is_kept_and_is_shown_again(study, tmp_path, monkeypatch, capsys):
    def run(*more):
        monkeypatch.setattr(
            sys, "argv", ["study", "--smoke", "--json", "--folder", str(tmp_path), *more]
        )
        assert network_study.main(study.__doc__, study.real, study.made) == 0
        return capsys.readouterr()

    told = json.loads(run().out)
    score = {
        (row["method"], row["stage"]): next(iter(row["scores"].values()))[0] for row in told["rows"]
    }
    assert len(score) == 4 + 3 + 3
    assert score["diba", "activations"] > score["diba", "replaced"]
    assert score["diba", "activations"] > score["random", "layer-wise"]
    assert not list(tmp_path.glob("*.layers")) and not list(tmp_path.glob("*.state.npz"))
    again = run("--only-finished")
    assert json.loads(again.out) == told
    assert again.err == ""


def test_processes_side_by_side_give_what_one_gives(tmp_path):
    def scores(*more):
        command = [sys.executable, study_classes.__file__, "--smoke", "--json", *more]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rows = json.loads(told)["rows"]
        return {(r["method"], r["stage"]): r["scores"] for r in rows}

    stages = ["--stages", "replaced", "layer-wise", "--methods", "diba", "codes"]
    one = scores("--folder", str(tmp_path / "one"), *stages)
    assert len(one) == 4
    plot = ["--plot", str(tmp_path / "classes.png")]
    assert scores("--folder", str(tmp_path / "two"), *stages, "--jobs", "2", *plot) == one
    assert (tmp_path / "classes.png").exists()
    with pytest.raises(subprocess.CalledProcessError) as failed:
        scores("--folder", str(tmp_path / "three"), "--jobs", "2", "--effort", "none")
    assert failed.value.stderr.endswith("not all could be run; what was finished is kept\n")


@pytest.mark.parametrize("method", list(network_study.METHODS))
def test_refitted_layers_bring_the_network_nearer_and_keep_their_bits(method):
    task = study_classes.made()
    dense, net = task.network(), task.network()
    names = net.encoder_names(network_study.VARIANTS["attention"])
    forms = {name: network_study.METHODS[method](dense.matrices[name], 4.0) for name in names}
    for name, form in forms.items():
        net.replace({name: as_layer(form, net.own[f"{name}.bias"])})

    def apart():
        ids, mask, _ = task.read("fit", np.arange(40))
        now, aim = (one.encode(ids, mask)[0] for one in (net, dense))
        return matched(now, aim, mask)[0]

    before = apart()
    nf.compress(net, dense, task, np.arange(40), names, lambda name, *_: forms[name], refit=True)
    assert apart() < before
    assert set(net.made) == set(names)
    for name, form in forms.items():
        now = net.made[name].to_matrix()
        for stays in STAY[method]:
            np.testing.assert_array_equal(getattr(now, stays), getattr(form, stays))
        if method == "mesa":  # values that changed places have other codes, their weights the same
            codes = dict(zip(form.blocks.ravel(), now.blocks.ravel(), strict=True))
            renamed = np.vectorize(codes.get)(form.blocks)
            np.testing.assert_array_equal(renamed, now.blocks)


def test_importance_is_that_of_tokens_and_outputs(tmp_path):
    task = study_classes.made()
    net = task.network()
    places = list(batches(task.fit, 60, np.arange(24)))
    matters = nf.importance(net, task, places)
    masks = [task.read("fit", rows)[1].ravel() for rows in places]
    for name in net.encoder_names():
        weights, channels = np.concatenate(matters[name].tokens), matters[name].channels
        assert not weights[~np.concatenate(masks)].any()
        assert weights.sum() == pytest.approx(sum(mask.sum() for mask in masks))
        assert np.trace(channels) / len(channels) == pytest.approx(1)
        np.testing.assert_allclose(channels, channels.T, atol=1e-5)
        assert np.linalg.eigvalsh(channels)[0] > 0.99 * nf.EVEN
        assert 0 <= matters[name].together <= 1
    # only the first token is read at the end
    last = matters["encoder.layer.1.output.dense"]
    first = [task.read("fit", rows)[1].cumsum(axis=1).ravel() == 1 for rows in places]
    assert all((w[~at] <= nf.EVEN + 1e-6).all() for w, at in zip(last.tokens, first, strict=True))
    assert last.together == 0
    nf.save_importance(tmp_path / "kept.npz", matters)
    kept = nf.load_importance(tmp_path / "kept.npz")
    assert list(kept) == list(matters)
    for name, found in matters.items():
        assert kept[name].together == found.together
        np.testing.assert_allclose(kept[name].channels, found.channels, rtol=1e-6)
        for mine, other in zip(kept[name].tokens, found.tokens, strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-6)


def test_errors_of_all_tokens_add_up_where_only_their_mean_is_read():
    task = study_sentences.made()
    places = list(batches(task.fit, 60, np.arange(24)))
    matters = nf.importance(task.network(), task, places)
    # of the last layer all tokens have one gradient but for their layer norms
    assert matters["encoder.layer.1.output.dense"].together > 0.9
    assert matters["encoder.layer.0.attention.self.key"].together < 0.1


def test_mixed_texts_are_parts_of_two():
    words = [[f"{row}"] * (row % 5) for row in range(40)]

    def mixed():
        task = study_sentences.made()
        task.set_words(words, lambda parts: parts)
        assert task.mix(30).tolist() == list(range(40, 70))
        assert len(task.labels["fit"]) == len(task.fit) == 70
        return task.fit[40:]

    cut = 0
    for text in mixed():
        assert 3 <= len(text) <= 4
        changes = sum(one != other for one, other in pairwise(text))
        assert changes <= 1
        cut += changes
    assert cut > 10
    assert mixed() == mixed()


def test_rows_that_cannot_be_mixed_are_refused(tmp_path, monkeypatch):
    for count, match in (("5", "classes cannot be made of others"), ("-1", "2")):
        words = ["study", "--smoke", "--mixed", count, "--folder", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit, match=match):
            network_study.main("Study.", None, study_classes.made)


def test_samples_of_sums_weigh_errors_as_they_say(rng):
    mask = np.array([[True, True, True, False], [True] * 4])
    weights = rng.uniform(1, 2, 8) * mask.ravel()
    x, added = rng.normal(size=(8, 3)), rng.normal(size=(8, 2))
    A, bias = rng.normal(size=(2, 3)), rng.normal(size=2)
    more, plus, both = nf.with_sums(x, added, weights, mask, 0.3)
    errors = x @ A.T + bias + added
    square = np.square(errors).sum(axis=1)
    sums = (np.sqrt(weights)[:, None] * errors).reshape(2, 4, 2).sum(axis=1)
    aim = 0.7 * weights @ square + 0.3 * np.square(sums).sum()
    assert both @ np.square(more @ A.T + bias + plus).sum(axis=1) == pytest.approx(aim)


def test_what_is_kept_comes_back(rng, tmp_path):
    net, other = (bert.Bert(bert.random_tensors(0), heads=2) for _ in range(2))
    names = net.encoder_names()
    for name, make in zip(
        names, [nf.by_weights, nf.by_label("rtn"), nf.at_random] * 4, strict=True
    ):
        net.replace({name: as_layer(make(net.matrices[name], 6.0), net.own[f"{name}.bias"])})
    net.own["embeddings.LayerNorm.bias"] += 1
    nf.save(tmp_path / "net.h5", net)
    nf.load(tmp_path / "net.h5", other)
    assert set(other.made) == set(names)
    assert set(other.parameters) == set(net.parameters)
    for name, value in net.parameters.items():
        np.testing.assert_array_equal(other.parameters[name], value)
    for name, layer in net.made.items():
        same = other.made[name].to_matrix().to_dense()
        np.testing.assert_array_equal(same, layer.to_matrix().to_dense())


def test_training_goes_on_where_it_was_interrupted(tmp_path):
    task = study_classes.made()
    dense = task.network()
    rows, options = np.arange(24), {"epochs": 2, "tokens": 60, "rate": 1e-3}

    def fresh():
        net = task.network()
        for name in net.encoder_names():
            form = nf.by_label("rtn")(net.matrices[name], 4.0)
            net.replace({name: as_layer(form, net.own[f"{name}.bias"])})
        return net

    whole, cut = fresh(), fresh()
    train(whole, dense, task, rows, **options)

    class Interrupted(Exception):
        pass

    def stop(line):
        raise Interrupted

    path = tmp_path / "state.npz"
    with pytest.raises(Interrupted):
        train(cut, dense, task, rows, path=path, every=0.0, tell=stop, **options)
    assert path.exists()
    cut = fresh()
    train(cut, dense, task, rows, path=path, **options)
    for name, value in whole.parameters.items():
        np.testing.assert_array_equal(cut.parameters[name], value)


def test_a_teacher_gives_the_same_states_from_disk(tmp_path, monkeypatch):
    task = study_classes.made()
    rows = np.array([3, 5, 8])
    ids, mask, _ = task.read("fit", rows)
    hidden, _ = task.network().encode(ids, mask)
    plain = Teacher(task.network()).states(rows, ids, mask)
    first = Teacher(task.network(), tmp_path / "kept").states(rows, ids, mask)
    monkeypatch.setattr(bert.Bert, "encode", None)  # from here on nothing is computed
    again = Teacher(task.network(), tmp_path / "kept")
    for one, two, three, exact in zip(
        plain[1:], first[1:], again.states(rows, ids, mask)[1:], hidden[1:], strict=True
    ):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(two, three)
        np.testing.assert_allclose(one[mask.ravel()], exact[mask.ravel()], rtol=1e-3, atol=1e-4)
        assert not one[~mask.ravel()].any()
    ids, mask, _ = task.read("fit", rows[::-1])
    np.testing.assert_array_equal(
        again.states(rows[::-1], ids, mask)[1][0], plain[1][-ids.shape[1]]
    )
    monkeypatch.undo()
    (tmp_path / "kept" / "5.npy").write_bytes(b"cut")
    ids, mask, _ = task.read("fit", rows)
    np.testing.assert_array_equal(again.states(rows, ids, mask)[2], plain[2])


@pytest.mark.parametrize("method", ["diba", "codes"])
def test_compression_goes_on_after_the_last_finished_layer(method, tmp_path):
    task = study_classes.made()
    dense, whole, cut = (task.network() for _ in range(3))
    names = dense.encoder_names(network_study.VARIANTS["attention"])
    fitted = []

    def fit(name, A, gram, outputs):
        fitted.append(name)
        return network_study.METHODS[method](A, 4.0)

    def compress(net, **how):
        nf.compress(net, dense, task, np.arange(40), names, fit, refit=True, **how)

    class Interrupted(Exception):
        pass

    def stop(line):
        if names[2] in line:
            raise Interrupted

    compress(whole)
    with pytest.raises(Interrupted):
        compress(cut, folder=tmp_path, tell=stop)
    fitted.clear()
    compress(cut, folder=tmp_path)
    assert fitted == names[3:]
    for name in names:
        for key, value in whole.made[name].parameters.items():
            np.testing.assert_array_equal(cut.made[name].parameters[key], value)


def test_hidden_states_pull_along_the_gradient_of_their_distance(rng):
    mask = np.array([[True, True, False]])
    aim = [rng.normal(size=(3, 4)) for _ in range(3)]
    now = [x + 0.1 * rng.normal(size=x.shape) for x in aim]
    _, gradients = matched(now, aim, mask)
    assert set(gradients) == {1, 2}
    for place, gradient in gradients.items():
        step = np.zeros((3, 4))
        step[1, 2] = 1e-6
        up = matched([x + step * (i == place) for i, x in enumerate(now)], aim, mask)[0]
        down = matched([x - step * (i == place) for i, x in enumerate(now)], aim, mask)[0]
        assert gradient[1, 2] == pytest.approx((up - down) / 2e-6, rel=1e-4)
        assert not gradient[2].any()


@pytest.mark.parametrize("rows", [1, 3])
def test_the_loss_of_classes_is_finite_for_one_row_too(rng, rows):
    task = study_classes.made()
    taught = rng.normal(size=(rows, 5))
    y = taught + 0.1 * rng.normal(size=taught.shape)
    value, gradient = task.loss(y, taught, None)
    step = np.zeros_like(y)
    step[0, 2] = 1e-6
    up, down = (task.loss(y + sign * step, taught, None)[0] for sign in (1, -1))
    assert 0 < value < 1
    assert gradient[0, 2] == pytest.approx((up - down) / 2e-6, rel=1e-4)


def test_standard_errors_take_groups_whole():
    right = np.array([1, 1, 0, 0, 1, 1, 0, 0], bool)
    assert nf.accuracy(right) == (0.5, pytest.approx(0.5 / np.sqrt(8)))
    doubled = nf.accuracy(right, np.arange(8) // 2)
    assert doubled == (0.5, pytest.approx(0.5 / np.sqrt(4)))


def test_reactions_are_cut_into_known_tokens():
    vocab = {
        token: i
        for i, token in enumerate(["[UNK]", "[CLS]", "[SEP]", "C", "Cl", "[", "]", ">>", ">"])
    }
    assert reactions.tokenize("CClO>>C", vocab) == [1, 3, 4, 0, 7, 3, 2]
    assert reactions.tokenize("[Cl]>>C", vocab, split=True) == [1, 5, 4, 6, 8, 8, 3, 2]


def test_no_reaction_comes_twice():
    rows = [
        ["a", "1.2", "train"],
        ["b", "1.10", "test"],
        ["a", "1.2", "test"],
        ["b", "1.10", "test"],
    ]
    parts = reactions.clean(rows)
    assert (parts["train"].smiles, parts["test"].smiles) == (["a"], ["b"])
    assert (parts["train"].labels.tolist(), parts["test"].labels.tolist()) == ([1], [0])


@pytest.fixture
def study_of(tmp_path, monkeypatch):
    """Give the `Study` that a command line makes; none of its stages is run."""
    task = study_classes.made()
    kept = {}
    make = network_study.Study.__init__

    def keep(self, *args):
        make(self, *args)
        kept["study"] = self

    def run(*more):
        words = ["study", "--smoke", "--methods", "diba", "--folder", str(tmp_path), *more]
        with monkeypatch.context() as patch:
            patch.setattr(network_study, "table", lambda rows: [])
            patch.setattr(network_study.Study, "stage", lambda self, *what: task.network())
            patch.setattr(network_study.Study, "__init__", keep)
            patch.setattr(sys, "argv", words)
            assert network_study.main("Study.", None, lambda: task) == 0
        return kept["study"]

    return run


def test_shares_and_tilt_keep_the_mean_and_are_part_of_the_settings(study_of):
    study = study_of("--shares", *"0.5 0.5 1 2 1 1.5".split(), "--tilt", "0.5")
    names = study.dense.encoder_names()
    bits = study.bits(names, "1/8", "diba")
    sizes = {name: study.dense.matrices[name].size for name in names}
    assert sum(bits[n] * sizes[n] for n in names) / sum(sizes.values()) == pytest.approx(4.0)
    first, last = (bits[f"encoder.layer.{i}.attention.self.query"] for i in (0, 1))
    assert last / first == pytest.approx(1.5 / 0.5)
    assert bits["encoder.layer.0.attention.output.dense"] / first == pytest.approx(4.0)
    assert set(study.bits(names, "1/8", "codes").values()) == {4.0}
    with pytest.raises(SystemExit, match="give another --folder"):
        study_of()
    for wrong in (("--tilt", "1"), ("--shares", *"0 1 1 1 1 1".split()), ("--taper", "-1")):
        with pytest.raises(SystemExit):
            study_of(*wrong)


def test_rows_trained_on_fall_above_a_bit_a_weight(study_of):
    study = study_of()
    counts = {}
    for taper in (0.0, 0.5, 1.0):
        study.args.taper = taper
        rows = [study.rows_trained_on(ratio) for ratio in network_study.RATIOS]
        assert all(set(some) <= set(study.train_rows) for some in rows)
        counts[taper] = [len(set(some)) for some in rows]
    assert counts == {0.0: [40] * 4, 0.5: [40, 40, 28, 20], 1.0: [40, 40, 20, 10]}


def test_the_attention_alone_takes_what_was_made_of_all_matrices(study_of, monkeypatch):
    study = study_of()
    every = study.stage("all", "diba", "1/8", "replaced")
    searched = []

    def search(A, bits, **how):
        searched.append(bits)
        return nf.at_random(A, bits)

    monkeypatch.setitem(network_study.METHODS, "diba", search)
    some = study.stage("attention", "diba", "1/8", "replaced")
    assert not searched
    assert list(some.made) == some.encoder_names(network_study.VARIANTS["attention"])
    for name, layer in some.made.items():
        assert layer.to_matrix().b1 == every.made[name].to_matrix().b1
    study.args.tilt = 0.5  # then the bits are others, among the attention's matrices
    study.args.shares = [1.0, 1.0, 1.0, 1.0, 2.0, 2.0]
    (study.folder / "attention-diba-1_8-replaced.h5").unlink()
    study.stage("attention", "diba", "1/8", "replaced")
    assert len(searched) == len(some.made)
