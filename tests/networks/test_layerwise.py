"""Layer by layer: feedback pays, moments are exact, masks and resuming hold."""

import functools
import os
import tracemalloc

import numpy as np
import pytest

import diba_np as dn
from diba_np.layers.linear import DiBALinear
from diba_np.matrix.quality import decibels
from diba_np.methods import fit as fit_baseline
from diba_np.methods.random_bits import random_factors
from diba_np.models.executors import Runner
from diba_np.networks.capture import capture
from diba_np.networks.layerwise import Layerwise, compress_layers
from diba_np.training.moments import LinearMoments, TargetMoments, moments

SIZES = (24, 64, 64, 48, 48)


class Network:
    """Four layers with ReLU between them, as stages; two layers of one stage share their input."""

    def __init__(self, rng, depth=4):
        self.weights, self.biases = {}, {}
        for i in range(depth):
            shape = (SIZES[i + 1], SIZES[i])
            self.weights[f"l{i}"] = rng.normal(size=shape) / np.sqrt(shape[1])
            self.biases[f"l{i}"] = 0.1 * rng.normal(size=shape[0])
        self.stages = [self.stage(i) for i in range(depth)]

    def stage(self, i):
        return lambda x, linear: np.maximum(linear(f"l{i}", x), 0)

    def run(self, x, layers):
        for i in range(len(self.stages)):
            x = np.maximum(layers[f"l{i}"](x), 0)
        return x

    def dense(self, x):
        for i in range(len(self.stages)):
            x = np.maximum(x @ self.weights[f"l{i}"].T + self.biases[f"l{i}"], 0)
        return x


@pytest.fixture
def data(rng):
    mixing = rng.normal(size=(24, 24)) / np.arange(1, 25)[:, None] ** 0.5
    return rng.normal(size=(12, 50, 24)) @ mixing


def quick(name, A, gram, **options):
    return dn.factorize(A, bits=3, gram=gram, max_sweeps=30, effort="fast", **options)


