"""MESA: the paper's vectors, its coding, blocks fitted to a matrix."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from diba_np.methods.deep_compression import DeepCompression, HuffmanCoded
from diba_np.methods.fitting import check_problem, gram
from diba_np.methods.mesa import (
    MESA,
    block_layout,
    cyclic_decode,
    cyclic_delta,
    stride_order,
)
from diba_np.methods.mesa_layer import SortedEntries, fit_blocks, kmeans, nearest


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
    order = stride_order(count, width)
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


@pytest.mark.parametrize("coder", ["auto", "huffman"])
@pytest.mark.parametrize("bits", [1.0, 3.0])
def test_pruning_spends_its_budget_on_entries_near_their_centroids(coder, bits, rng):
    A = rng.standard_t(2, size=(48, 64))
    A[rng.random(A.shape) < 0.5] = 0
    made = DeepCompression.fit(A, bits, coder=coder)
    assert 0.9 * bits < made.bits_per_weight <= bits
    kept = np.zeros(A.size, bool)
    kept[made.positions] = True
    flat = np.abs(A.ravel())
    assert flat[kept].min() >= flat[~kept].max() > 0 or not (flat[~kept] > 0).any()
    assert flat[kept].min() > 0  # zeros are left out
    assert np.isin(np.arange(len(made.centroids)), made.codes).all()  # none without a member
    error = np.abs(A.ravel()[made.positions, None] - made.centroids.astype(float) * made.scale)
    own = np.take_along_axis(error, made.codes[:, None], axis=1)[:, 0]
    assert np.square(own).sum() <= 1.2 * np.square(error.min(axis=1)).sum()


def test_rare_entries_have_centroids_of_their_own(rng):
    sparse = rng.standard_normal((64, 64)) * (rng.random((64, 64)) < 0.05)
    assert DeepCompression.fit(sparse, 2.0).snr(sparse) > 45
    tails = rng.standard_t(2, size=(64, 64))
    assert DeepCompression.fit(tails, 4.0).snr(tails) > 22


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_a_matrix_of_one_value_is_one_centroid(value):
    A = np.full((16, 16), value)
    made = DeepCompression.fit(A, 2.0)
    np.testing.assert_allclose(made.to_dense(), A, rtol=1e-3)


def test_kmeans_is_a_fixed_point(rng):
    values = np.concatenate([rng.standard_normal(300) * 0.1 + c for c in (-2, 0, 3)])
    centroids = kmeans(values, 8, rounds=500)
    label = nearest(values, centroids)
    assert (np.diff(centroids) >= 0).all()
    for j in np.unique(label):
        assert np.isclose(values[label == j].mean(), centroids[j], atol=1e-6)
    np.testing.assert_array_equal(label, np.argmin(np.abs(values[:, None] - centroids), axis=1))


@given(
    arrays(np.float64, array_shapes(max_dims=3, max_side=9), elements=st.integers(-8, 8)),
    arrays(np.float64, st.integers(1, 9), elements=st.integers(-8, 8)),
)
def test_the_nearest_of_sorted_entries_is_the_nearest(values, centroids):
    """Also in the middle between two centroids, and of centroids that are the same."""
    centroids.sort()
    found = SortedEntries(values).nearest(centroids)
    assert np.array_equal(found, nearest(values, centroids)) and found.dtype == np.int64


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
