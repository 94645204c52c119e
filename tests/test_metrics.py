"""Sizes and decibels against the figures that METHODS and the paper give."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diba_np import metrics
from diba_np.metrics import snr_db


@pytest.mark.parametrize(
    ("shape", "ks"),
    [
        ((384, 384), (78, 172, 360, 736)),
        ((1536, 384), (136, 288, 593, 1202)),
        ((768, 768), (174, 364, 744, 1504)),
        ((3072, 768), (289, 595, 1207, 2431)),
        ((4096, 4096), (1006, 2028, 4072, 8160)),
    ],
)
def test_largest_k_of_the_test_vectors(shape, ks):
    assert tuple(metrics.largest_k(*shape, r) for r in (0.5, 1, 2, 4)) == ks


@given(st.integers(1, 500), st.integers(1, 500), st.floats(0.1, 40), st.sampled_from([8, 16, 32]))
def test_largest_k_fits_and_one_more_does_not(m, n, rate, scale_bits):
    k = metrics.largest_k(m, n, rate, scale_bits)
    assert metrics.storage_bits(m, n, k + 1, scale_bits) > rate * m * n - 1e-6
    if k >= 1:
        assert metrics.storage_bits(m, n, k, scale_bits) <= rate * m * n + 1e-6


def test_storage_ratio():
    assert metrics.storage_bits(2, 3, 4) == 4 * 5 + 16 * 9
    assert metrics.storage_ratio(2, 3, 4) == (4 * 5 + 16 * 9) / (32 * 6)


def test_snr_db_edges():
    A = np.arange(6.0).reshape(2, 3)
    assert snr_db(A, A) == math.inf
    assert snr_db(np.zeros((2, 2)), np.zeros((2, 2))) == math.inf
    assert snr_db(np.zeros((2, 2)), np.ones((2, 2))) == -math.inf
    assert snr_db(A, np.zeros((2, 3))) == 0.0
    assert snr_db(A * 1e200, A * 0.9e200) == pytest.approx(20)
    assert snr_db(A * 1e-200, A * 0.9e-200) == pytest.approx(20)
    with pytest.raises(ValueError, match="one shape"):
        snr_db(A, A.T)
    with pytest.raises(ValueError, match="2-D"):
        snr_db(A[0], A[0])