@pytest.mark.filterwarnings("ignore:the auto solver was ended:UserWarning")
@pytest.mark.filterwarnings("ignore::diba_np.ConvergenceWarning")
class TestCompress:
    def error(self, net, data, layers):
        return np.sum((net.run(data, layers) - net.dense(data)) ** 2)

    def test_it_beats_the_same_fits_without_feedback(self, rng, data):
        net = Network(rng)
        made = compress_layers(net.stages, net.weights, list(data), quick, biases=net.biases)
        assert isinstance(made, Layerwise)
        assert list(made.layers) == list(net.weights)
        captured = capture(net_of(net), net.weights, list(data), biases=net.biases)
        alone = {
            name: DiBALinear(quick(name, A, captured[name].gram), bias=net.biases[name])
            for name, A in net.weights.items()
        }
        assert self.error(net, data, made.layers) < 0.8 * self.error(net, data, alone)
        for told in made.report:
            assert told["bits_per_weight"] <= 3
            assert told["output_snr_db"] > 3
            assert told["seconds"] >= 0
        assert made.report[0]["input_snr_db"] is None
        assert made.report[1]["input_snr_db"] > 3

    @pytest.mark.parametrize("scale", [0.0, 1.0])
    def test_inputs_that_are_all_the_same_tell_nothing_of_the_weights(self, rng, scale):
        """About their mean they are rounding alone: a text of one token, a constant image."""
        net = Network(rng, 2)
        same = np.tile(scale * rng.normal(size=24).astype(np.float32), (2, 7, 1))
        targets = {}

        def fit(name, A, gram):
            targets[name] = A, gram
            return quick(name, A, gram)

        made = compress_layers(net.stages, net.weights, list(same), fit, biases=net.biases)
        for name, (A, gram) in targets.items():
            assert np.array_equal(A, net.weights[name])
            assert np.array_equal(gram, np.eye(len(gram)))
        assert self.error(net, same[0], made.layers) < 1e-4  # by the biases

    def test_output_snr_is_that_of_the_batches_held_out(self, rng, data):
        net = Network(rng, depth=2)
        made = compress_layers(
            net.stages, net.weights, list(data), quick, biases=net.biases, hold_out=1 / 3
        )
        held = data[2::3].reshape(-1, 24)
        z = np.maximum(made.layers["l0"](held), 0)
        x = np.maximum(held @ net.weights["l0"].T + net.biases["l0"], 0)
        y = x @ net.weights["l1"].T
        noise = made.layers["l1"](z) - y - net.biases["l1"]
        expected = 10 * np.log10(np.sum(y**2) / np.sum(noise**2))
        assert made.report[1]["output_snr_db"] == pytest.approx(expected, abs=0.02)

    @pytest.mark.parametrize("label", ["rtn", "sign", "random"])
    def test_the_baselines_go_the_same_way(self, rng, data, label):
        net = Network(rng, depth=2)

        def fit(name, A, gram):
            if label == "random":
                return random_factors(A, bits=3, gram=gram)
            return fit_baseline(label, A, 3)

        made, plain = (
            compress_layers(
                net.stages, net.weights, list(data), fit, biases=net.biases, refit=refit
            )
            for refit in (True, False)
        )
        errors = [self.error(net, data, one.layers) for one in (made, plain)]
        assert errors[0] < errors[1]
        if label == "random":
            ours = compress_layers(net.stages, net.weights, list(data), quick, biases=net.biases)
            assert self.error(net, data, ours.layers) < 0.8 * errors[0]

    def test_the_dense_network_is_run_once_for_several_budgets(self, rng, data, tmp_path):
        net, ran = Network(rng, depth=2), []

        def watched(stage):
            def run(state, linear):
                ran.append(linear.__qualname__.startswith("dense_linear"))
                return stage(state, linear)

            return run

        def compressed(batches, **options):
            ran.clear()
            stages = [watched(stage) for stage in net.stages]
            return compress_layers(
                stages, net.weights, batches, quick, biases=net.biases, **options
            )

        alone = compressed(list(data))
        usual = sum(ran)
        for more in (0, (len(net.stages) - 1) * (len(data) - 2)):
            made = compressed(list(data), dense_states=tmp_path)
            assert sum(ran) == usual - more
            assert [told["snr_db"] for told in made.report] == [
                told["snr_db"] for told in alone.report
            ]
        for others in (list(data[::-1]), list(data[:, :40]), list(data[1:])):
            with pytest.raises(ValueError, match="dense_states must be of this network and these"):
                compressed(others, dense_states=tmp_path)

    def test_an_ended_run_goes_on_where_it_was(self, rng, data, tmp_path):
        net = Network(rng, depth=3)
        calls = []

        def fit(name, A, gram):
            calls.append(name)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return quick(name, A, gram) if name != "l1" else fit_baseline("rtn", A, 3)

        options = {"biases": net.biases, "folder": tmp_path / "parts"}
        with pytest.raises(KeyboardInterrupt):
            compress_layers(net.stages, net.weights, list(data), fit, **options)
        made = compress_layers(net.stages, net.weights, list(data), fit, **options)
        assert calls == ["l0", "l1", "l2", "l2"]
        calls[:] = ["", "", ""]
        whole = compress_layers(net.stages, net.weights, list(data), fit, biases=net.biases)
        np.testing.assert_array_equal(net.run(data, made.layers), net.run(data, whole.layers))
        untimed = [[{**r, "seconds": 0} for r in one.report] for one in (made, whole)]
        assert untimed[0] == untimed[1]
        told = []
        options["callback"] = lambda report: told.append(report["name"])
        never = [None] * 3  # stages that a run which is whole does not pass through
        again = compress_layers(never, net.weights, list(data), fit, **options)
        assert told == list(again.layers) == list(made.layers)
        assert again.report == made.report
        np.testing.assert_array_equal(net.run(data, again.layers), net.run(data, made.layers))
        other = {name: 2 * A for name, A in net.weights.items()}
        with pytest.raises(ValueError, match=r"folder must belong to these weights.*another 'l0'"):
            compress_layers(net.stages, other, list(data), fit, **options)

    def test_masked_rows_count_for_nothing_and_states_may_be_structured(self, rng, data):
        weights = {"q": rng.normal(size=(24, 24)), "v": rng.normal(size=(24, 24))}
        seen = []

        def first(batch, linear):
            x, keep = batch
            seen.append(x)
            y = linear("q", x, keep=keep) + linear("v", x, keep=keep)
            return {"y": y, "keep": keep}

        def second(state, linear):
            assert set(state) == {"y", "keep"}
            return linear("o", state["y"], state["keep"])

        weights["o"] = rng.normal(size=(16, 24))
        keep = rng.random((12, 50)) < 0.7
        junk = np.where(keep[..., None], data, 1e3 * rng.normal(size=data.shape))
        told = [
            compress_layers(
                [first, second], weights, [(x, k) for x, k in zip(xs, keep, strict=True)], quick
            )
            for xs in (junk, np.where(keep[..., None], data, 0))
        ]
        for a, b in zip(*(one.report for one in told), strict=True):
            assert a["output_snr_db"] == pytest.approx(b["output_snr_db"], abs=1e-3)
        # count, groups, one pass for q and v in both networks, and on to the next stage
        assert len(seen) == 2 * (1 + 2 * 12 + 2 * 12)
        assert not told[0].layers["q"].parameters["bias"].any()

    def test_a_layer_makes_good_what_its_residual_branch_lost(self, rng, data):
        weights = {f"l{i}": rng.normal(size=(24, 24)) / 5 for i in range(4)}
        biases = {name: 0.1 * rng.normal(size=24) for name in weights}

        def stages(told):
            def stage(i):
                def run(x, linear):
                    h = np.tanh(x)
                    return linear(f"l{i}", h, added=x) if told else linear(f"l{i}", h) + x

                return run

            return [stage(i) for i in range(4)]

        errors = []
        for told in (True, False):
            made = compress_layers(stages(told), weights, list(data), quick, biases=biases)
            x = z = data
            for name, layer in made.layers.items():
                x = x + np.tanh(x) @ weights[name].T + biases[name]
                z = z + layer(np.tanh(z))
            errors.append(np.sum((x - z) ** 2))
        assert errors[0] < 0.9 * errors[1]

    def test_rows_count_as_much_as_their_weights(self, rng):
        A = {"l": rng.normal(size=(16, 24))}
        data = rng.normal(size=(12, 250, 24))  # enough rows that their number does not matter
        w = rng.integers(0, 3, (12, 250)).astype(float)
        repeated = [
            (x.repeat(k.astype(int), axis=0), np.ones(int(k.sum())))
            for x, k in zip(data, w, strict=True)
        ]
        seen = []

        def fit(name, target, gram):
            seen.append((target, gram))
            return quick(name, target, gram)

        made = [
            compress_layers(
                [lambda state, linear: linear("l", state[0], keep=state[1])], A, batches, fit
            )
            for batches in (list(zip(data, w, strict=True)), repeated)
        ]
        for one, other in zip(*seen, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9)
        told = [one.report[0]["output_snr_db"] for one in made]
        assert told[0] == pytest.approx(told[1], abs=0.01)

    @pytest.mark.parametrize(
        ("keep", "added", "words"),
        [
            (np.ones(3), None, r"keep must have shape \(50,\), got \(3,\)"),
            (-np.ones(50), None, "keep must be a mask, or finite weights"),
            (None, np.ones((3, 64)), r"added must have shape \(50, 64\), got \(3, 64\)"),
        ],
    )
    def test_bad_arguments_of_a_call(self, rng, data, keep, added, words):
        net = Network(rng, depth=1)
        stages = [lambda x, linear: linear("l0", x, keep=keep, added=added)]
        with pytest.raises(ValueError, match=words):
            compress_layers(stages, net.weights, list(data), quick)

    @pytest.mark.parametrize(
        ("changed", "error", "words"),
        [
            ({"batches": iter([])}, TypeError, "batches must be iterable again"),
            ({"batches": []}, ValueError, "at least one batch, got none"),
            ({"weights": {}}, KeyError, "weights has no 'l0', which a stage calls"),
            ({"biases": {"l9": np.ones(3)}}, KeyError, "biases has 'l9'"),
            ({"biases": {"l0": np.ones(3)}}, ValueError, r"must have shape \(64,\), got \(3,\)"),
            ({"hold_out": 1.0}, ValueError, r"hold_out must lie in \[0, 1\), got 1"),
            ({"ridge": 0.0}, ValueError, "ridge must be"),
            ({"fit": lambda *_: np.ones((64, 24))}, TypeError, "what fit returns must be a matrix"),
            ({"fit": lambda n, A, H: quick(n, A[1:], H)}, ValueError, "fit must return shape"),
            ({"batches": [np.ones((3, 5))]}, ValueError, "'l0' reads 24 channels"),
        ],
    )
    def test_bad_arguments(self, rng, data, changed, error, words):
        net = Network(rng, depth=1)
        good = {
            "stages": net.stages, "weights": net.weights, "batches": list(data), "fit": quick
        }  # fmt: skip
        with pytest.raises(error, match=words):
            compress_layers(**(good | changed))

    def test_a_layer_that_is_called_twice_is_refused(self, rng, data):
        net = Network(rng, depth=1)
        twice = [lambda x, linear: linear("l0", x) + linear("l0", 2 * x)]
        with pytest.raises(ValueError, match="called once, 'l0' is called again"):
            compress_layers(twice, net.weights, list(data), quick)


