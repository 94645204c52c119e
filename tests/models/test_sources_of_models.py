"""What real models hold: experts, tied arrays, text, 8-bit floats, dead inputs; nothing is lost."""

import json

import h5py
import numpy as np
import pytest

import diba_np as dn
from diba_np.cli.main import main
from diba_np.errors import FormatError
from diba_np.matrix.row_blocks import RowBlocks
from diba_np.matrix.small_floats import decode
from diba_np.models.file import open_model
from diba_np.models.shapes import is_experts, matrix_shape, matrix_view, row_parts

OPTIONS = {"bits": 5.0, "effort": "fast", "jobs": 1, "threads": 1}


@pytest.fixture(scope="module")
def experts():
    rng = np.random.default_rng(3)
    return rng.normal(size=(3, 20, 24)) * np.array([1, 2, 3]).reshape(3, 1, 1)


@pytest.fixture(scope="module")
def model(experts):
    rng = np.random.default_rng(4)
    tied = rng.normal(size=(40, 30)).astype(np.float32)
    arrays = {
        "embed": tied,
        "norm": np.ones(30, np.float32),
        "norm2": np.ones(30, np.float32),
        "experts": experts,
        "conv1d": rng.normal(size=(24, 20, 3)),
        "conv3d": rng.normal(size=(20, 3, 2, 2, 2)),
        "head": tied.copy(),
        "position_ids": np.arange(8).reshape(2, 4),
        "position_ids2": np.arange(8).reshape(2, 4),
        "words": np.array(["a", "b"]),
    }
    with pytest.warns(UserWarning, match=r"no real numbers: 'words' \(text\)"):
        return dn.factorize_model(arrays, **OPTIONS), arrays


