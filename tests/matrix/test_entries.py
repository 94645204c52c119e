"""Entries, rows and blocks of a compressed matrix, as NumPy takes them; dtypes of operands."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.sparse.linalg import aslinearoperator, lsqr, svds
from strategies import factors

from diba_np import DiBAFactors, methods
from diba_np.matrix.row_blocks import RowBlocks

M, N = 20, 30


@pytest.fixture(scope="module")
def f():
    rng = np.random.default_rng(0)
    b1, b2 = rng.integers(0, 2, (M, 9)), rng.integers(0, 2, (9, N))
    return DiBAFactors(rng.normal(size=M), b1, rng.normal(size=9), b2, rng.normal(size=N))


def same(found, expected):
    assert type(found) is type(expected)
    assert np.shape(found) == np.shape(expected)
    assert np.asarray(found).dtype == np.float32
    # entries near zero are differences of large ones
    atol = 2e-6 * max(1.0, np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=atol)


MASK = np.random.default_rng(1).random((M, N)) < 0.2
INDICES = [
    (3, 5),
    (-1, -N),
    (slice(2, 4), 1),
    (..., 2),
    (2, ...),
    ...,
    (),
    (slice(None), 1),
    (slice(None, None, -2), slice(3, 9, 2)),
    ([0, 1], [2, 3]),
    np.ix_([1, 2], [3, 4]),
    (None, 3),
    None,
    MASK,
    (MASK[:, 0], 3),
    (slice(None), MASK[0]),
    np.array([[1, 2], [3, 3]]),
    [],
    ([], 3),
    (3, []),
    (slice(5, 5), 2),
    [1, 1, 0],
    ((1, 2),),
    ((1, 2), 3),
    np.int8(3),
    np.uint64(3),
]


@pytest.mark.parametrize("index", INDICES, ids=lambda index: repr(index)[:30])
def test_an_index_gives_what_it_gives_of_the_dense_matrix(f, index):
    dense = f.to_dense()
    same(f[index], dense[index])


@given(f=factors(), data=st.data())
def test_any_index_of_numpy(f, data):
    index = data.draw(hnp.basic_indices(f.shape, allow_newaxis=True))
    same(f[index], f.to_dense()[index])
    pair = data.draw(hnp.integer_array_indices(f.shape))
    same(f[pair], f.to_dense()[pair])


def test_a_block_takes_the_room_of_two(rng):
    b1, b2 = rng.integers(0, 2, (400, 9)), rng.integers(0, 2, (9, 300))
    f = DiBAFactors(np.ones(400), b1, np.ones(9), b2, np.ones(300))
    assert peak(lambda: f[...]) < 2.5 * 4 * 400 * 300  # indices alone were 8 times the block
    assert peak(lambda: f[:, 100:]) < 2.5 * 4 * 400 * 200


def test_blocks_of_rows_expand_what_is_asked(rng):
    b2, ones = rng.integers(0, 2, (30, 2000)), np.ones(2000)
    blocks = [DiBAFactors(np.ones(4), np.ones((4, 30)), ones[:30], b2, ones) for _ in range(20)]
    stacked, one = RowBlocks(blocks), peak(lambda: blocks[0][1])
    assert peak(lambda: stacked[5]) < 1.5 * one
    product = stacked.T @ np.ones(80)
    assert peak(lambda: stacked.T @ np.ones(80)) < 10 * product.nbytes  # of 20 parts
    np.testing.assert_allclose(product, stacked.to_dense().T @ np.ones(80), rtol=1e-12)


def peak(call):
    """Return the most bytes that a call holds at once, what it makes once left out."""
    call()
    tracemalloc.start()
    call()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


def test_every_method_and_blocks_of_rows_take_them(f, rng):
    dense = f.to_dense()
    stacked = RowBlocks([f, f])
    same(stacked[[1, M + 1], 2:4], np.concatenate([dense, dense])[[1, M + 1], 2:4])
    rounded = methods.fit("rtn", dense, 4.0)
    same(rounded[3, ::2], rounded.to_dense()[3, ::2])


@pytest.mark.parametrize(
    "index", [M, (0, N), (1, 2, 3), "a", 1.5, (0.5, 1), [M], np.ones(3, bool), MASK.T]
)
def test_a_wrong_index_is_an_index_error(f, index):
    with pytest.raises(IndexError):
        f[index]


# -- operands --------------------------------------------------------------------------------------

SINGLE = [np.bool_, np.int8, np.uint8, np.int16, np.uint16, np.float16, np.float32]
DOUBLE = [np.int32, np.uint32, np.int64, np.uint64, np.float64, np.longdouble]
RESULTS = [(kind, np.float32) for kind in SINGLE] + [(kind, np.float64) for kind in DOUBLE]
RESULTS += [(np.complex64, np.complex64), (np.complex128, np.complex128)]


def operators(f):
    dense = f.to_dense()
    made = [methods.fit(label, dense, 6.0) for label in ("rtn", "svd16", "qswd")]
    return [f, f.T, RowBlocks([f, f]), *made, made[0].T]


@pytest.mark.parametrize(("kind", "result"), RESULTS)
def test_the_dtype_of_a_product_is_numpys_up_to_float64(f, kind, result):
    for operator in operators(f):
        n = operator.shape[1]
        x = (np.arange(2 * n) % 2).reshape(n, 2).astype(kind)
        for y in (operator @ x, operator @ x[:, 0], operator.matvec(x[:, 0]), operator.matmat(x)):
            assert y.dtype == result
        dense = operator @ np.eye(n)
        np.testing.assert_allclose(operator @ x, dense @ x.astype(result), rtol=1e-4, atol=1e-4)


def test_ml_dtypes_count_as_float32(f):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="needs ml_dtypes")
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "int4"):
        kind = getattr(ml_dtypes, name)
        for operator in operators(f):
            x = (np.arange(operator.shape[1]) % 3).astype(kind)
            np.testing.assert_array_equal(operator @ x, operator @ x.astype(np.float32))
            assert (operator @ x).dtype == np.float32


@pytest.mark.parametrize("kind", [object, "U3", "M8[s]"])
def test_other_operands_are_refused(f, kind):
    for operator in operators(f):
        x = np.zeros(operator.shape[1], kind)
        with pytest.raises(TypeError, match="the operand must hold real numbers, got dtype"):
            operator @ x


def test_columns_none_and_many_vectors_of_every_operator(f, rng):
    for operator in operators(f):
        n, dense = operator.shape[1], operator.to_dense()
        for shape in ((n,), (n, 1), (0, n), (2, 0, n), (2, 3, n), (n, n)):
            x = rng.normal(size=shape)
            column = shape == (n, 1)
            expected = dense @ x if column else x @ dense.T
            for y in (operator.matvec(x), operator.T.rmatvec(x)):
                assert y.shape == expected.shape
                np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
        x = rng.normal(size=(2, n, 3))
        for y in (operator @ x, np.swapaxes(np.swapaxes(x, 1, 2) @ operator.T, 1, 2)):
            np.testing.assert_allclose(y, dense @ x, rtol=1e-4, atol=1e-4)


# -- an operator among scipy's ---------------------------------------------------------------------


@given(f=factors(), seed=st.integers(0, 2**32 - 1))
def test_products_are_linear_and_adjoint(f, seed):
    rng = np.random.default_rng(seed)
    m, n = f.shape
    x, z, y = rng.normal(size=(n, 1)), rng.normal(size=(n, 1)), rng.normal(size=(m, 1))
    dense = np.abs(f.to_dense()).sum() + 1e-30
    for operator in (f, aslinearoperator(f)):
        moved = operator @ (2.0 * x - z)
        assert moved.shape == (m, 1)
        np.testing.assert_allclose(moved, 2.0 * (operator @ x) - operator @ z, atol=1e-9 * dense)
        forwards, back = (y.T @ (operator @ x)).item(), (x.T @ (operator.T @ y)).item()
        assert abs(forwards - back) <= 1e-9 * dense * np.abs(x).max() * np.abs(y).max()
    assert (f @ np.empty((n, 0))).shape == (m, 0)


def test_solvers_take_it(f, rng):
    dense = f.to_dense().astype(np.float64)
    largest = svds(aslinearoperator(f), 2, return_singular_vectors=False, random_state=0)
    expected = np.linalg.svd(dense, compute_uv=False)[:2]
    np.testing.assert_allclose(np.sort(largest)[::-1], expected, rtol=1e-4)
    y = dense @ rng.normal(size=N)
    x = lsqr(f, y, atol=1e-12, btol=1e-12)[0]
    np.testing.assert_allclose(dense @ x, y, atol=1e-3 * np.abs(y).max())
