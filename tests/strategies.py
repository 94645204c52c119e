"""Hypothesis strategies of our own tests: those that users have, sums, and arrays of bits."""

import numpy as np
from hypothesis import strategies as st

from diba_np import DiBAFactors
from diba_np.testing import _SIZES as SIZES
from diba_np.testing import factorizations, matrices, packed_bits

__all__ = ["SIZES", "bit_arrays", "factors", "matrices", "sums"]

_UP_TO_40 = st.integers(1, 40)


def bit_arrays(rows=SIZES, columns=SIZES):
    """(rows, columns) uint8 zeros and ones, of any density."""
    return packed_bits(rows, columns).map(lambda bits: bits.to_dense())


def factors(sizes=SIZES):
    """A `DiBAFactors` with diagonals of both signs, some entries zero, without a bias."""
    return factorizations(sizes, sizes, sizes).filter(lambda f: f.bias is None)


@st.composite
def sums(draw, sizes=_UP_TO_40):
    """A sum of one to three terms, with a bias or without."""
    first = draw(factors(sizes))
    m, n = first.shape
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    terms = [first]
    for k in draw(st.lists(sizes, max_size=2)):
        d1, d2, d3 = (rng.normal(size=size) for size in (m, k, n))
        b1, b2 = rng.integers(0, 2, (m, k)), rng.integers(0, 2, (k, n))
        terms.append(DiBAFactors(d1, b1, d2, b2, d3, first.shift))
    bias = rng.normal(size=m) if draw(st.booleans()) else None
    return DiBAFactors.from_terms(terms, {"made": "here"}, bias=bias)
