"""The studies of whole networks on small made ones, and the tasks that they are built of."""

import contextlib
import io
import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import made_networks
import network_study
import reactions
import study_classes
import study_masked_tokens
import study_sentences

from diba_np import networks

STUDIES = (study_classes, study_masked_tokens, study_sentences)


def study_of(folder, study, *more):
    """What a study prints and what it tells of its progress."""
    words = ["study", "--smoke", "--json", "--effort", "fast", "--folder", str(folder), *more]
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            assert network_study.main(study.__doc__, study.real, study.made) == 0
    return json.loads(out.getvalue()), err.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Give the folder of a whole study and what it printed, each made once."""
    kept = {}

    def run(study):
        if study not in kept:
            folder = tmp_path_factory.mktemp(study.__name__)
            kept[study] = folder, study_of(folder, study)[0]
        return kept[study]

    return run


@pytest.mark.parametrize("study", STUDIES, ids=lambda module: module.__name__)
def test_a_study_runs_is_kept_and_is_shown_again(study, finished, monkeypatch):
    folder, first = finished(study)
    score = {
        (row["method"], row["stage"]): next(iter(row["scores"].values()))[0]
        for row in first["rows"]
    }
    assert len(score) == 4 + 4 + 2
    assert score["diba", "activations"] > score["diba", "weights"]
    assert score["diba", "activations"] > score["random", "weights"]
    assert all(row["bits"] <= 4.0 for row in first["rows"])
    assert not list(folder.glob("*.parts"))
    monkeypatch.setattr(networks, "compress", None)  # everything is kept
    assert study_of(folder, study, "--only-finished") == (first, "")


def test_what_a_study_writes_is_the_network_that_it_judged(finished):
    folder, first = finished(study_classes)
    (row,) = [
        row for row in first["rows"] if (row["method"], row["stage"]) == ("codes", "activations")
    ]
    small = networks.load(folder / "all-codes-1_8-activations.h5")
    assert row["scores"] == json.loads(json.dumps(study_classes.made().scores(small)))
    assert row["bits"] == network_study.stored_bits(small)
    assert set(small.compressed) == set(small.weights)


def test_processes_side_by_side_give_what_one_gives(finished, tmp_path, capfd):
    def scores(printed):
        return {(row["method"], row["stage"]): row["scores"] for row in printed["rows"]}

    stages = ["--stages", "weights", "activations", "--methods", "codes", "random"]
    plot = ["--plot", str(tmp_path / "classes.png")]
    two = scores(study_of(tmp_path / "two", study_classes, *stages, "--jobs", "2", *plot)[0])
    assert len(two) == 3
    one = scores(finished(study_classes)[1])
    assert two == {cell: one[cell] for cell in two}
    assert (tmp_path / "classes.png").exists()
    with pytest.raises(SystemExit, match="not all could be run; what was finished is kept"):
        chain = ["--stages", "weights", "--methods", "codes"]
        study_of(tmp_path / "three", study_classes, *chain, "--jobs", "2", "--effort", "none")
    assert "effort must be one of" in capfd.readouterr().err  # each process tells what failed


def test_the_attention_alone_leaves_the_rest_dense(tmp_path, monkeypatch, capsys):
    parser = network_study.parser_of("Study.")
    words = ["--smoke", "--methods", "codes", "--stages", "weights", "--folder", str(tmp_path)]
    args = parser.parse_args(words)
    monkeypatch.setattr(args, "smoke", False)
    args.variants, args.ratios = ["attention"], ["1/8"]
    network_study.run(parser, args, study_classes.made, study_classes.made)
    small = networks.load(tmp_path / "attention-codes-1_8-weights.h5")
    assert len(small.compressed) == 4 * made_networks.LAYERS
    assert all(".attention." in name for name in small.compressed)


def test_rows_trained_on_fall_above_a_bit_a_weight(tmp_path, monkeypatch):
    asked = []

    def compress(net, rows, **how):
        asked.append(how["taught"])
        return net

    monkeypatch.setattr(networks, "compress", compress)
    monkeypatch.setattr(network_study, "stored_bits", lambda net: 0.0)
    monkeypatch.setattr(network_study.shutil, "rmtree", lambda folder: None)
    parser = network_study.parser_of("Study.")
    args = parser.parse_args(["--rows", "40", "--folder", str(tmp_path)])
    study = network_study.Study(study_classes.made(), tmp_path, args)
    whole = sum(map(len, study.task.fit))
    for taper, shares in ((0.0, (1, 1, 1, 1)), (1.0, (1, 1, 0.5, 0.25))):
        study.args.taper = taper
        asked.clear()
        for ratio in network_study.RATIOS:
            study.stage(("all", "codes", ratio, "trained"))
        assert asked == [round(share * whole) for share in shares]


def test_mixed_texts_are_parts_of_two():
    words = [[f"{row}"] * (row % 5) for row in range(40)]

    def mixed():
        task = study_sentences.made()
        task.set_words(words, lambda parts: parts)
        task.mix(30)
        assert len(task.fit) == 70
        return task.fit[40:]

    cut = 0
    for text in mixed():
        assert 3 <= len(text) <= 4
        changes = sum(one != other for one, other in pairwise(text))
        assert changes <= 1
        cut += changes
    assert cut > 10
    assert mixed() == mixed()


@pytest.mark.parametrize(
    ("words", "match"),
    [(["--mixed", "5"], "classes cannot be made of others"), (["--mixed", "-1"], "2")]
    + [([option, "-1"], "2") for option in ("--jobs",)],
)
def test_bad_options_are_refused(tmp_path, monkeypatch, words, match):
    monkeypatch.setattr(sys, "argv", ["study", "--smoke", "--folder", str(tmp_path), *words])
    with pytest.raises(SystemExit, match=match):
        network_study.main("Study.", None, study_classes.made)


def test_other_settings_drop_what_is_kept(tmp_path):
    parser = network_study.parser_of("Study.")
    kept = []
    for effort in ("fast", "fast", "best"):
        args = parser.parse_args(["--effort", effort])
        study = network_study.Study(study_classes.made(), tmp_path, args)
        kept.append(len(study.results.rows))
        study.dense()
    assert kept == [0, 1, 0]


def test_bitat_has_no_rates_beyond_its_signs():
    args = network_study.parser_of("Study.").parse_args(["--methods", "bitat", "random"])
    chains = network_study.chains_of(args)
    assert {ratio for _, method, ratio, _ in chains if method == "bitat"} == {"1/64", "1/32"}
    assert all(not activations for _, method, _, activations in chains if method == "random")


def test_made_tasks_are_what_the_network_says():
    assert study_classes.made().scores(study_classes.made().net)["accuracy"] == (1.0, 0.0)
    sentences = study_sentences.made()
    assert sentences.scores(sentences.net)["cosine"][0] == pytest.approx(1.0)
    masked = study_masked_tokens.made()
    other = made_networks.random_network("masked", seed=1)
    assert masked.scores(masked.net)["accuracy"][0] > masked.scores(other)["accuracy"][0]


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