def net_of(net):
    def forward(x, linear):
        for stage in net.stages:
            x = stage(x, linear)
        return x

    return forward


@pytest.mark.parametrize("weighted", [False, True])
def test_moments_are_those_of_the_samples(rng, weighted):
    z, t = rng.normal(size=(40, 5)) + 1, rng.normal(size=(40, 3)) - 2
    A_hat, bias = rng.normal(size=(3, 5)), rng.normal(size=3)
    w = rng.random(40) if weighted else np.ones(40)
    sums = TargetMoments(3, 5)
    for part in (slice(0, 13), slice(13, 40)):
        sums.add(z[part], t[part], w[part] if weighted else None)
    noise = sums.noise(A_hat, bias)
    assert noise == pytest.approx(w @ np.sum((t - z @ A_hat.T - bias) ** 2, axis=1))
    root = np.sqrt(w / w.mean())[:, None]
    for centred in (False, True):
        means = (w @ z / w.sum(), w @ t / w.sum()) if centred else (0.0, 0.0)
        plain = moments([((z - means[0]) * root, (t - means[1]) * root)], False, np.zeros(3))
        told = sums.moments(centred)
        for name in ("xx", "yx", "yy"):
            np.testing.assert_allclose(getattr(told, name), getattr(plain, name), atol=1e-12)
        np.testing.assert_allclose(told.x_mean, means[0], atol=1e-12)
        np.testing.assert_allclose(told.y_mean, means[1], atol=1e-12)


