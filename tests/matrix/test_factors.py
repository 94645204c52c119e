"""DiBAFactors: the operator agrees with the dense matrix it stands for."""

import gc
import pickle
import subprocess
import sys
import weakref

import naive
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import LinearOperator, aslinearoperator, lsqr, svds
from strategies import factors

from diba_np import DiBAFactors, PackedBits, factorize, snr_db
from diba_np.methods.rounding import UniformRounding

SMALL = st.integers(1, 9)


def reference(f):
    """The float64 dense matrix and the size of the terms that were added up for each entry."""
    parts = (f.d1, f.b1.to_dense(), f.d2, f.b2.to_dense(), f.d3)
    exact = naive.dense_fast(*parts, f.shift)
    size = naive.dense_fast(*(np.abs(p).astype(float) for p in parts), 0.0)
    return exact, size + np.abs(exact)


@given(factors(SMALL))
def test_to_dense_equals_the_triple_loop(f):
    parts = (f.d1, f.b1.to_dense(), f.d2, f.b2.to_dense(), f.d3)
    exact = naive.dense(*parts, f.shift)
    np.testing.assert_allclose(naive.dense_fast(*parts, f.shift), exact, atol=1e-12)
    assert f.to_dense().dtype == np.float32
    np.testing.assert_allclose(f.to_dense(), exact, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(f), f.to_dense())
    assert np.asarray(f, np.float64).dtype == np.float64


@given(factors(), st.sampled_from([np.float32, np.float64]), st.integers(0, 2**31))
def test_products_agree_with_the_dense_matrix(f, dtype, seed):
    rng = np.random.default_rng(seed)
    m, n = f.shape
    exact, size = reference(f)
    epsilon = 8 * np.finfo(dtype).eps * (m + n + f.k)
    x, y = rng.normal(size=n).astype(dtype), rng.normal(size=m).astype(dtype)

    def check(found, dense, bound, operand):
        assert found.dtype == dtype
        error = np.abs(found - dense @ operand.astype(float))
        limit = epsilon * (
            bound @ np.abs(operand.astype(float)) + np.abs(operand).sum() * bound.max()
        )
        assert (error <= limit + 1e-30).all()

    check(f @ x, exact, size, x)
    check(f.matmat(x[:, None])[:, 0], exact, size, x)
    check(f.T @ y, exact.T, size.T, y)
    check(f.H @ y, exact.T, size.T, y)
    check(f.rmatvec(y), exact.T, size.T, y)
    columns = int(rng.integers(1, 301))
    X, Y = rng.normal(size=(n, columns)).astype(dtype), rng.normal(size=(m, 3)).astype(dtype)
    check(f @ X, exact, size, X)
    check(f.rmatmat(Y), exact.T, size.T, Y)
    # dottest
    slack = 2 * epsilon * float(np.abs(y) @ size @ np.abs(x) + size.max() * np.abs(x).sum())
    assert float((f @ x) @ y) == pytest.approx(float(x @ (f.T @ y)), abs=float(10 * slack) + 1e-30)


def test_leading_axes(rng):
    f = factorize(rng.normal(size=(7, 5)), k=4)
    dense = f.to_dense().astype(float)
    x = rng.normal(size=(2, 3, 5))
    np.testing.assert_allclose(f.matvec(x), x @ dense.T, atol=1e-5)
    np.testing.assert_allclose(f._matvec(x[0]), x[0] @ dense.T, atol=1e-5)
    stack = rng.normal(size=(2, 3, 5, 4))
    np.testing.assert_allclose(f._matmat(stack), dense @ stack, atol=1e-5)
    with pytest.raises(ValueError, match=r"(?i)dimension mismatch"):
        f.matvec(rng.normal(size=(3, 6)))


def test_operands_of_other_kinds(rng):
    f = factorize(rng.normal(size=(7, 5)), k=4)
    dense = f.to_dense()
    integers = np.arange(5)
    assert (f @ integers).dtype == np.float64
    np.testing.assert_allclose(f @ integers, dense @ integers, atol=1e-5)
    z = rng.normal(size=5) + 1j * rng.normal(size=5)
    np.testing.assert_allclose(f @ z, dense @ z, atol=1e-5)
    np.testing.assert_allclose(f @ np.arange(10.0)[::2], dense @ np.arange(10.0)[::2], atol=1e-4)
    fixed = np.ones(5)
    fixed.setflags(write=False)
    np.testing.assert_allclose(f @ fixed, dense.sum(1), atol=1e-5)
    np.testing.assert_allclose(np.ones(7) @ f, dense.sum(0), atol=1e-5)


