"""Products: every kernel against its plain namesake, on every path this machine has."""

import copy
import json
import math
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import naive
import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import bit_arrays, factors

from diba_np import DiBAFactors, PackedBits
from diba_np.cli.main import main
from diba_np.kernels import (
    columns,
    columns_simd,
    lookup_int16,
    lookup_neon,
    lookup_portable,
    lookup_simd,
    lookup_words,
)
from diba_np.kernels._barrier import arrive, barrier, take
from diba_np.kernels.threads import number_of_threads
from diba_np.kernels.transpose import transpose
from diba_np.machine.thread_pool import ThreadPool
from diba_np.products import cpu, parallel
from diba_np.products import product as products
from diba_np.products.cpu import available_paths, cpu_features, has_rounded, kernel_path
from diba_np.products.parallel import _Backoff, _backoff
from diba_np.products.product import Product

PATHS = available_paths()
SIZES = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 45, 63, 64, 65, 127, 130]))
SMALL = st.one_of(st.integers(1, 6), st.sampled_from([15, 16, 33]))
# odd sizes over several tiles (32 rows), units (15 columns) and blocks of units
SHAPES = [(1, 1, 1), (1, 40, 3), (33, 31, 16), (161, 200, 127), (97, 700, 45), (31, 16, 901)]

VECTOR_KERNELS = [
    (kernel, dtype)
    for path, kernel, dtype in [
        ("portable", lookup_portable.product_portable, np.float32),
        ("portable", lookup_portable.product_portable, np.float64),
        ("avx2", lookup_simd.product_avx2, np.float32),
        ("avx512", lookup_simd.product_avx512, np.float32),
        ("neon", lookup_neon.product_neon, np.float32),
    ]
    if path in PATHS
]
MATRIX_KERNELS = [
    (kernel, dtype)
    for path, kernel, dtype in [
        ("portable", columns.product_columns, np.float32),
        ("portable", columns.product_columns, np.float64),
        ("avx512", columns_simd.product_columns_avx512, np.float32),
    ]
    if path in PATHS
]
ROUNDED_KERNELS = [
    kernel
    for path, kernel in [
        ("avx2", lookup_words.product_avx2_rounded),
        ("avx512", lookup_int16.product_int16),
        ("neon", lookup_neon.product_neon_rounded),
    ]
    if path in PATHS and (path != "avx512" or "avx512vnni" in cpu_features())
]
TWINS = {
    "product_portable": lookup_portable.product_portable_par,
    "product_avx2": lookup_simd.product_avx2_par,
    "product_avx512": lookup_simd.product_avx512_par,
    "product_neon": lookup_neon.product_neon_par,
    "product_avx2_rounded": lookup_words.product_avx2_rounded_par,
    "product_neon_rounded": lookup_neon.product_neon_rounded_par,
    "product_int16": lookup_int16.product_int16_par,
    "product_columns": columns.product_columns_par,
    "product_columns_avx512": columns_simd.product_columns_avx512_par,
}


@pytest.fixture(params=[*PATHS, *(f"{path} permuting" for path in PATHS if path == "avx512")])
def path(request, monkeypatch):
    """A kernel path; permuting: as on CPUs where look-ups in registers beat those in memory."""
    name, _, permuting = request.param.partition(" ")
    monkeypatch.setattr(products, "permutes_as_it_loads", lambda: bool(permuting))
    monkeypatch.setattr(products, "_PERMUTING_ROWS", 0)
    return name


def problem(m, n, k, seed, density=0.5):
    """Bits and diagonals of both signs: (b1, b2, d1, d2, d3)."""
    rng = np.random.default_rng(seed)
    b1 = (rng.random((m, k)) < density).astype(np.uint8)
    b2 = (rng.random((k, n)) < density).astype(np.uint8)
    return b1, b2, *(rng.normal(size=size).astype(np.float32) for size in (m, k, n))


def operator(m, n, k, seed, shift=0.0):
    b1, b2, d1, d2, d3 = problem(m, n, k, seed)
    return DiBAFactors(d1, b1, d2, b2, d3, shift)


def arguments(b1, b2, d1, d2, d3, shift, dtype):
    """What a kernel takes between x and n_parts; b1 None leaves the second stage out."""
    tiles1 = np.empty((0, 0, 16), np.uint32) if b1 is None else PackedBits(b1).tiles
    d3, d2, d1 = (v.astype(dtype) for v in (d3, d2, d1))
    return d3, PackedBits(b2).tiles, d2, tiles1, d1, dtype(shift)


