"""QSWD: its projection, its special cases, its bits."""

import itertools

import naive
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diba_np.kernels.pursuit import descend_grid, pursue_columns
from diba_np.methods.fitting import check_problem
from diba_np.methods.qswd import QSWD
from diba_np.methods.qswd_fit import (
    Setting,
    choose_setting,
    cut,
    next_bits,
    project_columns,
    settings,
)


def brute_force_projection(z, s, scale, max_code):
    """Least squared distance to {at most s nonzeros} and the grid, by trying everything."""
    best = np.inf
    grid = scale * np.arange(-max_code, max_code + 1)
    for point in itertools.product(grid, repeat=len(z)):
        if np.count_nonzero(point) <= s:
            best = min(best, float(np.sum((z - np.array(point)) ** 2)))
    return best


@given(
    st.lists(st.floats(-4, 4), min_size=1, max_size=4),
    st.integers(1, 4),
    st.floats(0.1, 2.0),
    st.integers(1, 2),
)
def test_projection_equals_brute_force(z, s, scale, max_code):
    z = np.array(z)
    projected = project_columns(z[:, None], s, scale, max_code)[:, 0]
    assert np.count_nonzero(projected) <= s
    codes = projected / scale
    assert np.allclose(codes, np.rint(codes)) and np.abs(codes).max() <= max_code + 1e-9
    assert np.isclose(
        np.sum((z - projected) ** 2), brute_force_projection(z, s, scale, max_code), atol=1e-9
    )


def low_rank(rng, shape=(40, 30)):
    decay = np.diag(1.0 / np.arange(1, 31))
    return rng.standard_normal((shape[0], 30)) @ decay @ rng.standard_normal((30, shape[1]))


def test_full_support_and_16_bits_is_the_truncated_svd(rng):
    A = low_rank(rng)
    rank = 6
    made = QSWD.fit(A, 32, setting=(40, rank, rank, 16, 16))
    s = np.linalg.svd(A, compute_uv=False)
    lost = np.sum((A - made.to_dense().astype(float)) ** 2)
    assert np.isclose(lost, np.sum(s[rank:] ** 2), rtol=1e-4)


def test_one_nonzero_of_value_one_is_a_fixed_point_of_k_means(rng):
    A = rng.standard_normal((4, 400)) + 4 * rng.integers(0, 3, 400)
    made = QSWD.fit(A, 64, setting=(4, 9, 1, 16, 0), sweeps=200)
    assert (made.values == 1).all()
    C = made._dictionary().astype(float).T * made.scale
    V = cut(A, 4)
    label = made.sets[:, 0]
    distance = ((V[:, None, :] - C[None]) ** 2).sum(axis=2)
    chosen = distance[np.arange(400), label]
    # every column at its nearest centroid, every centroid at the mean of its columns
    assert (chosen <= distance.min(axis=1) * (1 + 1e-3) + 1e-4).all()
    for j in np.unique(label):
        np.testing.assert_allclose(C[j], V[label == j].mean(axis=0), atol=2e-3)


@pytest.mark.parametrize(("bits", "least"), [(2.0, 5.7), (4.0, 9.6)])
def test_figures_on_the_attention_matrix(bits, least, attention):
    made = QSWD.fit(attention, bits, sweeps=3)
    assert made.bits_per_weight <= bits
    assert made.snr(attention) > least + 3


def test_slot_search_is_exact_for_one_slot_and_never_rises(rng):
    C = rng.standard_normal((5, 12))
    V = rng.standard_normal((30, 5))
    G, B = (C.T @ C).astype(np.float32), (V @ C).astype(np.float32)
    for max_value in (0, 1, 3):
        sets, values = np.zeros((30, 1), np.int64), np.zeros((30, 1), np.int64)
        pursue_columns(G, B.copy(), max_value, 1, True, sets, values)
        allowed = [1] if max_value == 0 else [v for v in range(-max_value, max_value + 1) if v]
        for t in range(30):
            best = min(np.sum((V[t] - q * C[:, j]) ** 2) for j in range(12) for q in allowed)
            assert np.isclose(np.sum((V[t] - values[t, 0] * C[:, sets[t, 0]]) ** 2), best)
    sets, values = np.zeros((30, 3), np.int64), np.zeros((30, 3), np.int64)
    errors = []
    for turn in range(4):
        pursue_columns(G, B.copy(), 2, 1, turn == 0, sets, values)
        assert all(len(set(row)) == 3 for row in sets.tolist())
        Z = np.zeros((30, 12))
        np.put_along_axis(Z, sets, values, axis=1)
        errors.append(np.sum((V - Z @ C.T) ** 2))
    assert (np.diff(errors) <= 1e-9).all()


