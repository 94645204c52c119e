"""MESA: the paper's vectors, its coding, the trainer's gradients, the pipelines."""

import pathlib
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diba_np.methods.deep_compression import DeepCompression, HuffmanCoded
from diba_np.methods.entropy_coding import entropy
from diba_np.methods.fitting import check_problem, gram
from diba_np.methods.mesa import (
    MESA,
    block_layout,
    cyclic_decode,
    cyclic_delta,
    stride_order,
)
from diba_np.methods.mesa_layer import fit_blocks, kmeans, nearest
from diba_np.methods.mesa_training import (
    PIPELINES,
    Outcome,
    block_penalty,
    delta_entropy,
    run_pipeline,
)
from diba_np.methods.mlp import MLP

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "scripts"))

import digits


def test_vector_of_the_cyclic_delta():
    np.testing.assert_array_equal(cyclic_delta(np.array([0, 1]), np.array([7, 1]), 8), [-1, 0])


@given(st.integers(1, 40), st.integers(0, 1000))
def test_cyclic_deltas_are_invertible_and_short(r, seed):
    rng = np.random.default_rng(seed)
    previous, current = rng.integers(0, r, (2, 50))
    delta = cyclic_delta(previous, current, r)
    np.testing.assert_array_equal(cyclic_decode(previous, delta, r), current)
    assert delta.min() >= -(r // 2) and delta.max() < r - r // 2
    unsigned = np.minimum(np.abs(current - previous), r - np.abs(current - previous))
    np.testing.assert_array_equal(np.abs(delta), unsigned)


@pytest.mark.parametrize(
    ("p", "average", "rate"),
    [(0.0625, 1.5, 341), (0.25, 4.2, 30.5), (0.5, 2.3, 27.8), (0.1, 2.3, 139)],
)
def test_vectors_of_the_compression_rate(p, average, rate):
    W = np.zeros((160, 160), np.float32)
    network = MLP((160, 160), np.random.default_rng(0))
    network.weights = [W]
    kept = int(p * W.size)
    made = Outcome("MESA", 1.0, network, [], kept, average * kept)
    assert abs(made.compression - rate) < 0.5
    assert np.isclose(made.compression, 32 / (p * average), rtol=1e-3)


def test_vector_of_the_lenet_5_total():
    network = MLP((800, 500, 10), np.random.default_rng(0))
    made = Outcome("MESA", 1.0, network, [], 40500, 40000 * 2.3 + 500 * 6.7)
    # the paper's sizes: 400,000 and 5,000 weights
    assert abs(32 * 405000 / made.bits - 135.9) < 0.1
    assert abs(made.average_bits - 2.354) < 0.01


def test_block_layout():
    assert block_layout((300, 784), 0.1) == (10, 30, 78)
    assert block_layout((10, 100), 0.2) == (5, 2, 20)
    assert block_layout((4096, 4096), 0.125) == (8, 512, 512)
    assert block_layout((7, 9), 1.0) == (1, 7, 9)
    for p in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"p must lie in \(0, 1\]"):
            block_layout((4, 4), p)
    with pytest.raises(ValueError, match="p must leave blocks"):
        block_layout((4, 4), 0.1)


@given(st.integers(1, 12), st.integers(1, 9))
def test_stride_order_deals_each_column_once(count, width):
    order = stride_order(count * width + 3, count, width)
    assert sorted(order) == list(range(count * width))


@pytest.mark.parametrize("deltas", [True, False])
@pytest.mark.parametrize("order", ["natural", "stride", "stored"])
@pytest.mark.parametrize("coder", ["huffman", "rans", "auto"])
def test_blocks_round_trip(deltas, order, coder, rng, tmp_path):
    if order == "stored":
        order = (rng.permutation(25)[:20], rng.permutation(33)[:24])
    codes = np.cumsum(rng.integers(-1, 2, (4, 5, 6)), axis=0) % 7
    made = MESA(
        (25, 33), codes, np.sort(rng.standard_normal(7)).astype("<f2"), deltas, order, coder
    )
    made.save(tmp_path / "a.h5")
    again = MESA.load(tmp_path / "a.h5")
    np.testing.assert_array_equal(again.blocks, codes)
    np.testing.assert_array_equal(again.to_dense(), made.to_dense())
    assert np.count_nonzero(again.to_dense()) <= codes.size
    x = rng.standard_normal(33)
    np.testing.assert_allclose(again @ x, again.to_dense() @ x, rtol=1e-5, atol=1e-5)


def test_earlier_files_name_the_order_otherwise(rng):
    codes = rng.integers(0, 4, (2, 3, 4))
    made = MESA((6, 8), codes, np.arange(4).astype("<f2"), True, "stride")
    attrs, arrays = made.to_datasets()
    attrs["order"] = attrs.pop("block_order")
    again = MESA.from_datasets({"m": 6, "n": 8, "scale": 1.0, **attrs}, arrays)
    np.testing.assert_array_equal(again.to_dense(), made.to_dense())