def size_of_terms(b1, b2, d1, d2, d3, shift, X):
    """What the rounding errors of a product scale with: the sum of all terms' magnitudes."""
    # shift times the sum of all inputs is taken off every row, whatever its bits
    left = np.abs(d1.astype(float))[:, None] * (b1 + abs(shift))
    right = np.abs(d2.astype(float))[:, None] * (b2 + abs(shift)) * np.abs(d3.astype(float))
    return (left @ right) @ np.abs(X)


def run_all(kernel, x, given_, out_shape):
    """Run a kernel and its twin in several parts; return what all of them agree on."""
    results = []
    for function, parts in [(kernel, 1)] + [(TWINS[kernel.__name__], p) for p in (1, 2, 5)]:
        out = np.full(out_shape, np.nan, x.dtype)
        function(x, *given_, parts, out)
        results.append(out)
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)
    return results[0]


# -- layout ----------------------------------------------------------------------------------------


@given(bit_arrays())
def test_tiles_equal_naive(bits):
    packed = PackedBits(bits)
    before = packed.nbytes
    assert before == packed.words.nbytes
    np.testing.assert_array_equal(packed.tiles, naive.tile_rows(bits))
    np.testing.assert_array_equal(packed.T.tiles, naive.tile_columns(bits))
    np.testing.assert_array_equal(PackedBits(bits.T).tiles, naive.tile_rows(bits.T))
    assert packed.tiles is packed.tiles
    assert packed.tiles.ctypes.data % 64 == 0
    assert packed.nbytes == before + packed.tiles.nbytes
    turned = packed.T
    turned_tiles = turned.tiles
    assert turned.nbytes == turned_tiles.nbytes  # nobody asked for its words
    assert packed.T.words.shape == (bits.shape[1], -(-bits.shape[0] // 64))
    assert PackedBits(packed.T).T is packed


# -- kernels against naive -------------------------------------------------------------------------


@settings(max_examples=15)
@given(SIZES, SIZES, SIZES, st.sampled_from([0.0, 0.5, 0.25]), st.integers(0, 2**31))
@pytest.mark.parametrize(("kernel", "dtype"), VECTOR_KERNELS)
def test_vector_kernel_equals_naive(kernel, dtype, m, n, k, shift, seed):
    halves = problem(m, n, k, seed)
    x = np.random.default_rng(seed).normal(size=n).astype(dtype)
    found = run_all(kernel, x, arguments(*halves, shift, dtype), m)
    exact = getattr(naive, kernel.__name__)(*halves, shift, x)
    size = size_of_terms(*halves, shift, x[:, None])[:, 0]
    assert (np.abs(found - exact) <= 8 * np.finfo(dtype).eps * size).all()
    # the first stage alone
    _, b2, d1, d2, d3 = halves
    half = run_all(kernel, x, arguments(None, b2, d1, d2, d3, shift, dtype), k)
    exact = naive.mix(b2, shift, d3, d2, x)
    size = np.abs(d2) * ((b2 + shift) @ np.abs(d3 * x))
    assert (np.abs(half - exact) <= 8 * np.finfo(dtype).eps * size).all()


@settings(max_examples=15)
@given(
    SMALL,
    SMALL,
    SMALL,
    st.integers(0, 40) | st.integers(120, 300),
    st.sampled_from([0.0, 0.5]),
    st.integers(0, 2**31),
)
@pytest.mark.parametrize(("kernel", "dtype"), MATRIX_KERNELS)
def test_matrix_kernel_equals_naive(kernel, dtype, m, n, k, b, shift, seed):
    halves = problem(m, n, k, seed)
    lanes = 64 // np.dtype(dtype).itemsize
    lines = b // lanes * lanes  # whole cache lines only
    if kernel is columns_simd.product_columns_avx512:
        lines = b = max(b, 2)
    X = np.random.default_rng(seed).normal(size=(n, b)).astype(dtype)
    found = run_all(kernel, X, arguments(*halves, shift, dtype), (m, b))
    assert np.isnan(found[:, lines:]).all()
    _, b2, d1, d2, d3 = halves
    half = run_all(kernel, X, arguments(None, b2, d1, d2, d3, shift, dtype), (k, b))
    chosen = sorted({0, seed % max(1, lines), lines - 1} & set(range(lines)))
    if chosen:
        X = X[:, chosen]
        exact = getattr(naive, kernel.__name__)(*halves, shift, X)
        size = size_of_terms(*halves, shift, X)
        assert (np.abs(found[:, chosen] - exact) <= 8 * np.finfo(dtype).eps * size).all()
        exact = np.stack([naive.mix(b2, shift, d3, d2, x) for x in X.T], axis=1)
        size = np.abs(d2)[:, None] * ((b2 + shift) @ np.abs(d3[:, None] * X))
        assert (np.abs(half[:, chosen] - exact) <= 8 * np.finfo(dtype).eps * size).all()


@settings(max_examples=15)
@given(SIZES, SIZES, SIZES, st.sampled_from([0.0, 0.5, 0.25]), st.integers(0, 2**31))
@pytest.mark.parametrize("kernel", ROUNDED_KERNELS)
def test_rounded_kernel_is_within_its_steps_of_naive(kernel, m, n, k, shift, seed):
    halves = problem(m, n, k, seed)
    b1, b2, d1, d2, d3 = halves
    x = np.random.default_rng(seed).normal(size=n).astype(np.float32)
    x[seed % n] *= 10
    mixed = naive.mix(b1, shift, np.ones(k), np.ones(m), d2).astype(np.float32)
    given_ = (*arguments(*halves, shift, np.float32), mixed)
    found = run_all(kernel, x, given_, m)
    exact = getattr(naive, kernel.__name__)(*halves, shift, x)

    def most(values):  # half a step for each group of inputs
        size = 30 if kernel is lookup_int16.product_int16 else 15
        units = np.pad(np.abs(values), (0, -values.size % size)).reshape(-1, size)
        if size == 30:
            return math.ceil(values.size / 5) * 0.5 * units.sum(axis=1).max() / 65520
        pairs = np.add.reduceat(units, [0, 8], axis=1)
        return 4 * len(units) * 0.5 * pairs.max() / 32240

    inner = naive.mix(b2, 0.5, d3, d2, x)
    first = np.abs(d2) * most(d3 * x)
    bound = np.abs(d1) * (0.5 * first.sum() + most(np.abs(inner) + first))
    size = size_of_terms(*halves, 0.5, x[:, None])[:, 0]
    assert (np.abs(found - exact) <= 1.01 * bound + 64 * np.finfo(np.float32).eps * size).all()


@given(st.integers(1, 70), st.integers(1, 70))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_transpose_equals_naive(dtype, m, n):
    a = np.random.default_rng(m).normal(size=(m, n)).astype(dtype)
    out = np.full((n, m), np.nan, dtype)
    transpose(a, out)
    np.testing.assert_array_equal(out, naive.transpose(a))


# -- Product: any operand, any shape ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_number_of_columns(path, dtype, shape):
    m, n, k = shape
    b1, b2, d1, d2, d3 = problem(m, n, k, m + n + k)
    rng = np.random.default_rng(k)
    first, second = PackedBits(b2), PackedBits(b1)
    for shift in (0.0, 0.5):
        f = Product(first, second, d_in=d3, d_mid=d2, d_out=d1, shift=shift, path=path)
        g = Product(second.T, first.T, d_in=d1, d_mid=d2, d_out=d3, shift=shift, path=path)
        A = naive.dense_fast(d1, b1, d2, b2, d3, shift)
        for b in (1, 2, 5, 12, 16, 19, 40):
            X, Y = rng.normal(size=(n, b)).astype(dtype), rng.normal(size=(m, b)).astype(dtype)
            size = size_of_terms(b1, b2, d1, d2, d3, shift, X)
            found = f.matrix(X)
            assert (np.abs(found - A @ X) <= 8 * np.finfo(dtype).eps * size).all()
            for rows in (X.T, np.ascontiguousarray(X.T)):
                np.testing.assert_array_equal(f.rows(rows), found.T)
            size = size_of_terms(b2.T, b1.T, d3, d2, d1, shift, Y)
            assert (np.abs(g.matrix(Y) - A.T @ Y) <= 8 * np.finfo(dtype).eps * size).all()
        np.testing.assert_array_equal(f.vector(X[:, 0]), f.matrix(X[:, :1])[:, 0])
        if path == "avx512" and dtype == np.float32 and shift == 0:  # the same sums in registers
            few = f.matrix(X[:, :5])
            for column, x in zip(few.T, X[:, :5].T, strict=True):
                np.testing.assert_array_equal(column, f.vector(x))


@pytest.mark.parametrize("b", [None, 3, 4, 37, 128])
def test_the_same_result_for_any_number_of_threads(path, b, rng):
    words = [rng.integers(0, 2**64, size, np.uint64) for size in ((1024, 24), (1536, 16))]
    first, second = PackedBits.from_words(words[0], 1536), PackedBits.from_words(words[1], 1024)
    f = Product(first, second, path=path, shift=0.25)
    x = rng.normal(size=(1536,) if b is None else (1536, b)).astype(np.float32)
    for apply in (f.vector, f.vector_rounded) if b is None else (f.matrix,):
        results = []
        for threads in (1, 2):
            with ThreadPool(threads):
                _backoff.until = -math.inf
                results.append(apply(x))
        np.testing.assert_array_equal(*results)


def test_a_parallel_kernel_that_was_held_up_is_left_alone_for_a_while(monkeypatch):
    backoff, calls = _Backoff(), []

    def one(x, parts, out):
        calls.append(("one", parts))

    def many(x, parts, out):
        calls.append(("many", parts))

    many.overloads = {}
    monkeypatch.setattr(parallel, "_backoff", backoff)
    operands = ((one, many), 2, 0.0, np.ones(1), (), np.ones(1))
    parallel.run_kernel(*operands)
    monkeypatch.setattr(_Backoff, "HELD_UP", 0.0)  # every call is
    parallel.run_kernel(*operands)
    assert backoff.until > -math.inf
    backoff.until = math.inf
    parallel.run_kernel(*operands)
    assert calls == [("many", 2), ("many", 2), ("one", 1)]


def test_operands_of_any_layout(rng):
    f = operator(20, 30, 33, 0)
    A = naive.dense_fast(f.d1, f.b1.to_dense(), f.d2, f.b2.to_dense(), f.d3, 0.0)
    X = rng.normal(size=(30, 10)).astype(np.float32)
    X.setflags(write=False)
    for Y in (X, np.asfortranarray(X), X[:, ::-1], X[:, ::2], X.astype(np.float16), X[:, :0]):
        assert (f @ Y).dtype == np.float32
        np.testing.assert_allclose(f @ Y, A @ Y, atol=1e-3)
    for Y in ((10 * X).astype(np.int64), X.astype(np.longdouble), X > 0, (10 * X).astype(np.int8)):
        np.testing.assert_allclose(f @ Y, A @ Y.astype(float), atol=1e-2)
    for x in (X[:, 3], X[::-1, 3], X[:, 3].tolist(), np.ma.array(X[:, 3])):
        np.testing.assert_allclose(f @ x, A @ np.asarray(x, float), atol=1e-3)
    np.testing.assert_allclose(f.matvec_rounded(X[:, 3]), A @ X[:, 3], atol=1e-1)
    for bad in (np.array(["a"] * 30), np.array([None] * 30)):
        with pytest.raises(TypeError, match="the operand must hold real numbers, got dtype"):
            f.matvec(bad)
    for bad in (X, X[:3, 0], 1.0):
        with pytest.raises(ValueError, match=r"x must have shape \(30,\), got"):
            f.matvec_rounded(bad)
    with pytest.raises(TypeError, match="real numbers, got dtype complex"):
        f.matvec_rounded(X[:, 0] * 1j)


BAD = [
    {0: np.nan},
    {0: np.inf},
    {7: np.nan},
    {7: np.inf},
    {1: np.inf, 2: -np.inf},
    {1: -np.inf, 2: -np.inf},
    {1: np.inf, 2: np.nan},
]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_nan_and_infinity_reach_the_result_as_in_the_dense_product(path, bad, shift, rng):
    b1, b2, d1, d2, d3 = problem(40, 50, 70, 3)
    d1, d2, d3 = (np.rint(4 * d + 9) for d in (d1, d2, d3))  # the dense matrix is exact
    b1[3] = 0
    b2[:, 7] = 0
    f = Product(PackedBits(b2), PackedBits(b1), d_in=d3, d_mid=d2, d_out=d1, shift=shift, path=path)
    A = naive.dense_fast(d1, b1, d2, b2, d3, shift)
    X = rng.normal(size=(50, 20))
    for at, value in bad.items():
        X[at, 4] = X[at, 19] = value
    with np.errstate(invalid="ignore"):
        exact = A @ X
    for dtype in (np.float32, np.float64):
        near = {"rtol": 1e-4, "atol": 1.0}
        np.testing.assert_allclose(f.matrix(X.astype(dtype)), exact, **near)
        np.testing.assert_allclose(f.vector(X[:, 4].astype(dtype)), exact[:, 4], **near)
        rounded = f.vector_rounded(X[:, 4].astype(dtype))
        np.testing.assert_allclose(rounded, exact[:, 4], rtol=1e-3, atol=500)


def test_huge_inputs_do_not_reach_rows_that_leave_them_out(path, rng):
    bits = rng.integers(0, 2, (64, 100))
    bits[5] = bits[6] = 0
    bits[6, 3] = 1
    bits[7, 9] = 0
    x = rng.normal(size=100).astype(np.float32)
    x[9] = 1e30
    f = Product(PackedBits(bits), path=path)
    for y in (f.vector(x), f.matrix(np.stack([x] * 16, 1))[:, 0]):
        assert y[5] == 0
        assert y[6] == x[3]
        np.testing.assert_allclose(y[7], bits[7] @ x.astype(float), rtol=1e-5)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_sums_that_overflow_on_the_way_come_out_right(path, shift):
    bits, ones = np.array([[1, 0, 0], [0, 0, 1], [1, 1, 1]]), np.ones(3)
    f = Product(PackedBits(bits), PackedBits(np.eye(3)), d_out=ones / 8, shift=shift, path=path)
    x = np.array([3e38, 3e38, 1e38], np.float32)
    exact = (np.eye(3) - shift) @ ((bits - shift) @ x.astype(float)) / 8
    np.testing.assert_allclose(f.vector(x), exact, rtol=1e-6)
    np.testing.assert_allclose(f.vector_rounded(x), exact, rtol=1e-6)
    for b in (1, 17):
        np.testing.assert_allclose(
            f.matrix(np.stack([x] * b, 1)), np.stack([exact] * b, 1), rtol=1e-6
        )


def test_a_sum_that_overflows_when_it_is_shifted_comes_out_right(path):
    # sums and total of the second stage are 3e38 and -3e38, which float32 holds, 4.5e38 it does not
    bits, ones = PackedBits(np.eye(3)), np.ones(3)
    f = Product(bits, bits, d_mid=1e10 * ones, d_out=1e-10 * ones, shift=0.5, path=path)
    x = np.array([6e28, 0, 0], np.float32)
    exact = (np.eye(3) - 0.5) @ ((np.eye(3) - 0.5) @ x.astype(float))
    np.testing.assert_allclose(f.vector(x), exact, rtol=1e-6)
    for b in (2, 17):
        np.testing.assert_allclose(f.matrix(np.stack([x] * b, 1))[:, 0], exact, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"d_in": np.ones(2)}, r"d_in must have shape \(5,\), got \(2,\)"),
        ({"d_mid": np.ones(5)}, r"d_mid must have shape \(4,\), got \(5,\)"),
        ({"d_out": np.ones((3, 1))}, r"d_out must have shape \(3,\), got \(3, 1\)"),
        ({"second": PackedBits(np.ones((3, 5)))}, "second must have 4 columns, got 5"),
        ({"second": None, "d_mid": np.ones(4)}, "d_mid= needs second="),
    ],
)
def test_sizes_are_checked_before_the_kernels_read(options, words):
    first, second = PackedBits(np.ones((4, 5))), PackedBits(np.ones((3, 4)))
    with pytest.raises(ValueError, match=words):
        Product(first, **({"second": second} | options))
    product = Product(first, second)
    for call, x in (
        (product.vector, np.ones(3)),
        (product.vector, np.ones((5, 1))),
        (product.vector_rounded, np.ones(6)),
        (product.matrix, np.ones((4, 16))),
        (product.matrix, np.ones(5)),
    ):
        with pytest.raises(ValueError, match=r"the operand must have shape \(5,"):
            call(x)


