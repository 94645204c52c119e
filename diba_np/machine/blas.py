"""BLAS held at one thread, so that last digits do not depend on their number."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
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


Control = tuple[Callable[[int], Any], Callable[[], int]]  # (set, get) the number of threads


def _wheel_libraries(package: Any) -> list[Path]:
    """Return the OpenBLAS libraries that NumPy's or SciPy's wheel carries."""
    root = Path(str(package.__file__)).parent
    folders = (root.parent / f"{root.name}.libs", root / ".dylibs", root / ".libs")
    try:
        return sorted(path for folder in folders for path in folder.glob("*openblas*"))
    except OSError:  # a process without the right to read them
        return []


def _wheel_controls(package: Any) -> list[Control]:
    """Return the controls of those libraries."""
    controls = []
    for path in _wheel_libraries(package):
        library = ctypes.CDLL(str(path))  # loaded already: this only finds the handle
        for symbol in _SYMBOLS:
            set_threads = getattr(library, symbol.format("set"), None)
            get_threads = getattr(library, symbol.format("get"), None)
            if set_threads and get_threads:
                controls.append((set_threads, get_threads))
                break
    return controls


def _other_controls(known: Iterable[Path]) -> list[Control]:
    """Return the controls that `threadpoolctl` finds: MKL, BLIS, a system's OpenBLAS, FlexiBLAS.

    None of libraries that are known already, and none where it is not installed.
    """
    try:
        import threadpoolctl
    except ImportError:
        return []
    import scipy.linalg  # noqa: F401  # its BLAS is found once it is loaded

    libraries = threadpoolctl.ThreadpoolController().select(user_api="blas").lib_controllers
    files = {path.resolve() for path in known}
    return [
        (library.set_num_threads, library.get_num_threads)
        for library in libraries
        if Path(library.filepath).resolve() not in files
    ]


def _blas_controls() -> tuple[list[Control], list[str]]:
    """Return the controls of all BLAS libraries in use, and the packages whose BLAS has none."""
    import scipy

    controls = [control for package in (np, scipy) for control in _wheel_controls(package)]
    without = [str(p.__name__) for p in (np, scipy) if not _wheel_libraries(p)]
    if without:
        others = _other_controls(path for p in (np, scipy) for path in _wheel_libraries(p))
        controls += others
        # Accelerate has no number of threads to set, whatever else is loaded
        without = [name for name in without if not others or "accelerate" in _blas_name(name)]
    return controls, without


def blas_problem() -> str | None:
    """Return a sentence on a BLAS that cannot be held at one thread; None if all can.

    The bits of a search are then promised for equal numbers of threads of that BLAS alone.
    """
    _, without = _blas_controls()
    if not without:
        return None
    names = sorted({f"{name}'s BLAS ({_blas_name(name)})" for name in without})
    return (
        f"{' and '.join(names)} cannot be held at one thread, so last digits and bits may depend "
        "on its number of threads; install threadpoolctl, or set it to one thread"
    )


def _blas_name(package: str) -> str:
    """Return what a package was built with, as it says itself."""
    config: Any = import_module(f"{package}.__config__")
    dependencies = getattr(config, "CONFIG", {}).get("Build Dependencies", {})
    return str(dependencies.get("blas", {}).get("name") or "unknown").lower()


_holding = threading.Lock()


_held: list[tuple[Callable[[int], Any], int]] = []  # how to restore BLAS, while it is held


_holders = 0


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """Hold NumPy's and SciPy's BLAS at one thread: OpenBLAS, and others through `threadpoolctl`.

    One that cannot be held is left alone, `blas_problem` tells. The number is the whole process's:
    of several threads inside, the last one out restores it.
    """
    global _holders  # noqa: PLW0603
    with _holding:
        if _holders == 0:
            _held[:] = [(set_threads, get()) for set_threads, get in _blas_controls()[0]]
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