@pytest.mark.parametrize("fit", [UniformRounding.fit, lambda A, bits: factorize(A, bits=bits)])
def test_rows_times_it_do_without_scipy_where_columns_do(rng, monkeypatch, fit):
    f = fit(rng.normal(size=(17, 15)), 6.0)
    assert (np.arange(17) @ f).dtype == np.float64  # these are left to scipy
    monkeypatch.setattr(LinearOperator, "__rmatmul__", lambda self, x: pytest.fail("scipy"))
    for g in (f, f.T):
        dense, m = g.to_dense(), g.shape[0]
        for x in (rng.normal(size=m), rng.normal(size=(4, m)), np.ones((2 * m, 3)).T[:, ::2]):
            for operand in (x, x.astype(np.float32)):
                product = operand @ g
                assert product.dtype == operand.dtype
                np.testing.assert_array_equal(product, (g.T @ operand.T).T)
                np.testing.assert_allclose(product, x @ dense, atol=1e-4)


def test_scipy_takes_it_as_an_operator(attention):
    f = factorize(attention[:96, :64], bits=2.0)
    dense = f.to_dense().astype(float)
    assert aslinearoperator(f) is f
    values = np.sort(svds(f, 5, return_singular_vectors=False, v0=np.ones(64)))
    np.testing.assert_allclose(values, np.linalg.svd(dense)[1][:5][::-1], rtol=1e-4)
    y = dense @ np.arange(64.0)
    solved = lsqr(f, y, atol=1e-10, btol=1e-10, iter_lim=2000)[0]
    np.testing.assert_allclose(dense @ solved, y, rtol=1e-3, atol=1e-3 * np.abs(y).max())
    np.testing.assert_allclose(aslinearoperator(f).T @ y, dense.T @ y, rtol=1e-5, atol=1e-5)
    normal = f.T @ f
    assert isinstance(normal, LinearOperator)
    np.testing.assert_allclose(normal @ np.ones(64), dense.T @ (dense @ np.ones(64)), rtol=1e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_plain_operands_do_without_the_checks_of_scipy(monkeypatch, dtype, rng):
    f, g = factorize(rng.normal(size=(7, 5)), k=3), UniformRounding.fit(np.eye(7, 5), 8)
    x, y, X = (rng.normal(size=shape).astype(dtype) for shape in (5, 7, (5, 3)))
    for name in ("__matmul__", "matvec", "rmatvec"):
        monkeypatch.delattr(LinearOperator, name)
    for operator in (f, g):
        dense = operator.to_dense()
        for result, expected in (
            (operator @ x, dense @ x),
            (operator @ X, dense @ X),
            (operator.T @ y, dense.T @ y),
            (operator.matvec(x), dense @ x),
            (operator.rmatvec(y), dense.T @ y),
            (operator.T.matvec(y), dense.T @ y),
        ):
            assert result.dtype == dtype
            np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)


def test_transpose_is_a_factorization(rng):
    f = factorize(rng.normal(size=(9, 6)), k=5)
    assert isinstance(f.T, DiBAFactors)
    assert f.T.T is f
    np.testing.assert_allclose(f.T.to_dense(), f.to_dense().T, atol=1e-6)


def test_sizes_and_repr():
    f = DiBAFactors(
        np.ones(384), np.ones((384, 172)), np.ones(172), np.ones((172, 384)), np.ones(384)
    )
    assert f.storage_bits() == f.storage_bits(16) == 172 * 768 + 16 * (768 + 172)
    assert f.storage_bits(scale_bits=32) == 172 * 768 + 32 * (768 + 172)
    assert f.bits_per_weight == f.storage_bits() / 384**2
    assert f.storage_ratio() == pytest.approx(f.bits_per_weight / 32)
    assert repr(f) == "DiBAFactors(384 x 384, k=172, 0.9978 bits per weight)"
    # what half precision does not keep is counted, and stored, in single precision
    g = DiBAFactors(np.full(384, 1 / 3), f.b1, f.d2, f.b2, f.d3, shift=0.5)
    assert g.scale_bits == 32
    assert g.storage_bits() == f.storage_bits(32)
    assert "shift=0.5" in repr(g)


@given(factors(SMALL))
def test_snr_equals_the_definition(f):
    A = np.random.default_rng(0).normal(size=f.shape)
    noise = np.sum((A - reference(f)[0]) ** 2)
    assert f.snr(A) == pytest.approx(10 * np.log10(np.sum(A**2) / noise), abs=1e-3)
    assert f.snr(A) == snr_db(A, f)


