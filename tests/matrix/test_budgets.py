"""Budgets: k from bits and ratio, and the search for the smallest k."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diba_np.machine import processors
from diba_np.matrix import budgets
from diba_np.search.terms import terms_within


@given(st.integers(1, 300), st.floats(0.0, 3.0), st.integers(0, 100))
def test_smallest_k_is_the_smallest_on_any_rising_curve(answer, bend, seed):
    def reach(k):
        return 5.0 * k / 40 + bend * (k >= answer) - bend

    goal = reach(answer)
    asked = []
    found = budgets.smallest_k(lambda k: asked.append(k) or reach(k), goal, (80, 80))
    assert found == next(k for k in range(1, 10**4) if reach(k) >= goal)
    assert len(asked) == len(set(asked))
    assert len(asked) < 40


def test_smallest_k_says_when_a_goal_is_out_of_reach():
    words = (
        "snr=50 dB is not reached: 40 dB at k=25 is the best of . tried up to k=80,.* scale_bits=32"
    )
    with pytest.raises(ValueError, match=words):
        budgets.smallest_k(lambda k: 40.0 if k == 25 else 20.0, 50.0, (5, 5))


def test_exactly_one_budget():
    assert budgets.chosen({"k": 3, "bits": None}) == ("k", 3)
    with pytest.raises(TypeError, match="exactly one of k=, ratio=, got none"):
        budgets.chosen({"k": None, "ratio": None})
    with pytest.raises(TypeError, match="got k=1, bits=2"):
        budgets.chosen({"k": 1, "bits": 2})


@pytest.mark.parametrize("scale_bits", [16, (4, 3, 4)])
def test_the_bits_of_a_factorization_are_a_budget_for_it(scale_bits):
    for m, n, k in itertools.product(range(2, 60, 3), range(2, 60, 3), (1, 2, 5)):
        stored = budgets.storage_bits(m, n, k, scale_bits)
        assert budgets.largest_k(m, n, stored / (m * n), scale_bits) == k
        assert terms_within(2, 2 * stored / (m * n), (m, n), scale_bits, False) == 2


@pytest.mark.parametrize(
    ("name", "huge", "words"),
    [
        ("bits", 1e308, r"bits=1e\+308 is too large for a 9 x 9 matrix"),
        ("bits", 10**400, "bits must be finite"),
        ("ratio", math.inf, "ratio must be finite"),
        ("k", 2**31, "k=2147483648 is too large"),
    ],
)
def test_budgets_beyond_all_numbers(name, huge, words):
    with pytest.raises(ValueError, match=words):
        budgets.intermediate_dimension(name, huge, (9, 9))


def test_budgets_beyond_the_memory(monkeypatch):
    monkeypatch.setattr(budgets, "memory", lambda: 2.0**30)
    with pytest.raises(ValueError, match=r"^k=60000 is .* takes 2 GiB, this process may use 1$"):
        budgets.intermediate_dimension("k", 60000, (4096, 4096))
    with pytest.raises(ValueError, match=r"bits=30 is too large .* this process may use 1$"):
        budgets.intermediate_dimension("bits", 30, (4096, 4096))
    assert budgets.intermediate_dimension("k", 30000, (4096, 4096)) == 30000


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("k", 5000, "k of at most 1024"),
        ("k", 2**31, "k of at most 1024"),
        ("bits", 64, "bits of at most 32"),
        ("ratio", 2.5, r"ratio of at most 1 \(2.5 times smaller is ratio=1/2.5\)"),
    ],
)
def test_budgets_beyond_the_dense_matrix(name, value, remedy):
    with pytest.raises(ValueError, match=rf"^{name}={value:.10g} is too large .*; give {remedy},"):
        budgets.intermediate_dimension(name, value, (40, 30))


def test_budgets_up_to_the_dense_matrix_are_taken_and_small_ones_beyond_it(monkeypatch):
    monkeypatch.setattr(budgets, "memory", lambda: 2.0**40)
    assert budgets.intermediate_dimension("k", 1024, (40, 30)) == 1024
    assert budgets.intermediate_dimension("bits", 32, (40, 30)) == 433
    assert budgets.intermediate_dimension("ratio", 1, (4096, 4096)) == 65392
    assert budgets.intermediate_dimension("k", 65536, (4096, 4096)) == 65536
    assert budgets.intermediate_dimension("bits", 200, (3, 3)) == 77
    with pytest.raises(ValueError, match="k of at most 65536,"):
        budgets.intermediate_dimension("k", 65537, (4096, 4096))


def test_a_container_s_memory_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(processors, "_MEMORY_LIMITS", ())
    machine = processors.memory()
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(processors, "_MEMORY_LIMITS", (str(tmp_path / "none"), str(limit)))
    for text, memory in (("1048576\n", 2.0**20), ("max\n", machine), ("10" * 20, machine)):
        limit.write_text(text)
        assert processors.memory() == min(memory, machine)


def test_ratio_and_bits_agree():
    for shape in [(384, 384), (100, 700)]:
        assert budgets.intermediate_dimension("ratio", 1 / 16, shape) == (
            budgets.intermediate_dimension("bits", 2.0, shape)
        )


def test_too_small_a_budget_names_the_least():
    with pytest.raises(ValueError, match=r"bits=0.5 is too small for a 4 x 4 .* takes bits=9.5"):
        budgets.intermediate_dimension("bits", 0.5, (4, 4))


@given(st.lists(st.floats(0, 10), min_size=1, max_size=8))
def test_lower_hull_is_the_largest_convex_function_below(heights):
    x = np.arange(len(heights), dtype=float)
    hull = budgets.lower_hull(x, heights)
    at = np.interp(x, x[hull], np.array(heights)[hull])
    for i, height in enumerate(heights):
        assert at[i] <= height + 1e-9
        lowest = min(
            [height]
            + [
                heights[a] + (heights[b] - heights[a]) * (i - a) / (b - a)
                for a in range(i + 1)
                for b in range(i, len(heights))
                if a < b
            ]
        )
        assert at[i] == pytest.approx(lowest, abs=1e-9)
