"""LAPACK without the GIL: SciPy's own wrappers hold it, so that no two calls run side by side."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

from numpy.typing import NDArray


@cache
def _routine(name: str) -> Callable[..., None]:
    """Return a routine of `scipy.linalg.cython_lapack` with arguments uplo, n, A, lda, info."""
    from numba.extending import get_cython_function_address

    address = get_cython_function_address("scipy.linalg.cython_lapack", name)
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 5)(address)


def invert_definite(A: NDArray[Any]) -> bool:
    """Write the upper triangle of a symmetric positive definite matrix's inverse over its own.

    Parameters
    ----------
    A : (k, k) float32 array
        C-contiguous; its upper triangle is read, the lower one is used up.

    Returns
    -------
    bool
        False of a matrix that is not positive definite in single precision; it is used up too.
    """
    # rows of A are columns to LAPACK, which takes the upper triangle for the lower one
    size, info = ctypes.c_int(len(A)), ctypes.c_int()
    for name in ("spotrf", "spotri"):
        n = ctypes.byref(size)
        _routine(name)(b"L", n, A.ctypes.data, n, ctypes.byref(info))
        if info.value:
            return False
    return True
