"""Sizes and decibels against the figures that METHODS and the paper give."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diba_np import DiBAFactors
from diba_np.arrays import row_blocks
from diba_np.matrix.budgets import largest_k, storage_bits
from diba_np.matrix.quality import output_snr_db, snr_db


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
    assert tuple(largest_k(*shape, r) for r in (0.5, 1, 2, 4)) == ks


@given(st.integers(1, 500), st.integers(1, 500), st.floats(0.1, 40), st.sampled_from([8, 16, 32]))
def test_largest_k_fits_and_one_more_does_not(m, n, rate, scale_bits):
    k = largest_k(m, n, rate, scale_bits)
    assert storage_bits(m, n, k + 1, scale_bits) > rate * m * n - 1e-6
    if k >= 1:
        assert storage_bits(m, n, k, scale_bits) <= rate * m * n + 1e-6


def test_storage_bits():
    assert storage_bits(2, 3, 4) == 4 * 5 + 16 * 9


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


def test_output_snr_is_the_snr_of_the_outputs(rng):
    A, X = rng.normal(size=(4, 6)), rng.normal(size=(50, 6))
    A_hat = A + 0.1 * rng.normal(size=A.shape)
    assert output_snr_db(A, A_hat, X) == pytest.approx(snr_db(X @ A.T, X @ A_hat.T))
    assert output_snr_db(A, A_hat, np.eye(6)) == pytest.approx(snr_db(A, A_hat))
    assert output_snr_db(A * 1e200, A_hat * 1e200, X) == pytest.approx(output_snr_db(A, A_hat, X))
    assert output_snr_db(A, A, X) == math.inf
    f = DiBAFactors([1.0, 2.0], [[1], [1]], [3.0], [[1, 0]], [1.0, 1.0])
    assert output_snr_db(f.to_dense(), f, np.eye(2)) == math.inf
    with pytest.raises(ValueError, match=r"X must have shape \(N, 6\), one sample a row, got \(6,"):
        output_snr_db(A, A_hat, X.T)
    with pytest.raises(ValueError, match="one shape"):
        output_snr_db(A, A_hat.T, X)


def test_output_snr_reads_inputs_in_blocks(monkeypatch, rng):
    A, X = rng.normal(size=(4, 6)), rng.normal(size=(50, 6))
    whole = output_snr_db(A, A * 0.9, X)
    monkeypatch.setattr(row_blocks, "__defaults__", (7 * 6,))
    assert output_snr_db(A, A * 0.9, X) == pytest.approx(whole)