@pytest.mark.filterwarnings("ignore::diba_np.ConvergenceWarning")
def test_integers_are_read_as_the_same_floats(rng):
    net = Network(rng, depth=2)
    counts = rng.integers(0, 9, (4, 40, 24))
    reports = [
        compress_layers(net.stages, net.weights, list(counts.astype(kind)), quick).report
        for kind in (np.uint8, np.float32)
    ]
    for told in reports[0] + reports[1]:
        del told["seconds"]
    assert reports[0] == reports[1]
    with pytest.raises(
        TypeError, match="what a layer reads must be real numbers, got dtype complex128"
    ):
        compress_layers(net.stages, net.weights, [counts[0] * 1j], quick)


@pytest.mark.filterwarnings("ignore::diba_np.ConvergenceWarning")
def test_coded_diagonals_stay_coded(rng, data):
    net = Network(rng, depth=1)

    def coded(name, A, gram):
        return quick(name, A, gram, scale_bits=(4, 3, 4))

    for refit in (False, True):
        made = compress_layers(net.stages, net.weights, list(data), coded, refit=refit)
        assert made.report[0]["bits_per_weight"] <= 3
        assert made.layers["l0"].to_factors().scale_bits == (4, 3, 4)


def test_capture_keeps_moments_and_an_even_sample(rng, tmp_path):
    net = Network(rng, depth=2)
    batches = list(rng.normal(size=(7, 30, 24)))
    x = np.concatenate(batches)
    found = capture(net_of(net), net.weights, batches, rows=50, folder=tmp_path, biases=net.biases)
    np.testing.assert_allclose(found["l0"].gram, x.T @ x / 210)
    np.testing.assert_allclose(found["l0"].mean, x.mean(axis=0))
    assert found["l1"].count == 210
    kept = np.load(tmp_path / "l0.npy", mmap_mode="r")
    np.testing.assert_array_equal(kept, found["l0"].inputs)
    where = [int(np.flatnonzero((x.astype(np.float32) == row).all(axis=1))[0]) for row in kept]
    assert len(set(where)) == 50
    assert min(np.bincount(np.array(where) // 70, minlength=3)) > 5
    few = capture(net_of(net), net.weights, batches[:1], rows=50, folder=tmp_path / "few")
    assert few["l0"].inputs.shape == (30, 24)
    np.testing.assert_array_equal(np.load(tmp_path / "few" / "l0.npy"), few["l0"].inputs)

    def masked(x, linear):
        linear("l0", x, keep=np.zeros(len(x), bool))

    with pytest.raises(ValueError, match="'l0' must read at least one row, got none"):
        capture(masked, net.weights, batches)
    with pytest.raises(TypeError, match="rows= needs a folder="):
        capture(net_of(net), net.weights, batches, rows=3)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_moments_of_two_inputs_give_those_of_the_targets(rng, kind, weighted):
    A = rng.normal(size=(7, 5))
    x, z = (rng.normal(size=(40, 5)).astype(kind) for _ in range(2))
    w = rng.uniform(size=40) if weighted else None
    straight, targets, inputs = TargetMoments(7, 5), TargetMoments(7, 5), LinearMoments(5)
    for rows in (slice(0, 15), slice(15, None)):
        some = None if w is None else w[rows]
        straight.add(z[rows], x[rows] @ A.T.astype(kind), some)
        inputs.add(z[rows], x[rows], some)
    squares = inputs.give_to(targets, A)
    near = {"rtol": 1e-4 if kind == np.float32 else 1e-11, "atol": 1e-5}
    for centred in (False, True):
        told, expected = targets.moments(centred), straight.moments(centred)
        for name in ("xx", "yx", "yy", "x_mean", "y_mean"):
            np.testing.assert_allclose(getattr(told, name), getattr(expected, name), **near)
    y = x @ A.T
    weighed = np.ones(40) if w is None else w
    assert squares == pytest.approx(weighed @ np.square(y).sum(axis=1), rel=1e-5)
    A_hat, bias = rng.normal(size=A.shape), rng.normal(size=7)
    noise = weighed @ np.square(y - z @ A_hat.T - bias).sum(axis=1)
    assert targets.noise(A_hat, bias) == pytest.approx(noise, rel=1e-5)
    with pytest.raises(ValueError, match="targets must hold no samples"):
        inputs.give_to(targets, A)


@pytest.mark.parametrize("shape", [(24, 12), (12, 24)])
def test_an_input_that_hardly_changes_spoils_nothing(rng, shape):
    """Squares of it in float32 left no positive Gram matrix, and outputs of other numbers."""
    A = rng.normal(size=shape).astype(np.float32)
    x = rng.normal(size=(6, 100, shape[1])).astype(np.float32)

    def rounded(name, target, gram):
        return fit_baseline("rtn", target, 4.0, inputs=np.linalg.cholesky(gram).T)

    reached = []
    for level in (0.0, 100.3, 3000.7):
        x[..., 5] = level
        stages = [lambda state, linear: linear("a", state)]
        bias = {"a": np.zeros(len(A))}
        layer = compress_layers(stages, {"a": A}, list(x), rounded, biases=bias).layers["a"]
        rows = x.reshape(-1, shape[1]).astype(np.float64)
        exact, A_hat = rows @ A.T.astype(np.float64), layer.to_matrix().to_dense()
        noise = rows @ A_hat.T.astype(np.float64) + layer.parameters["bias"] - exact
        reached.append(decibels(exact.var(axis=0).sum(), np.square(noise).sum(axis=1).mean()))
    assert min(reached) > reached[0] - 0.5


def test_a_fit_has_little_of_wide_inputs_beside_it():
    """Of a layer's moments those that judge it stay, beside the target and the Gram matrix."""
    n = 400
    held = []

    def fit(name, A, gram):
        held.append(tracemalloc.get_traced_memory()[0] / (8 * n * n))
        return random_factors(A, bits=2.31, gram=np.eye(n), seed=0)

    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 20, n)).astype(np.float32)
    stages = [lambda x, linear: np.concatenate([linear("a", x), linear("b", x)], axis=-1)]
    weights = {name: rng.normal(size=(8, n)).astype(np.float32) for name in "ab"}
    tracemalloc.start()
    try:
        compress_layers(stages, weights, x, fit, refit=False)
    finally:
        tracemalloc.stop()
    both, alone = held  # while a is fitted b waits with two Gram matrices
    assert alone < 2.5
    assert both < 4.5


