"""The inverse of a definite matrix, against NumPy's."""

import numpy as np
import pytest

from diba_np.machine.lapack import invert_definite


@pytest.mark.parametrize("k", [1, 2, 7, 65, 200])
def test_the_upper_triangle_holds_the_inverse(k, rng):
    X = rng.normal(size=(2 * k + 1, k))
    A = X.T @ X / k + np.eye(k)
    inverse = A.astype(np.float32)
    assert invert_definite(inverse)
    np.testing.assert_allclose(np.triu(inverse), np.triu(np.linalg.inv(A)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_what_is_not_definite_is_told(value):
    assert not invert_definite(np.diag([1.0, value, 1.0]).astype(np.float32))
