"""Stacks: several factorizations in one call against the naive reference and single products."""

import json
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diba_np import DiBAFactors
from diba_np.matrix.diagonals import fit_grid
from diba_np.matrix.packed_bits import joined_tiles
from diba_np.methods.linear_trellis import LinearTrellis
from diba_np.methods.trellis_fit import Coded
from diba_np.methods.trellis_modes import LINEAR_MODES
from diba_np.products import Stack, plan
from diba_np.products import stack as stacks
from diba_np.products.cpu import available_paths, vector_path
from diba_np.products.plan import KERNELS
from diba_np.products.product import Product
from diba_np.products.terms import SumProduct

PATHS = available_paths()
SIZES = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 45, 64, 65, 130, 300]))


def factorization(m, n, k, seed, shift=0.0, d3=None, terms=1):
    """A factorization with random bits and diagonals, of the first term if there are several."""
    if terms > 1:
        parts = [factorization(m, n, max(1, k - i), seed + i, shift, d3) for i in range(terms)]
        return DiBAFactors.from_terms(parts)
    rng = np.random.default_rng(seed)
    d1, d2 = rng.normal(size=m), rng.normal(size=k)
    d3 = rng.normal(size=n) if d3 is None else d3
    return DiBAFactors(d1, rng.integers(0, 2, (m, k)), d2, rng.integers(0, 2, (k, n)), d3, shift)


def stack_on(path, factors, bias=None):
    """A stack on one of the kernel paths; on the portable one it runs single products."""
    stack = Stack(factors, bias)
    stack._kernel = KERNELS.get(path)
    return stack


def product_on(path, f, x):
    """The product by the kernels of a single vector; there is no stack on the portable path."""
    if path == "portable":
        return f @ x
    parts = [
        Product(t.b2, t.b1, d_in=t.d3, d_mid=t.d2, d_out=t.d1, shift=t.shift, path=path)
        for t in f.terms
    ]
    product = parts[0]
    if len(parts) > 1:
        tiles = (joined_tiles([getattr(t, b) for t in f.terms]) for b in ("b2", "b1"))
        product = SumProduct(parts, *tiles)
    return product.matrix(x[:, np.newaxis])[:, 0]


def spoil_rooms():
    """Fill what lies between x and the results with what any other product may have left there."""
    for room in plan._rooms:
        room[:] = np.nan


def chain(f):
    bits = f.b1.to_dense().astype(int), f.b2.to_dense().astype(int)
    return (*bits, f.d1, f.d2, f.d3, f.shift)


def exact_stack(factors, bias, added, x):
    parts = [naive.stack([chain(t) for t in f.terms], 0, 0, x) for f in factors]
    sums = [np.sum(p.reshape(len(f.terms), -1), 0) for p, f in zip(parts, factors, strict=True)]
    return np.concatenate(sums) + bias + added


