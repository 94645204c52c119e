"""Coded diagonals: grids, codes, and what a file makes of them."""

import pickle
from dataclasses import replace

import naive
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diba_np import DiBAFactors, FormatError, load
from diba_np.kernels.grids import descend_codes, round_each, round_in_order
from diba_np.matrix.budgets import GRID_BITS, largest_k, storage_bits
from diba_np.matrix.diagonals import LogGrid, check_scale_bits, fit_grid, pack_codes, unpack_codes
from diba_np.search.grids import round_diagonal


@st.composite
def grids(draw):
    low = float(np.float32(draw(st.floats(1e-6, 1e3))))
    ratio = float(np.float32(draw(st.floats(1.0, 1.2))))
    return LogGrid(draw(st.integers(2, 8)), low, ratio, draw(st.booleans()), draw(st.booleans()))


def coded(grid_of, m=9, k=13, n=11, seed=0):
    rng = np.random.default_rng(seed)
    vectors = [
        grid.decode(rng.integers(0, 2**grid.bits, size).astype(np.uint8))
        for grid, size in zip(grid_of, (m, k, n), strict=True)
    ]
    b1, b2 = rng.integers(0, 2, (m, k)), rng.integers(0, 2, (k, n))
    return DiBAFactors(vectors[0], b1, vectors[1], b2, vectors[2], 0.5, {"a": 1}, grids=grid_of)


@given(grids(), st.integers(0, 999))
def test_every_code_decodes_to_a_value_that_encodes_to_it(grid, seed):
    codes = np.arange(2**grid.bits).astype(np.uint8)
    values = grid.decode(codes)
    np.testing.assert_array_equal(grid.round(values), values)
    assert set(np.abs(values)) == set(grid.levels)
    x = np.random.default_rng(seed).normal(size=50) * grid.levels[-1]
    nearest = [min(grid.values, key=lambda v: abs(v - each)) for each in x]
    np.testing.assert_allclose(np.abs(grid.round(x) - x), np.abs(nearest - x), rtol=1e-6)
    assert LogGrid.from_pair(grid.bits, grid.to_pair()) == grid


@given(st.integers(2, 8), st.integers(0, 40), st.integers(0, 99))
def test_codes_pack_into_as_many_bits_as_they_have(bits, size, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, size).astype(np.uint8)
    stream = pack_codes(codes, bits)
    assert len(stream) == -(-bits * size // 8)
    np.testing.assert_array_equal(unpack_codes(stream, bits, size), codes)
    value = sum(int(c) << (bits * i) for i, c in enumerate(codes))
    assert stream.tobytes() == value.to_bytes(len(stream), "little")
    if bits * size % 8:
        stream[-1] |= 128
        with pytest.raises(ValueError, match="behind the last code"):
            unpack_codes(stream, bits, size)


def test_a_grid_is_fitted_with_signs_and_zeros_only_where_needed(rng):
    x = np.exp(rng.normal(size=200) / 3)
    plain = fit_grid(x, np.ones(200), 5)
    assert (plain.signed, plain.zero) == (False, False)
    assert np.abs(plain.round(x) / x - 1).mean() < 0.03
    x[3], x[5] = 0.0, -1.0
    full = fit_grid(x, np.ones(200), 5)
    assert (full.signed, full.zero) == (True, True)
    assert full.round(x)[3] == 0.0
    assert full.round(x)[5] < 0
    np.testing.assert_array_equal(fit_grid(np.zeros(4), np.ones(4), 2).round(np.zeros(4)), 0.0)
    np.testing.assert_array_equal(fit_grid(np.full(4, -2.5), np.ones(4), 2).round([-2.5]), -2.5)


@given(grids(), grids(), grids(), st.integers(0, 99))
def test_coded_factors_survive_everything(tmp_path_factory, g1, g2, g3, seed):
    f = coded((g1, g2, g3), seed=seed)
    path = tmp_path_factory.mktemp("scales") / "f.h5"
    size = f.save(path)
    assert f.scale_bits == (g1.bits, g2.bits, g3.bits)
    bits = 13 * 20 + 9 * g1.bits + 13 * g2.bits + 11 * g3.bits + 3 * GRID_BITS
    assert f.storage_bits() == storage_bits(9, 11, 13, f.scale_bits) == bits
    assert size <= bits / 8 + 16 * 1024
    for g in (load(path), pickle.loads(pickle.dumps(f)), f.T.T):
        assert g.grids == f.grids
        assert (g.b1, g.b2, g.record) == (f.b1, f.b2, f.record)
        for name in ("d1", "d2", "d3"):
            np.testing.assert_array_equal(getattr(f, name), getattr(g, name))
    assert f.T.grids == (g3, g2, g1)
    assert f.T.scale_bits == f.scale_bits[::-1]


def test_a_vector_must_lie_on_its_grid():
    f = coded((LogGrid(4, 0.5, 1.25), LogGrid(3, 1.0, 1.5, True), LogGrid(4, 0.5, 1.25)))
    with pytest.raises(ValueError, match="d1 must consist of levels of its grid"):
        DiBAFactors(f.d1 * 1.01, f.b1, f.d2, f.b2, f.d3, 0.5, grids=f.grids)


@pytest.mark.parametrize("pair", [(np.nan, 1.1), (0.0, 1.1), (1.0, 0.5), (1e38, 3e38)])
def test_files_with_impossible_grids_are_refused(tmp_path, pair):
    import h5py

    from diba_np.files import container
    from diba_np.matrix.factors_format import payload

    f = coded((LogGrid(4, 0.5, 1.25), LogGrid(3, 1.0, 1.5, True), LogGrid(4, 0.5, 1.25)))
    f.save(tmp_path / "f.h5")
    with h5py.File(tmp_path / "f.h5", "r+") as file:
        changed = file.attrs["grids"]
        changed[0] = pair
        file.attrs["grids"] = changed
        attributes, arrays = payload(f)
        attributes |= {"format": container.FORMAT, "record": file.attrs["record"]}
        attributes["grids"] = changed.tolist()
        file.attrs["digest"] = container.digest_of(attributes, arrays)
    with pytest.raises(FormatError, match=r"a grid needs|must be finite"):
        load(tmp_path / "f.h5")


def test_budgets_count_widths_and_grids():
    assert largest_k(384, 384, 1.0, (4, 3, 4)) == 187
    assert storage_bits(384, 384, 187, (4, 3, 4)) == 187 * 771 + 8 * 384 + 192 <= 384**2


@given(st.integers(0, 10**6))
def test_descent_equals_its_naive_namesake(seed):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(9, 6))
    H, r, d = root.T @ root, rng.normal(size=6), rng.normal(size=6)
    H[2], H[:, 2] = 0.0, 0.0
    values = np.sort(rng.normal(size=7))
    ours = d.copy()
    gradient = H @ d - r
    moves = descend_codes(H, gradient, ours, values, 5)
    expected, count = naive.descend_codes(H, r, d, values, 5)
    np.testing.assert_array_equal(ours, expected)
    assert moves == count
    np.testing.assert_allclose(gradient, H @ ours - r, atol=1e-10)


