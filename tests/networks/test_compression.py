"""`networks.compress` on small networks with random tensors: budget, resuming, what stages gain."""

import json
import multiprocessing
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from small_networks import network

import diba_np as dn
from diba_np import networks
from diba_np.cli.main import main
from diba_np.files.checkpoint import Checkpoint
from diba_np.layers.dense_linear import DenseLinear
from diba_np.layers.registry import LAYERS
from diba_np.networks.calibration import calibration
from diba_np.networks.compression_run import CompressionRun
from diba_np.networks.distillation import Teacher, distil, matched, taught
from diba_np.networks.importance import KeptImportance, importance, pulled
from diba_np.networks.layerwise import compress_layers
from diba_np.networks.network import Network
from diba_np.networks.stages import states_folder
from diba_np.training.optimisers import Diverged

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import study_language

VOCABULARY = 40
FITTED = 160


SIZES = {"hidden_size": 24, "intermediate_size": 32, "vocab_size": VOCABULARY}


def decoder(**more):
    return network("llama", dtype=np.float32, **(SIZES | more))


def rows(count, seed=0, tokens=12):
    return np.random.default_rng(seed).integers(0, VOCABULARY, (count, tokens))


def divergence(small, net):
    """Mean divergence from the dense network's predictions, on rows that nothing was fitted to."""
    held = rows(24, seed=9)
    last, aim = small.hidden(held)[-1], net.hidden(held)[-1]
    return taught(small, net, last, aim, np.ones(held.shape, bool), back=False)[0]


def arrays(net):
    """Everything that a compressed network holds beside the dense one."""
    return {name: value for name, value in net.parameters.items()} | {
        f"{name}/bits": layer.to_matrix().to_dense() for name, layer in net.compressed.items()
    }


def same(one, other):
    a, b = arrays(one), arrays(other)
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def stored_rate(small):
    matrices = [layer.to_matrix() for layer in small.compressed.values()]
    weights = sum(np.prod(matrix.shape) for matrix in matrices)
    return sum(matrix.storage_bits() for matrix in matrices) / weights


@pytest.fixture(scope="module")
def dense():
    return decoder()


@pytest.fixture(scope="module")
def shallow():
    """A network of one layer, for what costs as much in each."""
    return decoder(num_hidden_layers=1)


@pytest.fixture(scope="module")
def stages(shallow):
    """Weights alone, activations, end to end, at two bits."""
    ids, how = rows(FITTED), {"bits": 2.0, "effort": "fast"}
    return (
        networks.compress(shallow, ids, activations=False, epochs=0, **how),
        networks.compress(shallow, ids, epochs=0, **how),
        networks.compress(shallow, ids, epochs=4, rate=5e-3, **how),
    )


def test_every_stage_is_nearer_to_the_dense_network(shallow, stages):
    alone, fitted, trained = (divergence(small, shallow) for small in stages)
    assert fitted < 0.8 * alone
    assert trained < fitted


def test_the_budget_holds_and_every_matrix_is_compressed(shallow, stages):
    for small in stages:
        assert set(small.compressed) == set(shallow.layers)
        assert 1.8 < stored_rate(small) <= 2.0


def test_the_dense_network_stays_as_it_is(shallow, stages):
    assert not shallow.compressed
    assert np.array_equal(shallow.logits(rows(2)), decoder(num_hidden_layers=1).logits(rows(2)))


def test_what_was_compressed_before_is_not_trained(shallow):
    some = networks.compress(shallow, rows(8), bits=4.0, method="rtn", include=["*self_attn*"])
    logits, held = some.logits(rows(2)), arrays(some)
    rest = networks.compress(some, rows(8), bits=4.0, method="rtn", include=["*mlp*"], epochs=2)
    assert np.array_equal(some.logits(rows(2)), logits)
    now = arrays(some)
    assert all(np.array_equal(now[name], value) for name, value in held.items())
    assert set(some.compressed) < set(rest.compressed)


