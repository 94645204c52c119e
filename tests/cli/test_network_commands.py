"""The commands of whole networks, on small random ones."""

import inspect
import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from diba_np import networks
from diba_np.cli import networks as cli_networks
from diba_np.cli import verification
from diba_np.cli.main import main
from diba_np.files.parts import Parts
from diba_np.models.file import ModelFactors, open_model
from diba_np.networks.compression_run import CompressionRun
from diba_np.training.optimisers import Diverged

sys.path.insert(0, str(Path(__file__).parents[1] / "networks"))

from small_networks import inputs_of, network
from test_network_files import folder_of
from test_texts import packed, words


@pytest.fixture
def small(tmp_path):
    """A decoder in its file."""
    net = packed(network("llama", dtype=np.float32))
    net.tokenizer = words()
    net.save(tmp_path / "small.h5")
    return str(tmp_path / "small.h5")


def told(capsys):
    return json.loads(capsys.readouterr().out)


def test_evaluate_one_and_against_another(small, tmp_path, capsys):
    (tmp_path / "t.txt").write_text("a b c d\ne f g h i\n")
    assert main(["evaluate", small, "--texts", str(tmp_path / "t.txt"), "--json"]) == 0
    found = told(capsys)
    net = networks.load(small)
    assert found["perplexity"] == pytest.approx(net.perplexity("a b c d e f g h i"), rel=1e-5)
    dense = str(net.export(tmp_path / "dense"))
    line = ["evaluate", small, "--texts", str(tmp_path / "t.txt"), "--against", dense]
    assert main([*line, "--json"]) == 0
    both = told(capsys)
    assert both["agreement"] == 1
    assert both["against"]["bytes"] > 0
    assert main(line) == 0
    assert "agreement" in capsys.readouterr().out


@pytest.mark.parametrize("shards", [False, True])
def test_a_folders_bytes_are_of_what_is_read(shards, tmp_path, capsys):
    """Folders are often cloned with the same weights in several forms, and results lie there."""
    folder_of(tmp_path / "net", "llama")
    if shards:
        names = list(networks.load(tmp_path / "net").tensors.tensors)
        shard = "a-00001-of-00001.safetensors"
        index = {"weight_map": dict.fromkeys(names, shard)}
        (tmp_path / "net" / "model.safetensors").rename(tmp_path / "net" / shard)
        (tmp_path / "net" / "model.safetensors.index.json").write_text(json.dumps(index))
    size = sum(path.stat().st_size for path in (tmp_path / "net").iterdir())
    names = ("pytorch_model.bin", "tf_model.h5", "small.h5", "consolidated.safetensors")
    for name in names if shards else names[:3]:
        (tmp_path / "net" / name).write_bytes(bytes(100))
    np.save(tmp_path / "ids.npy", [[3, 4, 5]])
    line = ["evaluate", str(tmp_path / "net"), "--texts", str(tmp_path / "ids.npy"), "--json"]
    assert main(line) == 0
    assert told(capsys)["bytes"] == size


def test_evaluate_classes(tmp_path, capsys):
    folder_of(tmp_path / "net", "vit")
    inputs, _ = inputs_of("vit")
    np.save(tmp_path / "x.npy", inputs)
    labels = networks.load(tmp_path / "net").logits(inputs).argmax(axis=1)
    np.save(tmp_path / "y.npy", labels)
    given = ["--inputs", str(tmp_path / "x.npy"), "--labels", str(tmp_path / "y.npy")]
    assert main(["evaluate", str(tmp_path / "net"), *given, "--json"]) == 0
    assert told(capsys)["accuracy"] == 1


def test_evaluate_scores(tmp_path, capsys):
    net = network("bert", "score", dtype=np.float32)
    net.tokenizer = words()
    net.save(tmp_path / "net.h5")
    packed(net).save(tmp_path / "small.h5")
    (tmp_path / "t.txt").write_text("a b\nc d e\n")
    np.save(tmp_path / "y.npy", np.array([0.5, -1.0]))
    line = ["evaluate", str(tmp_path / "small.h5"), "--texts", str(tmp_path / "t.txt")]
    line += ["--against", str(tmp_path / "net.h5")]
    assert main(line) == 0
    out = capsys.readouterr().out
    assert "squared difference" in out and "squared error" not in out
    assert main([*line, "--labels", str(tmp_path / "y.npy")]) == 0
    assert "squared error" in capsys.readouterr().out


