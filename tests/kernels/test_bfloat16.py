"""Products of operands rounded to bfloat16: the plain formula, and rows that stand alone."""

import naive
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diba_np.kernels import bfloat16 as kernels
from diba_np.machine.thread_pool import ThreadPool
from diba_np.products.cpu import has_bfloat16

pytestmark = pytest.mark.skipif(
    not has_bfloat16(), reason="the CPU, or the path in use, has no dots of bfloat16"
)

# one over and one under what is done at a time
SIZES = st.integers(1, 70) | st.sampled_from([240, 241])
SUMMED = SIZES | st.just(2 * kernels.PAIRS + 3)


def matrices(m, n, k, seed=0):
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.uniform(-3, 3, size=n)
    A = (rng.normal(size=(m, n)) * sizes).astype(np.float32)
    return A, (rng.normal(size=(n, k)) / sizes[:, None]).astype(np.float32)


def product(A, B, threads=1):
    with ThreadPool(threads) as pool:
        return pool.matmul(A, B, rounded=True)


@given(SIZES, SUMMED, SIZES, st.booleans(), st.integers(0, 3))
def test_product_equals_that_of_the_rounded_operands(m, n, k, turned, seed):
    A, B = matrices(m, n, k, seed)
    left = np.asfortranarray(A) if turned else A
    reference = naive.product_bfloat16(A, B)
    bound = 2e-6 * np.sqrt(n) * (np.abs(A) @ np.abs(B)) + 1e-30
    assert np.all(np.abs(product(left, B) - reference) <= bound)


@given(SUMMED, st.integers(1, 200))
def test_panels_hold_the_bits_that_rounding_gives(n, k):
    _, B = matrices(1, n, k)
    B[0, 0] = np.float32(1.00390625)  # half way between two, of which one is even
    with ThreadPool(1) as pool:
        panels = pool.right(B, rounded=True)._held
    np.testing.assert_array_equal(panels, naive.pack_bfloat16(B, kernels.WIDTH))


@pytest.mark.parametrize("turned", [False, True])
def test_results_do_not_depend_on_threads_or_on_other_rows(turned):
    A, B = matrices(700, 300, 260)
    A = np.asfortranarray(A) if turned else A
    whole = product(A, B)
    for threads in (2, 3):
        np.testing.assert_array_equal(product(A, B, threads), whole)
    for rows in (slice(0, 1), slice(5, 18), slice(250, 500)):
        part = np.asfortranarray(A[rows]) if turned else np.ascontiguousarray(A[rows])
        np.testing.assert_array_equal(product(part, B), whole[rows])


@pytest.mark.parametrize("k", [1, 33, 300, 1000])
def test_gram_matrix_is_that_of_the_rounded_matrix(k):
    A, _ = matrices(150, k, 1)
    reference = naive.product_bfloat16(A.T, A)
    scale = np.sqrt(np.outer(np.diag(reference), np.diag(reference)))
    for threads in (1, 2):
        with ThreadPool(threads) as pool:
            gram = pool.gram(A, rounded=True)
        np.testing.assert_array_equal(gram, gram.T)
        assert np.all(np.abs(gram - reference) <= 1e-5 * scale)


def test_left_operands_of_any_strides(rng):
    A = rng.normal(size=(60, 90)).astype(np.float32)
    B = rng.normal(size=(45, 40)).astype(np.float32)
    np.testing.assert_array_equal(product(A[::2, ::2], B), product(A[::2, ::2].copy(), B))