def test_float64_stays_float64(tmp_path):
    net = network("llama", dtype=np.float64, **(SIZES | {"num_hidden_layers": 1}))
    for _ in range(2):  # the second time from the folder
        small = networks.compress(net, rows(8), bits=4.0, method="rtn", epochs=0, folder=tmp_path)
        assert {layer.dtype for layer in small.compressed.values()} == {np.dtype(np.float64)}
        assert small.hidden(rows(2))[-1].dtype == np.float64


def test_no_layer_gets_a_bias_that_it_had_not(stages):
    assert all(not layer.parameters["bias"].any() for layer in stages[-1].compressed.values())


def test_a_run_that_was_stopped_ends_with_the_same_bits(shallow, stages, tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint, "due", lambda keeper: True)  # the training is kept at each step

    class Stopped(Exception):
        pass

    def stop_at(event, count):
        left = [count]

        def callback(facts):
            left[0] -= facts["event"] == event
            if not left[0]:
                raise Stopped

        return callback

    options = {"bits": 2.0, "effort": "fast", "epochs": 4, "rate": 5e-3, "folder": tmp_path}
    for stop in (stop_at("matrix", 1), stop_at("matrix", 7), stop_at("training", 1)):
        with pytest.raises(Stopped):
            networks.compress(shallow, rows(FITTED), callback=stop, **options)
    seen = []
    told = {"callback": lambda facts: seen.append(facts) if facts["event"] == "training" else None}
    assert same(networks.compress(shallow, rows(FITTED), **told, **options), stages[-1])
    assert seen[0]["step"] == 20  # what came before was taken over
    # what is finished is only read
    told = []
    assert same(
        networks.compress(shallow, rows(FITTED), callback=told.append, **options), stages[-1]
    )
    assert {facts["left"] for facts in told if facts["event"] == "matrix"} == {None}


def test_states_that_a_killed_run_left_are_removed(shallow, tmp_path):
    """They may be many times as large as the network."""
    options = {"method": "rtn", "bits": 4.0, "folder": tmp_path}
    networks.compress(shallow, rows(4), **options)
    with states_folder(tmp_path) as left:
        pass
    left.mkdir()
    (left / "0-0.npy").touch()
    for mine in (
        "mine",
        "states-2024",
        "states-mine_too",
    ):  # the last is a name that tempfile gives
        (tmp_path / mine).mkdir()
        (tmp_path / mine / "notes.txt").touch()
    before = set(tmp_path.rglob("*"))
    networks.compress(shallow, rows(4), **options)
    assert set(tmp_path.rglob("*")) == before - {left, left / "0-0.npy"}


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_runs_share_what_the_dense_network_gives(kind, tmp_path, monkeypatch):
    """Encoders have no energies, decoders shares by them; the states of both teach."""
    net = network(kind, dtype=np.float32)
    ids = np.random.default_rng(3).integers(5, 19, (8, 6))

    def compressed(name, method, dense_folder=None):
        more = {"bits": 9.0, "effort": "fast", "folder": tmp_path / name}
        return networks.compress(net, ids, method=method, dense_folder=dense_folder, **more)

    alone = [compressed(f"{method}-alone", method) for method in ("gptq", "diba")]
    shared = tmp_path / "dense"
    first = compressed("gptq", "gptq", shared)
    kept = {path: path.stat().st_mtime_ns for path in shared.rglob("*") if path.is_file()}
    assert {path.parent.name.split("-")[0] for path in kept} == {"importance", "teacher"}
    assert not [*tmp_path.glob("gptq/importance-*"), *tmp_path.glob("gptq/teacher-*")]

    def forbidden(*_, **__):
        raise AssertionError("made again")

    monkeypatch.setattr("diba_np.networks.compression_run.importance", forbidden)
    monkeypatch.setattr("diba_np.networks.distillation.Teacher._keep", forbidden)
    second = compressed("diba", "diba", shared)
    assert same(first, alone[0]) and same(second, alone[1])
    assert {path: path.stat().st_mtime_ns for path in shared.rglob("*") if path.is_file()} == kept
    with pytest.raises(AssertionError, match="made again"):  # of other texts nothing is there
        networks.compress(net, ids[:4], method="gptq", bits=9.0, dense_folder=shared)


