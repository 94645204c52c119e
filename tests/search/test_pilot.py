"""The pilot: the part of a matrix that it sees, the widths and the k that it finds there."""

import numpy as np
import pytest

from diba_np import factorize
from diba_np.machine.thread_pool import ThreadPool
from diba_np.matrix.budgets import usual_k
from diba_np.search import pilot
from diba_np.search.representatives import representatives
from diba_np.search.target import Target
from diba_np.search.weighted_target import WeightedTarget
from diba_np.search.weights import as_weights

M, N = 640, 500
MIDDLE = np.s_[128:512, 58:442]


@pytest.fixture(scope="module")
def pool():
    with ThreadPool(1) as pool:
        yield pool


def scaled(rng):
    """Normal entries in rows and columns of unlike size."""
    rows, columns = (np.exp(rng.normal(size=s)) for s in ((M, 1), N))
    return rows * rng.normal(size=(M, N)) * columns


def with_middle(A, value):
    changed = A.copy()
    changed[MIDDLE] = value
    return changed


def weighed(A, pool, **given):
    given = {"inputs": None, "gram": None, "output_weight": None} | given
    return WeightedTarget(A, pool, as_weights(**given, shape=A.shape, pool=pool))


def test_the_middle_of_an_ordinary_matrix_stands_for_it(rng, pool):
    A = scaled(rng)
    X = rng.normal(size=(900, N)) @ rng.normal(size=(N, N))
    for target in (
        Target(A, pool),
        Target(A + 20.0, pool),
        Target(np.add.outer(np.arange(M), np.arange(N)), pool),
        weighed(A, pool, inputs=X, output_weight=rng.random(M)),
    ):
        part = pilot.part_of(target)
        np.testing.assert_array_equal(part.A, target.A[MIDDLE])


def test_all_of_a_small_matrix_is_seen(rng, pool):
    for A in (rng.normal(size=(384, 384)), np.ones((30, 400)), np.zeros((1, 1))):
        part = pilot.part_of(Target(A, pool))
        rows, columns = (min(s, 384) for s in A.shape)
        np.testing.assert_array_equal(part.A, A[:rows, :columns])


def test_rows_and_columns_of_most_energy_stand_for_what_the_middle_does_not(rng, pool):
    A = scaled(rng)
    w = np.ones(M)
    w[MIDDLE[0]] = 0.0
    for target in (
        Target(with_middle(A, 0.0), pool),
        Target(with_middle(A, 1e-3 * A[MIDDLE]), pool),
        Target(with_middle(A, np.sqrt(np.mean(A**2))), pool),
        Target(with_middle(A, np.outer(A[MIDDLE][:, 0], A[MIDDLE][0])), pool),
        weighed(with_middle(A, 0.0), pool, gram=np.eye(N)),
        weighed(A, pool, output_weight=w),
    ):
        part = pilot.part_of(target)
        assert part.shape == (384, 384)
        assert np.linalg.matrix_rank(part.A) > 200


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_widths_and_k_hardly_depend_on_where_a_matrix_is_empty(rng, pool, value):
    A = with_middle(scaled(rng), value)
    turned = np.roll(A, (M // 2, N // 2), (0, 1))
    targets = Target(A, pool), Target(turned, pool)
    one, other = (pilot.choose_widths(target, 100, 0.0, 0) for target in targets)
    assert np.max(np.abs(np.subtract(one, other))) <= 1 and min(one) >= 5
    (k, slope), (usual, same) = (pilot.estimate_k(target, 8.0, 0.0, 0) for target in targets)
    assert 0.5 < k / usual < 2.0 and slope == pytest.approx(same, rel=0.2)


def test_zero_rows_in_the_middle_cost_next_to_nothing(rng):
    A = np.exp(rng.normal(size=(M, 1))) * rng.normal(size=(M, 400)) * np.exp(rng.normal(size=400))
    A[128:512] = 0.0
    how = {"effort": "fast", "threads": 1}
    given = factorize(A, bits=0.5, scale_bits=(6, 6, 6), terms=1, **how).snr(A)
    assert factorize(A, bits=0.5, **how).snr(A) > given - 0.2


def test_where_nothing_is_seen_all_is_as_usual(rng, pool, monkeypatch):
    monkeypatch.setattr(pilot, "representatives", lambda energy, most: (np.arange(1), np.ones(1)))
    target = Target(with_middle(scaled(rng), 0.0), pool)
    assert pilot.part_of(target) is None
    assert pilot.choose_widths(target, 100, 0.0, 0) == pilot.USUAL_WIDTHS
    bit = (M + N) / (M * N)  # a weight, of one component
    usual = usual_k(8.0, (M, N)), pilot.SLOPE * bit
    assert pilot.estimate_k(target, 8.0, 0.0, 0) == usual
    zero = Target(np.zeros((M, N)), pool)
    assert pilot.estimate_k(zero, 8.0, 0.0, 0) == (1, pilot.SLOPE * bit)
    assert pilot.choose_widths(zero, 100, 0.0, 0) == (2, 2, 2)


def test_representatives_hold_the_largest_and_the_energy_of_all(rng):
    energy = rng.random(900)
    energy[[3, 500]] = 100.0
    index, scale = representatives(energy, 200)
    assert len(index) == 200 and (np.diff(index) > 0).all()
    largest = np.isin(index, np.argsort(-energy)[:50])
    assert largest.sum() == 50 and (scale[largest] == 1).all() and (scale[~largest] > 1).all()
    assert scale**2 @ energy[index] == pytest.approx(energy.sum())
    index, scale = representatives(energy[:200], 200)
    np.testing.assert_array_equal(index, np.arange(200))
    assert (scale == 1).all()
