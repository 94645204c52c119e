"""Sums of several terms: one class, and whatever one term can do."""

import copy
import pickle
import weakref
from pathlib import Path

import h5py
import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import lsqr
from strategies import sums

from diba_np import DiBAFactors, FormatError, factorize, load
from diba_np.cli.main import main
from diba_np.matrix.diagonals import LogGrid
from diba_np.matrix.row_blocks import RowBlocks

GOLDEN = Path(__file__).parents[2] / "data" / "golden_v3.h5"


def dense(f):
    """The float64 matrix by the plain reference."""
    parts = [(t.d1, t.b1.to_dense(), t.d2, t.b2.to_dense(), t.d3) for t in f.terms]
    return sum(naive.dense_fast(*part, f.shift) for part in parts)


def assert_same(f, g):
    assert (f.shape, f.k, f.shift, f.record) == (g.shape, g.k, g.shift, g.record)
    assert len(f.terms) == len(g.terms)
    for one, other in zip(f.terms, g.terms, strict=True):
        assert (one.b1, one.b2) == (other.b1, other.b2)
        assert one.grids == other.grids
        for name in ("d1", "d2", "d3"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    if f.bias is None:
        assert g.bias is None
    else:
        np.testing.assert_array_equal(f.bias, g.bias)


@pytest.fixture
def two(rng):
    A = rng.normal(size=(23, 17))
    first = factorize(A, k=12, scale_bits=(8, 3, 4), max_sweeps=20, threads=1)
    second = factorize(A - first.to_dense(), k=9, max_sweeps=20, threads=1)
    return A, DiBAFactors.from_terms([first, second], {"a": 1})


@settings(max_examples=40)
@given(sums(), st.sampled_from([np.float32, np.float64]), st.integers(0, 2**31))
def test_a_sum_is_the_operator_of_its_dense_matrix(f, dtype, seed):
    rng = np.random.default_rng(seed)
    m, n = f.shape
    exact = dense(f)
    near = 2e-5 * (1 + np.abs(exact).max() * max(m, n)) * (1 + f.k)
    np.testing.assert_allclose(f.to_dense(), exact, atol=near)
    x, X = rng.normal(size=n).astype(dtype), rng.normal(size=(n, 5)).astype(dtype)
    y = rng.normal(size=m).astype(dtype)
    assert (f @ x).dtype == dtype
    np.testing.assert_allclose(f @ x, exact @ x, atol=near)
    np.testing.assert_allclose(f @ X, exact @ X, atol=near)
    np.testing.assert_allclose(f.matvec(X.T), (exact @ X).T, atol=near)
    np.testing.assert_allclose(f.T @ y, exact.T @ y, atol=near)
    most = np.abs(exact).sum(axis=1).max() * np.abs(x).max()  # that a product of entries can be
    rounded = f.matvec_rounded(x.astype(np.float32))
    np.testing.assert_allclose(rounded, exact @ x, atol=1e-3 * most + near)
    np.testing.assert_allclose(f[m - 1], f.to_dense()[m - 1], atol=near)
    assert f.T.T is f
    assert f.T.k == f.k
    assert f.T.bias is None
    np.testing.assert_allclose(f.T.to_dense(), exact.T, atol=near)


@settings(max_examples=25)
@given(sums())
def test_copies_and_files_hold_the_same(tmp_path_factory, f):
    path = tmp_path_factory.mktemp("terms") / "f.h5"
    assert f.save(path) <= f.storage_bits() / 8 + 16 * 1024
    for again in (load(path), pickle.loads(pickle.dumps(f)), copy.deepcopy(f)):
        assert_same(f, again)
    with h5py.File(path) as file:
        assert file.attrs["format_version"] == (1 if len(f.terms) == 1 else 3)


def test_one_term_is_an_ordinary_factorization(rng):
    f = factorize(rng.normal(size=(9, 11)), k=5, scale_bits=4)
    g = DiBAFactors.from_terms([f])
    assert g.terms == (g,)
    assert f.terms == (f,)
    assert_same(f, g)
    assert g.scale_bits == f.scale_bits
    assert g.storage_bits() == f.storage_bits()
    assert repr(f) == repr(g)
    again = f.with_record({"b": 2})
    assert again.record == {"b": 2}
    assert_same(f, again.with_record(f.record))


def test_bits_of_every_term_count(two):
    _, f = two
    first, second = f.terms
    assert f.k == 21
    assert f.storage_bits() == first.storage_bits() + second.storage_bits()
    assert f.storage_bits(16) == 21 * 40 + 16 * (2 * 40 + 21)
    assert sum(f.storage_breakdown().values()) == f.storage_bits()
    assert f.storage_breakdown()["payload"] == 21 * 40
    biased = DiBAFactors.from_terms(f.terms, bias=np.ones(23))
    assert biased.storage_bits() == f.storage_bits() + 32 * 23
    assert_same(f.with_bias(np.ones(23)), biased.with_record(f.record))
    assert_same(f.with_bias(np.ones(23)).with_bias(None), f)
    assert repr(f).startswith("DiBAFactors(23 x 17, k=21 in 2 terms, ")
    before = f.nbytes
    for term in f.terms:  # whose own tiles are let go when the sum lays out its
        term @ np.ones(17, np.float32)
    tiles = [weakref.ref(bits.tiles) for term in f.terms for bits in (term.b1, term.b2)]
    f @ np.ones(17, np.float32)
    assert [reference() for reference in tiles] == [None] * 4
    assert f.nbytes > before + sum(t.b1.tiles.nbytes + t.b2.tiles.nbytes for t in f.terms)
    held = f.nbytes
    for term in f.terms:  # the tiles are those of the sum
        term @ np.ones(17, np.float32)
    assert f.nbytes <= held + sum(term._product.nbytes for term in f.terms)


def test_what_is_that_of_a_single_term_says_where_to_look(two):
    _, f = two
    for name in ("d1", "d2", "d3", "b1", "b2", "grids", "scale_bits"):
        with pytest.raises(AttributeError, match=rf"sum of 2 terms has no {name}.*f.terms\[0\]"):
            getattr(f, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        f.nothing  # noqa: B018
    for name in ("d1", "shift", "bias"):
        with pytest.raises(AttributeError, match=f"{name} of a factorization is fixed"):
            setattr(f, name, 1)


def test_terms_are_flattened_and_must_fit(two, rng):
    _, f = two
    assert len(DiBAFactors.from_terms([f, f]).terms) == 4
    other = factorize(rng.normal(size=(23, 16)), k=3)
    with pytest.raises(ValueError, match=r"one shape and shift, got \(23, 16\) with shift 0, \(23"):
        DiBAFactors.from_terms([f, other])
    shifted = factorize(rng.normal(size=(23, 17)), k=3, shift=0.5)
    with pytest.raises(ValueError, match="one shape and shift"):
        DiBAFactors.from_terms([f, shifted])
    with pytest.raises(ValueError, match="got none"):
        DiBAFactors.from_terms([])
    with pytest.raises(TypeError, match="terms must hold DiBAFactors, got ndarray at 1"):
        DiBAFactors.from_terms([f, np.ones(3)])
    with pytest.raises(ValueError, match="terms must have no bias, term 0 has one"):
        DiBAFactors.from_terms([DiBAFactors.from_terms(f.terms, bias=np.ones(23)), f])
    with pytest.raises(TypeError, match="record must be a dict"):
        DiBAFactors.from_terms([f, f], record=3)
    with pytest.raises(ValueError, match=r"bias must have shape \(23,\)"):
        DiBAFactors.from_terms([f, f], bias=np.ones(2))


def test_truncate_leaves_terms_off(two):
    A, f = two
    first, second = f.terms
    np.testing.assert_array_equal(f.truncate(12).to_dense(), first.to_dense())
    g = f.truncate(15)
    assert [t.k for t in g.terms] == [12, 3]
    assert g.record == {"a": 1, "truncated_from": 21}
    np.testing.assert_allclose(
        g.to_dense(), first.to_dense() + second.truncate(3).to_dense(), atol=1e-5
    )
    with pytest.raises(ValueError, match="k must be at most 21, got 22"):
        f.truncate(22)
    assert f.truncate(21).snr(A) == pytest.approx(f.snr(A))


def test_it_solves_and_stands_in_row_blocks(two, rng):
    _, f = two
    b = f @ rng.normal(size=17)
    assert np.abs(f @ lsqr(f, b, atol=1e-10, btol=1e-10)[0] - b).max() < 1e-4
    blocks = RowBlocks([f, f.terms[0]])
    attrs, arrays = blocks.to_datasets()
    again = RowBlocks.from_datasets(attrs, arrays)
    np.testing.assert_array_equal(again.to_dense(), blocks.to_dense())
    assert blocks.storage_bits() == f.storage_bits() + f.terms[0].storage_bits()


def test_golden_file_of_version_3():
    f = load(GOLDEN)
    assert (f.shape, f.k, f.shift, [t.k for t in f.terms]) == ((5, 9), 12, 0.25, [7, 5])
    first, second = f.terms
    for term in f.terms:
        bits1 = [[(3 * i + 5 * j + i * j) % 7 % 2 for j in range(term.k)] for i in range(5)]
        bits2 = [[(2 * i + 3 * j + i * j) % 5 % 2 for j in range(9)] for i in range(term.k)]
        np.testing.assert_array_equal(term.b1.to_dense(), bits1)
        np.testing.assert_array_equal(term.b2.to_dense(), bits2)
    assert (first.scale_bits, second.scale_bits) == ((4, 3, 2), 16)
    np.testing.assert_array_equal(first.d1, np.float32(0.5 * 1.25 ** np.array([0, 15, 3, 8, 1.0])))
    d2 = 2.0**40 * np.array([-2.25, -1.5, -1, 0, 1, 1.5, 2.25])
    np.testing.assert_array_equal(first.d2, d2)
    np.testing.assert_array_equal(first.d3, 2.0 ** (np.arange(9) % 4 - 3.0))
    np.testing.assert_array_equal(second.d1, [1.0, -0.5, 2.0, 0.25, 1.5])
    np.testing.assert_array_equal(second.d2, np.arange(-2.0, 3.0) * 2.0**-30)
    np.testing.assert_array_equal(second.d3, np.arange(1.0, 10.0) / 8)
    np.testing.assert_array_equal(f.bias, np.arange(5) / 4)
    assert f.record == {"made_by": "golden", "value": 1.5}


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("sizes", np.array([12, 8]), r"attribute sizes: found \[12, 8\], expected two or more"),
        ("sizes", np.array([21]), "attribute sizes: found"),
        ("sizes", np.array([22, -1]), "attribute sizes: found"),
        ("sizes", np.array([12.0, 9.0]), "attribute sizes: found"),
        ("sizes", 21, "attribute sizes: found"),
        ("scale_bits", np.array([[8, 3, 4], [16, 16, 4]]), "attribute scale_bits: found"),
        ("scale_bits", np.array([[8, 3, 9], [16, 16, 16]]), "attribute scale_bits: found"),
        ("scale_bits", np.array([8, 3, 4]), "attribute scale_bits: found"),
        ("scales", np.array([1.0]), "attribute scales: found"),
        ("grids", np.zeros((2, 3)), "attribute grids: found"),
        ("format_version", 4, "attribute format_version: found 4, expected at most 3"),
        ("k", 20, "expected two or more sizes with the sum 20"),
        ("scales", np.array([0.0, 2.0]), "digest: found"),
    ],
)
def test_damaged_files_are_refused(two, tmp_path, attribute, value, message):
    _, f = two
    f.save(tmp_path / "f.h5")
    with h5py.File(tmp_path / "f.h5", "r+") as file:
        file.attrs[attribute] = value
    with pytest.raises(FormatError, match=message):
        load(tmp_path / "f.h5")