def test_another_run_is_refused_where_one_is_kept(shallow, tmp_path):
    networks.compress(shallow, rows(4), method="rtn", bits=3.0, epochs=0, folder=tmp_path)
    with pytest.raises(ValueError, match=r"bits was 3\.0 and is now 2\.0"):
        networks.compress(shallow, rows(4), method="rtn", bits=2.0, epochs=0, folder=tmp_path)


@pytest.fixture(scope="module")
def finished(shallow, tmp_path_factory):
    """Options of a run, with the folder that keeps its stages."""
    folder = tmp_path_factory.mktemp("finished")
    options = {"method": "rtn", "bits": 4.0, "epochs": 0, "folder": folder}
    networks.compress(shallow, rows(4), **options)
    return options


@pytest.mark.parametrize("part", ["table", "norm", "bias", "dtype"])
def test_a_network_that_differs_in_one_part_is_another(finished, part):
    dtype = np.float64 if part == "dtype" else np.float32
    other = network("llama", dtype=dtype, **SIZES, num_hidden_layers=1)
    if part == "table":
        other.layers[other.token_name].weight[3, 5] += 0.25
    elif part == "norm":
        next(iter(other.blocks.values())).parameters["weight"][2] += 0.25
    elif part == "bias":
        other.layers[next(iter(other.weights))].parameters["bias"][1] += 0.25
    with pytest.raises(ValueError, match=r"another run \(not the same network"):
        networks.compress(other, rows(4), **finished)


def test_stages_whose_run_is_gone_are_not_taken_over(shallow, tmp_path):
    options = {"method": "rtn", "epochs": 0, "folder": tmp_path}
    networks.compress(shallow, rows(4), bits=5.0, **options)
    words = re.escape(f"finish that one, or delete the folder {tmp_path} to begin anew")
    with pytest.raises(ValueError, match=f"{words}$"):
        networks.compress(shallow, rows(4), bits=4.0, **options)
    shutil.rmtree(tmp_path / "network.parts")
    with pytest.raises(ValueError, match=r"holds importance-\w+ of a run that it does not name"):
        networks.compress(shallow, rows(4), bits=4.0, **options)


def test_numbers_of_numpy_are_settings_too(shallow, tmp_path):
    options = {"bits": np.float32(4), "epochs": np.int64(1), "rate": np.float32(1e-3)}
    small = networks.compress(
        shallow, rows(8), method="rtn", seed=np.uint8(0), folder=tmp_path, **options
    )
    again = networks.compress(
        shallow, rows(8), method="rtn", bits=4, rate=float(np.float32(1e-3)), folder=tmp_path
    )
    assert same(small, again)


def test_a_layer_that_was_put_in_the_place_of_another_is_what_is_compressed(rng):
    net, name = decoder(), "model.layers.1.mlp.up_proj"
    A, b = rng.normal(size=net.layers[name].shape), rng.normal(size=len(net.weights[name]))
    net.layers[name] = DenseLinear(A, b)
    for options in ({}, {"activations": False}):
        small = networks.compress(net, rows(40), bits=8.0, method="rtn", epochs=0, **options)
        assert small.layers[name].to_matrix().snr(A) > 30
        assert np.allclose(small.layers[name].parameters["bias"], b, atol=0.2)


