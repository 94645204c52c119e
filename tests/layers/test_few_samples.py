"""`retune` with few samples: what is held out, what stays, and that nothing becomes worse."""

import numpy as np
import pytest

import diba_np as dn
from diba_np.matrix.diagonals import half_diagonals

M, N = 24, 32


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(5)
    A = rng.normal(size=(M, N))
    mix = rng.normal(size=(6, N))
    X = rng.normal(size=(800, 6)) @ mix + 0.3 * rng.normal(size=(800, N)) + rng.normal(size=N)
    return A, X, X @ A.T, dn.factorize(A, bits=2.0, scale_bits=16)


def output_db(f, X, Y):
    error = Y - X @ f.to_dense().astype(float).T - (0 if f.bias is None else f.bias)
    return 10 * np.log10(np.sum(Y**2) / np.sum(error**2))


@pytest.mark.parametrize("method", ["als", "lbfgs", "adam"])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_few_samples_do_no_harm(problem, method, count):
    _, X, Y, f = problem
    for start in (0, 100, 200):
        part = slice(start, start + count)
        with pytest.warns(UserWarning, match=f"X has .* samples to fit for {N} channels: too few"):
            g = dn.retune(f, X[part], Y[part], method=method)
        assert output_db(g, X, Y) > output_db(f, X, Y) - 1.0
        assert g.record["retune"]["held_out"] == (1 if count > 1 else 0)
        assert g.record["retune"]["samples"] == count


def test_many_samples_gain_and_stay_by_nothing(problem):
    _, X, Y, f = problem
    g = dn.retune(f, X, Y)
    assert g.record["retune"]["stay"] == 0.0
    assert output_db(g, X, Y) > output_db(f, X, Y) + 0.5


def test_the_pull_falls_to_nothing_at_as_many_samples_as_channels(problem):
    _, X, Y, f = problem
    stays = []
    for count in (8, 16, 30):
        with pytest.warns(UserWarning, match="too few"):
            g = dn.retune(f, X[:count], Y[:count], validation=0.0)
        stays.append(g.record["retune"]["stay"])
        assert stays[-1] == pytest.approx(100 * (1 / count - 1 / N))
    assert dn.retune(f, X[:N], Y[:N], validation=0.0).record["retune"]["stay"] == 0.0


def test_batches_and_callables_hold_one_out_of_two(problem):
    _, X, Y, f = problem
    for count in (2, 3, 5):
        pairs = [(X[i : i + 1], Y[i : i + 1]) for i in range(count)]
        for source in (pairs, lambda pairs=pairs: iter(pairs)):
            with pytest.warns(UserWarning, match="too few"):
                g = dn.retune(f, source, validation=1e-9)
            assert g.record["retune"]["held_out"] == 1
            with pytest.warns(UserWarning, match="too few"):
                g = dn.retune(f, source, validation=0.9999)
            assert 1 <= g.record["retune"]["held_out"] < count


def test_labels_of_few_samples(problem):
    _, X, _, f = problem
    labels = np.arange(4) % M
    with pytest.warns(UserWarning, match="too few"):
        g = dn.retune(f, X[:4], labels, loss="cross_entropy")
    assert g.record["retune"]["held_out"] == 1
    with pytest.warns(UserWarning, match="too few"):
        h = dn.retune(f, X[:4].reshape(2, 2, N), labels.reshape(2, 2), loss="cross_entropy")
    np.testing.assert_array_equal(g.d1, h.d1)


def test_leading_axes_must_agree(problem):
    _, X, Y, f = problem
    with pytest.raises(ValueError, match="the same leading axes, got"):
        dn.retune(f, X[:6].reshape(2, 3, N), Y[:6].reshape(3, 2, M))


# -- bits of the diagonals -------------------------------------------------------------------------


@pytest.mark.parametrize("scale_bits", [16, 32, 4, "auto"])
@pytest.mark.parametrize("method", ["als", "lbfgs", "adam"])
def test_retune_keeps_the_bits_of_the_diagonals(problem, scale_bits, method):
    A, X, Y, _ = problem
    f = dn.factorize(A, bits=4.0, scale_bits=scale_bits)
    g = dn.retune(f, X, Y, method=method, bias=False, steps=2)
    assert g.scale_bits == f.scale_bits
    assert g.storage_bits() == f.storage_bits()
    assert dn.DiBALinear(f).to_factors().scale_bits == f.scale_bits


@pytest.mark.parametrize("method", ["als", "lbfgs", "adam"])
@pytest.mark.parametrize("scale_bits", [16, 32])
def test_no_row_vanishes_over_eight_decades(problem, method, scale_bits):
    A, X, _, _ = problem
    rows, columns = np.logspace(-8, 0, M), np.logspace(-2, 2, N)
    B = rows[:, None] * A * columns
    f = dn.factorize(B, bits=4.0, scale_bits=scale_bits, output_weight=rows**-2.0)
    Z = X / columns
    g = dn.retune(f, Z, Z @ B.T, method=method, steps=2, bias=False)
    for made in (f, g, f.truncate(f.k - 1, B), dn.DiBALinear(g).to_factors()):
        assert made.scale_bits == scale_bits
        dense = made.to_dense()
        assert dense.any(axis=1).all()
        assert dense.any(axis=0).all()


def test_entries_that_half_precision_cannot_hold_are_named():
    d1 = np.logspace(-16, 0, 8)
    f = dn.DiBAFactors(np.ones(8), np.eye(8), np.ones(8), np.eye(8), np.ones(8))
    layer = dn.DiBALinear(f)
    layer.parameters["d1"][...] = d1
    with pytest.warns(UserWarning, match="d1 spans too many decades.* of the rows become zero"):
        assert (layer.to_factors().d1 == 0).any()


def test_half_diagonals_hold_eleven_decades_and_round_once():
    rng = np.random.default_rng(2)
    for decades in (0, 3, 8, 11):
        parts = [
            10 ** rng.uniform(-decades, 0, size) * rng.choice([-1, 1], size) for size in (9, 7, 8)
        ]
        once = half_diagonals(*parts)
        twice = half_diagonals(*once)
        for a, b, part in zip(once, twice, parts, strict=True):
            np.testing.assert_array_equal(a, b)
            assert (a != 0).all()
            if decades <= 8:
                np.testing.assert_allclose(a / a[0], part / part[0], rtol=2e-3)
