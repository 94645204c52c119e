"""Errors fed back into later columns by codes of few bits."""

import numpy as np
import pytest

from diba_np.methods.feedback import _NOISE, fed_back, output_error, sequential_rounding
from diba_np.methods.trellis import Trellis


@pytest.fixture
def correlated(rng):
    X = rng.normal(size=(400, 40)) * np.exp(-0.15 * np.arange(40)) @ rng.normal(size=(40, 40))
    H = X.T @ X / len(X)
    return rng.normal(size=(60, 40)) * np.exp(0.3 * rng.normal(size=40)), H / np.trace(H) * 40


def test_what_a_column_costs_is_what_later_ones_leave_over(correlated, rng):
    W, H = correlated
    order = rng.permutation(40)
    fed, weight = fed_back(np.mean(W**2, axis=0), H, order, 1.0)
    for at, j in enumerate(order):
        later = order[at + 1 :]
        given = fed[j, later] @ np.linalg.solve(fed[np.ix_(later, later)], fed[later, j])
        assert weight[j] == pytest.approx(fed[j, j] - given)


@pytest.mark.parametrize("bits", [0.1, 1.0, 3.0])
def test_the_noise_is_the_level_of_reverse_water_filling(correlated, bits):
    W, H = correlated
    square, order = np.mean(W**2, axis=0), np.arange(40)
    fed, _ = fed_back(square, H, order, bits)
    added = np.diag(fed - H) * square / _NOISE
    np.testing.assert_allclose(added, added[0])
    variance = np.linalg.inv(np.linalg.cholesky(np.linalg.inv(H))).diagonal() ** 2 * square
    rates = np.maximum(0.5 * np.log2(variance / added[0]), 0.0)
    assert rates.mean() == pytest.approx(bits, rel=1e-4)
    off = fed - H
    np.fill_diagonal(off, 0.0)
    assert not off.any()


def test_the_target_under_it_is_the_charge_for_what_is_said(correlated, rng):
    W, H = correlated
    square = np.mean(W**2, axis=0)
    fed, _ = fed_back(square, H, np.arange(40), 1.0)
    aim = np.linalg.solve(fed, H @ W.T).T
    charges = np.diag(fed - H)
    apart = []
    for Q in (np.zeros_like(W), W, rng.normal(size=W.shape)):
        charged = output_error(W - Q, H) + float(np.sum(Q**2 * charges))
        apart.append(charged - output_error(aim - Q, fed))
    np.testing.assert_allclose(apart, apart[0])


def test_a_code_of_one_bit_loses_less_under_it(correlated):
    W, H = correlated
    square, order = np.mean(W**2, axis=0), np.argsort(-np.diagonal(H), kind="stable")
    size = 0.8 * np.sqrt(square)[order]

    def signs(at, rest):
        return size[at] * np.where(rest[0] >= 0, 1.0, -1.0)

    fed, _ = fed_back(square, H, order, 1.0)
    plain = sequential_rounding(W, H, order, signs)
    charged = sequential_rounding(np.linalg.solve(fed, H @ W.T).T, fed, order, signs)
    assert output_error(W - charged, H) < 0.9 * output_error(W - plain, H)


def test_a_column_of_zeros_changes_nothing_for_the_others(correlated):
    W, H = correlated
    square = np.mean(W**2, axis=0)
    square[7] = 0.0
    rest = np.delete(np.arange(40), 7)
    H[7, rest] = H[rest, 7] = 0.0
    # the same bits for all of them together
    fed, weight = fed_back(square, H, np.arange(40), 1.0)
    alone, own = fed_back(square[rest], H[np.ix_(rest, rest)], np.arange(39), 40 / 39)
    np.testing.assert_allclose(fed[np.ix_(rest, rest)], alone, rtol=1e-9)
    np.testing.assert_allclose(weight[rest], own, rtol=1e-6)


def test_nothing_is_fed_back_where_no_weight_counts(correlated):
    H, order = correlated[1], np.arange(40)
    fed, weight = fed_back(np.zeros(40), H, order, 1.0)
    np.testing.assert_array_equal(fed, H)
    assert np.isfinite(weight).all()


@pytest.mark.parametrize("rotation", ["none", "auto"])
def test_outputs_that_count_may_be_zero(rotation, rng):
    A, counts = np.zeros((40, 32)), np.arange(40) >= 20
    A[:20] = rng.normal(size=(20, 32))
    X = rng.normal(size=(100, 32))
    f = Trellis.fit(A, 4.0, inputs=X, output_weight=counts.astype(float), rotation=rotation)
    assert np.isfinite(f.to_dense()).all()