def test_a_training_of_other_arguments_is_refused(shallow, stages, tmp_path):
    data = calibration(shallow, rows(8), tokens=48)
    options = {"epochs": 1, "rate": 1e-3, "hold_out": 0.25, "path": tmp_path / "t"}
    distil(stages[1].replaced({}), shallow, data, **options)
    for other in ({"rate": 1.001e-3}, {"seed": 1}, {"hidden": 0.3}, {"hold_out": 0.5}):
        with pytest.raises(ValueError, match=f"checkpoint of another run, {next(iter(other))} was"):
            distil(stages[1].replaced({}), shallow, data, **(options | other))
    with pytest.raises(ValueError, match="checkpoint of another run, not the same rows"):
        distil(
            stages[1].replaced({}), shallow, calibration(shallow, rows(8, 1), tokens=48), **options
        )


def test_a_student_that_training_makes_worse_stays_as_it_was(shallow):
    how = {"bits": 4.0, "method": "rtn", "activations": False, "epochs": 0}
    small = networks.compress(shallow, rows(8), **how)
    data = calibration(shallow, rows(8), tokens=48)
    out = distil(small.replaced({}), shallow, data, epochs=1, rate=0.5)
    np.testing.assert_array_equal(out.logits(rows(4)), small.logits(rows(4)))


def test_a_training_that_diverges_says_what_to_do(stages, shallow):
    data = calibration(shallow, rows(8), tokens=48)
    with pytest.raises(Diverged, match=r"^step 1 of .*: the loss is nan; .* a smaller learning"):
        distil(stages[1].replaced({}), shallow, data, penalty=lambda: np.nan)


def test_independent_layers_in_processes_give_what_one_gives(shallow):
    options = {"bits": 3.0, "method": "rtn", "epochs": 0, "feedback": False}
    one, two = (networks.compress(shallow, rows(8), jobs=jobs, **options) for jobs in (1, 2))
    assert same(one, two)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("method", sorted(set(LAYERS) - {"diba"}))
def test_other_methods(shallow, method):
    how = {"bits": 3.0, "effort": "fast", "epochs": 1, "include": ["*.up_proj"]}
    small = networks.compress(shallow, rows(16), method=method, **how)
    assert len(small.compressed) == 3  # with the table of tokens and the head
    assert stored_rate(small) <= 3.0
    assert np.isfinite(small.logits(rows(2))).all()


def test_best_takes_the_method_by_the_matrix():
    net = decoder(num_hidden_layers=1)
    names = [name for name in net.weights if "mlp" in name]
    for name in names:  # signs times two vectors: what a single component holds
        A = net.weights[name]
        u, v = (np.sign(part) * (1 + abs(part)) for part in (A[:, :1], A[:1]))
        net.layers[name] = DenseLinear(u * v)
    how = {"bits": 2.0, "method": "best", "effort": "fast", "include": ["*.v_proj", "*.up_proj"]}
    small = networks.compress(net, rows(40), **how)
    taken = {name: layer.to_matrix().method for name, layer in small.compressed.items()}
    assert set(taken.values()) == {"diba", "linear-trellis"}
    assert stored_rate(small) <= 2.0
    assert np.isfinite(small.logits(rows(2))).all()


def test_a_trellis_run_goes_on_and_another_method_is_refused(shallow, tmp_path):
    class Stopped(Exception):
        pass

    def stop(facts):
        if facts["name"] != shallow.token_name:
            raise Stopped

    how = {"bits": 3.0, "method": "linear-trellis", "epochs": 0}
    options = how | {"include": ["*.v_proj", "*.up_proj"]}
    with pytest.raises(Stopped):
        networks.compress(shallow, rows(40), folder=tmp_path, callback=stop, **options)
    with pytest.raises(ValueError, match='method was "linear-trellis" and is now "best"'):
        networks.compress(shallow, rows(40), folder=tmp_path, **(options | {"method": "best"}))
    again = networks.compress(shallow, rows(40), folder=tmp_path, **options)
    assert same(again, networks.compress(shallow, rows(40), **options))
    again.save(tmp_path / "small.h5")
    loaded = networks.load(tmp_path / "small.h5")
    np.testing.assert_allclose(loaded.logits(rows(2)), again.logits(rows(2)), rtol=1e-4, atol=1e-4)
    # rows of the table are looked up in the bits: its outputs are not rotated
    table = again.layers[shallow.token_name].to_matrix()
    assert table.coded.rotation in ("none", "inputs")
    assert table.coded.rows[0].bits == 8
    written = [net.generate([1, 2, 3], 4) for net in (again, loaded)]
    assert np.array_equal(*written)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "vit"])
