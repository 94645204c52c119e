"""What a user's code sees of the types: mypy reads this file (setup.cfg), pytest runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import diba_np as dn

if TYPE_CHECKING:  # of the standard library from Python 3.11 on
    from typing import assert_type


def test_a_user_s_snippet() -> None:
    rng = np.random.default_rng(0)
    A = rng.normal(size=(12, 9))
    f = dn.factorize(A, k=4, max_sweeps=3)
    x = rng.normal(size=9)
    y = f @ x
    Y = f.T @ rng.normal(size=(12, 2))
    size: int = f.k * sum(f.shape)
    quality: float = f.snr(A)
    if TYPE_CHECKING:
        assert_type(f, dn.DiBAFactors)
        assert_type(y, NDArray[Any])
        assert_type(Y, NDArray[Any])
        assert_type(f.T, dn.DiBAFactors)
        assert_type(f.to_dense(), NDArray[np.float32])
        assert_type(f.b1, dn.PackedBits)
        assert_type(f.bits_per_weight, float)
        assert_type(dn.snr_db(A, f), float)
    assert (y.shape, Y.shape, size) == ((12,), (9, 2), 84)
    assert np.isfinite(quality)
