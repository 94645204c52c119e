"""Whole models: one budget, names kept, the same bits by every road, errors in one sentence."""

import dataclasses
import json
import math
import os
import runpy
import sys
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import diba_np as dn
from diba_np.cli.main import main
from diba_np.errors import FormatError
from diba_np.files.container import group_key
from diba_np.machine.processors import processors
from diba_np.matrix.row_blocks import RowBlocks, stack
from diba_np.matrix.stored_array import StoredArray
from diba_np.methods import METHODS, fit
from diba_np.models.file import ModelFactors, is_model, open_model
from diba_np.models.plan import Curve, Task, allocate, least, sample_curves
from diba_np.models.shapes import row_parts
from diba_np.sources.opening import open_source

NAMES = ["a/b", "a", "ü ñ 漢", "", ".", "%2F", "a%2Fb", "x\x00y", "/", "a/b1", "..", "lone \ud800"]


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(5)
    return {
        "a/b": rng.normal(size=(40, 30)),
        "a": 3 * rng.normal(size=(30, 45)).astype(np.float32),
        "conv": rng.normal(size=(24, 3, 3, 3)).astype(np.float16),
        "bias": rng.normal(size=40).astype(np.float32),
        "ids": np.arange(40).reshape(2, 20),
        "mask": np.array([[True, False]]),
        "scalar": np.float64(2.5),
        "empty": np.zeros((0, 3), np.float32),
    }


@pytest.fixture(scope="module")
def model(arrays):
    return dn.factorize_model(arrays, bits=6.0, jobs=1, threads=1, effort="fast")


def same(model, other):
    assert list(model) == list(other)
    for name in model:
        assert np.array_equal(model.dense(name), other.dense(name)), name


def test_an_expert_without_inputs_leaves_the_others_theirs(rng):
    experts = rng.normal(size=(3, 40, 32))
    grams = np.stack([np.diag(10.0 ** rng.uniform(-3, 3, 32)) for _ in range(3)])
    how = {"jobs": 1, "threads": 1, "effort": "fast", "allocation": "uniform"}
    silent = grams.copy()
    silent[2] = 0
    full = dn.factorize_model({"e": experts}, bits=3.0, grams={"e": grams}, **how)
    with pytest.warns(UserWarning, match="grams 'e' of expert 2 must not be all zero"):
        some = dn.factorize_model({"e": experts}, bits=3.0, grams={"e": silent}, **how)
    plain = dn.factorize_model({"e": experts}, bits=3.0, **how)
    assert np.array_equal(some.dense("e")[:2], full.dense("e")[:2])
    assert np.array_equal(some.dense("e")[2], plain.dense("e")[2])


def test_a_pattern_that_is_a_name_is_that_array_alone(rng):
    source = {name: rng.normal(size=(20, 20)) for name in ("w[0]", "w0", "w[1]")}

    def factorized(**options):
        made = dn.factorize_model(source, bits=8, jobs=1, threads=1, effort="fast", **options)
        return {name for name in made if not made[name].is_array}, made.record

    assert factorized(include=["w[0]"])[0] == {"w[0]"}
    assert factorized(exclude=["w[0]", "w[1]"])[0] == {"w0"}
    assert factorized(include=["w[[]*"])[0] == {"w[0]", "w[1]"}
    plain, heavy = (factorized(weights=w)[1]["weighted_error"] for w in ({}, {"w[1]": 1e6}))
    assert heavy > 1e3 * plain
    assert factorized(weights={"w[0]": 1.0, "w[[]*": 1e6})[1]["weighted_error"] > 1e3 * plain


# -- what comes out --------------------------------------------------------------------------------


def test_a_model_is_a_mapping_of_its_arrays(model, arrays):
    assert list(model) == list(arrays)
    for name, array in arrays.items():
        assert model.array_shape(name) == np.shape(array)
        dense = model.dense(name)
        assert (dense.shape, dense.dtype) == (np.shape(array), np.asarray(array).dtype)
        if name in ("a/b", "a", "conv"):
            assert isinstance(model[name], dn.DiBAFactors)
            assert model[name].snr(array.reshape(model[name].shape)) > 3
        else:
            assert np.array_equal(dense, array)
    assert model["conv"].shape == (24, 27)
    with pytest.raises(KeyError):
        model["none"]


def test_every_bit_counts_and_the_budget_holds(model, arrays):
    size = sum(np.size(array) for array in arrays.values())
    kept = 32 * 40 + 64 * 40 + 8 * 2 + 64
    made = sum(model[name].storage_bits() for name in ("a/b", "a", "conv"))
    assert model.storage_bits() == kept + made <= 6.0 * size
    assert made > 6.0 * size - kept - 2 * (24 + 27 + 16) * 3  # nothing much is left over
    assert model.record["counted_bits"] == model.storage_bits()


def test_save_and_open_give_the_same(model, tmp_path):
    path = tmp_path / "m.h5"
    assert model.save(path) == path.stat().st_size
    assert is_model(path)
    with open_model(path) as read:
        same(model, read)
        assert read.record == model.record
        assert dn.load(path, group="a/b").b1 == model["a/b"].b1
        assert read["a"] is read["a"]
    with pytest.raises(ValueError, match="closed"):
        read["a"]