def test_other_kinds(kind):
    net = network(kind, dtype=np.float32)
    if kind == "vit":
        data = np.random.default_rng(0).normal(size=(12, 2, 8, 8)).astype(np.float32)
    else:
        data = np.random.default_rng(0).integers(2, 19, (12, 8))
    events = []
    small = networks.compress(net, data, bits=3.0, method="gptq", epochs=2, callback=events.append)
    assert set(net.weights) <= set(small.compressed)
    assert np.isfinite(small.logits(data[:2])).all()
    trained = [facts for facts in events if facts["event"] == "training"]
    assert trained[-1]["step"] == trained[-1]["steps"]


def test_callback_tells_of_every_matrix(shallow):
    events = []
    networks.compress(shallow, rows(8), bits=3.0, method="rtn", epochs=0, callback=events.append)
    assert [facts["name"] for facts in events] == [*shallow.layers][-2:] + [*shallow.weights] or {
        facts["name"] for facts in events
    } == set(shallow.layers)
    assert events[-1]["left"] == 0
    assert events[-1]["bits_so_far"] <= 3.0


def test_an_outlier_token_neither_dominates_nor_is_lost():
    net = decoder()
    table = net.layers[net.token_name].weight
    table[0] *= 300.0  # its embedding, hundreds of times the rest
    found = dict(importance(net, calibration(net, np.where(rows(32) == 1, 0, rows(32)))))
    for matters in found.values():
        weights = np.concatenate([part.ravel() for part in matters.tokens])
        assert weights.min() > 0
        assert weights.max() < 40 * weights.mean()
        assert np.isclose(weights.mean(), 1.0)


def test_importance_is_the_same_after_a_file(dense, tmp_path):
    found = dict(importance(dense, calibration(dense, rows(6)), scratch=tmp_path))
    kept = KeptImportance(tmp_path / "kept", list(dense.weights))
    assert not kept.complete
    for name, each in found.items():
        kept.write(name, each)
    kept.finish()
    again = KeptImportance(tmp_path / "kept", list(dense.weights))
    assert again.complete
    assert again.names() == list(dense.weights)
    assert again.energies() == {name: found[name].energy for name in dense.weights}
    for name, each in found.items():
        assert np.allclose(again.outputs(name), each.outputs, rtol=1e-6, atol=1e-9)
        for a, b in zip(again.tokens(name), each.tokens, strict=True):
            assert np.allclose(a, b, rtol=1e-6)


def test_importance_without_energies_is_the_same(dense):
    data = calibration(dense, rows(6))
    whole, less = (dict(importance(dense, data, energies=asked)) for asked in (True, False))
    for name, each in less.items():
        assert each.energy is None
        assert whole[name].energy > 0
        assert np.array_equal(each.outputs, whole[name].outputs)
        assert all(map(np.array_equal, each.tokens, whole[name].tokens))


def test_of_wide_layers_the_weights_are_the_diagonal():
    net = network("llama", dtype=np.float32, hidden_size=32, intermediate_size=288)
    data = calibration(net, np.random.default_rng(3).integers(0, 19, (4, 6)))
    whole, diagonal = (dict(importance(net, data, coupled=most)) for most in (None, 32))
    for name, each in diagonal.items():
        outputs = whole[name].outputs
        wide = len(outputs) > 32
        np.testing.assert_array_equal(each.outputs, np.diag(outputs) if wide else outputs)
        assert each.energy == whole[name].energy
    assert diagonal["model.layers.0.mlp.up_proj"].outputs.shape == (288,)