@settings(max_examples=25)
@given(
    n=SIZES,
    sizes=st.lists(
        st.tuples(SIZES, SIZES, st.booleans(), st.integers(1, 3)), min_size=1, max_size=4
    ),
    shift=st.sampled_from([0.0, 0.5]),
    bias=st.booleans(),
    added=st.booleans(),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("path", PATHS)
def test_a_stack_equals_naive_and_its_products(path, n, sizes, shift, bias, added, seed):
    rng = np.random.default_rng(seed)
    common = rng.normal(size=n)
    factors = [
        factorization(m, n, k, seed + i, shift, common if shared else None, terms)
        for i, (m, k, shared, terms) in enumerate(sizes)
    ]
    m = sum(f.shape[0] for f in factors)
    x = rng.normal(size=n).astype(np.float32)
    more = rng.normal(size=m).astype(np.float32) if added else None
    offset = rng.normal(size=m).astype(np.float32) if bias else None
    stack = stack_on(path, factors, offset)
    expected = np.concatenate([product_on(path, f, x) for f in factors])
    zeros = np.zeros(m, np.float32)
    exact = exact_stack(
        factors,
        zeros if offset is None else offset,
        zeros if more is None else more,
        x,
    )
    for shifted in (offset, more):
        if shifted is not None:
            expected = expected + shifted
    size = [sum(np.abs(t.d1) * (np.abs(t.d2).sum() * (np.abs(t.d3) @ np.abs(x))) for t in f.terms)
            * 2 + 9 for f in factors]  # fmt: skip
    bound = 12 * np.finfo(np.float32).eps * np.concatenate(size)
    # what is added comes before the second term
    ordered = not (bias or added) or all(len(f.terms) == 1 for f in factors)
    for _ in range(2):
        spoil_rooms()
        found = stack(x, added=more)
        assert found.dtype == np.float32
        if ordered:
            np.testing.assert_array_equal(found, expected)
        assert (np.abs(found - expected) <= bound).all()
    assert (np.abs(found - exact) <= bound).all()


def trellis(m, n, number, others, rotation, seed, scaled):
    """A linear trellis of random paths, most columns in one mode, the first ones in another."""
    rng = np.random.default_rng(seed)
    few = min(others, n // 11)
    used = [number] + [number % len(LINEAR_MODES) + 1] * (few > 0)
    chosen = np.arange(n) < few
    codes = []
    for place, columns in zip(used, (n - few, few), strict=False):
        mode = LINEAR_MODES[place - 1]
        shape = columns, -(-m // mode.weights)
        codes.append(rng.integers(0, 1 << mode.bits, shape).astype(np.uint8))
    scales = [None, None]
    if scaled:
        values = [rng.uniform(0.5, 2, size) for size in (m, n)]
        grids = [fit_grid(v, np.ones(v.size), 3) for v in values]
        scales = [(grid, grid.encode(v)) for grid, v in zip(grids, values, strict=True)]
    return LinearTrellis((m, n), Coded(rotation, used, chosen.astype(np.uint8), codes, *scales), 5)


@settings(max_examples=25)
@given(
    n=SIZES,
    sizes=st.lists(
        st.tuples(
            SIZES,
            st.integers(1, len(LINEAR_MODES)),
            st.integers(0, 2),
            st.sampled_from(["none", "inputs", "outputs", "both"]),
            st.booleans(),
        ),
        min_size=1,
        max_size=3,
    ),
    bias=st.booleans(),
    added=st.booleans(),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("path", PATHS)
def test_linear_trellises_beside_a_factorization(path, n, sizes, bias, added, seed):
    rng = np.random.default_rng(seed)
    factors = [trellis(m, n, *rest[:-1], seed, rest[-1]) for m, *rest in sizes]
    factors.insert(1, factorization(20, n, 9, seed))
    m = sum(f.shape[0] for f in factors)
    x = rng.normal(size=n).astype(np.float32)
    offset = rng.normal(size=m).astype(np.float32) if bias else np.zeros(m, np.float32)
    more = rng.normal(size=m).astype(np.float32) if added else np.zeros(m, np.float32)
    stack = stack_on(path, factors, offset if bias else None)
    dense = np.concatenate([f.to_dense() for f in factors]).astype(float)
    bound = 3e-6 * (np.abs(dense).max(axis=1) * np.abs(x).sum() * 4 + 4)
    for _ in range(2):
        spoil_rooms()
        found = stack(x, added=more if added else None)
        assert (np.abs(found - (dense @ x + offset + more)) <= bound).all()
    if stack._kernel is not None and not bias and not added:
        own = np.concatenate([f @ x for f in factors])
        same = path == vector_path()  # that of the single products
        assert np.array_equal(found, own) or not same


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e38])
def test_what_is_not_finite_in_a_trellis(bad, rng):
    f = trellis(40, 64, 3, 2, "both", 1, True)
    x = rng.normal(size=64).astype(np.float32)
    x[7] = bad
    with np.errstate(over="ignore", invalid="ignore"):
        expected = (f.to_dense().astype(float) @ x).astype(np.float32)
        for found in (f @ x, Stack([f])(x)):
            np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_trellis_with_a_part_of_low_rank_goes_its_own_way(rng):
    f = LinearTrellis.fit(rng.normal(size=(32, 48)) + 20, 3.0, threads=1)
    assert f.coded.low is not None
    stack, x = Stack([f]), rng.normal(size=48).astype(np.float32)
    assert stack._kernel is None
    np.testing.assert_array_equal(stack(x), f @ x)


@pytest.fixture
def layer():
    return [factorization(m, 40, 30, m) for m in (40, 16, 16)]


@pytest.mark.parametrize("path", PATHS)
def test_results_in_place(layer, path, rng):
    stack = stack_on(path, layer)
    assert stack.shape == (72, 40)
    assert stack.rows == (slice(0, 40), slice(40, 56), slice(56, 72))
    x, residual = (rng.normal(size=size).astype(np.float32) for size in (40, 72))
    expected = stack(x, added=residual)
    out = np.empty(72, np.float32)
    assert stack(x, added=residual, out=out) is out
    np.testing.assert_array_equal(out, expected)
    out[:] = residual
    assert stack(x, added=out, out=out) is out
    np.testing.assert_array_equal(out, expected)
    square = stack_on(path, layer[:1])
    expected = square(x)
    square(x, out=x)  # the result may take the place of the operand
    np.testing.assert_array_equal(x, expected)
    for y, f in zip(stack.split(stack @ x), layer, strict=True):
        np.testing.assert_array_equal(y, product_on(path, f, x))


def test_other_operands(layer, rng):
    bias = rng.normal(size=72)
    stack = Stack(layer, bias)
    X, added = rng.normal(size=(40, 9)).astype(np.float32), rng.normal(size=(72, 9))
    expected = np.concatenate([f @ X for f in layer]) + bias.astype(np.float32)[:, None]
    np.testing.assert_array_equal(stack(X), expected)
    np.testing.assert_allclose(stack(X, added=added), expected + added, rtol=1e-6, atol=1e-6)
    out = np.empty((72, 9), np.float32)
    assert stack(X, out=out) is out
    np.testing.assert_array_equal(out, expected)
    wide = stack(X[:, 0].astype(float))
    assert wide.dtype == np.float64
    exact = exact_stack(layer, bias.astype(np.float32), 0, X[:, 0])
    np.testing.assert_allclose(wide, exact, rtol=1e-9, atol=1e-9)
    for x in (X[:, 3], X[::-1, 3], X[:, 3].tolist(), X[:, 3].astype(np.float16)):
        np.testing.assert_allclose(
            stack(x), np.concatenate([f @ np.asarray(x) for f in layer]) + bias, atol=1e-2
        )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_as_in_single_products(layer, path, bad, rng):
    stack = stack_on(path, layer)
    x, out = rng.normal(size=40).astype(np.float32), rng.normal(size=72).astype(np.float32)
    x[7], out[3] = bad, -bad
    with np.errstate(invalid="ignore"):
        expected = np.concatenate([f @ x for f in layer]) + out
    assert not np.isfinite(expected).all()
    np.testing.assert_allclose(stack(x, added=out, out=out), expected, rtol=1e-4, atol=1e-4)
    x[7] = 1  # nothing of it is left
    np.testing.assert_allclose(stack(x), np.concatenate([f @ x for f in layer]), atol=1e-4)
    huge = np.full(40, 1e38, np.float32)
    expected = np.concatenate([f @ huge for f in layer])
    np.testing.assert_allclose(stack(huge), expected, rtol=1e-5)


def test_a_large_matrix_goes_its_own_way(layer, monkeypatch, rng):
    monkeypatch.setattr(stacks, "_SMALL", 100)
    stack, x = Stack(layer), rng.normal(size=40).astype(np.float32)
    assert stack._kernel is None
    np.testing.assert_array_equal(stack(x), np.concatenate([f @ x for f in layer]))


@pytest.mark.parametrize("terms", [1, 3])
def test_single_products_in_several_threads(terms, rng):
    f = factorization(70, 40, 30, 1, terms=terms)
    xs = rng.normal(size=(200, 40)).astype(np.float32)
    expected = [product_on(None, f, x) for x in xs]
    found = {}

    def work(name):
        found[name] = [f @ x for x in xs]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    for results in found.values():
        np.testing.assert_array_equal(results, expected)


def test_several_threads_and_processes(layer, rng):
    stack = Stack(layer, np.ones(72))
    xs = rng.normal(size=(200, 40)).astype(np.float32)
    expected, found = [stack(x) for x in xs], {}

    def work(name):
        found[name] = [stack(x) for x in xs]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    for results in found.values():
        np.testing.assert_array_equal(results, expected)
    copy = pickle.loads(pickle.dumps(stack))
    assert copy.nbytes == 288
    np.testing.assert_array_equal(copy(xs[0]), expected[0])
    diagonals = 4 * sum(sum(f.shape) + f.k for f in layer)
    assert copy.nbytes > 288 + diagonals


class Unfit:
    shape = (3, 40)


class Dense(Unfit):
    terms = ()  # as all methods have but DiBA


@pytest.mark.parametrize(
    ("factors", "options", "error", "words"),
    [
        ([], {}, ValueError, "factors must hold at least one factorization, got none"),
        ([Unfit()], {}, TypeError, "factors must be DiBAFactors or linear trellises, got Unfit"),
        ([Dense()], {}, TypeError, "factors must be DiBAFactors or linear trellises, got Dense"),
        ([factorization(3, 4, 2, 0), factorization(3, 5, 2, 0)], {}, ValueError,
         "factors must have the same number of columns, got 4, 5"),
        ([factorization(3, 4, 2, 0)], {"bias": np.ones(4)}, ValueError,
         r"bias must have shape \(3,\), got \(4,\)"),
        ([factorization(3, 4, 2, 0)], {"bias": ["a"] * 3}, TypeError,
         "bias must be a vector of real numbers, got dtype"),
        ([factorization(3, 4, 2, 0)], {"bias": [1, np.nan, 0]}, ValueError,
         "bias must be finite in float32, got nan at 1"),
        (factorization(3, 4, 2, 0), {}, TypeError,
         "factors must be a sequence of DiBAFactors, got DiBAFactors"),
        (None, {}, TypeError, "factors must be a sequence of DiBAFactors, got NoneType"),
    ],
)  # fmt: skip
def test_bad_stacks(factors, options, error, words):
    with pytest.raises(error, match=words):
        Stack(factors, **options)


def test_bad_operands(layer):
    stack, x = Stack(layer), np.ones(40, np.float32)
    readonly = np.ones(72, np.float32)
    readonly.setflags(write=False)
    memory = np.ones(100, np.float32)
    for operand, options, error, words in [
        (x[1:], {}, ValueError, r"x must have shape \(40,\) or \(40, b\), got \(39,\)"),
        (np.ones((2, 40, 1)), {}, ValueError, r"x must have shape \(40,\) or"),
        (x * 1j, {}, TypeError, "the operand must hold real numbers, got dtype complex"),
        (x, {"added": x}, ValueError, r"added must have shape \(72,\), got \(40,\)"),
        (x, {"added": np.array(["a"] * 72)}, TypeError, "added must hold real numbers"),
        (x, {"added": np.ma.masked_less(np.arange(72.0), 2)}, ValueError,
         "added must have no masked entries, got 2"),
        (x, {"out": [0.0] * 72}, TypeError, "out must be an array of float32, got list"),
        (x, {"out": np.ones(72)}, TypeError, "out must be an array of float32, got float64"),
        (x, {"out": readonly}, ValueError, r"writeable array in C-order of shape \(72,\)"),
        (x, {"out": x}, ValueError, r"writeable array in C-order of shape \(72,\), got \(40,\)"),
        (x, {"added": memory[1:73], "out": memory[:72]}, ValueError,
         "added must be out itself or share no memory with it"),
    ]:  # fmt: skip
        with pytest.raises(error, match=words):
            stack(operand, **options)
    with pytest.raises(ValueError, match=r"y must have 72 rows, got shape \(40,\)"):
        stack.split(x)


def test_the_benchmark_runs():
    script = Path(__file__).parents[2] / "scripts" / "bench_stack.py"
    command = [sys.executable, str(script), "--smoke", "--json"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = json.loads(out)["rows"]
    assert {row["way"] for row in rows} >= {"calls", "stack"}
    assert all(row["us"] > 0 for row in rows)


def test_the_table_beside_other_runtimes_runs():
    script = Path(__file__).parents[2] / "scripts" / "bench_runtimes.py"
    command = [sys.executable, str(script), "--smoke", "--json"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = json.loads(out)["rows"]
    assert {row["way"] for row in rows} >= {"numpy float32", "f @ x", "f @ X", "2 stacks"}
    assert all(row["us"] > 0 for row in rows)
