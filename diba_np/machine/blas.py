"""BLAS held at one thread, so that last digits do not depend on their number."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

# the set/get pairs that builds of OpenBLAS in wheels and in distributions export
_SYMBOLS = (
    "scipy_openblas_{}_num_threads64_",
    "scipy_openblas_{}_num_threads",
    "openblas_{}_num_threads64_",
    "openblas_{}_num_threads",
)


def _blas_controls() -> list[tuple[Callable[[int], Any], Callable[[], int]]]:
    """Find the (set, get) functions of the OpenBLAS libraries that NumPy and SciPy carry."""
    import scipy

    controls = []
    for package in (np, scipy):
        root = Path(str(package.__file__)).parent
        folders = (root.parent / f"{root.name}.libs", root / ".dylibs", root / ".libs")
        for path in sorted(p for folder in folders for p in folder.glob("*openblas*")):
            library = ctypes.CDLL(str(path))  # loaded already: this only finds the handle
            for symbol in _SYMBOLS:
                set_threads = getattr(library, symbol.format("set"), None)
                get_threads = getattr(library, symbol.format("get"), None)
                if set_threads and get_threads:
                    controls.append((set_threads, get_threads))
                    break
    return controls


_holding = threading.Lock()


_held: list[tuple[Callable[[int], Any], int]] = []  # how to restore BLAS, while it is held


_holders = 0


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """Hold NumPy's and SciPy's OpenBLAS at one thread; a BLAS of another kind is left alone.

    The number is the whole process's: of several threads inside, the last one out restores it.
    """
    global _holders  # noqa: PLW0603
    with _holding:
        if _holders == 0:
            _held[:] = [(set_threads, get()) for set_threads, get in _blas_controls()]
            for set_threads, _ in _held:
                set_threads(1)
        _holders += 1  # last: where something above fails, nothing is held
    try:
        yield
    finally:
        with _holding:
            _holders -= 1
            if _holders == 0:
                for set_threads, count in _held:
                    set_threads(count)


@contextmanager
def threads_of_children(count: int) -> Iterator[None]:
    """Let processes started inside use so many numerical threads; restored afterwards."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, str(count)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