@pytest.mark.parametrize("include", [[], ["*mlp*"]])
@pytest.mark.parametrize("tied", [False, True])
def test_dense_weights_of_one_layer_are_held(monkeypatch, include, tied):
    most, make = [0], Network._make_layer

    def count(self, name):
        held = [n for n, layer in self.layers.held().items() if isinstance(layer, DenseLinear)]
        most[0] = max(most[0], 1 + sum(n in net.weights for n in held))
        return make(self, name)

    monkeypatch.setattr(Network, "_make_layer", count)
    net = decoder(num_hidden_layers=4, tie_word_embeddings=tied)
    networks.compress(net, rows(8), bits=8.0, method="random", include=include, epochs=0)
    assert most[0] == 7  # of a layer of the network
    assert not set(net.layers.held()) & set(net.weights)


def test_weights_of_outputs_are_products_of_gradients():
    """One layer's gradients by hand: the same labels, the whole network at once."""
    net = network("llama")
    data = calibration(net, np.random.default_rng(3).integers(0, 19, (4, 6)))
    found = dict(importance(net, data, seed=5))
    gradients = {}

    def linear(name, x, added=None, keep=None):
        y, pull = net.linear(name, x, added)

        def back(g):
            gradients.setdefault(name, []).append(g.reshape(-1, g.shape[-1]).copy())
            return pull(g)

        return y, back

    hidden, back = net.forward(data.inputs, data.mask, linear)
    back({-1: pulled(net, hidden[-1], *np.ones((2, 4, 6), bool), np.random.default_rng(5))})
    assert gradients.keys() >= net.weights.keys()
    for name, parts in gradients.items():
        if name in net.weights:
            whole = sum(g.T @ g for g in parts)
            even = np.eye(len(whole))
            assert np.allclose(
                found[name].outputs, 0.8 * whole / np.diag(whole).mean() + 0.2 * even, atol=1e-9
            )


def test_gradients_of_the_lesson_are_central_differences():
    net = network("llama")
    rng = np.random.default_rng(0)
    x, aim = rng.normal(size=(2, 2, 5, 8))
    mask = np.arange(5) < np.array([[5], [3]])
    turn = rng.normal(size=x.shape)

    def distance(x):
        return matched({0: x}, {0: aim}, mask)

    def divergence(x):
        return taught(net, net, x, aim, mask)

    for loss in (distance, divergence):
        gradient = loss(x)[1]
        gradient = gradient[0] if isinstance(gradient, dict) else gradient
        step = 1e-5
        slope = (loss(x + step * turn)[0] - loss(x - step * turn)[0]) / (2 * step)
        assert np.isclose(slope, np.vdot(gradient, turn), rtol=1e-5)
    assert abs(divergence(aim)[0]) < 1e-12


def test_a_teacher_gives_the_same_from_disk(dense, tmp_path):
    ids = rows(3)
    mask = np.arange(12) < np.array([[12], [5], [9]])
    first, second = (Teacher(dense, tmp_path).states(np.arange(3), ids, mask) for _ in range(2))
    plain = Teacher(dense).states(np.arange(3), ids, mask)
    for place, states in first.items():
        assert np.array_equal(states, second[place])
        assert np.array_equal(states, plain[place])
    assert not states[1, 5:].any()
    (tmp_path / "1.npy").write_bytes(b"cut short")
    again = Teacher(dense, tmp_path).states(np.arange(3), ids, mask)
    assert all(np.array_equal(again[place], first[place]) for place in first)
    shutil.rmtree(tmp_path)


