"""The one decorator through which every kernel is compiled."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numba

# The only option that may depend on the environment: Numba's cache key does not hold the others.
CACHE = os.environ.get("DIBA_NP_CACHE", "1") != "0"


def njit(*, fastmath: bool | set[str], parallel: bool = False) -> Callable[[Any], Any]:
    """Compile on first call, without the GIL, with NumPy's rules for division by zero.

    Parameters
    ----------
    fastmath : bool or set of str
        Stated at every kernel. ``False`` wherever a comparison decides about a bit.
    parallel : bool
        Whether `numba.prange` loops run on several threads.

    Returns
    -------
    callable
        A decorator. Compiled code is cached on disk where a folder can be written, else not.
    """

    def decorate(function: Any) -> Any:
        options = {
            "fastmath": fastmath,
            "parallel": parallel,
            "nogil": True,
            "error_model": "numpy",
        }
        if CACHE:
            try:
                return numba.njit(cache=True, **options)(function)
            except RuntimeError:  # no writable folder for the cache: compile without it
                pass
        return numba.njit(**options)(function)

    return decorate