def test_pickle_in_a_fresh_interpreter(tmp_path, rng):
    f = factorize(rng.normal(size=(20, 70)), k=9, shift=0.5)
    f @ np.ones(70)  # whatever a product keeps must not be in the way
    f.T @ np.ones(20)
    path = tmp_path / "f.pickle"
    path.write_bytes(pickle.dumps(f))
    code = (
        "import pickle, sys, numpy as np\n"
        f"f = pickle.loads(open({str(path)!r}, 'rb').read())\n"
        "total = float((f @ np.ones(70)).sum())\n"
        "print(f.b1.count(), f.b2.count(), f.shift, f.record['seed'], repr(total))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    b1, b2, shift, seed, total = out.stdout.split()
    assert (int(b1), int(b2), float(shift), int(seed)) == (f.b1.count(), f.b2.count(), 0.5, 0)
    assert float(total) == pytest.approx((f @ np.ones(70)).sum(), rel=1e-12)


@pytest.mark.parametrize("sizes", [(1e-30, 1e30, 1e30), (1e30, 1e-30, 1e-30)])
def test_dense_where_two_diagonals_alone_leave_the_range(sizes):
    ones = np.ones((2, 2))
    d1, d2, d3 = (np.full(2, size) for size in sizes)
    f = DiBAFactors(d1, ones, d2, ones, d3)
    np.testing.assert_allclose(f.to_dense(), np.full((2, 2), 2 * np.prod(sizes)), rtol=1e-6)


def test_immutable(rng):
    f = factorize(rng.normal(size=(4, 4)), k=2)
    for vector in (f.d1, f.d2, f.d3):
        with pytest.raises(ValueError, match="read-only"):
            vector[0] = 1
    for name in ("d1", "b2", "shift", "bias"):
        with pytest.raises(AttributeError, match=f"{name} of a factorization is fixed"):
            setattr(f, name, getattr(f, name))
    mine = np.ones(4, np.float32)
    DiBAFactors(mine, f.b1, f.d2, f.b2, f.d3)
    mine[0] = 2


@pytest.mark.parametrize("count", [1, 2])
def test_the_record_of_the_transpose_is_of_another_matrix(count):
    record = {"source": {"sha256": "0"}, "activations": {}, "output_snr_db": 9.0, "snr_db": 7.0}
    record |= {"zero_rows": 2, "zero_columns": 5}
    one = DiBAFactors([1.0, 2.0], [[1], [1]], [3.0], [[1, 0]], [1.0, 1.0], 0.0, record)
    f = DiBAFactors.from_terms([one] * count, record)
    assert f.T.record == {"snr_db": 7.0, "zero_rows": 5, "zero_columns": 2}
    assert f.T.T.record == record


@pytest.mark.parametrize("scale_bits", [16, 32, (5, 4, 5)])
def test_truncate_keeps_the_components_that_matter_most(rng, scale_bits):
    A = rng.normal(size=(40, 30))
    f = factorize(A, k=30, shift=0.5, scale_bits=scale_bits, max_sweeps=50)
    f.record["retune"] = {"loss_after": 1.0}
    kept = np.arange(30) < 20
    coarse = f.truncate(20)
    np.testing.assert_array_equal(coarse.b1.to_dense(), f.b1.to_dense()[:, kept])
    np.testing.assert_array_equal(coarse.d2, f.d2[kept])
    assert (coarse.grids, coarse.record["truncated_from"]) == (f.grids, 30)
    last = DiBAFactors(
        f.d1, f.b1.to_dense()[:, 10:], f.d2[10:], f.b2.to_dense()[10:], f.d3, 0.5, grids=f.grids
    )
    assert last.snr(A) < coarse.snr(A) < f.snr(A)
    fitted = f.truncate(20, A)
    assert fitted.snr(A) > coarse.snr(A) + 0.1
    assert (fitted.k, fitted.scale_bits) == (20, f.scale_bits)
    # figures are of the whole, or new
    assert fitted.record["snr_db"] == fitted.snr(A)
    gone = {"snr_db", "objective_history", "improving_flips_left", "stages", "zero_rows", "retune"}
    assert not gone & set(coarse.record)
    assert coarse.record["solver"] == f.record["solver"]
    biased = DiBAFactors(f.d1, f.b1, f.d2, f.b2, f.d3, 0.5, grids=f.grids, bias=np.arange(40))
    for cut in (biased.truncate(20), biased.truncate(20, A)):
        np.testing.assert_array_equal(cut.bias, biased.bias)
    # importance is the exact rise of the error without one component
    rises = []
    for l in range(30):
        d2 = f.d2.copy()
        d2[l] = 0
        dense = reference(DiBAFactors(f.d1, f.b1, d2, f.b2, f.d3, 0.5))[0]
        rises.append(np.sum((A - dense) ** 2))
    assert all(np.diff(rises) <= 1e-6 * np.sum(A**2))
    with pytest.raises(ValueError, match="k must be at most 30, got 31"):
        f.truncate(31)
    with pytest.raises(ValueError, match=r"A must have shape \(40, 30\), got \(2, 2\)"):
        f.truncate(3, np.ones((2, 2)))


def test_operands_that_numpy_would_flatten_are_refused(rng):
    f = DiBAFactors([1.0], [[1, 1]], [1.0, 2.0], np.ones((2, 3)), np.ones(3))
    masked = np.ma.masked_array(np.ones(3), [False, True, False])
    hidden = np.ma.masked_array([1.0], [True])
    for product in (
        lambda: f @ masked,
        lambda: f.matvec(masked),
        lambda: f.matvec_rounded(masked),
        lambda: f.rmatvec(hidden),
        lambda: f.rmatmat(hidden[:, None]),
    ):
        with pytest.raises(ValueError, match="must have no masked entries, got 1"):
            product()
    with pytest.raises(TypeError, match=r"the operand must be a dense array.*pass its .toarray"):
        f @ csr_matrix(np.eye(3))
    np.testing.assert_array_equal(f @ np.ma.masked_array(np.ones(3)), f @ np.ones(3))


ONE = np.ones((2, 2), int)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"d1": [1.0]}, ValueError, r"d1 must have shape \(2,\), got \(1,\)"),
        ({"d2": [1.0, np.nan]}, ValueError, "d2 must be finite in float32, got nan at 1"),
        ({"d3": [1e39, 1.0]}, ValueError, "d3 must be finite in float32, got 1e"),
        ({"d1": ["a", "b"]}, TypeError, "d1 must be a vector of real numbers"),
        ({"b1": ONE * 3}, ValueError, "got 3"),
        ({"b2": np.ones((3, 2))}, ValueError, r"must share k, got \(2, 2\) and \(3, 2\)"),
        ({"shift": 2}, ValueError, r"shift must lie in \[0, 1\], got 2"),
        ({"shift": "x"}, TypeError, "shift must be a number"),
        ({"shift": "0.5"}, TypeError, "shift must be a number"),
        ({"shift": True}, TypeError, "shift must be a number"),
        ({"shift": np.nan}, ValueError, "shift must be finite"),
        ({"record": [1]}, TypeError, "record must be a dict, got list"),
    ],
)
def test_bad_arguments(changed, error, words):
    good = {"d1": [1, 1], "b1": ONE, "d2": [1, 1], "b2": PackedBits(ONE), "d3": [1, 1]}
    with pytest.raises(error, match=words):
        DiBAFactors(**(good | changed))