def test_arrays_of_a_file_that_was_replaced_are_refused(model, arrays, tmp_path):
    path = tmp_path / "m.h5"
    model.save(path)
    read = open_model(path)
    read.save(path)  # the same arrays
    assert np.array_equal(read.dense("a"), model.dense("a"))
    others = {name: np.zeros_like(array) for name, array in arrays.items()}
    dn.factorize_model(others, bits=6.0, jobs=1, effort="fast").save(path)
    with pytest.raises(FormatError, match=r"array a/b: was changed since the file was opened"):
        read["a/b"]


def test_a_source_that_changes_in_mid_run_ends_it(tmp_path, rng):
    source, other = tmp_path / "a.npy", tmp_path / "b.npy"
    np.save(source, rng.normal(size=(20, 20)))
    np.save(other, np.zeros((20, 20)))

    def change(event):
        if event["event"] == "budget":
            other.replace(source)

    with pytest.raises(FormatError, match=r"a\.npy: was changed while its arrays were being read"):
        dn.factorize_model(source, bits=6.0, jobs=1, effort="fast", callback=change)


def test_what_goes_through_a_whole_file_holds_one_array_at_a_time(model, tmp_path):
    model.save(tmp_path / "m.h5")
    with open_model(tmp_path / "m.h5") as read:
        assert read.storage_bits() == model.storage_bits()
        read.save(tmp_path / "again.h5")
        read.export(tmp_path / "m.npz")
        read.export(tmp_path / "m.safetensors")
        read.dense("a")
        assert read._made == {}
        assert read["a"] is read.read("a")


def test_odd_names_are_kept(tmp_path):
    arrays = {name: np.full(i + 1, i, np.float32) for i, name in enumerate(NAMES)}
    arrays["x" * 300] = np.random.default_rng(0).normal(size=(20, 20))
    assert len({group_key(name) for name in arrays}) == len(arrays)
    model = dn.factorize_model(
        arrays,
        bits=9.0,
        jobs=1,
        threads=1,
        effort="fast",
        output=tmp_path / "m.h5",
        exclude=NAMES[:1],
    )
    assert list(model) == list(arrays)
    for name in NAMES:
        assert np.array_equal(model.dense(name), arrays[name])
        assert np.array_equal(dn.load(tmp_path / "m.h5", group=name).array, arrays[name])


def test_what_is_left_out_takes_no_part_in_the_budget(arrays):
    model = dn.factorize_model(arrays, bits=2.0, jobs=1, threads=1, effort="fast", include=["a*"])
    assert {name for name in model if model[name].method == "diba"} == {"a", "a/b"}
    assert np.array_equal(model.dense("conv"), arrays["conv"])
    used = sum(model[name].storage_bits() for name in ("a", "a/b"))
    assert 1.8 < used / (arrays["a"].size + arrays["a/b"].size) <= 2.0


