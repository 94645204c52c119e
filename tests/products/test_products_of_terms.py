"""Products of several terms: every kernel against its plain namesake, on every path."""

import math

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diba_np import PackedBits
from diba_np.kernels import columns, columns_simd, lookup_neon, lookup_portable, lookup_simd
from diba_np.machine.thread_pool import product_threads
from diba_np.matrix.packed_bits import joined_tiles
from diba_np.products import product as products
from diba_np.products.cpu import available_paths
from diba_np.products.parallel import _backoff
from diba_np.products.product import Product
from diba_np.products.terms import SumProduct

PATHS = available_paths()
KERNELS = [
    (kernel, twin, dtype)
    for path, kernel, twin, dtype in [
        ("portable", lookup_portable.product_terms_portable,
         lookup_portable.product_terms_portable_par, np.float32),
        ("portable", lookup_portable.product_terms_portable,
         lookup_portable.product_terms_portable_par, np.float64),
        ("avx2", lookup_simd.product_terms_avx2, lookup_simd.product_terms_avx2_par, np.float32),
        ("avx512", lookup_simd.product_terms_avx512, lookup_simd.product_terms_avx512_par,
         np.float32),
        ("neon", lookup_neon.product_terms_neon, lookup_neon.product_terms_neon_par, np.float32),
        ("portable", columns.product_terms_columns, columns.product_terms_columns_par, np.float32),
        ("portable", columns.product_terms_columns, columns.product_terms_columns_par, np.float64),
        ("avx512", columns_simd.product_terms_columns_avx512,
         columns_simd.product_terms_columns_avx512_par, np.float32),
    ]
    if path in PATHS
]  # fmt: skip
SIZES = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 45, 65]))


def terms_of(m, n, sizes, seed):
    """The halves (b1, b2, d1, d2, d3) of each term."""
    rng = np.random.default_rng(seed)
    return [
        (
            rng.integers(0, 2, (m, k), dtype=np.uint8),
            rng.integers(0, 2, (k, n), dtype=np.uint8),
            *(rng.normal(size=size).astype(np.float32) for size in (m, k, n)),
        )
        for k in sizes
    ]


def sum_product(terms, shift, path=None):
    packed = [(PackedBits(b2), PackedBits(b1)) for b1, b2, *_ in terms]
    parts = [
        Product(first, second, d_in=d3, d_mid=d2, d_out=d1, shift=shift, path=path)
        for (first, second), (_, _, d1, d2, d3) in zip(packed, terms, strict=True)
    ]
    tiles2, tiles1 = (joined_tiles([pair[i] for pair in packed]) for i in (0, 1))
    return SumProduct(parts, tiles2, tiles1)


def dense_and_size(terms, shift):
    """The float64 matrix, and of each entry the magnitudes that were added up."""
    m, n = terms[0][0].shape[0], terms[0][1].shape[1]
    exact, size = np.zeros((m, n)), np.zeros((m, n))
    for b1, b2, d1, d2, d3 in terms:
        exact += naive.dense_fast(d1, b1, d2, b2, d3, shift)
        left, right = np.abs(d1)[:, None] * (b1 + shift), np.abs(d2)[:, None] * (b2 + shift)
        size += left @ (right * np.abs(d3))
    return exact, size


@settings(max_examples=12)
@given(SIZES, SIZES, st.lists(SIZES, min_size=1, max_size=4), st.integers(2, 40),
       st.sampled_from([0.0, 0.5, 0.25]), st.integers(0, 2**31))  # fmt: skip
