"""Ranges and units: rows and columns over decades, in whatever units channels and outputs are."""

import numpy as np
import pytest

import diba_np as dn
from diba_np.matrix.quality import output_snr_db

M, N = 48, 40


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(8)
    A = rng.normal(size=(M, N))
    X = (
        rng.normal(size=(300, N))
        @ np.linalg.cholesky(0.6 ** np.abs(np.subtract.outer(np.arange(N), np.arange(N)))).T
    )
    return A, X, np.exp2(rng.integers(-12, 13, N)), np.exp2(rng.integers(-12, 13, M))


@pytest.mark.parametrize("how", ["inputs", "gram"])
def test_units_of_channels_that_are_powers_of_two_change_no_bit(problem, how):
    A, X, u, _ = problem
    given = {"inputs": lambda X: X, "gram": lambda X: X.T @ X}[how]
    f, g = (dn.factorize(B, k=16, **{how: given(Z)}) for B, Z in ((A, X), (A * u, X / u)))
    reached, other = output_snr_db(A, f, X), output_snr_db(A * u, g, X / u)
    assert other == pytest.approx(reached, abs=0.25)


def test_units_of_outputs_do_not_count(problem):
    A, _, _, v = problem
    B = v[:, None] * A
    W = np.eye(M) + 0.3
    for weight, other in ((np.ones(M), v**-2.0), (W, W / v[:, None] / v)):
        f = dn.factorize(A, k=16, output_weight=weight)
        g = dn.factorize(B, k=16, output_weight=other)
        restored = g.to_dense() / v[:, None]
        assert dn.snr_db(A, restored) == pytest.approx(dn.snr_db(A, f), abs=0.5)


def test_dead_channels_stay_harmless(problem):
    A, X, u, _ = problem
    Z = X.copy()
    Z[:, 3] = 0
    with pytest.warns(UserWarning, match="inputs has 1 channel that is always zero"):
        f = dn.factorize(A * u, k=16, inputs=Z / u)
    with pytest.warns(UserWarning, match="always zero"):
        g = dn.factorize(A, k=16, inputs=Z)
    assert output_snr_db(A * u, f, Z / u) == pytest.approx(output_snr_db(A, g, Z), abs=0.5)


@pytest.mark.parametrize("scale_bits", [16, 32, "auto", 8])
@pytest.mark.parametrize("matrix", [False, True])
def test_output_weights_that_even_rows_out_serve_every_row(problem, scale_bits, matrix):
    A = problem[0]
    rows = np.logspace(-6, 0, M)
    B = rows[:, None] * A
    weight = np.diag(rows**-2.0) if matrix else rows**-2.0
    f = dn.factorize(B, bits=4.0, scale_bits=scale_bits, output_weight=weight)
    error = np.sum((B - f.to_dense()) ** 2, axis=1) / np.sum(B**2, axis=1)
    assert error.max() < 0.6  # 2.2 dB; the mean is above 5 dB


@pytest.mark.parametrize("scale_bits", [16, 32, "auto"])
def test_rows_and_columns_over_decades_do_not_vanish(problem, scale_bits):
    A = problem[0]
    B = np.logspace(-4, 0, M)[:, None] * A * np.logspace(-4, 0, N)
    f = dn.factorize(B, bits=4.0, scale_bits=scale_bits)
    assert f.bits_per_weight <= 4.0
    dense = f.to_dense()
    assert dense.any(axis=1).all()
    assert dense.any(axis=0).all()


def test_a_half_precision_file_holds_what_moved_up(problem, tmp_path):
    A = problem[0]
    B = np.logspace(-8, 0, M)[:, None] * A
    f = dn.factorize(B, bits=4.0, scale_bits=16)
    assert f.scale_bits == 16
    f.save(tmp_path / "a.h5")
    g = dn.load(tmp_path / "a.h5")
    for name in ("d1", "d2", "d3"):
        np.testing.assert_array_equal(getattr(f, name), getattr(g, name))


def test_rows_that_are_lost_are_named():
    A = np.diag(np.logspace(-30, 0, 16))
    with pytest.warns(UserWarning, match=r"A loses \d+ rows \(the first 0\) and .* columns"):
        f = dn.factorize(A, k=4, scale_bits=16)
    assert not f.to_dense().any(axis=1).all()


def test_rows_of_which_next_to_nothing_is_right_are_named_too(rng):
    A = rng.normal(size=(24, 40))
    A[12:] *= 1e-4
    with pytest.warns(UserWarning, match=r"A loses \d+ rows") as told:
        f = dn.factorize(A, k=9)
    dense = f.to_dense().astype(np.float64)
    lost = np.square(dense - A).sum(axis=1) > 0.9 * np.square(A).sum(axis=1)
    assert lost.any() and not lost[:12].any() and dense[lost].any(axis=1).all()
    first = np.flatnonzero(lost)[0]
    assert f"A loses {lost.sum()} rows (the first {first}), small" in str(told[0].message)


def test_the_record_counts_rows_that_few_components_leave_at_zero(recwarn):
    A = np.random.default_rng(0).normal(size=(20, 15))
    f = dn.factorize(A, k=3)
    rows, columns = (int((~f.to_dense().any(axis=axis)).sum()) for axis in (1, 0))
    assert (f.record["zero_rows"], f.record["zero_columns"]) == (rows, columns)
    assert rows > 0 and not recwarn.list


def test_an_ordinary_matrix_warns_of_nothing(problem, recwarn):
    dn.factorize(problem[0], k=24)
    assert not recwarn.list