class TestRidges:
    """How far a target goes from the dense weights is chosen on batches that are held out."""

    def run(self, rng, ridge, lost):
        weights = {"l": rng.normal(size=(12, 24))}
        x = rng.normal(size=(16, 10, 24))
        first = [{"x": one, "h": np.zeros((10, 12))} for one in x]
        other = [{"x": one, "h": lost(one, weights["l"])} for one in x]
        made = compress_layers(
            [lambda state, linear: linear("l", state["x"], added=state["h"])],
            weights,
            first,
            lambda name, A, gram: fit_baseline("rtn", A, 12),
            ridge=ridge,
            hold_out=0.25,
            refit=False,
            compressed_batches=other,
        )
        return weights["l"], made.layers["l"].to_matrix().to_dense(), made.report[0]

    def test_noise_of_the_residual_branch_moves_nothing(self, rng):
        def lost(x, A):
            return rng.normal(size=(len(x), len(A)))

        state = rng.bit_generator.state
        A, several, _ = self.run(rng, (0.01, 0.1, 1.0), lost)
        rng.bit_generator.state = state
        _, single, _ = self.run(rng, 0.01, lost)
        assert np.linalg.norm(several - A) < 0.3 * np.linalg.norm(single - A)

    def test_what_can_be_made_good_is(self, rng):
        A, found, told = self.run(rng, (0.01, 0.1, 1.0), lambda x, A: -0.5 * x @ A.T)
        assert np.linalg.norm(found - 1.5 * A) < 0.02 * np.linalg.norm(A)
        assert told["output_snr_db"] > 30

    def test_bad_ridges(self, rng):
        for ridge, message in (((), "at least one"), ((0.1, 0.0), "ridge")):
            with pytest.raises(ValueError, match=message):
                self.run(rng, ridge, lambda x, A: np.zeros((len(x), len(A))))