@pytest.mark.parametrize(("kernel", "twin", "dtype"), KERNELS)
def test_kernels_equal_naive(kernel, twin, dtype, m, n, sizes, b, shift, seed):
    terms = terms_of(m, n, sizes, seed)
    given_ = sum_product(terms, shift)._prepared(np.dtype(dtype))
    rng = np.random.default_rng(seed)
    matrix = "columns" in kernel.__name__
    x = rng.normal(size=(n, b) if matrix else n).astype(dtype)
    found = []
    for function, parts in ((kernel, 1), (twin, 1), (twin, 2), (twin, 5)):
        out = np.full((m, b) if matrix else m, np.nan, dtype)
        total = function(x, *given_, parts, out)
        found.append(out)
        assert np.isfinite(total) or matrix
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)
    exact = getattr(naive, kernel.__name__)(terms, shift, x)
    size = dense_and_size(terms, shift)[1] @ np.abs(x)
    done = slice(None)
    if kernel is columns.product_terms_columns:  # whole cache lines only
        lanes = 64 // np.dtype(dtype).itemsize
        done = slice(b // lanes * lanes)
        assert np.isnan(found[0][:, done.stop :]).all()
    if x.ndim == 2:
        size = size[:, done]
        exact, found[0] = exact[:, done], found[0][:, done]
    assert (np.abs(found[0] - exact) <= 12 * np.finfo(dtype).eps * size).all()


@pytest.mark.parametrize("permuting", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_any_operand(path, permuting, rng, monkeypatch):
    monkeypatch.setattr(products, "permutes_as_it_loads", lambda: permuting)
    monkeypatch.setattr(products, "_PERMUTING_ROWS", 0)
    terms = terms_of(97, 70, (33, 7, 45), 1)
    f = sum_product(terms, 0.0, path)
    exact, size = dense_and_size(terms, 0.0)
    for dtype in (np.float32, np.float64):
        for b in (1, 2, 5, 16, 19, 40):
            X = rng.normal(size=(70, b)).astype(dtype)
            bound = 12 * np.finfo(dtype).eps * (size @ np.abs(X))
            assert (np.abs(f.matrix(X) - exact @ X) <= bound).all()
            np.testing.assert_array_equal(f.rows(X.T), f.matrix(X).T)
        assert (np.abs(f.vector(X[:, 0]) - exact @ X[:, 0]) <= bound[:, 0]).all()
    x = X[:, 0].astype(np.float32)
    near = 3e-3 * np.linalg.norm(exact @ x) + 0.05
    np.testing.assert_allclose(f.vector_rounded(x), exact @ x, atol=near)
    many = rng.normal(size=(70, 900)).astype(np.float32)  # through dense blocks
    np.testing.assert_allclose(f.matrix(many), exact @ many, atol=1e-2)


@pytest.mark.parametrize("path", PATHS)
def test_nan_and_infinity_reach_the_result_as_in_the_dense_product(path, rng):
    terms = [(b1, b2, *(np.rint(4 * d + 9) for d in rest))
             for b1, b2, *rest in terms_of(40, 50, (20, 33), 2)]  # fmt: skip
    f = sum_product(terms, 0.0, path)
    exact, _ = dense_and_size(terms, 0.0)
    X = rng.normal(size=(50, 20)).astype(np.float32)
    for bad in ({0: np.nan}, {7: np.inf}, {1: np.inf, 2: -np.inf}):
        Y = X.copy()
        for at, value in bad.items():
            Y[at, 4] = Y[at, 19] = value
        with np.errstate(invalid="ignore"):
            wanted = exact @ Y.astype(float)
        np.testing.assert_allclose(f.matrix(Y), wanted, rtol=1e-4, atol=1.0)
        for apply in (f.vector, f.vector_rounded):
            np.testing.assert_allclose(apply(Y[:, 4]), wanted[:, 4], rtol=1e-4, atol=1.0)


def test_terms_that_overflow_and_cancel_come_out_right(rng):
    b1, b2, d1, d2, d3 = terms_of(20, 30, (9,), 3)[0]
    up = (b1, b2, d1 * np.float32(1e30), d2 * np.float32(1e8), d3)
    terms = [up, (b1, b2, -up[2], up[3], d3), (b1, b2, d1, d2, d3)]
    x = rng.normal(size=30).astype(np.float32)
    exact = naive.dense_fast(d1, b1, d2, b2, d3, 0.0) @ x
    # what is left of sums of 1e38 is their rounding in float64
    found = sum_product(terms, 0.0).vector(x)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, exact, atol=1e38 * 1e-13)


@pytest.mark.parametrize("b", [None, 3, 37, 128])
@pytest.mark.parametrize("path", PATHS)
def test_the_same_result_for_any_number_of_threads(path, b, rng):
    f = sum_product(terms_of(1024, 1536, (800, 300), 4), 0.25, path)
    x = rng.normal(size=(1536,) if b is None else (1536, b)).astype(np.float32)
    results = []
    for threads in (1, 2):
        with product_threads(threads):
            _backoff.until = -math.inf
            results.append((f.vector if b is None else f.matrix)(x))
    np.testing.assert_array_equal(*results)


def test_tiles_in_one_piece_are_those_of_each(rng):
    parts = [PackedBits(rng.integers(0, 2, shape)) for shape in ((40, 31), (7, 90), (33, 15))]
    first = parts[0].tiles.copy()
    parts.append(parts[1].T)
    flat = joined_tiles(parts)
    assert flat.ctypes.data % 64 == 0
    np.testing.assert_array_equal(parts[0].tiles, first)
    for part in parts:
        np.testing.assert_array_equal(part.tiles, naive.tile_rows(part.to_dense()))
        assert np.shares_memory(part.tiles, flat)


def test_terms_must_fit_each_other():
    one, other = terms_of(5, 6, (3,), 0) + terms_of(5, 6, (4,), 1)
    parts = [sum_product([term], 0.0)._terms[0] for term in (one, other)]
    with pytest.raises(ValueError, match="one shape, shift and path"):
        SumProduct([parts[0], Product(PackedBits(one[1]))], None, None)
    with pytest.raises(ValueError, match="one shape, shift and path"):
        SumProduct([], None, None)
