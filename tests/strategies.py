"""Hypothesis strategies: bounded, finite, small."""

import numpy as np
from hypothesis import strategies as st

from diba_np import DiBAFactors

_UP_TO_40 = st.integers(1, 40)

# sizes around the ends of words, and small ones
SIZES = st.one_of(st.integers(1, 12), st.sampled_from([63, 64, 65, 127, 128, 130]))


@st.composite
def bit_arrays(draw, rows=SIZES, columns=SIZES):
    """(rows, columns) uint8 zeros and ones, of any density."""
    m, n = draw(rows), draw(columns)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    return (rng.random((m, n)) < density).astype(np.uint8)


@st.composite
def factors(draw, sizes=SIZES):
    """A `DiBAFactors` with diagonals of both signs, some entries zero."""
    m, n, k = draw(sizes), draw(sizes), draw(sizes)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shift = draw(st.sampled_from([0.0, 0.5, 0.25, 1.0]))
    d1, d2, d3 = (rng.normal(size=s) * (rng.random(s) < 0.9) for s in (m, k, n))
    b1 = rng.integers(0, 2, (m, k))
    b2 = rng.integers(0, 2, (k, n))
    return DiBAFactors(d1, b1, d2, b2, d3, shift)


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


@st.composite
def matrices(draw, most=12):
    """Small real matrices of several kinds: normal, low rank, sparse, constant, with zero rows."""
    m, n = draw(st.integers(1, most)), draw(st.integers(1, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["normal", "rank1", "sparse", "constant", "zero rows"]))
    A = rng.normal(size=(m, n))
    if kind == "rank1":
        A = np.outer(A[:, 0], A[0])
    elif kind == "sparse":
        A *= rng.random((m, n)) < 0.2
    elif kind == "constant":
        A[:] = A[0, 0]
    elif kind == "zero rows":
        A[::2] = 0.0
    return A * draw(st.sampled_from([1.0, 1e-6, 1e6]))
