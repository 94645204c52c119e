"""Export: what other software reads is what the model says, under the source's names and types."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import diba_np as dn
from diba_np.cli.main import main
from diba_np.matrix.small_floats import decode, encode
from diba_np.models.file import ModelFactors, open_model
from diba_np.sources.opening import open_source

sys.path.insert(0, str(Path(__file__).parents[1] / "sources"))
from files_of_others import safetensors_of

OPTIONS = {"bits": 6.0, "effort": "fast", "jobs": 1, "threads": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    rng = np.random.default_rng(7)
    tied = rng.normal(size=(40, 24)).astype(np.float32)
    arrays = {
        "w/ü": tied,
        "moe": rng.normal(size=(2, 20, 24)).astype(np.float16),
        "wide": rng.normal(size=(20, 30)).astype(">f8"),
        "head": tied,
        "ids": np.arange(6).reshape(2, 3),
        "mask": np.array([True, False, True]),
        "scalar": np.float32(2.5),
        "none": np.zeros((0, 3), np.float32),
    }
    path = tmp_path_factory.mktemp("export") / "m.h5"
    dn.factorize_model(arrays, output=path, **OPTIONS).close()
    return open_model(path), path


def same(model, found, types=None):
    assert list(found) == list(model)
    for name in model:
        expected = model.dense(name)
        assert found[name].shape == expected.shape, name
        assert found[name].dtype == (types or {}).get(name, expected.dtype), name
        assert np.array_equal(found[name], expected), name


def test_a_file_for_the_package_safetensors(model, tmp_path):
    library = pytest.importorskip("safetensors.numpy", reason="the package safetensors")
    path = tmp_path / "m.safetensors"
    assert model[0].export(path) == path.stat().st_size
    read = library.load_file(path)
    found = {name: read[name] for name in model[0]}
    assert len(read) == len(found)
    same(model[0], found, {"wide": np.dtype("<f8")})
    head = int.from_bytes(path.read_bytes()[:8], "little")
    assert head % 8 == 0
    assert json.loads(path.read_bytes()[8 : 8 + head])["__metadata__"] == {"format": "pt"}


def test_an_archive_for_numpy(model, tmp_path):
    path = tmp_path / "m.npz"
    assert model[0].export(path) == path.stat().st_size
    with np.load(path, allow_pickle=False) as found:
        same(model[0], dict(found))


def test_folders_of_one_file_and_of_shards(model, tmp_path):
    made = model[0]
    made.export(tmp_path / "one")
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["model.safetensors"]
    made.export(tmp_path / "many", shard_bytes=4000)
    files = sorted(p.name for p in (tmp_path / "many").iterdir())
    assert files[-1] == "model.safetensors.index.json" and len(files) > 3
    assert files[0] == f"model-00001-of-{len(files) - 1:05d}.safetensors"
    index = json.loads((tmp_path / "many" / files[-1]).read_text())
    assert set(index["weight_map"]) == set(made)
    for folder in ("one", "many"):
        read = {entry.name: entry.read() for entry in open_source(tmp_path / folder)}
        same(made, {name: read[name] for name in made}, {"wide": np.dtype("<f8")})
    # again into a folder that is there: its other files stay
    (tmp_path / "one" / "config.json").write_text("{}")
    made.export(tmp_path / "one")
    assert len(list((tmp_path / "one").iterdir())) == 2
    # of the two forms of weights the older one goes, lest a reader takes it
    made.export(tmp_path / "one", shard_bytes=4000)
    assert not (tmp_path / "one" / "model.safetensors").exists()
    made.export(tmp_path / "one")
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()


def test_no_infinity_comes_of_what_float16_holds(tmp_path, rng):
    A = (3e4 * rng.normal(size=(32, 24))).clip(-65504, 65504).astype(np.float16)
    made = dn.factorize_model({"w": A}, bits=4.0, jobs=1, effort="fast")
    assert np.abs(made["w"].to_dense()).max() > 65520  # beyond what rounds to the largest
    made.export(tmp_path / "w.npz")
    for array in (made.dense("w"), np.load(tmp_path / "w.npz")["w"]):
        assert array.dtype == np.float16 and np.abs(array).max() == 65504


def test_two_shards_of_bfloat16_come_back_as_they_were(tmp_path, rng, capsys):
    """A Hugging Face folder -> model -> export -> read by the package safetensors."""
    safe_open = pytest.importorskip("safetensors", reason="the package safetensors").safe_open
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="the package ml_dtypes")
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    arrays = {
        "model.embed_tokens.weight": encode(rng.normal(size=(64, 32)), "bfloat16"),
        "model.norm.weight": encode(rng.normal(size=32), "bfloat16"),
        "lm_head.weight": encode(rng.normal(size=(48, 32)), "bfloat16"),
    }
    names, places = list(arrays), {}
    for number, part in enumerate((names[:2], names[2:]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        words = {name: arrays[name] for name in part}
        (source / file).write_bytes(safetensors_of(words, dict.fromkeys(part, "BF16")))
        places |= dict.fromkeys(part, file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    model = str(tmp_path / "m.h5")
    words = ["model", str(source), "--bits", "6", "-o", model, "--jobs", "1", "--effort", "fast"]
    assert main([*words, "--quiet", "--threads", "1"]) == 0
    assert main(["verify", model, str(source)]) == 0
    assert main(["export", model, "-o", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["arrays"] == 3
    with safe_open(out / "model.safetensors", "numpy") as file:
        assert set(file.keys()) == set(arrays)
        for name, words in arrays.items():
            part = file.get_slice(name)
            assert part.get_dtype() == "BF16" and tuple(part.get_shape()) == words.shape
    found = {entry.name: entry for entry in open_source(out)}
    with open_model(model) as made:
        for name in arrays:
            assert found[name].dtype == made.array_dtype(name) == "bfloat16"
            read = found[name].read()
            nearest = made.dense(name).astype(ml_dtypes.bfloat16).astype(np.float32)
            assert np.array_equal(read, nearest)
        norm = "model.norm.weight"  # kept as it is: to the bit
        assert np.array_equal(found[norm].read(), decode(arrays[norm], "bfloat16"))
        assert made["lm_head.weight"].snr(decode(arrays["lm_head.weight"], "bfloat16")) > 8


def test_what_cannot_be_exported_says_why(model, tmp_path, capsys):
    made, path = model
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="expected a folder, or a name that ends with"):
        made.export(tmp_path / "file")
    with pytest.raises(OSError, match="no such folder"):
        made.export(tmp_path / "gone" / "folder")
    with pytest.raises(TypeError, match="path must be a path, got bytes"):
        made.export(b"folder")
    with pytest.raises(ValueError, match="shard_bytes must be at least 1"):
        made.export(tmp_path / "f", shard_bytes=0)
    odd = dn.factorize_model({"__metadata__": np.ones(3)}, **OPTIONS | {"bits": 99.0})
    with pytest.raises(ValueError, match="'__metadata__' cannot be written"):
        odd.export(tmp_path / "m.safetensors")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").write_text("")
    for output, words in (("there", "exists; pass --force"), (str(path), "is also what is read")):
        assert main(["export", str(path), "-o", str(tmp_path / output), "--force"][:-1]) == 1
        assert words in capsys.readouterr().err
    assert main(["export", str(path), "-o", str(tmp_path / "there"), "--force"]) == 0
    dn.factorize(np.eye(20), k=2, threads=1).save(tmp_path / "one.h5")
    assert main(["export", str(tmp_path / "one.h5"), "-o", str(tmp_path / "n")]) == 1
    assert "is no file of a model or network; it holds one matrix" in capsys.readouterr().err
    assert not any(".part" in p.name for p in tmp_path.iterdir())


@pytest.mark.parametrize(
    "line",
    ["info {}", "verify {}", "verify {} a.npz", "export {} -o a.npz", "export {} -o a.safetensors"],
)
def test_a_command_reads_each_array_once(line, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if line.startswith("verify"):
        model[0].export("a.npz")
    read = []
    of_file = ModelFactors._read
    monkeypatch.setattr(
        ModelFactors, "_read", lambda self, name: read.append(name) or of_file(self, name)
    )
    assert main(line.format(model[1]).split()) in (0, 1)  # types that .npz has not differ
    assert sorted({*read}) == sorted(set(model[0]) - set(model[0].aliases))
    assert all(read.count(name) == 1 for name in {*read} - {*model[0].aliases.values()})


def test_names_that_an_archive_cannot_hold(tmp_path):
    for name in ("a\0b", "a\ud800"):
        made = dn.factorize_model({name: np.ones(3), "w": np.eye(20)}, **OPTIONS)
        with pytest.raises(ValueError, match="neither NUL nor surrogates, found the array 'a"):
            made.export(tmp_path / "m.npz")
        made.export(tmp_path / "m.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]