def test_dense_blocks_where_blas_is_faster(monkeypatch, rng):
    f = operator(20, 30, 300, 0)
    A = naive.dense_fast(f.d1, f.b1.to_dense(), f.d2, f.b2.to_dense(), f.d3, 0.0)
    used = []
    original = Product._run_dense
    monkeypatch.setattr(Product, "_run_dense", lambda *a: used.append(1) or original(*a))
    monkeypatch.setattr(products, "_DENSE_BYTES", 1)  # blocks of 64 columns
    X = rng.normal(size=(30, 100)).astype(np.float32)
    np.testing.assert_allclose(f @ X, A @ X, atol=1e-2)
    assert used == [1]
    f @ X[:, :10]
    assert used == [1]
    narrow = operator(20, 3, 300, 0)  # three columns of it take as long as a cache line of 16
    narrow @ X[:3, :16]
    assert used == [1]
    narrow @ X[:3, :40]
    assert used == [1, 1]


def test_dense_blocks_bring_no_warning_and_lose_nothing(rng):
    f, X = operator(20, 3, 300, 0), rng.normal(size=(3, 40)).astype(np.float32)
    X[0, 3], X[1, 5], X[2, 5], X[0, 7] = np.nan, np.inf, -np.inf, 3e38
    A = naive.dense_fast(f.d1, f.b1.to_dense(), f.d2, f.b2.to_dense(), f.d3, 0.0)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = (A[:, :, None] * X.astype(float)).sum(axis=1).astype(np.float32)
    np.testing.assert_allclose(f @ X, expected, rtol=1e-3, atol=0.1)
    # d2 d3 is below what float32 holds, the product is not
    g = DiBAFactors(1e15 * f.d1, f.b1, 1e-22 * f.d2, f.b2, 1e-22 * f.d3)
    X = rng.normal(size=(3, 40)).astype(np.float32)
    np.testing.assert_allclose(g @ (np.float32(1e29) * X), A @ X, rtol=1e-3, atol=0.1)