def test_generate_streams_and_reports(small, capsys):
    assert main(["generate", small, "a b", "--tokens", "5"]) == 0
    out = capsys.readouterr().out
    written = networks.load(small).generate("a b", 5)
    assert out == f"a b{written}\n"
    assert main(["generate", small, "a b", "--tokens", "5", "--json"]) == 0
    assert told(capsys)["generated"] == written


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("größe 漢\r\n".encode(), None),
        (b"a \xff", "-: not readable as UTF-8"),
        (None, "standard input is closed"),
    ],
)
def test_standard_input_is_utf8_whatever_the_terminal_is(given, said, monkeypatch, capsys):
    seen = []
    net = SimpleNamespace(generate=lambda text, *_, **__: seen.append(text) or text)
    monkeypatch.setattr(cli_networks, "load_network", lambda path: net)
    terminal = {"encoding": "latin-1", "errors": "surrogateescape"}
    stdin = None if given is None else io.TextIOWrapper(io.BytesIO(given), **terminal)
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main(["generate", "net", "-", "--json"]) == (0 if said is None else 1)
    assert said in capsys.readouterr().err if said else seen == ["größe 漢"]


def test_generate_refuses_an_encoder_before_it_writes(tmp_path, capsys):
    net = packed(network("bert", dtype=np.float32))
    net.tokenizer = words()
    net.save(tmp_path / "small.h5")
    assert main(["generate", str(tmp_path / "small.h5"), "a b"]) == 1
    out, err = capsys.readouterr()
    assert (out, "needs a decoder" in err) == ("", True)


def test_embed_writes_a_vector_a_line(small, tmp_path, capsys):
    # a byte order mark is no text, and only a newline ends a line
    texts = "\ufeffa b\u2028c\x85d\fe\r\n c d e\n"
    (tmp_path / "t.txt").write_bytes(texts.encode())
    line = ["embed", small, str(tmp_path / "t.txt"), "-o", str(tmp_path / "e.npy"), "--json"]
    assert main(line) == 0
    assert told(capsys)["texts"] == 2
    vectors = np.load(tmp_path / "e.npy")
    assert np.allclose(vectors, networks.load(small).embed(["a b c d e", "c d e"]))
    assert main(line) == 1
    assert "exists; pass --force" in capsys.readouterr().err
    np.save(tmp_path / "ids.npy", [[3, 4, 5], [6, 7, 8]])
    line[2] = str(tmp_path / "ids.npy")
    assert main([*line, "--force"]) == 0
    expected = networks.load(small).embed(np.load(line[2]))
    assert np.allclose(np.load(tmp_path / "e.npy"), expected)


def test_export_writes_a_folder(small, tmp_path, capsys):
    assert main(["export", small, "-o", str(tmp_path / "dense"), "--json"]) == 0
    assert told(capsys)["bytes"] > 0
    ids = [[3, 4, 5]]
    one, two = (networks.load(path).logits(ids) for path in (small, tmp_path / "dense"))
    assert np.allclose(one, two, atol=1e-4 * np.abs(one).max())
    assert main(["export", small, "-o", str(tmp_path / "dense")]) == 1
    assert "new or empty" in capsys.readouterr().err
    (tmp_path / "dense" / "mine.txt").write_text("kept")
    assert main(["export", small, "-o", str(tmp_path / "dense"), "--force"]) == 1
    assert "dense: is there already, and --force replaces no folder" in capsys.readouterr().err
    assert (tmp_path / "dense" / "mine.txt").read_text() == "kept"
    (tmp_path / "empty").mkdir()
    assert main(["export", small, "-o", str(tmp_path / "empty"), "--force"]) == 0
    capsys.readouterr()
    assert main(["export", small, "-o", "-"]) == 1
    assert "-: a network is written as a folder; name one" in capsys.readouterr().err
    assert not Path("-").exists()
    assert main(["export", small, "-o", str(tmp_path / "d.safetensors")]) == 1
    assert "d.safetensors: expected a folder; " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["net", "small.h5"])