def test_texts_of_a_decoder_are_joined_and_cut():
    net = decoder()

    class Tokenizer:
        opening = ()

        def encode(self, text, special=True):
            assert not special
            return [ord(letter) % VOCABULARY for letter in text]

    net.tokenizer = Tokenizer()
    data = calibration(net, ["abcd", "efgh", "ij"], length=4)
    assert data.inputs.shape == (2, 4)
    assert data.inputs.tolist() == [
        [ord(c) % VOCABULARY for c in text] for text in ("abcd", "efgh")
    ]


@pytest.mark.parametrize(
    ("texts", "options", "error", "message"),
    [
        (rows(2), {"bits": 0}, ValueError, "bits"),
        (rows(2), {"bits": "1"}, TypeError, "bits"),
        (rows(2), {"method": "svd16"}, ValueError, "method must be one of diba"),
        (rows(2), {"effort": "some"}, ValueError, "effort must be one of fast"),
        (rows(2), {"epochs": -1}, ValueError, "epochs"),
        (rows(2), {"jobs": 0}, ValueError, "jobs"),
        (rows(2), {"rate": 0}, ValueError, "rate"),
        (rows(2) + VOCABULARY, {}, ValueError, "ids must lie in"),
        ([], {}, ValueError, "at least one token"),
        ([[]], {}, ValueError, "at least one token"),
        (["a text"], {}, ValueError, "tokenizer"),
        (["a text", [1, 2]], {}, TypeError, "all strings"),
    ],
)
def test_bad_input(dense, texts, options, error, message):
    with pytest.raises(error, match=message):
        networks.compress(dense, texts, **options)


def test_hidden_states_that_overflow_are_refused_before_anything_is_written(tmp_path):
    net = decoder()
    large = net.replaced({})
    for block in large.blocks.values():
        for name, values in block.parameters.items():
            block.parameters[name] = values * 1e30
    with pytest.raises(ValueError, match="hidden states of the first text are not finite"):
        networks.compress(large, rows(2), bits=4.0, folder=tmp_path / "parts")
    assert not (tmp_path / "parts").exists()


def test_fewer_tokens_than_channels_are_told(dense, monkeypatch):
    monkeypatch.setattr(CompressionRun, "result", lambda run: run.net)
    few = np.full((2, 6), 5)
    with pytest.warns(UserWarning, match="texts hold 12 tokens for layers of up to 32 channels"):
        networks.compress(dense, few, bits=2.0)
    networks.compress(dense, few, bits=2.0, activations=False)
    networks.compress(dense, rows(6, tokens=6), bits=2.0)


def test_a_layer_that_gives_nothing_has_no_output_snr(rng):
    weights = {"a": np.zeros((4, 6)), "b": rng.normal(size=(4, 4))}

    def stage(x, linear):
        return linear("b", linear("a", x), added=x[:, :4])

    fit = lambda name, A, gram: dn.factorize(A, k=4, gram=gram, effort="fast")  # noqa: E731
    batches = [rng.normal(size=(12, 6)) for _ in range(3)]
    report = compress_layers([stage], weights, batches, fit).report
    assert [part["output_snr_db"] for part in report] == [None, None]


def test_a_network_tells_how_it_was_made(tmp_path):
    net = decoder(num_hidden_layers=1)
    small = networks.compress(net, rows(16), bits=2, method="rtn", epochs=2, taught=48)
    small.save(tmp_path / "small.h5")
    for record in (small.record, networks.load(tmp_path / "small.h5").record):
        told = {name: record[name] for name in ("bits", "method", "effort", "seed", "epochs")}
        assert told == {"bits": 2, "method": "rtn", "effort": "fast", "seed": 0, "epochs": 2}
        assert (record["fitted_tokens"], record["taught_tokens"]) == (16 * 12, 3 * 12)
        assert record["diba_np"] == dn.__version__
    assert "bits" not in net.record
    untrained = networks.compress(net, rows(16), bits=2, method="rtn", epochs=0)
    assert "taught_tokens" not in untrained.record


def test_a_network_is_asked_for():
    with pytest.raises(TypeError, match="net must be a Network"):
        networks.compress(np.eye(3), rows(2))