def test_what_is_not_finite_takes_no_more_work_than_it_has_to(monkeypatch, rng):
    f = operator(40, 1000, 50, 0)
    runs, blocks = [], []
    run, columns_of = Product._run_matrix, Product._columns
    monkeypatch.setattr(
        Product, "_run_matrix", lambda self, x, out: runs.append(x) or run(self, x, out)
    )
    monkeypatch.setattr(
        Product, "_columns", lambda self, *a: blocks.append(a) or columns_of(self, *a)
    )
    x = rng.normal(size=1000).astype(np.float32)
    x[5] = np.nan
    assert np.isnan(f @ x).all()  # as NaN makes it whatever the rest is
    assert not runs
    assert np.isnan(f @ (np.inf * np.sign(rng.normal(size=1000)))).all()
    assert len(blocks) == 1  # then infinities of both signs have met in every row


# -- rounded ---------------------------------------------------------------------------------------


def plus_minus_part(f, x):
    return naive.dense_fast(f.d1, f.b1.to_dense(), f.d2, f.b2.to_dense(), f.d3, 0.5) @ x


@pytest.mark.parametrize("shift", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(300, 1100, 400), (900, 200, 700)])
def test_rounded_keeps_its_promise(shape, shift, rng):
    f = operator(*shape, 1, shift)
    A = naive.dense_fast(f.d1, f.b1.to_dense(), f.d2, f.b2.to_dense(), f.d3, shift)
    for g, B in ((f, A), (f.T, A.T)):
        x = rng.normal(size=B.shape[1]).astype(np.float32)
        scale = np.linalg.norm(plus_minus_part(g, x))
        assert g.matvec_rounded(x).dtype == np.float32
        offset = 1e-6 * np.linalg.norm(B @ x)
        assert np.linalg.norm(g.matvec_rounded(x) - B @ x) <= 6e-4 * scale + offset
        np.testing.assert_array_equal(g.matvec_rounded(0 * x), 0 * (g @ x))


