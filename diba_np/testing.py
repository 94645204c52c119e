"""Hypothesis strategies and invariants for property tests of one's own (extra ``[test]``).

Importing this needs the package ``hypothesis``; nothing of the library imports it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

from diba_np.checks import as_matrix
from diba_np.matrix.diagonals import DIAGONALS
from diba_np.matrix.factors import DiBAFactors
from diba_np.matrix.files import load
from diba_np.matrix.packed_bits import WORD, PackedBits

__all__ = ["assert_factorization", "factorizations", "matrices", "packed_bits"]

Array = NDArray[Any]

# small sizes, and those around the ends of words
_SIZES = st.one_of(st.integers(1, 12), st.sampled_from([63, 64, 65, 127, 128, 130]))
_SEEDS = st.integers(0, 2**32 - 1)
_KINDS = ("normal", "rank one", "sparse", "constant", "zero rows", "decades")


@st.composite
def packed_bits(
    draw: Any,
    rows: st.SearchStrategy[int] = _SIZES,
    columns: st.SearchStrategy[int] = _SIZES,
) -> PackedBits:
    """Draw packed 0/1 matrices of any density.

    Parameters
    ----------
    rows, columns : strategy of int, optional
        By default 1 to 12, and sizes around the ends of 64-bit words.

    Returns
    -------
    strategy of PackedBits
    """
    shape, rng = (draw(rows), draw(columns)), np.random.default_rng(draw(_SEEDS))
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    return PackedBits(rng.random(shape) < density)


@st.composite
def factorizations(
    draw: Any,
    m: st.SearchStrategy[int] = _SIZES,
    n: st.SearchStrategy[int] = _SIZES,
    k: st.SearchStrategy[int] = _SIZES,
) -> DiBAFactors:
    """Draw factorizations: diagonals of both signs, zeros among them, any shift, some with a bias.

    Parameters
    ----------
    m, n, k : strategy of int, optional
        Rows, columns and intermediate dimension; by default as of `packed_bits`.

    Returns
    -------
    strategy of DiBAFactors
    """
    sizes = draw(m), draw(k), draw(n)
    rng = np.random.default_rng(draw(_SEEDS))
    shift = draw(st.sampled_from([0.0, 0.5, 0.25, 1.0]))
    d1, d2, d3 = (rng.normal(size=size) * (rng.random(size) < 0.9) for size in sizes)
    b1, b2 = (rng.integers(0, 2, shape) for shape in (sizes[:2], sizes[1:]))
    bias = rng.normal(size=sizes[0]) if draw(st.booleans()) else None
    return DiBAFactors(d1, b1, d2, b2, d3, shift, bias=bias)


@st.composite
def matrices(draw: Any, most: int = 12, kinds: tuple[str, ...] = _KINDS) -> Array:
    """Draw small real matrices, float64, finite: what a factorization has to cope with.

    Parameters
    ----------
    most : int, default 12
        Most rows and columns.
    kinds : tuple of str, optional
        Among "normal", "rank one", "sparse", "constant", "zero rows" and "decades" (rows and
        columns from 1e-4 to 1 in size); all by default.

    Returns
    -------
    strategy of (m, n) float64 ndarray
        Times 1, 1e-6 or 1e6.
    """
    m, n = draw(st.integers(1, most)), draw(st.integers(1, most))
    rng = np.random.default_rng(draw(_SEEDS))
    kind = draw(st.sampled_from(kinds))
    A: Array = rng.normal(size=(m, n))
    if kind == "rank one":
        A = np.outer(A[:, 0], A[0])
    elif kind == "sparse":
        A *= rng.random((m, n)) < 0.2
    elif kind == "constant":
        A[:] = A[0, 0]
    elif kind == "zero rows":
        A[::2] = 0.0
    elif kind == "decades":
        A *= 10.0 ** rng.uniform(-4, 0, (m, 1)) * 10.0 ** rng.uniform(-4, 0, n)
    return A * float(draw(st.sampled_from([1.0, 1e-6, 1e6])))


def assert_factorization(f: DiBAFactors, A: ArrayLike, *, bits: float | None = None) -> None:
    """Check all that holds of any factorization of a matrix; AssertionError says what does not.

    Shapes and dtypes of the parts; zero bits behind the last columns; products with vectors and
    matrices, and of the transpose, equal to those of the dense matrix; the counted storage, within
    a budget; the SNR; and the same factorization after a round trip through a file.

    Parameters
    ----------
    f : DiBAFactors
    A : (m, n) array_like
        What it stands for.
    bits : float, optional
        Stored bits per weight that it may take; by default any number.

    Raises
    ------
    AssertionError

    Notes
    -----
    Cost: a dense copy in float64, ``O(k m n)`` flops, and a temporary file.
    """
    matrix = as_matrix(A)
    m, n = matrix.shape
    _check(f.shape == (m, n), f"shape must be {(m, n)}, is {f.shape}")
    _check(f.k == sum(term.k for term in f.terms), "k must be the sum over the terms")
    for term in f.terms:
        _check_parts(term, m, n)
    _check_products(f)
    stored = f.k * (m + n)
    _check(f.storage_bits() >= stored, f"storage_bits must be at least {stored}")
    _check(f.storage_bits() == sum(f.storage_breakdown().values()), "storage_breakdown must add up")
    if bits is not None:
        own = (f.storage_bits() - (0 if f.bias is None else 32 * m)) / (m * n)
        _check(own <= bits * (1 + 1e-12), f"bits per weight must be at most {bits}, are {own}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "factorization.h5"
        f.save(path)
        again = load(path)
    _check(isinstance(again, DiBAFactors), "load must return a DiBAFactors")
    own, loaded = np.asarray(f.bias), np.asarray(again.bias)
    _check(np.array_equal(own, loaded), "bias must come back from a file as it was")
    _check(len(f.terms) == len(again.terms), "as many terms must come back from a file")
    for one, other in zip(f.terms, again.terms, strict=True):
        for name in DIAGONALS:
            same = np.array_equal(getattr(one, name), getattr(other, name))
            _check(same, f"{name} must come back from a file as it was")
        for name in ("b1", "b2"):
            same = np.array_equal(getattr(one, name).words, getattr(other, name).words)
            _check(same, f"{name} must come back from a file as it was")
    _check(again.snr(matrix) == f.snr(matrix), "snr must be the same after a file")


def _check_parts(f: DiBAFactors, m: int, n: int) -> None:
    """Check shapes, dtypes and padding of one term."""
    for name, size in zip(DIAGONALS, (m, f.k, n), strict=True):
        d = getattr(f, name)
        _check(d.shape == (size,) and d.dtype == np.float32, f"{name} must be ({size},) float32")
        _check(bool(np.isfinite(d).all()), f"{name} must be finite")
    for name, shape in (("b1", (m, f.k)), ("b2", (f.k, n))):
        bits = getattr(f, name)
        _check(bits.shape == shape, f"{name} must have shape {shape}, has {bits.shape}")
        tail = shape[1] % WORD
        over = bits.words[:, -1] >> np.uint64(tail) if tail else np.zeros(1, np.uint64)
        _check(not over.any(), f"{name} must have zero bits behind its last column")


def _check_products(f: DiBAFactors) -> None:
    """Check products against float64 arithmetic on the unpacked parts."""
    dense, sizes = np.zeros(f.shape), np.zeros(f.shape)
    for term in f.terms:
        b1, b2 = (bits.to_dense().astype(np.float64) for bits in (term.b1, term.b2))
        d1, d2, d3 = (d.astype(np.float64) for d in (term.d1, term.d2, term.d3))
        dense += (d1[:, None] * (b1 - f.shift) * d2) @ ((b2 - f.shift) * d3)
        # terms as products add them up: those of the bits, and those of the shift
        larger1, larger2 = np.abs(d1)[:, None] * (b1 + f.shift), (b2 + f.shift) * np.abs(d3)
        sizes += (larger1 * np.abs(d2)) @ larger2
    _check(_near(f.to_dense(), dense, sizes, 1e-5), "to_dense must be D1 B1 D2 B2 D3")
    rng = np.random.default_rng(0)
    for operator, exact, size in ((f, dense, sizes), (f.T, dense.T, sizes.T)):
        for columns, kind in ((1, np.float32), (3, np.float64), (17, np.float32)):
            X: Array = rng.normal(size=(operator.shape[1], columns)).astype(kind)
            tolerance = 1e-4 if kind == np.float32 else 1e-10
            bound = size @ np.abs(X)
            _check(_near(operator @ X, exact @ X, bound, tolerance), f"f @ X, {columns} columns")
            x = X[:, 0]
            _check(_near(operator @ x, exact @ x, bound[:, 0], tolerance), "f @ x, a vector")


def _near(result: Array, exact: Array, size: Array, tolerance: float) -> bool:
    """Tell whether a product is exact up to rounding, relative to the sum of its terms' sizes."""
    return result.shape == exact.shape and bool(
        (np.abs(result - exact) <= tolerance * size + 1e-30).all()
    )


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)