def test_grid_descent_ends_where_no_single_entry_improves(rng):
    M = rng.standard_normal((8, 5))
    G = M.T @ M
    target = rng.standard_normal((6, 8))
    steps = np.array([0.3, 0.2, 0.5, 0.25, 0.4])
    codes = np.zeros((6, 5), np.int64)
    descend_grid(G, np.ascontiguousarray(target @ M), steps, 3, 100, codes)

    def loss(c):
        return np.sum((target - (c * steps) @ M.T) ** 2, axis=1)

    now = loss(codes)
    for j in range(5):
        for value in range(-3, 4):
            other = codes.copy()
            other[:, j] = value
            assert (loss(other) >= now - 1e-9).all()


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(0, 4),
)
def test_counted_bits_are_the_streams_bytes(m, n, d, r, s, z_bits):
    d, s = min(d, m), min(s, r)
    st_ = Setting((m, n), d, r, s, 5, z_bits)
    A = np.random.default_rng(m * n).standard_normal((m, n))
    made = QSWD.fit(A, st_.bits() / A.size + 1e-6, setting=(d, r, s, 5, z_bits), sweeps=2)
    assert made.storage_bits() == st_.bits()
    again = QSWD.from_datasets(
        {"m": m, "n": n, "scale": made.scale, **made.to_datasets()[0]}, made.to_datasets()[1]
    )
    np.testing.assert_array_equal(again.to_dense(), made.to_dense())


def test_every_setting_offered_fits(rng):
    A = rng.standard_normal((64, 48))
    for bits in (0.3, 1, 2.5, 6):
        problem = check_problem(A, bits)
        offered = [item for row in settings(A.shape, problem.budget) for item in row]
        assert offered and all(item.bits() <= problem.budget for item in offered)
    problem = check_problem(A[:24], 1.0)
    assert choose_setting(problem).bits() <= problem.budget


def test_a_setting_over_the_budget_is_refused():
    with pytest.raises(ValueError, match="setting must fit 64 bits"):
        QSWD.fit(np.eye(8), 1, setting=(8, 8, 8, 8, 8))


@pytest.mark.parametrize(
    "setting",
    [(4, 9, 1, 1, 0), (4, 9, 1, 17, 0), (4, 9, 10, 8, 0), (0, 9, 1, 8, 0), (4, 9, 1, 8, 17)],
)
def test_a_setting_that_no_file_can_hold_is_refused(setting):
    with pytest.raises(ValueError, match=r"setting \(d, r, s, c_bits, z_bits\) must have .* got"):
        QSWD.fit(np.eye(8), 32, setting=setting)


def test_better_than_the_svd_on_noise(rng):
    A = rng.standard_normal((96, 96))
    made = QSWD.fit(A, 2)
    assert made.snr(A) > 7.0


@pytest.mark.parametrize("shape", [(8, 8), (3, 40), (1, 1)])
def test_next_bits_are_the_least_that_fit(shape):
    fits = [any(settings(shape, budget)) for budget in range(200)]
    refused = [budget for budget in range(150) if not fits[budget]]
    assert refused[-1] > fits.index(True)  # there are gaps
    for budget in refused:
        assert next_bits(shape, budget) == budget + fits[budget:].index(True)


# -- kernels against the plain forms ---------------------------------------------------------------


@pytest.mark.parametrize(("max_value", "r"), [(0, 7), (2, 7), (1, 65), (2, 64), (0, 63)])
def test_slot_search_equals_the_plain_one(max_value, r, rng):
    C = rng.standard_normal((5, r))
    V = rng.standard_normal((6, 5))
    G, B = (C.T @ C).astype(np.float32), (V @ C).astype(np.float32)
    sets = np.array([rng.choice(r, 3, replace=False) for _ in range(6)])
    values = np.ones((6, 3), np.int64)
    if max_value:
        values = rng.choice([-max_value, -1, 1, max_value], (6, 3))
    plain = naive.pursue_columns(G, B, max_value, 3, sets, values)
    pursue_columns(G, B.copy(), max_value, 3, False, sets, values)
    np.testing.assert_array_equal(sets, plain[0])
    np.testing.assert_array_equal(values, plain[1])


def test_grid_descent_equals_the_plain_one(rng):
    M = rng.standard_normal((8, 5))
    G, B = M.T @ M, rng.standard_normal((6, 8)) @ M
    steps = np.array([0.3, 0.2, 0.5, 0.25, 0.4])
    codes = rng.integers(-2, 3, (6, 5))
    plain = naive.descend_grid(G, B, steps, 2, 4, codes)
    descend_grid(G, B.copy(), steps, 2, 4, codes)
    np.testing.assert_array_equal(codes, plain)