@pytest.mark.parametrize("n", [30, 45, 75, 960, 1000])
def test_rounded_where_sums_of_look_ups_are_as_large_as_can_be(n):
    # constant inputs with all bits of a row alike: every pair of units (block of 64) uses up its
    # 16 bits
    rows = np.repeat([[1], [0]], 40, axis=0)
    f = DiBAFactors(np.ones(80), rows @ np.ones((1, 60)), np.ones(60), np.ones((60, n)), np.ones(n))
    for x in (np.full(n, 3, np.float32), np.full(n, -7, np.float32)):
        np.testing.assert_allclose(f.matvec_rounded(x), f @ x, rtol=1e-3, atol=abs(x[0]) * 0.06 * n)


def test_rounded_is_exact_where_its_steps_would_not_do(rng):
    f = operator(20, 70000, 30, 1)
    x = rng.normal(size=70000).astype(np.float32)
    for scale in (1e-25, 1e25, 1e-42):  # squares under- and overflow
        y = np.float32(scale) * x
        np.testing.assert_array_equal(f.matvec_rounded(y), f @ y)
    x[3] = 1e5  # the root mean square is then 1/264 of it
    np.testing.assert_array_equal(f.matvec_rounded(x), f @ x)


# -- DiBAFactors -----------------------------------------------------------------------------------


