"""`diba_np.testing`: its strategies draw what they say, its invariants notice what is wrong."""

import copy

import numpy as np
import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st
from strategies import sums

import diba_np as dn
from diba_np.testing import assert_factorization, factorizations, matrices, packed_bits


@given(f=factorizations())
@settings(max_examples=25)
def test_every_drawn_factorization_holds(f):
    assert_factorization(f, f.to_dense())


@given(f=sums())
@settings(max_examples=10)
def test_every_sum_holds(f):
    assert_factorization(f, f.to_dense())


@given(A=matrices(most=10), k=st.integers(1, 6))
@settings(max_examples=15)
def test_every_search_holds(A, k):
    assert_factorization(dn.factorize(A, k=k, effort="fast"), A)


def test_a_search_keeps_its_budget(rng):
    A = rng.normal(size=(40, 30))
    for scale_bits in (16, 4, 32):
        assert_factorization(dn.factorize(A, bits=4.0, scale_bits=scale_bits), A, bits=4.0)
    with pytest.raises(AssertionError, match="bits per weight must be at most 2"):
        assert_factorization(dn.factorize(A, bits=4.0), A, bits=2.0)


@given(bits=packed_bits(rows=st.just(3), columns=st.integers(60, 70)))
def test_packed_bits_have_the_shape_that_is_asked_for(bits):
    assert bits.shape[0] == 3
    assert 60 <= bits.shape[1] <= 70
    assert set(np.unique(bits.to_dense())) <= {0, 1}


def test_matrices_are_of_every_kind():
    find(matrices(), lambda A: not A.any(axis=1).all() and A.any())
    find(matrices(kinds=("decades",)), lambda A: np.ptp(np.log10(np.abs(A))) > 6)
    find(factorizations(), lambda f: f.bias is not None and f.shift == 0.25)


def broken(f, **changes):
    """The same object with other parts, past the checks of the class."""
    other = object.__new__(type(f))
    other.__dict__.update(f.__dict__ | changes)
    return other


def test_it_notices_what_is_wrong(rng):
    A = rng.normal(size=(9, 7))
    f = dn.factorize(A, k=4)
    assert_factorization(f, A)
    d1 = np.array(f.d1)
    with pytest.raises(AssertionError, match=r"shape must be \(7, 9\), is \(9, 7\)"):
        assert_factorization(f, A.T)
    with pytest.raises(AssertionError, match=r"d1 must be \(9,\) float32"):
        assert_factorization(broken(f, d1=d1.astype(np.float64)), A)
    with pytest.raises(AssertionError, match="d1 must be finite"):
        assert_factorization(broken(f, d1=d1 * np.float32(np.nan)), A)
    _ = f @ np.ones(7)  # the product keeps the parts that it was made of
    with pytest.raises(AssertionError, match="f @ X"):
        assert_factorization(broken(f, d1=d1 * 2), A)
    bits = copy.copy(f.b2)
    bits._words = f.b2.words | np.uint64(1 << 60)
    with pytest.raises(AssertionError, match="b2 must have zero bits behind its last column"):
        assert_factorization(broken(f, b2=bits), A)
    with pytest.raises(ValueError, match="A contains"):
        assert_factorization(f, A * np.nan)