def test_a_relative_name_stays_the_place_where_it_was_opened(name, tmp_path, monkeypatch, rng):
    folder_of(tmp_path / "net", "llama")
    networks.load(tmp_path / "net").save(tmp_path / "small.h5")
    (tmp_path / "elsewhere").mkdir()
    ids = rng.integers(2, 19, (1, 5))
    expected = networks.load(tmp_path / name).logits(ids)
    monkeypatch.chdir(tmp_path)
    net, model = networks.load(name), open_model("small.h5")
    monkeypatch.chdir("elsewhere")
    assert np.array_equal(net.logits(ids), expected)
    assert all(model.dense(each) is not None for each in model)


def test_info_counts_bits_by_kind_of_tensor(small, capsys):
    assert main(["info", small, "--json"]) == 0
    found = told(capsys)
    assert found["network"] == "llama"
    assert found["compressed"] == 16
    parts = {name: part for name, part in found["bits"].items() if name != "all"}
    assert sum(part["bits"] for part in parts.values()) == found["bits"]["all"]["bits"]
    assert found["bits"]["all"]["bits"] / 8 < found["file_bytes"]
    assert main(["info", small]) == 0
    assert "embeddings and head" in capsys.readouterr().out


def test_a_network_is_verified_by_its_matrices_alone(small, tmp_path, capsys):
    source = tmp_path / "source"
    folder_of(source, "llama")
    assert main(["verify", small, str(source), "--json"]) == 0
    found = told(capsys)
    layers = [networks.load(path).layers for path in (source, small)]
    pairs = [[own[name].to_matrix().to_dense() for own in layers] for name in layers[0]]
    signal = sum(np.square(A).sum() for A, _ in pairs)
    noise = sum(np.square(A - A_hat).sum() for A, A_hat in pairs)
    assert (found["ok"], found["same_source"], found["differ"]) == (True, None, [])
    assert found["snr_db"] == pytest.approx(10 * np.log10(signal / noise), abs=1e-3)
    assert main(["verify", small, str(source)]) == 0
    out = capsys.readouterr().out
    assert "compared by SNR alone: a network is trained" in out and "`evaluate --against`" in out
    other = tmp_path / "other"
    folder_of(other, "llama", intermediate_size=16)
    assert main(["verify", small, str(other)]) == 1
    out = capsys.readouterr().out
    assert "NOT the network it was made from: 6 differ, the first model.layers.0.mlp.gate" in out


def test_networks_are_compared_layer_by_layer(small, tmp_path, monkeypatch):
    folder_of(tmp_path / "source", "llama")
    loaded = []
    monkeypatch.setattr(
        verification, "load_network", lambda path: loaded.append(networks.load(path)) or loaded[-1]
    )
    differ, sums, read = verification.network_differences(small, str(tmp_path / "source"))
    assert (differ, sums is None) == ([], False)
    assert read == {f"{name}.weight" for name in loaded[0].layers}
    assert not loaded[1].layers.held()  # the dense layers are not held


def test_matrices_are_read_once_when_a_network_is_verified(small, tmp_path, monkeypatch, capsys):
    folder_of(tmp_path / "source", "llama")
    net, read, of_file = networks.load(small), [], ModelFactors._read
    matrices = {f"{name}.weight" for name in net.layers}
    monkeypatch.setattr(
        ModelFactors, "_read", lambda self, name: read.append(name) or of_file(self, name)
    )
    assert main(["verify", small, str(tmp_path / "source"), "--json"]) == 0
    assert sorted(n for n in read if n in matrices) == sorted(matrices)
    assert {*told(capsys)["checked"]} == {*read}


