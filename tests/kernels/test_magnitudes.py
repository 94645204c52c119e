"""Kernels of the relaxation: the plain formulas, and the same bits for every number of threads."""

import naive
import numpy as np
import pytest

from diba_np.kernels import magnitudes as kernels


def arrays(rng, rows, k, count):
    return [rng.normal(size=(rows, k)).astype(np.float32) for _ in range(count)]


def calls(rng, rows=150, k=37):
    """Arguments, the arrays that the kernel writes, and the reference's results, by kernel."""
    X, Q, Y = arrays(rng, rows, k, 3)
    q, p = rng.random(k, np.float32), rng.random(rows, np.float32)
    parts = np.empty((-(-rows // kernels.BLOCK), k), np.float32)
    c, block = np.float32(0.3), kernels.BLOCK
    Q0, X0, p0, p1 = Q.copy(), X.copy(), p.copy(), p.copy()
    point, out = np.empty_like(X), np.empty(rows)
    parts0, parts1 = parts.copy(), parts.copy()
    return {
        "regression_point": (
            (Q, p, q, c, Y, point),
            (point,),
            (naive.regression_point(Q, p, q, 0.3, Y),),
        ),
        "blend_magnitudes": (
            (X, Q0, c, q, p0, parts),
            (Q0, p0, parts),
            naive.blend_magnitudes(X, Q, 0.3, q, p, block),
        ),
        "power_magnitudes": (
            (Q, q, p1, parts0),
            (p1, parts0),
            naive.power_magnitudes(Q, q, block),
        ),
        "soften": ((Q, p, q, c, X0, parts1), (X0, parts1), naive.soften(Q, p, q, 0.3, X, block)),
        "explained": ((X, Y, Q, p, q, c, out), (out,), (naive.explained(X, Y, Q, p, q, 0.3),)),
    }


NAMES = ("regression_point", "blend_magnitudes", "power_magnitudes", "soften", "explained")


@pytest.mark.parametrize("name", NAMES)
def test_kernel_equals_its_naive_namesake(name, rng):
    arguments, written, expected = calls(rng)[name]
    getattr(kernels, name)(*arguments)
    for array, reference in zip(written, expected, strict=True):
        np.testing.assert_allclose(array, reference, rtol=2e-5, atol=2e-4)