class TestIndependent:
    """Without feedback layers depend on the dense network alone."""

    def test_each_layer_is_what_it_is_alone(self, rng, data):
        net = Network(rng)
        made = compress_layers(
            net.stages, net.weights, list(data), quick_codes, biases=net.biases, feedback=False
        )
        assert list(made.layers) == list(net.weights)
        assert all(told["input_snr_db"] is None for told in made.report)
        x = list(data)
        for i, stage in enumerate(net.stages):
            alone = compress_layers(
                [stage],
                {f"l{i}": net.weights[f"l{i}"]},
                x,
                quick_codes,
                biases={f"l{i}": net.biases[f"l{i}"]},
            )
            one, other = (m.layers[f"l{i}"].to_matrix().to_dense() for m in (made, alone))
            assert np.allclose(one, other, atol=1e-6)
            A, b = net.weights[f"l{i}"], net.biases[f"l{i}"]
            x = [np.maximum(each @ A.T + b, 0) for each in x]


def quick_codes(name, A, gram):
    return fit_baseline("rtn", A, 3)


def rounded_after_an_end(mark, name, A, gram):
    """Round a matrix; the first process that is asked to is gone before it answers."""
    if not mark.exists():
        mark.touch()
        os._exit(9)
    return fit_baseline("rtn", A, 4.0)


def test_the_fit_of_a_process_that_was_killed_is_made_again(rng, data, tmp_path):
    net, fit = Network(rng, depth=2), functools.partial(rounded_after_an_end, tmp_path / "mark")
    found = []
    for runner in (Runner(2, 1), Runner(1, 1)):  # the second finds the mark
        with runner:
            options = {"biases": net.biases, "feedback": False, "runner": runner}
            made = compress_layers(net.stages, net.weights, list(data), fit, **options)
        found.append({name: layer.to_matrix().to_dense() for name, layer in made.layers.items()})
    for name in net.weights:
        assert np.array_equal(found[0][name], found[1][name])