def test_a_networks_file_is_read_once_when_exported(small, tmp_path, monkeypatch):
    net, read, of_file = networks.load(small), [], ModelFactors._read
    monkeypatch.setattr(
        ModelFactors, "_read", lambda self, name: read.append(name) or of_file(self, name)
    )
    net.export(tmp_path / "dense")
    assert len(read) == len({*read}) == len(net.layers)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (["evaluate", "nothing"], "nothing: no such file or folder"),
        (["evaluate", "{small}", "--texts", "nothing.txt"], "nothing.txt: no such file"),
        (["evaluate", "{small}", "--texts", "{blank}"], "holds no text"),
        (["evaluate", "{small}", "--texts", "{latin}"], "not readable as UTF-8"),
        (["evaluate", "{small}"],
         "next tokens are judged on --texts or --inputs, which is missing\n"),
        (["evaluate", "{small}", "--texts", "{good}", "--labels", "{ids}"],
         "next tokens are judged on --texts or --inputs; leave --labels out"),
        (["evaluate", "{small}", "--texts", "{good}", "--inputs", "{ids}"],
         "next tokens are judged on --texts or --inputs; give one of both"),
        (["evaluate", "{bare}", "--texts", "{ids}"], "is judged against another: give --against"),
        (["evaluate", "{scores}", "--texts", "{ids}"],
         "give --labels, with --texts or --inputs; --against alone will do too"),
        (["embed", "{small}", "{gap}", "-o", "{out}"], "gap.txt: line 2 is blank; each line is"),
        (["generate", "{net}", "a"], "generate needs a decoder"),
        (["embed", "{net}", "{good}", "-o", "{out}"], "texts need a tokenizer"),
        (["model", "{net}", "--texts", "{good}", "--bits", "1", "-o", "{out}", "--exclude", "a"],
         "--exclude is of matrices alone"),
        (["embed", "{small}", "{good}", "-o", "{good}", "--force"], "is also what is read"),
        (["embed", "{small}", "{good}", "-o", "{small}", "--force"], "is also what is read"),
        (["model", "{small}", "--texts", "{good}", "--bits", "1", "-o", "{good}", "--force"],
         "is also what is read"),
        (["model", "{small}", "--texts", "{good}", "--bits", "1", "-o", "{small}", "--force"],
         "is also what is read"),
        *((["model", "{net}", "--texts", "{good}", "--bits", "1", "-o", f"{{net}}/{name}",
            "--force"], "is in the folder that is read")
          for name in ("config.json", "model.safetensors")),
        (["embed", "{net}", "{good}", "-o", "{net}/config.json", "--force"],
         "may be a part of it; name another file, or delete this one"),
        (["model", "{small}", "--texts", "{good}", "--bits", "1", "-o", os.devnull],
         "is no file; a model is written to one"),
        *((["model", "{net}", "--texts", "{good}", "--bits", "1", "-o", "{out}", *option],
           f"{option[0]} is of matrices alone; leave it out with --texts")
          for option in (("--shift", "0.5"), ("--scale-bits", "8"), ("--terms", "2"),
                         ("--solver", "greedy"), ("--max-sweeps", "9"), ("--tol", "0.1"),
                         ("--min-size", "32"), ("--allocation", "uniform"))),
        *((["model", "{net}", "--bits", "1", "-o", "{out}", *option],
           f"{option[0]} is of networks alone; give --texts too, or leave it out")
          for option in (("--dense-folder", "{out}"), ("--no-embeddings",), ("--no-feedback",),
                         ("--length", "64"), ("--calibrate", "100"), ("--epochs", "0"),
                         ("--taught", "100"), ("--rate", "0.1"), ("--codes",))),
        *((["model", "{net}", "--texts", "{good}", "--bits", "1", "-o", "{out}", "--dense-folder",
            folder], "--dense-folder must be a folder of its own")
          for folder in ("{out}", "{net}", "{good}")),
        (["model", "{other}", "--texts", "{good}", "--bits", "1", "-o", "{out}"],
         "model_type must be one of bert"),
        (["model", "{vit}", "--texts", "{good}", "--bits", "1", "-o", "{out}"],
         "good.txt: a vit reads no texts; give images or"),
    ],
)  # fmt: skip
def test_one_sentence_and_nothing_written(line, match, small, tmp_path, capsys):
    folder_of(tmp_path / "net", "bert")
    folder_of(tmp_path / "scores", "bert", "score")
    folder_of(tmp_path / "bare", "bert", "")
    folder_of(tmp_path / "vit", "vit")
    np.save(tmp_path / "ids.npy", [[3, 4, 5]])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "mamba"}')
    np.savez(tmp_path / "other" / "weights.npz", a=np.eye(3))
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "good.txt").write_text("a b c\n")
    (tmp_path / "gap.txt").write_text("a\n \nb\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    places = {name: tmp_path / name for name in ("net", "scores", "bare", "vit", "other", "out")}
    places |= {name: tmp_path / f"{name}.txt" for name in ("blank", "latin", "good", "gap")}
    places["ids"] = tmp_path / "ids.npy"
    before = {path: path.read_bytes() for path in (tmp_path / "net").iterdir()}
    assert main([part.format(small=small, **places) for part in line]) == 1
    err = capsys.readouterr().err
    assert match in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
    assert before == {path: path.read_bytes() for path in (tmp_path / "net").iterdir()}


@pytest.fixture
def compressing(small, tmp_path):
    """The command that compresses a network, without its output."""
    (tmp_path / "t.txt").write_text("a b c d e f g\n")
    words = ["model", small, "--texts", str(tmp_path / "t.txt"), "--bits", "9", "--quiet"]
    return [*words, "-o", str(tmp_path / "out.h5")]


def test_a_training_that_diverges_is_one_sentence(compressing, tmp_path, capsys, monkeypatch):
    def diverged(*_, **__):
        raise Diverged("step 2 of 3: the loss is nan")

    monkeypatch.setattr(networks, "compress", diverged)
    assert main(compressing) == 1
    assert capsys.readouterr().err == "diba-np: error: step 2 of 3: the loss is nan\n"
    assert not (tmp_path / "out.h5").exists()


def test_the_options_of_networks_are_arguments_of_compress(compressing, monkeypatch):
    calls = []

    def stopped(*_, **how):
        calls.append(how)
        raise Diverged("stopped")

    usual = inspect.signature(networks.compress).parameters
    monkeypatch.setattr(networks, "compress", stopped)
    options = ["--no-embeddings", "--no-feedback", "--codes", "--epochs", "0", "--rate", "0.1"]
    options += ["--length", "64", "--calibrate", "100", "--taught", "50", "--dense-folder", "d"]
    assert main(compressing) == main([*compressing, *options]) == 1
    plain, given = ({k: v for k, v in how.items() if k != "callback"} for how in calls)
    changed = {name: value for name, value in given.items() if plain.get(name) != value}
    assert changed == {
        "embeddings": False,
        "feedback": False,
        "codes": True,
        "epochs": 0,
        "rate": 0.1,
        "length": 64,
        "calibrate": 100,
        "taught": 50,
        "dense_folder": "d",
    }
    assert changed.keys() <= usual.keys()
    assert not changed.keys() & plain.keys()


@pytest.mark.parametrize("place", ["", "network"])
def test_a_restart_leaves_a_run_that_is_writing(place, compressing, tmp_path, capsys):
    (tmp_path / "out.h5.parts").mkdir()
    # of another `model`, or of `networks.compress`
    own = tmp_path / "out.h5.parts" / place if place else tmp_path / "out.h5"
    running = Parts(own, {})
    running.write("finished", 1)
    assert main([*compressing, "--restart"]) == 1
    assert f"{own}: another run writes to it now" in capsys.readouterr().err
    assert running.read("finished") == 1
    running.close()


def test_parts_of_a_run_without_texts_stay(compressing, tmp_path, capsys):
    parts = Parts(tmp_path / "out.h5", {"bits": 9})
    parts.write("curves", [1])
    parts.close()
    assert main(compressing) == 1
    assert "holds parts of a run without --texts; finish that one" in capsys.readouterr().err
    assert parts.read("curves") == [1]


def test_parts_of_another_run_with_texts_name_the_restart(compressing, tmp_path, capsys):
    home = tmp_path / "out.h5.parts"
    home.mkdir()
    parts = Parts(home / "network", {"bits": 8})
    parts.write("matrices", ["a"])
    parts.close()
    assert main(compressing) == 1
    assert f"delete the folder {home}, or pass --restart\n" in capsys.readouterr().err


def test_parts_of_a_run_with_texts_stay(tmp_path, capsys):
    np.savez(tmp_path / "w.npz", a=np.eye(20))
    home = tmp_path / "out.h5.parts"
    home.mkdir()
    (home / "table-0.h5").touch()
    parts = Parts(home / "network", {"bits": 9})
    parts.write("matrices", ["a"])
    line = ["model", str(tmp_path / "w.npz"), "--bits", "9", "-o", str(tmp_path / "out.h5")]
    assert main([*line, "--restart"]) == 1
    assert "out.h5: another run writes to it now" in capsys.readouterr().err
    parts.close()
    assert main(line) == 1
    assert "holds parts of a run with --texts; finish that one" in capsys.readouterr().err
    assert (home / "table-0.h5").exists() and parts.read("matrices") == ["a"]
    assert main([*line, "--restart", "--jobs", "1", "--quiet"]) == 0
    assert not home.exists()


@pytest.mark.parametrize("stage", ["importance-0a/complete", "layers/order.json", "table-0.h5"])
def test_a_restart_removes_any_stage_of_a_run_with_texts(stage, tmp_path, capsys):
    np.savez(tmp_path / "w.npz", a=np.eye(20))
    part = tmp_path / "out.h5.parts" / stage
    part.parent.mkdir(parents=True)
    part.touch()
    line = ["model", str(tmp_path / "w.npz"), "--bits", "9", "-o", str(tmp_path / "out.h5")]
    assert main([*line, "--jobs", "1", "--quiet"]) == 1
    assert "holds parts of a run with --texts; finish that one" in capsys.readouterr().err
    assert part.exists()
    assert main([*line, "--jobs", "1", "--quiet", "--restart"]) == 0
    assert not (tmp_path / "out.h5.parts").exists()


def test_a_restart_drops_parts_of_another_run_with_texts_and_goes_on_with_its_own(
    compressing, tmp_path, monkeypatch
):
    def own_table(self, name, fit):
        ends.append(self._is_kept(name))
        layer = table(self, name, fit)
        if len(ends) == 1:
            raise KeyboardInterrupt
        return layer

    ends, table = [], CompressionRun._table
    monkeypatch.setattr(CompressionRun, "_table", own_table)
    home = tmp_path / "out.h5.parts"
    home.mkdir()
    parts = Parts(home / "network", {"bits": 8})
    parts.write("matrices", ["a"])
    parts.close()
    (home / "table-9.h5").touch()
    again = [*compressing, "--epochs", "0", "--restart"]
    assert main(again) == 1
    assert not (home / "table-9.h5").exists()  # of the other run
    assert main(again) == 0
    assert ends[:2] == [False, True]  # the same command has gone on


@pytest.mark.parametrize(
    ("left", "told"),
    [
        ("table-0.h5", "1 finished layers are kept"),
        ("importance", "what was measured of the network is kept"),
    ],
)
def test_an_interruption_tells_what_is_kept(left, told, compressing, tmp_path, capsys, monkeypatch):
    def interrupted(*_, folder, method, **__):
        assert not folder.exists() and method == "rtn"
        folder.mkdir()
        (folder / left).touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(networks, "compress", interrupted)
    log = tmp_path / "log"
    assert main([*compressing, "--method", "rtn", "--restart", "--json-log", str(log)]) == 1
    err = capsys.readouterr().err
    assert f"{told} in {tmp_path / 'out.h5.parts'}, the same" in err
    assert json.loads(log.read_text())["event"] == "interrupted"


def test_a_network_from_its_folder_to_another_folder(tmp_path, capsys, rng):
    folder_of(tmp_path / "net", "llama")
    (tmp_path / "net" / "tokenizer.json").write_text(words().text)
    names = "abcdefghijklmno"
    (tmp_path / "t.txt").write_text(" ".join(names[i] for i in rng.integers(0, 15, 600)))
    source, out, text = (str(tmp_path / name) for name in ("net", "small.h5", "t.txt"))
    line = ["model", source, "--texts", text, "--bits", "9", "-o", out, "--quiet", "--json"]
    assert main([*line, "--json-log", str(tmp_path / "log")]) == 0
    report = told(capsys)
    events = [json.loads(line)["event"] for line in (tmp_path / "log").read_text().splitlines()]
    assert {*events} >= {"matrix", "done"} and events[-1] == "done"
    assert report["file_bytes"] == Path(out).stat().st_size
    assert not Path(f"{out}.parts").exists()
    assert main(["evaluate", out, "--texts", text, "--against", source, "--json"]) == 0
    assert told(capsys)["agreement"] > 0.3
    assert main(["export", out, "-o", str(tmp_path / "dense"), "--json"]) == 0
    ids = rng.integers(2, 19, (2, 9))
    one, two = (networks.load(path).logits(ids) for path in (out, tmp_path / "dense"))
    assert np.allclose(one, two, atol=1e-5 * np.abs(one).max())


def test_an_error_that_is_not_known_is_told():
    from diba_np.cli.networks import _judged_lines

    one = {"network": "n", "bytes": 1, "targets": 3, "tokens_per_second": 2.0}
    row = one | {
        "task": "next tokens",
        "accuracy": 0.5,
        "perplexity": 2.0,
        "accuracy_error": np.nan,
    }
    assert dict(_judged_lines(row))["its error"].strip() == "not known"
    rows = one | {"task": "sentences", "cosine": 0.5, "cosine_error": np.nan}
    assert "0.5000 ± not known" in dict(_judged_lines(rows))["cosine"]
