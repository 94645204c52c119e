"""BiTAT and GPTQ: order of the variants, exact flips, 1-bit products."""

import itertools

import naive
import numpy as np
import pytest

from diba_np.kernels.signs import flip_signs
from diba_np.matrix.quality import snr_db
from diba_np.methods.bitat import (
    ORDERS,
    BiTAT,
    binarize,
)
from diba_np.methods.feedback import inverse_cholesky, sequential_rounding
from diba_np.methods.fitting import gram
from diba_np.methods.gptq import GPTQ
from diba_np.methods.rounding import SignRows, UniformRounding


@pytest.fixture(scope="module")
def correlated():
    """(W, X_train, X_test): weights and inputs whose spectrum falls as 1 / j."""
    rng = np.random.default_rng(3)
    n = 96
    Q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    X = (rng.standard_normal((6000, n)) / np.sqrt(np.arange(1, n + 1))) @ Q.T
    return rng.standard_normal((128, n)), X[:4000], X[4000:]


def output_snr(W, W_hat, X):
    return snr_db(X @ W.T, X @ W_hat.T)


def test_order_of_the_variants_on_correlated_inputs(correlated):
    W, X, X_test = correlated
    H = gram(X, W.shape[1], 0.01)
    reached = {}
    for name, order, flips in [(o, o, False) for o in ORDERS] + [("flips", "descending", True)]:
        S, alpha = binarize(W, H, order, flips)
        assert set(np.unique(S)) == {-1.0, 1.0}
        reached[name] = output_snr(W, S * alpha[:, None], X_test)
    assert reached["plain"] + 1.5 < reached["ascending"] < reached["natural"]
    assert reached["natural"] < reached["descending"] + 0.15
    assert reached["descending"] + 0.4 < reached["flips"]


def test_order_of_the_variants_on_the_attention_matrix(attention):
    rng = np.random.default_rng(0)
    n = attention.shape[1]
    Q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    X = (rng.standard_normal((4000, n)) / np.sqrt(np.arange(1, n + 1))) @ Q.T
    H = gram(X[:3000], n, 0.01)
    reached = []
    for order, flips in [(o, False) for o in ORDERS] + [("descending", True)]:
        S, alpha = binarize(attention.astype(float), H, order, flips, rounds=1, passes=2)
        reached.append(output_snr(attention, S * alpha[:, None], X[3000:]))
    plain, ascending, natural, descending, flipped = reached
    assert abs(plain - 4.27) < 0.15
    assert plain + 2 < ascending < natural <= descending + 0.05
    assert descending + 0.5 < flipped


def test_on_white_inputs_all_variants_are_equal(rng):
    W = rng.standard_normal((64, 80))
    for order in ORDERS:
        S, alpha = binarize(W, np.eye(80), order, True)
        np.testing.assert_array_equal(S, np.where(W >= 0, 1.0, -1.0))
        np.testing.assert_allclose(alpha, np.abs(W).mean(axis=1))
    np.testing.assert_array_equal(
        BiTAT.fit(W, 1.5).to_dense() > 0, SignRows.fit(W, 1.5).to_dense() > 0
    )


def loss_of(w, s, H):
    q, p = s @ H @ s, s @ H @ w
    return w @ H @ w - p * p / q


def test_flips_are_exact_and_leave_no_single_or_double_flip_that_helps(rng):
    X = rng.standard_normal((40, 9)) @ rng.standard_normal((9, 9))
    H = X.T @ X / 40 + 0.01 * np.eye(9)
    W = rng.standard_normal((12, 9))
    S = np.where(rng.random((12, 9)) < 0.5, 1.0, -1.0)
    S *= np.where(np.sum((S @ H) * W, axis=1) < 0, -1.0, 1.0)[:, None]
    before = [loss_of(w, s, H) for w, s in zip(W, S, strict=True)]
    gain = np.empty(12)
    flip_signs(H, np.ascontiguousarray(W @ H), np.arange(9), 100, True, S, gain)
    after = np.array([loss_of(w, s, H) for w, s in zip(W, S, strict=True)])
    np.testing.assert_allclose(gain, before - after, atol=1e-9)
    assert (gain >= 0).all()
    for w, s, now in zip(W, S, after, strict=True):
        for count in (1, 2):
            for chosen in itertools.combinations(range(9), count):
                other = s.copy()
                other[list(chosen)] *= -1
                if other @ H @ w > 0:
                    assert loss_of(w, other, H) >= now - 1e-9