@given(
    st.integers(1, 30),
    st.integers(1, 30),
    st.floats(0.0, 1.0),
    st.integers(1, 8),
    st.integers(0, 1000),
)
def test_sparse_weights_round_trip(m, n, density, gap_bits, seed):
    rng = np.random.default_rng(seed)
    positions = np.flatnonzero(rng.random(m * n) < density)
    codes = rng.integers(0, 5, len(positions))
    made = DeepCompression(
        (m, n), positions, codes, np.sort(rng.standard_normal(5)).astype("<f2"), gap_bits
    )
    attrs, arrays = made.to_datasets()
    again = DeepCompression.from_datasets({"m": m, "n": n, "scale": 1.0, **attrs}, arrays)
    np.testing.assert_array_equal(again.positions, positions)
    np.testing.assert_array_equal(again.to_dense(), made.to_dense())


def test_kmeans_is_a_fixed_point(rng):
    values = np.concatenate([rng.standard_normal(300) * 0.1 + c for c in (-2, 0, 3)])
    centroids = kmeans(values, 8, rounds=500)
    label = nearest(values, centroids)
    assert (np.diff(centroids) >= 0).all()
    for j in np.unique(label):
        assert np.isclose(values[label == j].mean(), centroids[j], atol=1e-6)
    np.testing.assert_array_equal(label, np.argmin(np.abs(values[:, None] - centroids), axis=1))


def test_entropy_coding_beats_k_means_at_equal_bits():
    A = np.random.default_rng(0).standard_normal((256, 256))
    made = HuffmanCoded.fit(A, 2.0)
    assert 1.9 < made.bits_per_weight <= 2.0
    assert made.snr(A) > 10.2  # Lloyd-Max without entropy coding: 9.3 dB


# ---- layer mode --------------------------------------------------------------------------
@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_coupled_blocks_solve_their_normal_equations(alpha, count, rng):
    A = rng.standard_normal((8, 12))
    X = rng.standard_normal((60, 12)) @ rng.standard_normal((12, 12))
    problem = check_problem(A, 4, X)
    rows, columns = np.arange(8).reshape(count, -1), np.arange(12).reshape(count, -1)
    blocks, error_of = fit_blocks(problem, rows, columns, count, alpha)
    H = gram(problem.X, 12)
    w = alpha * np.trace(H) / 12 / max(count - 1, 1)

    def objective(B):
        total = 0.0
        for j in range(count):
            E = problem.W[rows[j]].copy()
            E[:, columns[j]] -= B[j]
            total += np.sum((E @ H) * E)
        return total + w * np.sum(np.diff(B, axis=0) ** 2)

    best = objective(blocks)
    for _ in range(20):
        assert objective(blocks + 1e-3 * rng.standard_normal(blocks.shape)) > best
    if alpha == 0:
        other = blocks + rng.standard_normal(blocks.shape)
        assert np.isclose(error_of(other) - error_of(blocks), objective(other) - best)


def test_layer_mode_finds_a_block_diagonal_matrix(rng):
    A = np.zeros((24, 24))
    block = rng.standard_normal((6, 6))
    for j in range(4):
        A[6 * j : 6 * j + 6, 6 * j : 6 * j + 6] = block
    made = MESA.fit(A, 3.0)
    assert made.snr(A) > 15
    assert made.bits_per_weight <= 3.0


@pytest.mark.parametrize(("method", "bits"), [(DeepCompression, 2.0), (MESA, 0.5)])
def test_no_invented_least_budget_is_told(method, bits, rng):
    wanted = rf"bits must be larger for {method.method} on shape \(8, 8\), got {bits}"
    with pytest.raises(ValueError, match=wanted):
        method.fit(rng.standard_normal((8, 8)), bits)


# ---- the trainer ------------------------------------------------------------------------
def test_gradients_equal_central_differences(rng):
    network = MLP((5, 7, 4), rng)
    network.weights = [W.astype(np.float64) for W in network.weights]
    network.biases = [rng.standard_normal(len(b)) for b in network.biases]
    X, y = rng.standard_normal((6, 5)), rng.integers(0, 4, 6)
    _, grad_w, grad_b = network.loss_and_gradients(X, y)
    for parameters, gradients in ((network.weights, grad_w), (network.biases, grad_b)):
        for value, gradient in zip(parameters, gradients, strict=True):
            for at in list(np.ndindex(value.shape))[::3]:
                keep = value[at]
                sides = []
                for step in (1e-6, -1e-6):
                    value[at] = keep + step
                    sides.append(network.loss_and_gradients(X, y)[0])
                value[at] = keep
                assert np.isclose((sides[0] - sides[1]) / 2e-6, gradient[at], atol=1e-6)


