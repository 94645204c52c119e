"""Products of signs by XNOR and popcount."""

import naive
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diba_np.kernels.signs import multiply_signs, pack_sides
from diba_np.methods.binary_bitat import sign_tiles

WIDTHS = [1, 2, 63, 64, 65, 127, 128, 129, 200]


def packed(x, thresholds):
    words = np.full((len(x), -(-x.shape[1] // 64)), 2**64 - 1, np.uint64)
    pack_sides(np.ascontiguousarray(x, np.float32), thresholds.astype(np.float32), words)
    return words


@pytest.mark.parametrize("n", WIDTHS)
def test_sides_are_packed_with_zeros_behind(rng, n):
    x = rng.normal(size=(3, n)).astype(np.float32)
    x[1] = -1.0
    thresholds = rng.normal(size=n).astype(np.float32)
    x[0, ::2] = thresholds[::2]  # on it is not below it
    np.testing.assert_array_equal(packed(x, thresholds), naive.pack_sides(x, thresholds))
    assert not (packed(np.ones((1, n)), np.zeros(n))[0, -1] >> np.uint64((n - 1) % 64) >> 1).any()


def test_what_is_not_a_number_is_below():
    assert packed(np.array([[np.nan, np.inf, -np.inf]]), np.zeros(3))[0, 0] == 2


@pytest.mark.parametrize(("m", "words"), [(1, 1), (8, 3), (65, 1), (200, 40), (100, 3000)])
def test_tiles_hold_every_word_once(m, words):
    rows = np.arange(1, m * words + 1, dtype=np.uint64).reshape(m, words)
    tiles = sign_tiles(rows)
    width = tiles.shape[2]
    assert width % 8 == 0 and (width < m + 8 or width == 64)
    for i in range(m):
        np.testing.assert_array_equal(tiles[i // width, :, i % width], rows[i])
    assert np.count_nonzero(tiles) == rows.size


@given(st.sampled_from(WIDTHS), st.integers(0, 4), st.integers(1, 150), st.integers(0, 2**32 - 1))
def test_products_equal_the_plain_ones(n, count, m, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.choice([-1, 1], size=(count, n)), rng.choice([-1, 1], size=(m, n))
    scales, bias = (rng.normal(size=m).astype(np.float32) for _ in range(2))
    out = np.full((count, m), np.nan, np.float32)
    tiles = sign_tiles(packed(b, np.zeros(n)))
    multiply_signs(packed(a, np.zeros(n)), tiles, n, scales, bias, out)
    expected = naive.multiply_signs(a.tolist(), b.tolist(), scales.tolist(), bias.tolist())
    np.testing.assert_allclose(out, expected.reshape(count, m), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("n", WIDTHS)
def test_counts_are_exact(rng, n):
    a, b = rng.choice([-1, 1], size=(5, n)), rng.choice([-1, 1], size=(9, n))
    a[0], b[0], b[1] = 1, 1, -1
    out = np.empty((5, 9), np.float32)
    tiles = sign_tiles(packed(b, np.zeros(n)))
    ones = np.ones(9, np.float32)
    multiply_signs(packed(a, np.zeros(n)), tiles, n, ones, 0 * ones, out)
    np.testing.assert_array_equal(out, a @ b.T)
    assert out[0, 0] == n and out[0, 1] == -n
