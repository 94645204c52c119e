"""Scalar codes and the SVD against what theory and plain formulas say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diba_np.methods.gptq import GPTQ
from diba_np.methods.rounding import NormalFloat, SignRows, UniformRounding
from diba_np.methods.scalar import (
    fit_scales,
    group_index,
    group_starts,
    layout_bits,
    layouts,
    nearest_codes,
    normal_values,
    uniform_values,
)
from diba_np.methods.svd import TruncatedSVD


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"levels": 512}, "levels must be at most 256, got 512"),
        ({"levels": 1}, "levels must be at least 2, got 1"),
        ({"group": -16}, "group must be at least 0, got -16"),
        ({"group": 24}, r"group must be below the 24 columns \(0 for the row\), got 24"),
    ],
)
@pytest.mark.parametrize("method", [UniformRounding, NormalFloat, GPTQ])
def test_grids_and_groups_that_are_none(method, wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        method.fit(np.ones((8, 24)), 10, **wrong)


@pytest.fixture(scope="module")
def gauss():
    return np.random.default_rng(0).standard_normal((128, 512))


def test_known_figures_on_gaussian_matrices(gauss):
    assert abs(SignRows.fit(gauss, 1.1).snr(gauss) - 4.40) < 0.05
    made = NormalFloat.fit(gauss, 2.04, levels=4, group=0)
    assert abs(made.snr(gauss) - 9.30) < 0.1
    ternary = UniformRounding.fit(gauss, 1.7, levels=3, group=0)
    assert abs(ternary.snr(gauss) - 7.2) < 0.15
    assert ternary.bits_per_weight < 1.64
    for levels, bits, expected in ((8, 3.1, 14.3), (16, 4.1, 19.4)):
        assert (
            abs(UniformRounding.fit(gauss, bits, levels=levels, group=0).snr(gauss) - expected)
            < 0.4
        )


@pytest.mark.parametrize(("n", "group"), [(7, 3), (6, 3), (5, 0), (0, 0), (0, 4)])
def test_groups_start_where_the_index_moves_on(n, group):
    starts, index = group_starts(n, group), group_index(n, group)
    assert len(index) == n
    np.testing.assert_array_equal(starts, np.unique(index, return_index=True)[1])


def test_sign_is_the_plain_formula(rng):
    A = rng.standard_normal((9, 33))
    expected = np.where(A >= 0, 1, -1) * np.abs(A).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(SignRows.fit(A, 3).to_dense(), expected, rtol=1e-3)


def test_the_weakest_columns_go_first(rng):
    A = rng.standard_normal((40, 30)) * np.linspace(0.1, 3, 30)
    made = SignRows.fit(A, 1.0)
    assert 0 < made.kept.sum() < 30
    energy = np.sum(A**2, axis=0)
    assert energy[made.kept].min() > energy[~made.kept].max()


@given(st.integers(2, 64))
def test_tables_are_sorted_and_reach_one(levels):
    for values in (uniform_values(levels), normal_values(levels)):
        assert len(values) == levels and (np.diff(values) > 0).all()
    assert np.isclose(np.abs(normal_values(levels)).max(), 1.0)
    if levels > 3:
        assert np.min(np.abs(normal_values(levels))) < 1e-12


def test_nearest_codes_are_nearest(rng):
    table = np.sort(rng.standard_normal(7))
    W = rng.standard_normal((5, 6))
    chosen = table[nearest_codes(W, table)]
    assert np.allclose(np.abs(W - chosen), np.abs(W[..., None] - table).min(axis=-1))


@pytest.mark.parametrize("group", [0, 4, 5])
def test_scales_are_as_good_as_a_fine_search(group, rng):
    W = rng.standard_normal((6, 13))
    table = uniform_values(5)
    scales = fit_scales(W, table, group)
    starts = np.arange(0, 13, group or 13)
    for g, start in enumerate(starts):
        part = W[:, start : start + (group or 13)]
        for i, row in enumerate(part):
            fine = np.linspace(1e-2, 4, 400)
            losses = [np.sum((row - s * table[nearest_codes(row / s, table)]) ** 2) for s in fine]
            s = float(scales[i, g])
            ours = np.sum((row - s * table[nearest_codes(row / s, table)]) ** 2)
            assert ours <= min(losses) * 1.35 + 0.02


@given(st.integers(1, 60), st.integers(1, 60), st.floats(0.2, 9))
def test_layouts_fit(m, n, bits):
    budget = int(bits * m * n)
    for levels, group, kept in layouts((m, n), budget):
        assert 1 <= kept <= n and layout_bits((m, n), levels, group, kept) <= budget


def test_svd_width_16_is_the_truncated_svd(rng):
    A = rng.standard_normal((60, 50)) @ np.diag(1.0 / np.arange(1, 51))
    made = TruncatedSVD.fit(A, 6.0, width=16)
    rank = int(6.0 * A.size) // (16 * 110)
    s = np.linalg.svd(A, compute_uv=False)
    assert made.record["rank"] == rank
    assert np.isclose(np.sum((A - made.to_dense()) ** 2), np.sum(s[rank:] ** 2), rtol=1e-3)
    assert TruncatedSVD.fit(A, 6.0).snr(A) >= made.snr(A)
    with pytest.raises(ValueError, match="width must be 8, 16 or None, got 4"):
        TruncatedSVD.fit(A, 6.0, width=4)
