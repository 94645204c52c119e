"""Flip kernels: every decision equals the full recomputation of the error."""

import naive
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diba_np.kernels import flips as kernels

SLACK = 1e-9
NAMES = ("sweep_fixed", "sweep_joint", "sweep_tabu")
PATIENCE = 9


def problem(seed, shift, m=6, k=7, n=9):
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(m, n))
    M = rng.normal(size=(k, n))
    bits = rng.integers(0, 2, (m, k), dtype=np.uint8)
    scale = rng.normal(size=m)
    if seed % 3 == 0:
        bits[0], M[0], scale[1] = 0, 0.0, 0.0  # an empty row, a dead component, a zero scale
    return A, M, bits, scale, shift


def run(name, A, M, bits, scale, shift, passes):
    bits, scale = bits.copy(), scale.copy()
    G, C = M @ M.T, A @ M.T
    h = (bits - shift) @ G
    flips = np.full(len(A), -1)
    extra = {"sweep_joint": (shift,), "sweep_tabu": (PATIENCE,)}.get(name, ())
    slack = np.full(len(A), SLACK)
    getattr(kernels, name)(bits, h, G, C, scale, slack, passes, flips, *extra)
    return bits, scale, flips, h, G


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 0.3]), st.integers(1, 4))
@pytest.mark.parametrize("name", NAMES)
def test_kernel_equals_its_naive_namesake(name, seed, shift, passes):
    given_ = problem(seed, shift)
    bits, scale, flips, h, G = run(name, *given_, passes)
    A, M, start, s, _ = given_
    extra = (PATIENCE,) if name == "sweep_tabu" else ()
    if name == "sweep_tabu":
        passes *= 12
        bits, scale, flips, h, G = run(name, *given_, passes)
    reference = getattr(naive, name)(A, start, s, M, shift, SLACK, passes, *extra)
    np.testing.assert_array_equal(bits, reference[0])
    np.testing.assert_array_equal(flips, reference[-1])
    if name == "sweep_joint":
        np.testing.assert_allclose(scale, reference[1], rtol=1e-9, atol=1e-12)
    else:
        np.testing.assert_array_equal(scale, s)
    # the running gradient equals the fresh one after any sequence of flips
    if name != "sweep_tabu":
        np.testing.assert_allclose(h, (bits - shift) @ G, atol=1e-10)


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 0.3]))
def test_forms_follow_flipped_bits(seed, shift):
    A, M, before, _, _ = problem(seed, shift)
    G, C = M @ M.T, A @ M.T
    bits = before ^ (np.random.default_rng(seed).random(before.shape) < 0.4)
    p, q = naive.update_forms(before, before, G, C, shift)
    kernels.update_forms(before, bits.astype(np.uint8), (before - shift) @ G, G, C, p, q)
    expected = naive.update_forms(before, bits, G, C, shift)
    np.testing.assert_allclose((p, q), expected, rtol=1e-9, atol=1e-9)


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.5]))
@pytest.mark.parametrize("name", NAMES)
def test_the_error_of_no_row_rises(name, seed, shift):
    A, M, start, s, _ = problem(seed, shift)
    bits, scale, flips, _, _ = run(name, A, M, start, s, shift, 3)
    for i in range(len(A)):
        before = naive.row_error(A[i], start[i], s[i], M, shift)
        after = naive.row_error(A[i], bits[i], scale[i], M, shift)
        assert after <= before + 1e-9
        if flips[i] and name != "sweep_joint":
            assert after < before


@pytest.mark.parametrize("name", NAMES)
def test_blocks_of_rows_make_the_same_bits(name):
    A, M, bits, scale, shift = problem(1, 0.0, m=200, k=40, n=50)
    whole = run(name, A, M, bits, scale, shift, 5)
    parts = [
        run(name, A[at : at + 70], M, bits[at : at + 70], scale[at : at + 70], shift, 5)
        for at in (0, 70, 140)
    ]
    for index in range(3):  # bits, scales, flips
        np.testing.assert_array_equal(whole[index], np.concatenate([p[index] for p in parts]))
    assert whole[2].sum() > 0


def test_no_single_flip_is_left_after_enough_passes():
    A, M, bits, scale, shift = problem(2, 0.0)
    done, *_ = run("sweep_fixed", A, M, bits, scale, shift, 100)
    again, _, flips, *_ = run("sweep_fixed", A, M, done, scale, shift, 1)
    assert flips.sum() == 0
    np.testing.assert_array_equal(again, done)


def test_a_walk_ends_lower_than_single_flips():
    A, M, bits, scale, shift = problem(4, 0.0, k=30)
    single, *_ = run("sweep_fixed", A, M, bits, scale, shift, 100)
    walked, _, moves, *_ = run("sweep_tabu", A, M, single, scale, shift, 100)
    errors = [
        [naive.row_error(A[i], b[i], scale[i], M, shift) for i in range(len(A))]
        for b in (single, walked)
    ]
    assert sum(errors[1]) < 0.95 * sum(errors[0])
    assert all((after < before) == bool(m) for before, after, m in zip(*errors, moves, strict=True))
