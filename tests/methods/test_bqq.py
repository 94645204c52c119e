"""Binary quadratic quantization: its formula, its search, products from the bits."""

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diba_np import FormatError, methods
from diba_np.kernels.pursuit import descend_bits
from diba_np.methods.bqq import BQQ, _fit_constants, _flip


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32), k=st.integers(1, 9), passes=st.integers(0, 6))
def test_flips_are_those_that_help(seed, k, passes):
    rng = np.random.default_rng(seed)
    M = rng.normal(size=(12, k))
    G, B = M.T @ M, rng.normal(size=(5, k))
    bits = rng.integers(0, 2, (5, k)).astype(np.uint8)
    expected, count = naive.descend_bits(G, B, passes, bits)
    assert descend_bits(G, B.copy(), passes, bits) == count
    np.testing.assert_array_equal(bits, expected)


@pytest.fixture(scope="module")
def matrix():
    rng = np.random.default_rng(4)
    return rng.normal(size=(60, 8)) @ rng.normal(size=(8, 44)) + rng.normal(size=(60, 44))


@pytest.mark.parametrize("bits", [1.0, 2.6])
def test_the_matrix_is_the_formula(bits, matrix):
    made = BQQ.fit(matrix, bits)
    Y, Z = made.Y.to_dense().astype(float), made.Z.to_dense().astype(float)
    ones, at, total = np.ones(matrix.shape), 0, np.zeros(matrix.shape)
    for term, rank in enumerate(made.ranks):
        r, s, t = made.constants[3 * term : 3 * term + 3].astype(float)
        y, z = Y[:, at : at + rank], Z[at : at + rank]
        at += rank
        total += r * y @ z + s * y.sum(1)[:, None] * ones + t * z.sum(0) * ones
    total = made.scale * (total + float(made.constants[-1]))
    assert len(made.ranks) == made.record["terms"] == max(1, round(bits / 1.25))
    np.testing.assert_allclose(made.to_dense(), total, atol=1e-5 * np.abs(total).max())


def test_more_rounds_never_lose(matrix):
    errors = [np.sum((matrix - BQQ.fit(matrix, 1.5, rounds=r).to_dense()) ** 2) for r in (0, 2, 8)]
    assert errors[0] >= errors[1] >= errors[2] * (1 - 1e-6)


def test_constants_are_least_squares_and_flips_lower_the_error(matrix):
    rng = np.random.default_rng(0)
    parts = [tuple(rng.integers(0, 2, (size, 5)).astype(np.uint8) for size in matrix.shape)]
    parts += [tuple(rng.integers(0, 2, (size, 3)).astype(np.uint8) for size in matrix.shape)]
    constants = _fit_constants(matrix, parts)

    def features():
        columns = []
        for Y, Z in parts:
            y, z = Y.astype(float), Z.astype(float)
            columns.append((y @ z.T).ravel())
            columns.append(np.repeat(y.sum(1), len(z)))
            columns.append(np.tile(z.sum(1), len(y)))
        return np.stack([*columns, np.ones(matrix.size)], 1)

    expected = np.linalg.lstsq(features(), matrix.ravel(), rcond=None)[0]
    np.testing.assert_allclose(constants, expected, rtol=1e-3, atol=1e-4)
    before = np.sum((matrix.ravel() - features() @ constants) ** 2)
    assert _flip(matrix, parts, constants, 1) > 0
    assert np.sum((matrix.ravel() - features() @ constants) ** 2) < before


def test_structure_is_found():
    rng = np.random.default_rng(6)
    A = 3.0 * (rng.integers(0, 2, (80, 3)) @ rng.integers(0, 2, (3, 80))) - 1.0
    assert BQQ.fit(A, 1.0).snr(A) > 15
    normal = rng.normal(size=(160, 160))
    assert BQQ.fit(normal, 1.0).snr(normal) > 4.2


def test_products_come_from_the_bits(matrix, monkeypatch):
    made = BQQ.fit(matrix, 2.6)
    dense = made.to_dense().astype(float)
    monkeypatch.setattr(made, "to_dense", None)
    rng = np.random.default_rng(0)
    for kind, close in ((np.float32, 1e-3), (np.float64, 1e-4)):
        x, y = (rng.normal(size=(side, 5)).astype(kind) for side in (44, 60))
        np.testing.assert_allclose(made @ x, dense @ x, atol=close)
        np.testing.assert_allclose(made.T @ y, dense.T @ y, atol=close)
        assert (made @ x).dtype == kind
    z = x[:, 0] + 1j * x[:, 1]
    np.testing.assert_allclose(made @ z, dense @ z, atol=close)


def test_operands_that_are_not_finite_give_what_the_dense_matrix_gives(matrix):
    made = BQQ.fit(matrix, 1.0)
    x = np.ones((44, 2), np.float32)
    x[3, 0], x[5, 1] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(made @ x, made.to_dense() @ x)
        y = np.ones((60, 1), np.float32)
        y[0] = -np.inf
        np.testing.assert_allclose(made.T @ y, made.to_dense().T @ y)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda attrs, arrays: attrs.update(terms=0), "terms must be at least 1"),
        (lambda attrs, arrays: attrs.update(terms=7), "length 7"),
        (lambda attrs, arrays: arrays["ranks"].__setitem__(0, 0), "rank of at least 1"),
        (lambda attrs, arrays: arrays.update(y=arrays["y"][1:]), "bytes"),
    ],
)
def test_contents_that_contradict_each_other_are_refused(change, text, matrix):
    made = methods.fit("bqq", matrix, 2.6)
    attrs, arrays = made.to_datasets()
    attrs |= {"m": 60, "n": 44, "scale": 1.0}
    change(attrs, arrays)
    with pytest.raises((ValueError, FormatError), match=text):
        BQQ.from_datasets(attrs, arrays)