def test_shapes_as_matrices():
    assert matrix_shape((128, 768, 2048)) == (128 * 768, 2048)
    assert matrix_shape((768, 48, 128)) == (768, 48 * 128)  # a convolution over time
    assert not is_experts((384, 384, 3)) and not is_experts((1, 3)) and not is_experts((2, 2, 2, 2))
    assert row_parts((2, 40, 30)) == [(0, 40), (40, 80)]
    big = row_parts((2, 100_000, 64))
    assert len(big) > 2 and (100_000, big[len(big) // 2][1]) == big[len(big) // 2]
    assert matrix_view(np.zeros((2, 40, 30))).shape == (80, 30)


def test_experts_are_factorized_one_by_one_and_come_back_in_their_shape(model, experts):
    made = model[0]["experts"]
    assert isinstance(made, RowBlocks) and len(made.blocks) == 3
    dense = model[0].dense("experts")
    assert dense.shape == experts.shape and dense.dtype == experts.dtype
    for block, expert, own in zip(made.blocks, experts, dense, strict=True):
        assert block.snr(expert) > 6
        assert np.array_equal(block.to_dense(), own.astype(np.float32))
    ks = [block.k for block in made.blocks]
    assert ks[0] < ks[2]  # the largest errors get the most bits
    for name in ("conv1d", "conv3d"):
        assert isinstance(model[0][name], dn.DiBAFactors)
        assert model[0].dense(name).shape == model[1][name].shape


def test_the_record_of_experts_with_inputs_of_their_own_tells_both_ratios(experts, rng):
    X = rng.normal(size=(3, 50, 24)) * np.array([9, 3, 1]).reshape(3, 1, 1)
    grams = np.einsum("esi,esj->eij", X, X) / 50
    made = dn.factorize_model({"e": experts}, grams={"e": grams}, **OPTIONS)["e"]
    assert made.record["snr_db"] == pytest.approx(made.snr(matrix_view(experts)), abs=1e-3)
    signal, noise = (
        np.einsum("eij,ejk,eik", E, grams, E)
        for E in (experts, experts - made.to_dense().reshape(experts.shape))
    )
    decibels = 10 * np.log10(signal / noise)
    assert made.record["output_snr_db"] == pytest.approx(decibels, abs=1e-3)


def test_one_array_under_two_names_is_stored_and_counted_once(model, tmp_path, capsys):
    made, arrays = model
    assert made.aliases == {"head": "embed", "position_ids2": "position_ids"}
    assert made["head"] is made["embed"]
    size = sum(a.size for name, a in arrays.items() if name not in ("words", *made.aliases))
    assert made.size == size and made.record["counted_weights"] == size
    assert made.bits_per_weight <= 5.0
    path = tmp_path / "m.h5"
    made.save(path)
    with open_model(path) as again:
        assert again.aliases == made.aliases and list(again) == list(made)
        assert again.storage_bits() == made.storage_bits()
        for name in made:
            assert np.array_equal(again.dense(name), made.dense(name))
        again.save(tmp_path / "n.h5")
    assert dn.load(path, group="head").b1 == made["embed"].b1
    assert open_model(tmp_path / "n.h5").aliases == made.aliases
    assert main(["info", str(path)]) == 0
    out = capsys.readouterr().out
    assert "head" in out and "the same as embed" in out and "words: text" in out
    assert "kept" in out and "1-D, 960 bits" in out
    np.savez(tmp_path / "m.npz", **arrays)
    assert main(["verify", str(path), str(tmp_path / "m.npz"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["same_source"] is True


def test_an_alias_of_nothing_is_refused(model, tmp_path):
    from diba_np.models.file import Alias, write_model

    path = tmp_path / "m.h5"
    made = model[0]
    items = [("a", (40, 30), "<f4", made["embed"]), ("b", (40, 30), "<f4", Alias("none"))]
    write_model(path, items, {})
    with pytest.raises(FormatError, match="'b' as an alias of 'none'"):
        open_model(path)
    with pytest.raises(FormatError, match="group none"):
        dn.load(path, group="b")


def test_tied_arrays_count_with_the_inputs_of_both(rng):
    w = rng.normal(size=(24, 20))
    gram = np.diag(np.geomspace(1, 1e-3, 20))
    both = dn.factorize_model({"a": w, "b": w}, grams={"b": gram}, **OPTIONS)
    alone = dn.factorize_model({"a": w}, grams={"a": gram}, **OPTIONS)
    assert both.aliases == {"b": "a"} and both["a"].b1 == alone["a"].b1
    # one of the two is left out: it stays as it was
    apart = dn.factorize_model({"a": w, "b": w}, exclude=["b"], **OPTIONS)
    assert not apart.aliases and np.array_equal(apart.dense("b"), w)


def test_what_is_left_out_ends_no_run(tmp_path, rng):
    class Lazy(dict):
        def __getitem__(self, name):
            if name == "gone":
                raise KeyError(name)
            return super().__getitem__(name)

    source = Lazy(
        w=rng.normal(size=(20, 20)),
        text=np.array(["a"]),
        objects=[{}, None],
        nan=np.full((20, 20), np.nan),
        gone=0,
    )
    kept = ["text", "objects", "nan", "gone"]
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = dn.factorize_model(source, exclude=kept, **OPTIONS)
    assert list(model) == ["w", "nan"] and np.isnan(model.dense("nan")).all()
    assert {name for name, _ in model.record["omitted"]} == {"text", "objects", "gone"}
    with pytest.raises(TypeError, match="objects must be an array of numbers"):
        dn.factorize_model(source, exclude=["gone", "nan"], **OPTIONS)
    np.save(tmp_path / "w.npy", source["w"])
    (tmp_path / "bad.npy").write_bytes(b"no array")
    with pytest.raises(FormatError, match=r"bad\.npy: not readable"):
        dn.factorize_model(tmp_path, **OPTIONS)
    assert list(dn.factorize_model(tmp_path, exclude=["bad"], **OPTIONS)) == ["w"]


def test_longdouble_is_taken_as_float64_and_not_left_out(tmp_path, rng):
    arrays = {"w": rng.normal(size=(20, 20)), "b": rng.normal(size=20)}
    wide = {name: array.astype(np.longdouble) for name, array in arrays.items()}
    np.savez(tmp_path / "m.npz", **wide)
    (tmp_path / "m").mkdir()
    with h5py.File(tmp_path / "m.h5", "w") as file:
        for name, array in wide.items():
            file[name] = array
            np.save(tmp_path / "m" / f"{name}.npy", array)
    expected = dn.factorize_model(arrays, **OPTIONS)
    for source in (wide, tmp_path / "m.npz", tmp_path / "m.h5", tmp_path / "m"):
        made = dn.factorize_model(source, **OPTIONS)
        assert not made.record["omitted"] and made.bits_per_weight == expected.bits_per_weight
        assert np.array_equal(made.dense("b"), arrays["b"]) and made["w"].b1 == expected["w"].b1
        assert made.array_dtype("w") == made.array_dtype("b") == "<f8"


def test_floats_of_8_bits_are_factorized_and_kept_to_the_bit(tmp_path, rng):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="the package ml_dtypes")
    kind = ml_dtypes.float8_e4m3fn
    arrays = {"w": rng.normal(size=(24, 20)).astype(kind), "v": rng.normal(size=9).astype(kind)}
    model = dn.factorize_model(arrays, output=tmp_path / "m.h5", **OPTIONS)
    with model:
        assert model.array_dtype("w") == model.array_dtype("v") == "float8_e4m3fn"
        assert model["w"].snr(arrays["w"].astype(float)) > 6
        assert model["v"].storage_bits() == 72
        assert model.dense("v").tolist() == decode(arrays["v"].view("u1"), "float8_e4m3fn").tolist()


def test_a_gram_matrix_of_nothing_is_named_and_left_out(rng):
    arrays = {"a": rng.normal(size=(20, 24)), "b": rng.normal(size=(20, 24))}
    gram = np.diag(np.geomspace(1, 1e-2, 24)) * 7
    with pytest.warns(UserWarning, match=r"grams 'b' must not be all zero: factorized by the"):
        model = dn.factorize_model(arrays, grams={"a": gram, "b": np.zeros((24, 24))}, **OPTIONS)
    assert "output_snr_db" in model["a"].record and "output_snr_db" not in model["b"].record
    assert model["b"].k > 1 and model["b"].snr(arrays["b"]) > 5
    experts = rng.normal(size=(2, 20, 24))
    grams = {"e": np.stack([gram, gram[::-1, ::-1]])}
    model = dn.factorize_model({"e": experts}, grams=grams, **OPTIONS)
    errors = (model.dense("e") - experts) ** 2
    assert errors[0, :, 0].sum() < errors[1, :, 0].sum()
    assert errors[1, :, -1].sum() < errors[0, :, -1].sum()


@pytest.mark.parametrize(
    ("gram", "words"),
    [
        (np.ones((24, 23)), "grams 'a' must be square"),
        (np.full((24, 24), np.nan), "grams 'a' contains 576 non-finite"),
        (
            np.triu(np.ones((24, 24))),
            r"grams 'a' must be symmetric, got 1 at \(0, 1\) and 0 at \(1, 0\)",
        ),
        (-np.eye(24), "grams 'a' must be positive semidefinite, got a smallest eigenvalue of -1"),
        (np.eye(20), r"grams 'a' must have shape \(24, 24\), got \(20, 20\)"),
        (np.ones((2, 24, 24)), r"grams 'a' must have shape \(24, 24\), got"),
    ],
)
def test_gram_matrices_are_checked_before_any_search(gram, words, rng):
    seen = []
    with pytest.raises(ValueError, match=words):
        dn.factorize_model(
            {"a": rng.normal(size=(20, 24))}, grams={"a": gram}, callback=seen.append, **OPTIONS
        )
    assert not any(event["event"] in ("start", "curve") for event in seen)


def test_what_is_kept_is_named_where_the_budget_does_not_pay_for_it(rng):
    arrays = {"w": rng.normal(size=(20, 20)), "lookup": np.arange(4000).reshape(4, 1000)}
    words = r"kept: 'lookup' \(4, 1000\) integers 256000 bits; leave them out by their names"
    with pytest.raises(ValueError, match=words):
        dn.factorize_model(arrays, **OPTIONS | {"bits": 1.0})
    model = dn.factorize_model(arrays, exclude=["lookup"], **OPTIONS)
    assert np.array_equal(model.dense("lookup"), arrays["lookup"])