def test_penalty_gradient_equals_central_differences(rng):
    weights = [rng.standard_normal((6, 9)), rng.standard_normal((4, 6))]
    orders = [
        (np.arange(6).reshape(3, 2), np.arange(9).reshape(3, 3)),
        (np.arange(4).reshape(2, 2), rng.permutation(6).reshape(2, 3)),
    ]
    value, gradients = block_penalty(weights, orders, 0.7)
    B = [weights[0][2 * j : 2 * j + 2, 3 * j : 3 * j + 3] for j in range(3)]
    C = [weights[1][np.ix_(*(o[j] for o in orders[1]))] for j in range(2)]
    plain = sum(np.sum((B[j + 1] - B[j]) ** 2) for j in range(2)) / 2 + np.sum((C[1] - C[0]) ** 2)
    assert np.isclose(value, 0.7 * plain / 2)
    for W, gradient in zip(weights, gradients, strict=True):
        for at in np.ndindex(W.shape):
            keep = W[at]
            W[at] = keep + 1e-5
            up = block_penalty(weights, orders, 0.7)[0]
            W[at] = keep - 1e-5
            down = block_penalty(weights, orders, 0.7)[0]
            W[at] = keep
            assert np.isclose((up - down) / 2e-5, gradient[at], atol=1e-6)


def test_masks_and_shared_values_hold(rng):
    mask = [rng.random((7, 5)) < 0.5, np.ones((3, 7), bool)]
    network = MLP((5, 7, 3), rng, mask)
    X, y = rng.standard_normal((50, 5)).astype(np.float32), rng.integers(0, 3, 50)
    losses = network.train(X, y, rng, 6, rate=1e-2)
    assert losses[-1] < losses[0]
    assert not network.weights[0][~mask[0]].any()
    share = [np.where(mask[0], rng.integers(1, 4, (7, 5)), 0), rng.integers(1, 5, (3, 7))]
    network.train(X, y, rng, 2, share=share)
    for W, indices in zip(network.weights, share, strict=True):
        for j in np.unique(indices):
            assert len(np.unique(W[indices == j])) == 1
    assert not network.weights[0][~mask[0]].any()


def patterns(count):
    """Ten noisy patterns of 784 pixels: (X_train, y_train, X_test, y_test)."""
    parts = digits.split(digits.drawn_digits(count))
    return (*parts["fit"], *parts["test"])


def test_pipelines_store_what_they_say(tmp_path):
    data = patterns(800)
    outcomes = {
        name: run_pipeline(
            name,
            data,
            sizes=(784, 60, 10),
            p=(0.1, 0.2),
            epochs=2,
            retrain=1,
            alpha=1.0,
            order="stride",
        )
        for name in PIPELINES
    }
    dense = 784 * 60 + 60 * 10
    assert outcomes["FC"].bits == 32 * dense and outcomes["FC"].compression == 1
    for name, made in outcomes.items():
        for index, layer in enumerate(made.layers):
            layer.save(tmp_path / "a.h5")
            np.testing.assert_array_equal(
                type(layer).load(tmp_path / "a.h5").to_dense(), made.network.weights[index]
            )
            if name not in ("MPDC",):
                assert len(np.unique(made.network.weights[index])) <= 2**5 + 1
        assert np.isclose(made.compression, 32 * dense / made.bits)
    assert outcomes["FC+Q+H"].kept == dense
    assert outcomes["MESA"].kept == outcomes["M+Q+H"].kept == outcomes["MPDC"].kept
    assert (
        outcomes["MESA"].bits
        < outcomes["M+Q+H"].bits
        < outcomes["DeepC"].bits
        < outcomes["FC+Q+H"].bits
    )


def test_delta_entropy_falls_as_alpha_grows():
    data = patterns(1200)
    reached = []
    for alpha in (0.0, 0.1, 1.0):
        made = run_pipeline(
            "MESA",
            data,
            sizes=(784, 60, 10),
            p=(0.1, 0.2),
            epochs=6,
            retrain=1,
            alpha=alpha,
            order="stride",
        )
        reached.append(delta_entropy(made.layers[0])[1])
        assert delta_entropy(made.layers[0])[0] == entropy(made.layers[0].blocks)
    assert reached[0] > reached[1] > reached[2]


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"name": "X"}, "name must be one of"),
        ({"p": (0.1,)}, "p must have 3 entries"),
        ({"q": 0}, r"q must lie in \[1, 8\]"),
        ({"order": "random"}, "order must be stride or natural"),
    ],
)
def test_bad_settings_are_named(kwargs, text):
    with pytest.raises(ValueError, match=text):
        run_pipeline(**{"name": "MESA", "data": (None,) * 4, **kwargs})