@pytest.mark.parametrize(
    "index",
    [
        3,
        -1,
        np.int64(2),
        slice(1, 7, 2),
        slice(5, 5),
        [4, 4, 0],
        [],
        np.array([[1, 2], [3, -7]]),
        np.arange(9) % 2 == 0,
        ...,
    ],
    ids=str,
)
def test_rows_are_those_of_the_dense_matrix(rng, index):
    f = factorize(rng.normal(size=(9, 7)), k=5)
    expected = f.to_dense()[index]
    for found in (f[index], f.rows(index)):
        assert (found.shape, found.dtype) == (expected.shape, np.float32)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("index", [9, [0, -10], 1.5, (1, 7), "a", np.ones(8, bool)], ids=str)
def test_bad_row_indices_are_index_errors(rng, index):
    f = factorize(rng.normal(size=(9, 7)), k=5)
    with pytest.raises(IndexError):
        f[index]


def test_a_factorization_that_is_dropped_is_freed_at_once(rng):
    """A circle would hold its arrays until Python looks for circles, and it counts objects."""
    f = DiBAFactors(np.ones(4), rng.integers(0, 2, (4, 3)), np.ones(3), np.eye(3, 5), np.ones(5))
    whole = DiBAFactors.from_terms([f, f])
    for made in (f, whole):
        assert made.T.T is made
        assert made.T is made.T
        np.testing.assert_array_equal(made.T @ np.ones(4), made.to_dense().sum(axis=0))
    alone = whole.T
    gone = [weakref.ref(f), weakref.ref(f.b1), weakref.ref(whole), weakref.ref(f.T)]
    gc.disable()
    try:
        del made, whole
        np.testing.assert_array_equal(alone.T.to_dense(), 2 * f.to_dense())
        assert alone.T.T is alone
        del f, alone
        assert [reference() for reference in gone] == [None] * 4
    finally:
        gc.enable()