def test_the_command_compresses_a_folder_with_texts(tmp_path, capsys):
    net = decoder(num_hidden_layers=1)
    net.export(tmp_path / "folder")
    np.save(tmp_path / "ids.npy", rows(16))
    output = tmp_path / "small.h5"
    words = ["model", str(tmp_path / "folder"), "--texts", str(tmp_path / "ids.npy")]
    words += ["--bits", "2", "--include", "*.up_proj", "--quiet", "--json"]
    assert main([*words, "-o", str(output)]) == 0
    assert json.loads(capsys.readouterr().out)["file_bytes"] == output.stat().st_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "ids.npy", "small.h5"]
    small = networks.load(output)
    direct = networks.compress(net, rows(16), bits=2, effort="fast", include=["*.up_proj"])
    assert stored_rate(small) <= 2
    assert np.allclose(small.logits(rows(2)), direct.logits(rows(2)), atol=1e-3)


def test_the_study_of_a_language_model_runs_and_goes_on(tmp_path, monkeypatch, capsys):
    def run():
        monkeypatch.setattr(sys, "argv", ["study", "--smoke", "--json", "--folder", str(tmp_path)])
        assert study_language.main() == 0
        return capsys.readouterr().out

    first = run()
    monkeypatch.setattr(networks, "compress", None)  # everything is kept
    assert run() == first
    dense, *rest = json.loads(first)
    assert dense["divergence"] < 1e-9
    divergence = {(row["method"], row["stage"]): row["divergence"] for row in rest}
    assert len(divergence) == 6
    assert divergence["diba", "activations"] < divergence["diba", "weights"]
    assert all(row["bits"] <= 2.0 and row["perplexity"] > 1 for row in rest)


def test_a_teacher_prepares_what_it_would_find_batch_by_batch(dense, tmp_path):
    data = calibration(dense, rows(9), tokens=36)
    one, other = Teacher(dense, tmp_path / "one"), Teacher(dense, tmp_path / "other")
    one.prepare(data, data.places)
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == [f"{i}.npy" for i in range(9)]
    held = set(dense.layers.held())
    for places in data.places:
        inputs, mask = data.read(places)
        found, aim = (teacher.states(places, inputs, mask) for teacher in (one, other))
        assert list(found) == list(aim) == one.places
        assert all(np.array_equal(found[place], aim[place]) for place in found)
    assert set(dense.layers.held()) >= held


def test_released_layers_are_read_again():
    net = decoder()
    ids = rows(2)
    before = net.logits(ids)
    mine = decoder()
    with mine.released():
        assert np.array_equal(mine.logits(ids), before)
        assert mine.layers.held()
    assert not mine.layers.held()
    assert np.array_equal(mine.logits(ids), before)


def test_a_process_that_does_not_see_the_folder_says_so(dense, tmp_path):
    kept = KeptImportance(tmp_path / "kept", ["a", "b"])
    with pytest.raises(FileNotFoundError, match="needs a folder that its processes see"):
        kept.outputs("a")
    assert kept.outputs("c") is None
    kept.finish()
    assert kept.outputs("a") is None  # never called


@pytest.mark.parametrize("feedback", [True, False])
def test_an_executor_gives_what_one_process_gives(shallow, tmp_path, feedback):
    how = {"bits": 2.0, "method": "gptq", "epochs": 0, "feedback": feedback}
    one = networks.compress(shallow, rows(12), **how)
    with ThreadPoolExecutor(2) as pool:
        other = networks.compress(shallow, rows(12), executor=pool, folder=tmp_path, **how)
        with pytest.raises(ValueError, match="needs a folder="):
            networks.compress(shallow, rows(12), executor=pool, **how)
        with pytest.raises(ValueError, match="takes the place of jobs="):
            networks.compress(shallow, rows(12), executor=pool, folder=tmp_path, jobs=2, **how)
    assert same(one, other)
