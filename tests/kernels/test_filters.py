"""The circular filter, its transpose and the Hadamard transform against their definitions."""

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diba_np.kernels.filters import filter_back, filter_sums
from diba_np.kernels.hadamard import hadamard, rotate_vector


@settings(deadline=None, max_examples=60)
@given(
    bits=st.integers(1, 4),
    V=st.integers(1, 3),
    length=st.integers(1, 5),
    steps=st.one_of(st.integers(1, 9), st.integers(30, 40)),
    columns=st.sampled_from([1, 2, 7, 48, 300]),
    missing=st.integers(0, 2),
    single=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_filters_equal_their_definition(bits, V, length, steps, columns, missing, single, seed):
    rng = np.random.default_rng(seed)
    kind = np.float32 if single else np.float64
    taps = rng.normal(size=(V, bits * length)).astype(kind)
    sums = rng.normal(size=(bits, steps * columns)).astype(kind)
    close = {"rtol": 1e-4, "atol": 1e-4} if single else {"rtol": 1e-11, "atol": 1e-11}
    scales = rng.normal(size=(V, steps)).astype(kind)
    rows = V * steps - min(missing, V - 1)
    y = rng.normal(size=(rows, columns)).astype(kind)
    out, back = np.full(rows * columns, np.nan, kind), np.full_like(sums, np.nan)
    total = filter_sums(sums, taps, scales, columns, False, out)
    expected = naive.filter_sums(sums, taps, scales, columns)[:rows].ravel()
    np.testing.assert_allclose(out, expected, **close)
    assert np.isclose(total, out.sum(dtype=float), rtol=1e-3, atol=1e-2)
    total = filter_sums(sums, taps, scales, columns, True, out)
    np.testing.assert_allclose(out, 2 * expected, **close)
    assert np.isclose(total, out.sum(dtype=float), rtol=1e-3, atol=1e-2)
    filter_back(y.ravel(), taps, scales, columns, back)
    np.testing.assert_allclose(back, naive.filter_back(y, taps, scales, columns, bits), **close)
    assert np.isclose(
        np.sum(y * expected.reshape(y.shape)), np.sum(sums * back), rtol=1e-3, atol=1e-2
    )
    sums[0, -1] = np.nan
    assert np.isnan(filter_sums(sums, taps, scales, columns, False, out))


@pytest.mark.parametrize("P", [1, 2, 4, 8, 16, 64, 512])
@pytest.mark.parametrize("columns", [1, 3, 16])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_hadamard_equals_the_matrix(P, columns, kind):
    x = np.random.default_rng(P).normal(size=P * columns).astype(kind)
    expected = naive.hadamard(x, columns)
    hadamard(x, columns)
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-4)


def test_hadamard_of_no_columns_ends():
    hadamard(np.empty(0), 0)


@pytest.mark.parametrize(
    "power, odd", [(1, 1), (8, 1), (16, 1), (4, 3), (128, 3), (4, 5), (1, 5), (64, 9)]
)
@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("back", [False, True])
def test_a_rotated_vector_equals_the_matrix(power, odd, kind, back):
    rng = np.random.default_rng(power)
    x, signs = rng.normal(size=power * odd), rng.choice([-1.0, 1.0], power * odd)
    factor, (room, out) = rng.normal(size=(odd, odd)), np.empty((2, x.size), kind)
    rotate_vector(*(part.astype(kind) for part in (x, signs, factor)), back, room, out)
    expected = naive.rotate_vector(x, signs, factor, back)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-4)
