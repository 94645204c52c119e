"""Viterbi against plain dynamic programming and against all paths there are."""

import itertools

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diba_np.kernels.viterbi import trellis_states, viterbi


def search(x, scale, table, bits, start=-1, end=-1):
    size = table.shape[1]
    codes = np.empty(len(x), np.uint8)
    cost, best = np.empty(size, np.float32), np.empty(size >> bits, np.float32)
    choices = np.empty((len(x), size >> bits), np.uint8)
    return viterbi(x, scale, table, bits, start, end, cost, best, choices, codes), codes


@pytest.mark.parametrize(
    ("bits", "width", "V"), [(1, 3, 1), (1, 5, 2), (2, 4, 1), (2, 5, 3), (3, 6, 1), (4, 4, 2)]
)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_equals_the_plain_search_ties_included(data, bits, width, V):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    steps = data.draw(st.integers(1, 12))
    shape = (V, 1 << width)
    # few values, so that many paths are equal
    table = rng.integers(-2, 3, shape) if data.draw(st.booleans()) else rng.normal(size=shape)
    x = rng.integers(-2, 3, (steps, V)).astype(np.float32)
    scale = rng.choice([0.0, 0.5, 1.0], (steps, V)).astype(np.float32)
    table = table.astype(np.float32)
    start = data.draw(st.integers(-1, (1 << width) - 1))
    for end in (-1, start if steps * bits >= width else -1):
        state, codes = search(x, scale, table, bits, start, end)
        ref_state, ref_codes = naive.viterbi(x, scale, table, bits, start, end)
        assert state == ref_state
        np.testing.assert_array_equal(codes, ref_codes)
        if start >= 0:
            assert state == start
        states = np.empty(steps, np.int64)
        trellis_states(codes, bits, state, width, states)
        np.testing.assert_array_equal(states, naive.trellis_states(codes, bits, state, width))
        if end >= 0:
            assert states[-1] == end


@pytest.mark.parametrize("closed", [False, True])
def test_no_path_is_better(closed):
    rng = np.random.default_rng(3)
    bits, width, steps = 1, 3, 7
    table = rng.normal(size=(1, 8)).astype(np.float32)
    x, scale = (rng.normal(size=(steps, 1)).astype(np.float32) for _ in range(2))

    def error(start, codes):
        states = naive.trellis_states(codes, bits, start, width)
        return np.sum((x[:, 0] - scale[:, 0] * table[0, states]) ** 2), states[-1]

    for given_state in range(8) if closed else (-1,):
        start, codes = search(x, scale, table, bits, given_state, given_state)
        reached = [
            error(first, path)[0]
            for first in (range(8) if given_state < 0 else (given_state,))
            for path in itertools.product(range(2), repeat=steps)
            if given_state < 0 or error(first, path)[1] == given_state
        ]
        assert error(start, codes)[0] <= min(reached) * (1 + 1e-6)


def test_sums_of_a_long_path_stay_small():
    rng = np.random.default_rng(0)
    x = 1e3 * rng.normal(size=(20000, 1)).astype(np.float32)
    table = rng.normal(size=(1, 16)).astype(np.float32)
    size = 16
    codes = np.empty(len(x), np.uint8)
    cost = np.empty(size, np.float32)
    scale = np.full_like(x, 1e3)
    choices = np.empty((len(x), 8), np.uint8)
    viterbi(x, scale, table, 1, 0, -1, cost, np.empty(8, np.float32), choices, codes)
    assert np.isfinite(cost).all() and np.ptp(cost) < 1e9