@given(factors(), st.integers(0, 2**31))
def test_memory_is_counted_and_pickles_carry_none_of_it(f, seed):
    x = np.random.default_rng(seed).normal(size=f.shape[1]).astype(np.float32)
    fresh, size = f.nbytes, len(pickle.dumps(f))
    diagonals = 4 * (sum(f.shape) + f.k)
    assert fresh == f.b1.words.nbytes + f.b2.words.nbytes + diagonals
    f @ x
    held = fresh + f.b1.tiles.nbytes + f.b2.tiles.nbytes + diagonals
    # a plan: diagonals once more, filled up to cache lines, and a table; rooms are nobody's own
    planned, more = kernel_path() != "portable", diagonals + 1024
    assert held + planned * diagonals <= f.nbytes <= held + planned * more
    f.rmatvec(np.ones(f.shape[0], np.float32))
    held += f.b1.T.tiles.nbytes + f.b2.T.tiles.nbytes + 2 * diagonals
    assert f.nbytes == f.T.nbytes
    assert held + 2 * planned * diagonals <= f.nbytes <= held + 2 * planned * more
    before = f.nbytes
    f.matvec_rounded(x)
    assert before <= f.nbytes <= before + 4 * f.shape[0]
    assert len(pickle.dumps(f)) == size
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(f)) @ x, f @ x)


