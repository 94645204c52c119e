"""Products with a few dense columns against their definition."""

import naive
import numpy as np
import pytest

from diba_np.kernels.few_columns import few_columns, few_columns_back


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("N", [1, 2, 17])
@pytest.mark.parametrize(("m", "count"), [(1, 1), (7, 3), (2048, 2), (5000, 11)])
def test_both_products_equal_naive(m, count, N, kind):
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(count, m)).astype(kind)
    x, y = rng.normal(size=(count, N)).astype(kind), rng.normal(size=(m, N)).astype(kind)
    out, back = np.full((m, N), np.nan, kind), np.full((count, N), np.nan, kind)
    few_columns(weights, x, out)
    few_columns_back(weights, y, back)
    close = 1e-4 if kind is np.float32 else 1e-11
    np.testing.assert_allclose(out, naive.few_columns(weights, x), rtol=close, atol=close)
    np.testing.assert_allclose(
        back, naive.few_columns_back(weights, y), rtol=close, atol=50 * close
    )
    weights[-1, -1] = np.inf
    few_columns(weights, x, out)
    assert not np.isfinite(out[-1]).any()