def test_the_same_bits_from_processes_threads_and_a_file(model, arrays, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    path, log = tmp_path / "m.h5", tmp_path / "log"
    options = {"bits": 6.0, "effort": "fast"}
    killed = []

    def kill_one(event):
        import multiprocessing

        if event["event"] == "budget":
            for child in multiprocessing.active_children()[:1]:
                child.kill()
                killed.append(child)

    spread = dn.factorize_model(
        arrays, output=path, jobs=2, threads=1, json_log=log, callback=kill_one, **options
    )
    assert len(killed) == (processors() > 1)
    same(model, spread)
    assert not list(tmp_path.glob("*.parts"))
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert [e["event"] for e in events if e["event"] != "curve"] == (
        ["start", "budget", "matrix", "matrix", "matrix", "done"]
    )
    with ThreadPoolExecutor(2) as pool:
        same(model, dn.factorize_model(arrays, executor=pool, **options))


def test_grams_and_weights_move_the_bits(rng):
    arrays = {"p": rng.normal(size=(40, 30)), "q": rng.normal(size=(40, 30))}
    plain = dn.factorize_model(arrays, bits=2.0, jobs=1, threads=1, effort="fast")
    tilted = dn.factorize_model(
        arrays, bits=2.0, jobs=1, threads=1, effort="fast", weights={"q*": 16.0}
    )
    assert abs(plain["p"].k - plain["q"].k) <= 4
    assert tilted["q"].k > 1.3 * tilted["p"].k
    X = rng.normal(size=(200, 30)) * np.geomspace(1, 0.05, 30)
    gram = X.T @ X / len(X)
    fitted = dn.factorize_model(
        arrays, bits=2.0, jobs=1, threads=1, effort="fast", grams={"p": gram}
    )
    assert fitted["p"].record["output_snr_db"] is not None
    assert "output_snr_db" not in fitted["q"].record
    assert fitted["p"].k < fitted["q"].k  # its inputs are small: its error weighs less


# -- the budget ------------------------------------------------------------------------------------


def task(number, shape, energy):
    return Task(number, str(number), 0, shape[0], shape, True, energy, energy)


def test_row_parts_are_decided_by_the_shape():
    assert row_parts((4096, 4096)) == [(0, 4096)]
    parts = row_parts((100_000, 64))
    assert parts[0][0] == 0 and parts[-1][1] == 100_000
    assert all(a[1] == b[0] for a, b in pairwise(parts))
    assert min(stop - start for start, stop in parts) >= 16 * 64
    # a block of 256 rows of 16 would take longer than it is worth
    assert min((stop - start) * 16 for start, stop in row_parts((400_000, 16))) >= 1 << 17


@given(st.floats(-3, 3), st.floats(0.2, 0.9), st.floats(0.2, 0.9), st.floats(1.5, 4.0))
def test_allocation_is_as_good_as_trying_everything(log_energy, first, second, rate):
    shapes = [(30, 40), (24, 64)]
    energies = [1.0, 10.0**log_energy]
    tasks = [task(i, s, e) for i, (s, e) in enumerate(zip(shapes, energies, strict=True))]
    curves = [Curve((1.0, 2.0), (e, e**2)) for e in (first, second)]
    budget = int(rate * sum(math.prod(shape) for shape in shapes))
    shares = allocate(tasks, curves, budget)
    assert sum(shares) <= budget

    def error(task, curve, bits):
        unit = task.unit(16)
        k = np.maximum((bits - (task.bits(1, 16) - unit)) // unit, 0)
        return task.energy * curve.at(np.asarray(k * sum(task.shape) / math.prod(task.shape)))

    floor = tasks[0].bits(1, 16), tasks[1].bits(1, 16)
    tried = np.arange(floor[0], budget - floor[1] + 1)
    best = np.min(error(tasks[0], curves[0], tried) + error(tasks[1], curves[1], budget - tried))
    ours = sum(error(t, c, b) for t, c, b in zip(tasks, curves, shares, strict=True))
    # a piece of the grid of k may end between two pieces of the other: two components' worth
    assert ours <= best * 1.1 + 1e-9


@pytest.mark.parametrize("by", ["gram", "rows"])
def test_a_curve_sees_what_a_few_rows_or_columns_hold(by, rng):
    A, gram = rng.normal(size=(300, 300)), np.eye(300)
    (left_out, *_) = set(range(200, 300)) - set(np.linspace(0, 299, 256).astype(int))
    if by == "gram":
        gram[left_out, left_out] = 3e4  # not among 256 evenly spaced columns
    else:
        A[left_out] *= 150
    curve = sample_curves(A, gram, 0.0, 0, 1, ("diba",))["diba"]
    whole = dn.factorize(A, k=round(A.size / 800), gram=gram, effort="fast", threads=1)
    short = -10 * np.log10(curve.at(np.array([1.0]))[0])
    assert whole.record["output_snr_db"] > 12  # a part without them would say 4 dB
    assert short == pytest.approx(whole.record["output_snr_db"], abs=3)


def test_a_curve_ends_where_bits_are_of_no_use(rng):
    A = rng.normal(size=(64, 64))
    curves = sample_curves(A, None, 0.0, 0, 1, ("diba", "linear-trellis"))
    at = {method: curve.at(np.array([3.0, 4.0, 6.0, 8.0])) for method, curve in curves.items()}
    assert at["linear-trellis"][0] < at["diba"][0]
    assert at["linear-trellis"][1] == at["linear-trellis"][2] > at["diba"][2]
    lowest = least([*curves.values()]).at(np.array([3.0, 8.0]))
    np.testing.assert_allclose(lowest, [at["linear-trellis"][0], at["diba"][3]], rtol=0.3)


def test_errors_relative_to_each_matrix(rng):
    arrays = {"large": rng.normal(size=(64, 64)), "small": rng.normal(size=(64, 64)) / 16}
    how = {"bits": 2.0, "jobs": 1, "threads": 1, "effort": "fast", "scale_bits": 16}
    with pytest.warns(UserWarning, match="1 of 2 matrices keep less than 1 dB, the first 'small'"):
        dn.factorize_model(arrays, **how)
    made = dn.factorize_model(arrays, allocation="relative", **how)
    rates = [made[name].bits_per_weight for name in arrays]
    assert rates[0] == pytest.approx(rates[1], abs=0.2)
    assert made.bits_per_weight <= 2.0


def test_relative_errors_know_no_units_of_gram_matrices(rng):
    A = rng.normal(size=(40, 40))
    arrays, how = {"a": A, "b": A[::-1]}, {"bits": 2.0, "jobs": 1, "threads": 1, "effort": "fast"}
    for unit in (1e4, 1e-4):
        with pytest.warns(UserWarning, match="'b'"):
            made = dn.factorize_model(
                arrays, grams={"a": unit * np.eye(40), "b": np.zeros((40, 40))},
                allocation="relative", **how,
            )  # fmt: skip
        assert made["a"].bits_per_weight == pytest.approx(made["b"].bits_per_weight, abs=0.2)


def test_either_name_of_an_array_may_have_its_weight(rng):
    A, B = rng.normal(size=(2, 40, 40))
    how = {"bits": 2.0, "jobs": 1, "threads": 1, "effort": "fast", "scale_bits": 16}
    rates = []
    for name in "at":
        made = dn.factorize_model({"a": A, "t": A, "b": B}, weights={name: 1e3}, **how)
        rates.append([made[each].bits_per_weight for each in "atb"])
    assert rates[0] == rates[1] and rates[0][0] > rates[0][2] + 1


def test_uniform_gives_the_same_rate():
    tasks = [task(0, (100, 100), 1.0), task(1, (300, 50), 5.0)]
    shares = allocate(tasks, None, 25_000)
    assert 24_990 < sum(shares) <= 25_000
    assert shares[0] / 10_000 == pytest.approx(shares[1] / 15_000, abs=1e-3)


def test_no_matrix_gets_more_bits_than_the_dense_one():
    tasks = [task(0, (100, 100), 1.0), task(1, (300, 50), 5.0)]
    for curves in (None, [Curve((1.0,), (0.25,))] * 2):
        shares = allocate(tasks, curves, 64 * 25_000)
        assert shares[0] <= 32 * 10_000
        assert shares[1] <= 32 * 15_000


@pytest.mark.parametrize("method", ["diba", "best"])
def test_the_smallest_matrices_keep_to_the_plan(method, rng):
    arrays = {"a": rng.normal(size=(40, 30)), "s": rng.normal(size=(4, 4))}
    options = {"bits": 6.0, "min_size": 2, "jobs": 1, "threads": 1, "max_sweeps": 5}
    made = dn.factorize_model(arrays, method=method, **options)
    assert made.bits_per_weight <= 6.0 and not made["s"].is_array


def test_row_blocks_multiply_as_one_matrix(rng, tmp_path):
    A = rng.normal(size=(50, 20))
    blocks = [dn.factorize(part, k=12, effort="fast", threads=1) for part in (A[:30], A[30:])]
    squares = [float((p**2).sum()) for p in (A[:30], A[30:])]
    made = stack(blocks, squares, squares)
    dense = made.to_dense()
    assert dense.shape == (50, 20)
    assert made.record["snr_db"] == pytest.approx(made.snr(A), abs=1e-3)
    assert np.allclose(made @ np.eye(20), dense, atol=1e-5)
    assert np.allclose(made.T @ np.eye(50), dense.T, atol=1e-5)
    # some BLAS round a row by how many are with it
    some = [49, 0, 31, 0]
    np.testing.assert_allclose(made.row_expander()(slice(25, 40)), dense[25:40], atol=1e-5)
    np.testing.assert_allclose(made[some], dense[some], atol=1e-5)
    np.testing.assert_allclose(made[-1], dense[-1], atol=1e-5)
    assert made.storage_bits() == sum(block.storage_bits() for block in blocks)
    made.save(tmp_path / "r.h5")
    read = dn.load(tmp_path / "r.h5")
    assert isinstance(read, RowBlocks)
    # a file's record holds 60 000 bytes, and tables of a million rows have thousands of blocks
    many = stack(blocks[:1] * 4000, squares[:1] * 4000, squares[:1] * 4000).record
    assert len(json.dumps(many)) < 4000 and len(made.record["blocks"]) == 2
    assert np.array_equal(read.to_dense(), dense)


def test_large_tall_matrices_become_row_blocks(monkeypatch, rng, tmp_path):
    from diba_np.models import run, shapes

    monkeypatch.setattr(shapes, "_LARGE", 1000)
    monkeypatch.setattr(shapes, "_TALL", 2)
    monkeypatch.setattr(shapes, "_SMALL", 1)
    read = []

    def load(path):
        made = dn.load(path)
        read.append(path)
        return made

    monkeypatch.setattr(run, "load", load)
    A = rng.normal(size=(100, 16))
    seen = []
    path = tmp_path / "m.h5"
    made = dn.factorize_model(
        {"e": A}, bits=2.0, jobs=1, threads=1, effort="fast", output=path, callback=seen.append
    )
    assert len(read) == 3  # each part once, for the file
    assert isinstance(made["e"], RowBlocks)
    assert [b.shape for b in made["e"].blocks] == [(33, 16), (33, 16), (34, 16)]
    assert [e["event"] for e in seen if e["event"] in ("part", "matrix")] == (
        ["part", "part", "matrix"]
    )
    assert made.record["snr_db"] == pytest.approx(made["e"].snr(A), abs=1e-3)
    assert dn.load(path, group="e").record["source"]["shape"] == [100, 16]


# -- bad input -------------------------------------------------------------------------------------

OK = {"w": np.ones((20, 20))}


@pytest.mark.parametrize(
    ("source", "options", "kind", "words"),
    [
        (5, {}, TypeError, "source must be a path or a mapping, got int"),
        ({}, {}, ValueError, "found none in a dict"),
        ({1: np.ones(3)}, {}, TypeError, "got the key 1"),
        ({"w": np.array(["x"])}, {}, FormatError, r"found no numbers in the source: 'w' \(text\)"),
        ({"w": np.full((20, 20), np.nan)}, {}, ValueError, "w contains 400 non-finite entries"),
        (OK, {"bits": "1"}, TypeError, "bits must be a number"),
        (OK, {"bits": 0}, ValueError, "bits must be finite and above 0"),
        (OK, {"bits": 0.1}, ValueError, "bits is too small: k=1 of every matrix takes"),
        (OK, {"include": ["z*"]}, ValueError, "include 'z\\*' matches none of the 1 arrays"),
        (OK, {"exclude": [3]}, TypeError, "patterns must be strings, got 3"),
        (OK, {"weights": {"z": 1}}, ValueError, "weights 'z' matches none"),
        (OK, {"weights": {"w": -1}}, ValueError, "weights 'w' must be finite and above 0"),
        (OK, {"weights": [1]}, TypeError, "weights must be a mapping, got list"),
        (OK, {"grams": {"z": np.eye(20)}}, ValueError, "grams holds 'z', which is none"),
        (OK, {"grams": {"w": np.eye(3)}}, ValueError, "grams 'w' must have shape \\(20, 20\\)"),
        (
            OK,
            {"allocation": "even"},
            ValueError,
            "allocation must be one of shared, relative, uniform",
        ),
        (OK, {"effort": "low"}, ValueError, "effort must be one of"),
        (OK, {"jobs": 0}, ValueError, "jobs must be at least 1, got 0"),
        (OK, {"threads": 0}, ValueError, "threads must be at least 1, got 0"),
        (OK, {"executor": 3}, TypeError, "executor must be a concurrent.futures.Executor"),
        (OK, {"min_size": 0}, ValueError, "min_size must be at least 1"),
        (OK, {"scale_bits": "most"}, ValueError, "scale_bits must be a number of bits"),
    ],
)
def test_bad_arguments(source, options, kind, words):
    with pytest.raises(kind, match=words):
        dn.factorize_model(source, **({"bits": 4.0} | options))


@pytest.mark.parametrize("allocation", ["shared", "uniform"])
def test_a_model_without_matrices_is_kept_as_it_is(allocation):
    model = dn.factorize_model({"b": np.arange(5.0)}, bits=64, allocation=allocation)
    np.testing.assert_array_equal(model["b"].to_dense().ravel(), np.arange(5.0))
    with pytest.raises(ValueError, match="bits is too small"):
        dn.factorize_model({"a": np.eye(3)}, bits=1, min_size=100, allocation=allocation)


@pytest.mark.parametrize("allocation", ["shared", "relative", "uniform"])
@pytest.mark.parametrize("method", ["diba", "best"])
def test_few_bits_are_planned_with_coded_diagonals(allocation, method, rng):
    # one component with 16-bit diagonals takes 0.13 bits a weight here, with codes 0.04
    arrays = {name: rng.normal(size=(256, 256)).astype("f4") for name in "ab"}
    model = dn.factorize_model(
        arrays, bits=0.08, allocation=allocation, method=method, effort="fast"
    )
    assert 0.04 < model.bits_per_weight <= 0.08
    with pytest.raises(dn.BudgetError, match=r"k=1 of every matrix takes 0.0\d+ bits a weight"):
        dn.factorize_model(arrays, bits=0.03, allocation=allocation, method=method)


def test_a_budget_that_is_too_small_leaves_nothing_behind(tmp_path, rng):
    arrays = {"w": rng.normal(size=(20, 20)).astype("f4"), "long": np.arange(300.0)}
    with pytest.raises(ValueError, match="what is kept as it is leaves"):
        dn.factorize_model(arrays, bits=2, output=tmp_path / "m.h5", jobs=1)
    arrays["w"] = arrays["w"].astype("f8") * 1e40
    with pytest.raises(ValueError, match="the largest magnitude in w must lie in"):
        dn.factorize_model(arrays, bits=60, output=tmp_path / "m.h5", jobs=1)
    assert not list(tmp_path.iterdir())


def test_damaged_model_files_are_refused(model, tmp_path):
    path = tmp_path / "m.h5"
    model.save(path)
    whole = path.read_bytes()
    with h5py.File(path, "a") as file:
        del file["bias"]
    with pytest.raises(FormatError, match="groups_digest"):
        open_model(path)
    assert main(["verify", str(path)]) == main(["info", str(path)]) == 1
    path.write_bytes(whole)
    with h5py.File(path, "a") as file:
        file.move("a", "other")
    with pytest.raises(FormatError, match="groups_digest"):
        open_model(path)
    path.write_bytes(whole)
    with h5py.File(path, "a") as file:
        file["a"].attrs["array_shape"] = "[45, 30]"
    with open_model(path) as read, pytest.raises(FormatError, match="digest"):
        read["a"]
    path.write_bytes(whole[: len(whole) // 2])
    assert not is_model(path)
    with pytest.raises(FormatError):
        open_model(path)
    dn.factorize(np.eye(20), k=3, threads=1).save(path)
    with pytest.raises(FormatError, match="is no file of a model or network"):
        open_model(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("name", "[" * 5000), ("array_shape", "[" * 5000), ("order", np.inf), ("order", np.nan)],
)
def test_attributes_that_do_not_read_are_refused(model, tmp_path, name, value):
    path = tmp_path / "m.h5"
    model.save(path)
    with h5py.File(path, "a") as file:
        file["a"].attrs[name] = value
    with pytest.raises(FormatError, match="expected a model"):
        open_model(path)


def test_a_flipped_byte_is_found_or_harmless(model, tmp_path, rng):
    path = tmp_path / "m.h5"
    model.save(path)
    whole = bytearray(path.read_bytes())
    refused = 0
    for at in rng.integers(0, len(whole), 40):
        changed = whole.copy()
        changed[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        try:
            with open_model(path) as read:
                same(model, read)
        except FormatError:
            refused += 1
    assert refused > 20


@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<i8", "|b1", "<f2", "|u1", "bfloat16"])
def test_stored_arrays_come_back_as_they_were(dtype, tmp_path):
    array = np.arange(6).reshape(2, 3).astype("f4" if dtype == "bfloat16" else dtype)
    made = StoredArray.of(array, dtype)
    made.save(tmp_path / "s.h5")
    read = dn.load(tmp_path / "s.h5")
    assert np.array_equal(read.array, array)
    assert np.allclose(read @ np.ones(3), array.astype(float) @ np.ones(3))
    assert read.storage_bits() == 6 * (16 if dtype == "bfloat16" else 8 * array.itemsize)


def test_bench_runs(capsys, monkeypatch):
    path = Path(__file__).parents[2] / "scripts" / "bench_model.py"
    bench = runpy.run_path(str(path))
    words = "--smoke --bits 2 --jobs 1 --no-speedup --allocations relative shared"
    monkeypatch.setattr(sys, "argv", ["bench_model.py", *words.split()])
    assert bench["main"]() == 0
    out = capsys.readouterr().out
    for words in ("| relative |", "| word embeddings |", "shared: error lower by", "than relative"):
        assert words in out


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch, rng):
    monkeypatch.chdir(tmp_path)
    np.savez("m.npz", first=rng.normal(size=(30, 20)), second=rng.normal(size=(20, 24)), b=[1.0])
    return tmp_path


def run(capsys, *args):
    status = main([str(a) for a in args])
    out, err = capsys.readouterr()
    return status, out, err


MAKE = (
    "model",
    "m.npz",
    "--bits",
    4,
    "-o",
    "m.h5",
    "--jobs",
    1,
    "--threads",
    1,
    "--effort",
    "fast",
)


def test_command(here, capsys):
    status, out, _ = run(capsys, *MAKE, "--json")
    assert status == 0
    report = json.loads(out)
    assert report["factorized"] == 2 and report["kept"] == 1
    assert report["bits_per_weight"] <= 4.0
    assert report["file_bytes"] == (here / "m.h5").stat().st_size
    status, out, _ = run(capsys, "info", "m.h5")
    assert status == 0
    for words in ("first", "30 x 20", "kept (1-D)", "2 factorized, 1 kept"):
        assert words in out
    assert len(json.loads(run(capsys, "info", "m.h5", "--json")[1])["groups"]) == 3
    assert "k  " in run(capsys, "info", "m.h5", "--group", "first")[1]
    status, out, _ = run(capsys, "verify", "m.h5", "m.npz", "--json")
    assert (status, json.loads(out)["same_source"]) == (0, True)
    np.savez("other.npz", first=np.ones((30, 20)))
    status, out, _ = run(capsys, "verify", "m.h5", "other.npz", "--json")
    assert (status, json.loads(out)["differ"]) == (1, ["second", "b", "first"])
    np.save("first.npy", np.load("m.npz")["first"])
    status, out, _ = run(capsys, "verify", "m.h5", "first.npy", "--group", "first", "--json")
    assert (status, json.loads(out)["same_source"]) == (0, True)
    np.save("x.npy", np.ones(20))
    assert run(capsys, "apply", "m.h5", "x.npy", "--group", "first", "-o", "y.npy")[0] == 0
    assert run(capsys, "reconstruct", "m.h5", "--group", "first", "-o", "f.npy")[0] == 0
    assert np.allclose(np.load("y.npy"), np.load("f.npy") @ np.ones(20), atol=1e-4)
    assert run(capsys, "reconstruct", "m.h5", "--group", "b", "-o", "b.npy")[0] == 0
    assert np.array_equal(np.load("b.npy"), [1.0])
    # an array more in the source is another source
    with np.load("m.npz") as arrays:
        np.savez("more.npz", **arrays, more=np.full(3, np.nan))
    status, out, _ = run(capsys, "verify", "m.h5", "more.npz", "--json")
    assert (status, json.loads(out)["differ"]) == (1, ["more"])
    status, out, _ = run(capsys, "verify", "m.h5", "more.npz")
    assert "NOT the model it was made from: 1 differ, the first more" in out
    # what was left out by name is none, though a record names twenty of them only
    objects = {f"o{i}": np.array([None]) for i in range(21)}
    np.savez("more.npz", **np.load("m.npz"), **objects)
    made = dn.factorize_model("more.npz", bits=4, exclude="o*", effort="fast", jobs=1)
    made.save("some.h5")
    assert run(capsys, "verify", "some.h5", "more.npz")[0] == 0
    np.savez("more.npz", **np.load("m.npz"), **objects, another=np.ones(3))
    assert run(capsys, "verify", "some.h5", "more.npz")[0] == 1
    # where nothing can be compared, nothing is exact
    status, out, err = run(capsys, "verify", "m.h5", "x.npy")
    assert (status, out, "x.npy: holds none of the model's arrays" in err) == (1, "", True)
    np.savez("other.npz", b=np.ones(3), first=np.ones((20, 30)))
    status, out, _ = run(capsys, "verify", "m.h5", "other.npz", "--json")
    assert status == 1 and "snr_db" not in json.loads(out)


def test_one_array_of_a_model_beside_its_own(here, capsys, monkeypatch, rng):
    source = {
        "conv": rng.normal(size=(24, 5, 2, 2)),
        "experts": rng.normal(size=(2, 20, 18)),
        "w": rng.normal(size=(20, 24)),
        "bias": rng.normal(size=7).astype(np.float32),
        "mask": np.array([True, False]),
        "nothing": np.zeros((0, 4)),
    }
    np.savez("m.npz", **source, tied=source["w"])
    status, out, _ = run(capsys, *MAKE, "--json", "--quiet")
    snr = json.loads(out)["snr_db"]
    status, out, _ = run(capsys, "verify", "m.h5", "m.npz", "--json")
    assert json.loads(out)["snr_db"] == pytest.approx(snr, abs=1e-3)  # a tied array counts once
    for name, array in source.items():
        assert run(capsys, "info", "m.h5", "--group", name)[0] == 0
        np.save("a.npy", array)
        np.save("other.npy", array + np.ones(1, array.dtype))
        check = ("verify", "m.h5", "--group", name, "--json")
        if array.size:
            status, out, _ = run(capsys, *check, "a.npy")
            assert (status, json.loads(out)["same_source"]) == (0, True), name
            status, out, _ = run(capsys, *check, "other.npy")
            assert (status, json.loads(out)["same_source"]) == (1, False), name
    np.save("conv.npy", source["conv"])
    status, _, err = run(capsys, "verify", "m.h5", "conv.npy", "--group", "experts")
    assert "conv.npy: found shape (24, 5, 2, 2), expected (2, 20, 18)" in err
    pytest.importorskip("matplotlib")
    from diba_np.report import pictures

    panels_of = pictures.panels_of
    monkeypatch.setattr(pictures, "panels_of", lambda *args: panels_of(*args)[:1])  # is quicker
    for command in ("plot", "report"):
        assert run(capsys, command, "m.h5", "conv.npy", "--group", "conv")[0] == 0


def test_command_errors_are_one_sentence(here, capsys):
    np.save("x.npy", np.ones(20))
    (here / "w.json").write_text("[]")
    (here / "bad.json").write_text("{")
    (here / "deep.json").write_text("[" * 200_000)
    (here / "archive").write_bytes(b"PK\x03\x04 and no more")
    cases = {
        ("model", "none.npz", "--bits", 1, "-o", "o.h5"): "none.npz: no such file",
        ("model", "m.npz", "--bits", 1, "-o", "x.npy"): "x.npy: exists; pass --force",
        ("model", "m.npz", "--bits", 1, "-o", "none/o.h5"): "none: no such folder",
        ("model", "w.json", "--bits", 1, "-o", "o.h5"): "w.json: expected a folder of .npy",
        (*MAKE, "--weights", "w.json"): "w.json: found list, expected an object",
        (*MAKE, "--weights", "bad.json"): "bad.json: not readable as JSON",
        (*MAKE, "--weights", "deep.json"): "deep.json: not readable as JSON (nested too deeply)",
        ("model", "archive", "--bits", 1, "-o", "o.h5"): "archive: not readable as an archive",
        (*MAKE, "--json-log", "none/log"): "No such file or directory",
        (*MAKE, "--json-log", "m.npz"): "m.npz: is also what is read (m.npz); name another file",
        (*MAKE, "--method", "rtn"): "method must be one of diba, linear-trellis, best, got 'rtn'",
        (*MAKE, "--include", "none"): "include 'none' matches none of the 3 arrays",
    }
    for args, words in cases.items():
        status, out, err = run(capsys, *args)
        assert (status, out, err.count("\n")) == (1, "", 1), args
        assert words in err
    assert not list(here.glob("*.h5*"))
    run(capsys, *MAKE)
    for command in ("apply", "reconstruct"):
        args = [command, "m.h5", *(["x.npy"] if command == "apply" else []), "-o", "o.npy"]
        status, _, err = run(capsys, *args)
        assert status == 1 and "found a whole model with groups" in err
        assert "expected one matrix; name one with --group" in err
        status, _, err = run(capsys, *args, "--group", "third")
        assert status == 1 and "group third" in err
    for name in ("o.npy", "o.safetensor"):  # a folder of that name is nothing that was meant
        status, _, err = run(capsys, "export", "m.h5", "-o", name)
        assert status == 1 and "expected a folder, or a name with .safetensors or .npz" in err
    (here / "net.npy").mkdir()
    for name in ("net.npy", "net.dense"):
        assert run(capsys, "export", "m.h5", "-o", name)[0] == 0


@pytest.mark.parametrize(
    ("method", "allocation"),
    [("linear-trellis", "uniform"), ("best", "shared"), ("best", "uniform")],
)
def test_other_methods_share_the_budget(method, allocation, rng, tmp_path):
    model = {
        "noise": rng.normal(size=(24, 20)),
        "low": np.outer(rng.normal(size=32), rng.choice([-1.0, 1.0], 32)),
        "experts": rng.normal(size=(2, 16, 16)),
        "bias": np.zeros(3, np.float32),
    }
    grams = {"noise": np.diag(np.linspace(0.1, 2, 20))}
    how = {"jobs": 1, "threads": 1, "effort": "fast", "allocation": allocation, "grams": grams}
    path = tmp_path / "m.h5"
    made = dn.factorize_model(model, bits=2.5, method=method, output=path, **how)
    assert made.bits_per_weight <= 2.5
    assert made["noise"].record["output_snr_db"] > made["noise"].record["snr_db"] - 3
    assert made["noise"].snr(model["noise"]) == pytest.approx(
        made["noise"].record["snr_db"], abs=1e-3
    )
    assert len(made["experts"].blocks) == 2
    assert made.dense("experts").shape == (2, 16, 16)
    assert made.record["method"] == method
    assert made["noise"].method == "linear-trellis"
    with open_model(path) as again:
        assert np.array_equal(again.dense("low"), made.dense("low"))
    # little is left to a factorization of few components, and nothing to a trellis
    assert made["low"].method == ("diba" if method == "best" else method)


def test_best_goes_on_from_its_parts(rng, tmp_path):
    model = {f"w{i}": rng.normal(size=(18, 16)) for i in range(2)}
    how = {"bits": 3.0, "method": "best", "jobs": 1, "threads": 1, "effort": "fast"}
    path = tmp_path / "m.h5"

    def stop(event):
        if event["event"] == "matrix":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dn.factorize_model(model, output=path, callback=stop, **how)
    with pytest.raises(ValueError, match='method was "best" and is now "diba"'):
        dn.factorize_model(model, output=path, **(how | {"method": "diba"}))
    events = []
    made = dn.factorize_model(model, output=path, callback=events.append, **how)
    assert [event["resumed"] for event in events if event["event"] == "matrix"].count(True) == 1
    assert not any(event["event"] == "curve" for event in events)
    whole = dn.factorize_model(model, **how)
    assert all(np.array_equal(made.dense(name), whole.dense(name)) for name in model)


def test_methods_that_are_not_known_are_refused():
    with pytest.raises(ValueError, match="method must be one of diba, linear-trellis, best, got"):
        dn.factorize_model({"a": np.eye(20)}, bits=1.0, method="sign")


@pytest.mark.parametrize("label", METHODS)
def test_a_models_file_holds_the_matrices_of_every_method(label, tmp_path):
    A = np.random.default_rng(0).normal(size=(32, 48))
    made = dn.factorize(A, bits=4.0, effort="fast") if label == "diba" else fit(label, A, 4.0)
    ModelFactors({}, {"a": ((32, 48), "<f4")}, {"a": made}).save(tmp_path / "a.h5")
    again = open_model(tmp_path / "a.h5")
    np.testing.assert_array_equal(again["a"].to_dense(), made.to_dense())


def test_what_is_read_is_not_written_to(tmp_path, rng):
    source, grams = tmp_path / "m.npz", tmp_path / "g.npz"
    np.savez(source, a=rng.normal(size=(20, 20)))
    np.savez(grams, a=np.eye(20))
    before = source.read_bytes(), grams.read_bytes()
    wrongs = ({"output": source}, {"json_log": source}, {"json_log": grams}, {"output": grams})
    both = {"output": tmp_path / "o.h5", "json_log": tmp_path / "o.h5"}
    for wrong in (*wrongs, both):
        with pytest.raises(ValueError, match=r"must not be the (source|grams)|must be two files"):
            dn.factorize_model(source, bits=3, grams=grams, jobs=1, **wrong)
    assert (source.read_bytes(), grams.read_bytes()) == before
    # nor is a part of a folder; a model that lies in it is ours
    folder = tmp_path / "weights"
    folder.mkdir()
    with h5py.File(folder / "a.h5", "w") as file:
        file["a"] = np.eye(20)
    before = (folder / "a.h5").read_bytes()
    with pytest.raises(ValueError, match="output is in the folder that is read and may be a part"):
        dn.factorize_model(folder, bits=3, jobs=1, output=folder / "a.h5")
    assert (folder / "a.h5").read_bytes() == before
    output = folder / "made.h5"
    dn.factorize_model(folder, bits=3, jobs=1, output=output, effort="fast")
    with pytest.raises((ValueError, FormatError)) as raised:  # two arrays a then, no overwriting
        dn.factorize_model(folder, bits=3, jobs=1, output=output, effort="fast")
    assert "folder that is read" not in str(raised.value)
    for name in ("output", "json_log"):
        with pytest.raises(TypeError, match=f"{name} must be a path, got bytes"):
            dn.factorize_model(source, bits=3, **{name: b"o.h5"})


def test_experts_of_one_array_read_it_once_and_an_interruption_keeps_the_curves(
    tmp_path, rng, monkeypatch
):
    np.savez(tmp_path / "m.npz", a=rng.normal(size=(6, 20, 24)), b=rng.normal(size=(20, 24)))
    reads, sampled = [], []

    def counted(source):
        return [
            dataclasses.replace(entry, read=lambda entry=entry: reads.append(1) or entry.read())
            for entry in open_source(source)
        ]

    def interrupted(*args):
        sampled.append(1)
        if len(sampled) == 4:
            raise KeyboardInterrupt
        return sample_curves(*args)

    monkeypatch.setattr("diba_np.models.factorization.open_source", counted)
    monkeypatch.setattr("diba_np.models.run.sample_curves", interrupted)
    options = {"bits": 3, "jobs": 1, "effort": "fast", "output": tmp_path / "m.h5"}
    with pytest.raises(KeyboardInterrupt):
        dn.factorize_model(tmp_path / "m.npz", **options)
    reads.clear()
    dn.factorize_model(tmp_path / "m.npz", **options)
    assert len(sampled) == 4 + (7 - 3)
    assert len(reads) <= 2 + 2 + 2 + 2  # what they are, their curves, the fits, the judging


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_log_that_cannot_be_written_ends_no_run(rng):
    with pytest.warns(UserWarning, match="/dev/full: log not written: No space left"):
        model = dn.factorize_model(
            {"a": rng.normal(size=(20, 20))}, bits=3, jobs=1, effort="fast", json_log="/dev/full"
        )
    assert list(model) == ["a"]


def test_what_is_no_path_is_told(tmp_path):
    for wrong in (b"m.h5", None, 3):
        with pytest.raises(TypeError, match="path must be a path, got"):
            open_model(wrong)