def test_columns_that_are_not_stored_stay_zero(correlated):
    W, X, X_test = correlated
    made = BiTAT.fit(W, 0.8, inputs=X)
    assert 0 < made.kept.sum() < W.shape[1]
    assert not made.to_dense()[:, ~made.kept].any()
    assert made.storage_bits() <= 0.8 * W.size
    assert (
        output_snr(W, made.to_dense(), X_test)
        > output_snr(W, SignRows.fit(W, 0.8).to_dense(), X_test) + 1
    )


def test_bad_options():
    with pytest.raises(ValueError, match="order must be one of"):
        binarize(np.eye(3), np.eye(3), "random")
    with pytest.raises(ValueError, match="one entry per row"):
        BiTAT.fit(np.eye(30), 8, inputs=np.ones((5, 30)), sample_weight=np.ones(4))
    with pytest.raises(ValueError, match="not all 0"):
        BiTAT.fit(np.eye(30), 8, inputs=np.ones((5, 30)), sample_weight=np.zeros(5))


def test_inverse_cholesky(rng):
    M = rng.standard_normal((9, 6))
    H = M.T @ M
    U = inverse_cholesky(H)
    np.testing.assert_allclose(np.triu(U), U)
    np.testing.assert_allclose(U.T @ U, np.linalg.inv(H), rtol=1e-8, atol=1e-10)


def naive_compensation(W, H, order, quantize_one):
    """Optimal compensation, column by column, with a fresh inverse every time."""
    W = W.copy()
    left = list(order)
    out = np.zeros_like(W)
    for j in order:
        inverse = np.linalg.inv(H[np.ix_(left, left)])
        at = left.index(j)
        out[:, j] = quantize_one(W[:, j])
        error = (W[:, j] - out[:, j]) / inverse[at, at]
        W[:, left] -= np.outer(error, inverse[at])
        left.pop(at)
    return out


@pytest.mark.parametrize("block", [2, 5, 128])
def test_sequential_rounding_equals_the_naive_form(block, rng):
    X = rng.standard_normal((60, 11)) @ rng.standard_normal((11, 11))
    H = X.T @ X
    W = rng.standard_normal((4, 11))
    order = rng.permutation(11)
    ours = sequential_rounding(W, H, order, lambda position, rest: np.rint(2 * rest[0]) / 2, block)
    np.testing.assert_allclose(
        ours, naive_compensation(W, H, order, lambda w: np.rint(2 * w) / 2), atol=1e-9
    )


def test_gptq_beats_plain_rounding_on_its_inputs(correlated):
    W, X, X_test = correlated
    for bits in (1.5, 2.3, 3.4):
        ours, plain = GPTQ.fit(W, bits, inputs=X), UniformRounding.fit(W, bits)
        assert (
            output_snr(W, ours.to_dense(), X_test) > output_snr(W, plain.to_dense(), X_test) + 1.5
        )


# -- kernels against the plain forms ---------------------------------------------------------------


@pytest.mark.parametrize("pairs", [False, True])
def test_sign_flips_equal_the_plain_ones(pairs, rng):
    X = rng.standard_normal((40, 9)) @ rng.standard_normal((9, 9))
    H = X.T @ X / 40 + 0.01 * np.eye(9)
    C = np.ascontiguousarray(rng.standard_normal((8, 9)) @ H)
    S = np.where(rng.random((8, 9)) < 0.5, 1.0, -1.0)
    S[:, 4] = 0.0  # a column that is not stored
    S *= np.where(np.sum(S * C, axis=1) < 0, -1.0, 1.0)[:, None]
    order = rng.permutation(9)
    plain, flips = naive.flip_signs(H, C, [j for j in order if j != 4], 5, pairs, S)
    assert flip_signs(H, C, order, 5, pairs, S, np.empty(8)) == flips > 0
    np.testing.assert_array_equal(S, plain)