def test_products_from_several_threads_at_once(rng):
    f = operator(1500, 1500, 1400, 0)
    x = rng.normal(size=1500).astype(np.float32)
    expected, found = f @ x, []

    def work():
        for _ in range(10):
            found.append(f @ x)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 30
    for result in found:
        np.testing.assert_array_equal(result, expected)


def test_held_up_kernels_lose_a_share_of_the_time_at_most(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(parallel.time, "perf_counter", lambda: now[0])
    backoff = _Backoff()
    for seconds, work in ((1e-4, 1e7), (1.0, 1e10)):  # so much work may take that long
        backoff.note(seconds, work)
        assert now[0] >= backoff.until
    backoff.note(0.02, 0)  # once is no reason to stop
    assert now[0] >= backoff.until
    backoff.note(0.02, 0)
    assert now[0] < backoff.until
    now[0] += 0.21
    assert now[0] >= backoff.until
    now[0] += 10.0  # the allowance is whole again, not larger
    lost, start = 0.0, now[0]
    while now[0] < start + 100:
        if now[0] >= backoff.until:
            now[0] += 0.05
            lost += 0.05
            backoff.note(0.05, 0)
        now[0] += 0.001
    assert 0.9 * backoff.SHARE < lost / 100 < 1.1 * backoff.SHARE


def test_a_barrier_does_not_wait_for_good():
    counters = barrier()
    assert not arrive(counters, 3)  # alone: gives up
    assert not arrive(counters, 3)
    assert arrive(counters, 3)  # the last one never waits
    assert arrive(counters, 3)
    assert [take(counters) for _ in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("threads", [1, numba.config.NUMBA_NUM_THREADS])
def test_number_of_threads_is_that_of_numba(threads):
    before = numba.get_num_threads()
    numba.set_num_threads(threads)
    try:
        assert number_of_threads() == numba.get_num_threads() == threads
    finally:
        numba.set_num_threads(before)


# -- paths -----------------------------------------------------------------------------------------


@pytest.fixture
def forget_path():
    def forget():
        kernel_path.cache_clear()
        has_rounded.cache_clear()

    forget()
    yield forget
    forget()


@pytest.mark.parametrize("path", PATHS)
def test_a_forced_path_is_used(path, forget_path, monkeypatch, rng):
    monkeypatch.setenv("DIBA_NP_KERNEL", path)
    assert kernel_path() == path
    f = operator(40, 50, 30, 0)
    assert f._product._path == path
    x = rng.normal(size=50).astype(np.float32)
    np.testing.assert_allclose(f @ x, f.to_dense() @ x, atol=1e-3)
    if not has_rounded():
        np.testing.assert_array_equal(f.matvec_rounded(x), f @ x)


def test_a_path_that_is_wrong_or_missing_is_one_sentence(
    forget_path, monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("DIBA_NP_KERNEL", "sse")
    f = operator(3, 4, 2, 0)
    message = "DIBA_NP_KERNEL must be one of portable, avx2, avx512, neon, got 'sse'"
    with pytest.raises(ValueError, match=message):
        f @ np.ones(4)
    f.save(tmp_path / "f.h5")
    np.save(tmp_path / "x.npy", np.ones(4))
    names = [str(tmp_path / name) for name in ("f.h5", "x.npy", "y.npy")]
    assert main(["apply", *names[:2], "-o", names[2]]) == 1
    assert capsys.readouterr().err == f"diba-np: error: {message}\n"
    assert not os.path.exists(names[2])
    monkeypatch.setenv("DIBA_NP_KERNEL", "avx512")
    monkeypatch.setattr(cpu, "cpu_features", lambda: {"avx2"})
    monkeypatch.setattr(cpu, "is_arm", lambda: False)
    with pytest.raises(ValueError, match=r"can run \(portable, avx2\), got 'avx512'"):
        f @ np.ones(4)
    monkeypatch.delenv("DIBA_NP_KERNEL")
    assert kernel_path() == "avx2"


@pytest.mark.parametrize("stages", [1, 2])
def test_sums_of_some_rows_that_overflow_come_out_right(path, stages, monkeypatch):
    # the sum of all inputs is 0: only the rows tell
    x = np.array([3e38, -3e38, 0, 0, 0, 3e38, -3e38], np.float32)
    bits = np.ones((2000, 7), np.uint8)
    bits[1990, [1, 6]] = 0
    exact = np.zeros(2000)
    exact[1990] = 7.5e37
    second = PackedBits(np.eye(2000)) if stages == 2 else None
    f = Product(PackedBits(bits), second, d_out=np.full(2000, 1 / 8), path=path)
    for parts in (1, 3):
        monkeypatch.setattr(f, "_parts", lambda n_columns=1, parts=parts: parts)
        np.testing.assert_allclose(f.vector(x), exact, rtol=1e-6)
        np.testing.assert_allclose(f.vector_rounded(x), exact, rtol=1e-6)
        for n_columns in (3, 16):
            f.matrix(np.zeros((7, n_columns), np.float32))  # what the next result's memory holds
            found = f.matrix(np.stack([x] * n_columns, 1))
            np.testing.assert_allclose(found, np.stack([exact] * n_columns, 1), rtol=1e-6)


# -- benchmark -------------------------------------------------------------------------------------


BENCHMARK = Path(__file__).parents[2] / "scripts" / "bench_products.py"


def test_the_benchmark_names_no_case_that_it_has_not():
    command = [sys.executable, str(BENCHMARK), "--smoke", "--only", "nothing"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        "no case holds 'nothing'; one is called '4096x4096 1 64': size bits batch"
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_benchmark_runs(dtype):
    command = [sys.executable, str(BENCHMARK), "--smoke", "--json", "--threads", "1"]
    command += ["--dtype", dtype]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    report = json.loads(out)
    ways = {row["way"] for row in report["rows"]}
    assert {f"numpy {dtype}", dtype, "transpose"} <= ways
    assert report["path"] == kernel_path()
    assert 0 < report["first_use_s"]["process_to_first_product"]
    for row in report["rows"]:
        assert row["us"] > 0
        assert row.get("error", 0) < (1e-3 if "16-bit" in row["way"] else 1e-6)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_a_copy_reads_no_memory_of_the_original(copied, rng):
    bits = [PackedBits(rng.integers(0, 2, shape)) for shape in ((9, 40), (35, 9))]
    x = rng.normal(size=40).astype(np.float32)
    product = Product(*bits, d_mid=rng.normal(size=9))
    expected = product.vector(x), product.vector_rounded(x)
    other = copied(product)
    for one in bits:
        one.tiles[...] = ~one.tiles
    np.testing.assert_array_equal(other.vector(x), expected[0])
    np.testing.assert_array_equal(other.vector_rounded(x), expected[1])


def test_diagonals_are_those_that_were_given(rng):
    bits, d = PackedBits(rng.integers(0, 2, (35, 40))), rng.normal(size=40)
    x, product = rng.normal(size=40), Product(bits, d_in=d)
    expected = bits.to_dense() @ (d * x)
    d[...] = 0
    np.testing.assert_allclose(product.vector(x), expected, rtol=1e-12)
