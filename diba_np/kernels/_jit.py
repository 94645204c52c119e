"""The one decorator through which every kernel is compiled, and where compiled code is cached."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numba
from numba.core import caching

from diba_np.environment import jit_disabled

# The only option that may depend on the environment: Numba's cache key does not hold the others.
CACHE = os.environ.get("DIBA_NP_CACHE", "1") != "0"

_logger = logging.getLogger(__name__)


class _OutsideThePackage(caching.CompileResultCacheImpl):  # type: ignore[misc]
    """Numba's places for compiled code, without the one among the modules.

    What lies there outlives an uninstall and keeps the removed package's folder importable. The
    others are ``NUMBA_CACHE_DIR`` and the user's cache folder, in both a folder for each place
    that kernels are installed in.
    """

    _locator_classes: ClassVar[list[Any]] = [
        locator
        for locator in caching.CompileResultCacheImpl._locator_classes
        if "InTree" not in locator.__name__
    ]


class _Cache(caching.FunctionCache):  # type: ignore[misc]
    """A function's cache; what cannot be read is compiled, what cannot be written is not kept."""

    _impl_class = _OutsideThePackage

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # a damaged file unpickles to anything
            _logger.debug("cache of compiled code not readable: %s", error)
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception as error:  # no space, no right to write, a damaged index
            _logger.debug("cache of compiled code not written: %s", error)


def _remove_remains() -> None:
    """Delete what earlier versions cached beside this file, where it would outlive an uninstall."""
    folder = Path(__file__).with_name("__pycache__")
    with contextlib.suppress(OSError):
        for path in [*folder.glob("*.nbi"), *folder.glob("*.nbc")]:
            path.unlink()


if not getattr(numba.config, "CACHE_LOCATOR_CLASSES", None):  # else the user chose the place
    _remove_remains()


def njit(
    *, fastmath: bool | set[str], parallel: bool = False, cached: bool = True
) -> Callable[[Any], Any]:
    """Compile on first call, without the GIL, with NumPy's rules for division by zero.

    Parameters
    ----------
    fastmath : bool or set of str
        Stated at every kernel. ``False`` wherever a comparison decides about a bit.
    parallel : bool
        Whether `numba.prange` loops run on several threads.
    cached : bool
        Whether compiled code is kept. Not that of a function made by another: Numba would not
        know it again in the next process. Such a function is named after what it is made of.

    Returns
    -------
    callable
        A decorator. Compiled code is cached on disk where a folder can be written, else not.
        Where Numba is told not to compile, what it returns raises a ValueError that says so.
    """

    def decorate(function: Any) -> Any:
        if numba.config.DISABLE_JIT:
            return _refusing(function)
        if not cached:
            _name_apart(function)
        compiled = numba.njit(
            fastmath=fastmath, parallel=parallel, nogil=True, error_model="numpy"
        )(function)
        if CACHE and cached:
            # no folder for the cache (RuntimeError, OSError): compile in every process
            with contextlib.suppress(RuntimeError, OSError):
                compiled._cache = _Cache(function)
        return compiled

    return decorate


def _name_apart(function: Any) -> None:
    """Add to the name of a function that another made what it was made of.

    Machine code is called by its function's name, types and a count that begins anew in every
    process. Two kernels compiled in different processes may so hold code under one name for two
    functions of one maker: where both are loaded the first would do for either.
    """
    parts = []
    for cell in function.__closure__ or ():
        part = cell.cell_contents
        named = getattr(part, "__qualname__", None)
        parts.append(f"{part.__module__}.{named}" if named else repr(part))
    function.__qualname__ += f"_{zlib.crc32(' '.join(parts).encode()):08x}"


def _refusing(function: Any) -> Any:
    """Return the stand-in of a kernel that cannot be compiled."""

    @functools.wraps(function)
    def refuse(*arguments: Any) -> Any:
        raise jit_disabled()

    refuse.overloads, refuse.stats = {}, None  # type: ignore[attr-defined]
    return refuse