def test_the_command_line_shows_and_uses_terms(two, tmp_path, capsys):
    _, f = two
    f.save(tmp_path / "f.h5")
    assert main(["info", str(tmp_path / "f.h5")]) == 0
    shown = capsys.readouterr().out
    assert "21 in terms of 12, 9" in shown
    assert "8/3/4, 16-bit diagonals" in shown
    assert main(["info", str(tmp_path / "f.h5"), "--json"]) == 0
    assert '"terms": [12, 9]' in capsys.readouterr().out.replace("\n", "").replace("  ", "")
    assert main(["verify", str(tmp_path / "f.h5")]) == 0
    assert main(["reconstruct", str(tmp_path / "f.h5"), "-o", str(tmp_path / "B.npy")]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "B.npy"), f.to_dense())


def test_grids_of_every_term_stay_its_own(rng):
    grids = [LogGrid(3, 0.5 * (i + 1), 1.5) for i in range(2)]
    terms = []
    for grid in grids:
        d1, d2, d3 = (grid.levels[rng.integers(0, 8, size)] for size in (6, 4, 7))
        b1, b2 = rng.integers(0, 2, (6, 4)), rng.integers(0, 2, (4, 7))
        terms.append(DiBAFactors(d1, b1, d2, b2, d3, grids=(grid, grid, grid)))
    f = pickle.loads(pickle.dumps(DiBAFactors.from_terms(terms)))
    assert [term.grids[0] for term in f.terms] == grids
    assert type(f.storage_bits()) is int  # JSON takes no other
