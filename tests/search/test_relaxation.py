"""The sign relaxation: gauges on smooth matrices."""

from types import SimpleNamespace

import numpy as np
import pytest

from diba_np import factorize
from diba_np.kernels import bfloat16
from diba_np.machine.thread_pool import ThreadPool
from diba_np.methods.dbf import dbf
from diba_np.products.cpu import has_bfloat16
from diba_np.search.halves import share_gauges
from diba_np.search.options import EFFORTS


def halves(size):
    """Two halves with the gauges in blocks, so that components of these sizes do not balance."""
    k = len(size)
    gauges = np.where(np.arange(k) < k // 2, 1, -1).astype(np.float32)
    return [SimpleNamespace(q=np.sqrt(size), gauge=gauges.copy()) for _ in range(2)]


def test_gauges_balance_uneven_components(rng):
    size = np.sort(rng.lognormal(size=40))[::-1].astype(np.float32)
    first, second = halves(size)
    share_gauges(first, second)
    for gauge, most in ((first.gauge, 1), (second.gauge, 1), (first.gauge * second.gauge, 2)):
        assert sorted(gauge) == [-1] * 20 + [1] * 20
        assert abs(size @ gauge) < most * size.max()


@pytest.mark.parametrize("size", [np.linspace(1, 1.2, 40), np.linspace(1, 9, 15)])
def test_gauges_of_even_or_few_components_stay(size):
    first, second = halves(size)
    before = first.gauge.copy()
    share_gauges(first, second)
    np.testing.assert_array_equal(first.gauge, before)
    np.testing.assert_array_equal(second.gauge, before)


def test_strict_bits_hold_a_smooth_matrix_nearly_as_well_as_signs():
    i = np.arange(128)
    A = 0.9 ** abs(i[:, None] - i)
    strict, signs = (factorize(A, bits=2.0, shift=shift).snr(A) for shift in (0.0, 0.5))
    assert strict > signs - 1.5


def test_effort_rises_where_components_are_uneven():
    i = np.arange(64)
    smooth = 0.9 ** abs(i[:, None] - i)
    balanced = factorize(smooth, bits=2.0)
    assert EFFORTS["balanced"].uneven < balanced.record["sweeps"]
    best = factorize(smooth, bits=2.0, effort="best")
    assert best.record["sweeps"] > EFFORTS["best"].iterations + EFFORTS["balanced"].uneven
    assert best.snr(smooth) >= balanced.snr(smooth)
    # iterations that were asked for are kept to
    told = factorize(smooth, k=30, max_sweeps=50)
    assert told.record["sweeps"] <= 50 + EFFORTS["balanced"].rounds + 2


def test_even_components_take_no_longer(rng):
    f = factorize(rng.standard_normal((96, 96)), k=72)
    assert f.record["sweeps"] <= EFFORTS["balanced"].iterations + EFFORTS["balanced"].rounds + 2


def test_history_is_that_of_the_search_that_was_kept():
    i = np.arange(64)
    f = factorize(0.9 ** abs(i[:, None] - i), k=40, effort="best")
    assert np.all(np.diff(f.record["objective_history"][:-1]) <= 1e-12)


needs_bfloat16 = pytest.mark.skipif(
    not has_bfloat16(), reason="the CPU, or the path in use, has no dots of bfloat16"
)


@pytest.fixture
def products(monkeypatch):
    """Counts of products by whether they were rounded; small matrices count as large ones."""
    counts = {True: 0, False: 0}
    plain = ThreadPool.matmul

    def counted(self, A, B, out=None, rounded=False):
        counts[rounded] += 1
        return plain(self, A, B, out, rounded)

    monkeypatch.setattr("diba_np.search.target._WORTH_ROUNDING", 0.0)
    monkeypatch.setattr(ThreadPool, "matmul", counted)
    return counts


@needs_bfloat16
@pytest.mark.parametrize("weighed", [False, True])
def test_rounded_products_cost_no_quality(attention, weighed, products, monkeypatch, rng):
    A = attention[:160, :128]
    options = {"k": 72, "effort": "fast"}
    if weighed:
        options["inputs"] = rng.normal(size=(300, 128)) * np.arange(1, 129) ** -0.5
    name = "output_snr_db" if weighed else "snr_db"
    rounded = factorize(A, **options).record[name]
    assert products[True] > 100
    monkeypatch.setattr("diba_np.search.target._WORTH_ROUNDING", np.inf)
    products[True] = 0
    exact = factorize(A, **options).record[name]
    assert products[True] == 0
    assert abs(rounded - exact) < 0.1


@needs_bfloat16
def test_products_are_exact_once_the_error_is_small(products, rng):
    low_rank = rng.normal(size=(90, 2)) @ rng.normal(size=(2, 80))
    assert factorize(low_rank, k=60, effort="fast").snr(low_rank) > 24
    assert products[False] > 3 * products[True] > 0


@needs_bfloat16
def test_the_published_search_rounds_nothing(products, rng):
    dbf(rng.normal(size=(40, 30)), bits=2.0)
    assert products[True] == 0


@needs_bfloat16
def test_threads_give_the_same_bits_where_products_are_rounded(products, monkeypatch, rng):
    A, plain = rng.normal(size=(300, 220)), bfloat16.product_bfloat16
    cuts, results = [set(), set()], []
    monkeypatch.setattr("diba_np.machine.thread_pool._BLOCK_FLOPS", 2e6)  # else there is one block
    for threads, rows in enumerate(cuts, 1):
        monkeypatch.setattr(
            bfloat16,
            "product_bfloat16",
            lambda *args, rows=rows: rows.add(args[4:6]) or plain(*args),
        )
        results.append(factorize(A, k=128, effort="fast", max_sweeps=20, threads=threads))
    first, second = results
    assert products[True] > 50
    assert len(cuts[1]) > len(cuts[0]) > 0
    assert first.b1.words.tobytes() == second.b1.words.tobytes()
    assert first.b2.words.tobytes() == second.b2.words.tobytes()