@given(st.integers(0, 10**6), st.integers(1, 7))
def test_rounding_each_equals_its_naive_namesake(seed, count):
    rng = np.random.default_rng(seed)
    values = np.sort(rng.integers(-9, 9, count).astype(float))
    entries = rng.integers(-20, 20, 30) / 2.0  # many lie half-way between two values
    ours = entries.copy()
    round_each(values, ours)
    np.testing.assert_array_equal(ours, naive.round_each(values, entries))


@given(st.integers(0, 10**6))
def test_rounding_in_order_equals_its_naive_namesake(seed):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(9, 6))
    H, best, values = root.T @ root, rng.normal(size=6), np.sort(rng.normal(size=7))
    # M lower triangular with M^T M = H
    M = np.linalg.cholesky(H[::-1, ::-1])[::-1, ::-1].T
    ours = best.copy()
    round_in_order(np.ascontiguousarray(M), ours, values)
    np.testing.assert_array_equal(ours, naive.round_in_order(H, best, values))


@given(st.integers(0, 10**6), st.integers(2, 8))
def test_a_grid_is_the_best_of_the_ranges_tried(seed, bits):
    rng = np.random.default_rng(seed)
    x, weights = rng.normal(size=50) * rng.choice([1, -1, 0], 50), rng.random(50)
    grid = fit_grid(x, weights, bits)
    error = weights @ (grid.round(x) - x) ** 2
    logs = np.log(np.abs(x[x != 0]))
    steps = max(2 ** (bits - grid.signed) - 1 - grid.zero, 1)
    for low in np.quantile(logs, [0, 0.01, 0.1, 0.2]):
        for high in np.quantile(logs, [1, 0.99, 0.9]):
            ratio = float(np.float32(np.exp(max(high - low, 0.0) / steps)))
            tried = replace(grid, low=float(np.float32(np.exp(low))), ratio=ratio)
            assert error <= weights @ (tried.round(x) - x) ** 2 * (1 + 1e-9) + 1e-12


def test_rounding_one_by_one_beats_rounding_each(rng):
    root = rng.normal(size=(30, 30)) + 2.0
    H, exact = root.T @ root, np.abs(rng.normal(size=30)) + 0.5
    values = np.array([0.5, 1.0, 1.5, 2.0])
    rounded = round_diagonal(H, H @ exact, exact, values)
    assert set(rounded) <= set(values)
    near = values[np.abs(values - exact[:, None]).argmin(1)]

    def error(d):
        return (d - exact) @ H @ (d - exact)

    assert error(rounded) < 0.5 * error(near)
    assert error(round_diagonal(H, H @ exact, rounded, values)) <= error(rounded)


@pytest.mark.parametrize(
    ("given_", "error"),
    [(1, ValueError), (9, ValueError), ((4, 3), ValueError), ((16, 4, 4), ValueError),
     ("8", TypeError), (4.0, TypeError), (True, TypeError), (None, TypeError)],
)  # fmt: skip
def test_bad_widths(given_, error):
    with pytest.raises(error, match="scale_bits must be 16, 32"):
        check_scale_bits(given_)
    assert check_scale_bits(16) == 16
    assert check_scale_bits(5) == (5, 5, 5)
    assert check_scale_bits([4, 3, 4]) == (4, 3, 4)
