"""Environment variables that Numba reads: what is wrong with them, said before it fails on them."""

from __future__ import annotations

import os

THREADS, LAYER, DISABLED = "NUMBA_NUM_THREADS", "NUMBA_THREADING_LAYER", "NUMBA_DISABLE_JIT"

_LAYERS = ("default", "safe", "threadsafe", "forksafe", "omp", "tbb", "workqueue")

# more threads than this and than so many a processor: systems refuse to start them
_MOST_THREADS, _MOST_A_PROCESSOR = 256, 16


def numba_threads() -> int | None:
    """Return what ``NUMBA_NUM_THREADS`` says; None where it is unset or empty.

    Raises
    ------
    ValueError
        It is no positive int, or one that no system starts so many threads for.
    """
    value = os.environ.get(THREADS, "").strip()
    if not value:
        return None
    most = max(_MOST_THREADS, _MOST_A_PROCESSOR * (os.cpu_count() or 1))
    if not value.isdecimal() or not 1 <= int(value) <= most:
        raise ValueError(f"{THREADS} must be an int in [1, {most}], got {value!r}; unset it")
    return int(value)


def check_layer() -> None:
    """Check the name in ``NUMBA_THREADING_LAYER``; whether it is installed only loading tells.

    Raises
    ------
    ValueError
    """
    value = os.environ.get(LAYER)
    if value is not None and value.lower() not in _LAYERS:
        raise ValueError(f"{LAYER} must be one of {', '.join(_LAYERS)}, got {value!r}; unset it")


def absent_layer(error: Exception) -> ValueError:
    """Return what to raise where Numba could load no threading layer."""
    value = os.environ.get(LAYER)
    if value is None:
        return ValueError(f"Numba can load no threading layer: {' '.join(str(error).split())}")
    return ValueError(f"{LAYER} must be a layer that Numba can load here, got {value!r}; unset it")


def is_jit_disabled() -> bool:
    """Tell whether ``NUMBA_DISABLE_JIT`` asks for kernels that are not compiled."""
    return os.environ.get(DISABLED, "").strip() not in ("", "0")


def jit_disabled() -> ValueError:
    """Return what to raise where a kernel is called and Numba does not compile."""
    value = os.environ.get(DISABLED, "in numba.config")
    return ValueError(
        f"{DISABLED} must be 0 or unset, got {value!r}: the kernels of diba_np run compiled alone"
    )


def check_variables() -> None:
    """Check the variables that Numba fails on without a word of them.

    Raises
    ------
    ValueError
    """
    numba_threads()
    check_layer()


def problems() -> list[str]:
    """Return a sentence for every variable that stops Numba, or that it will not obey."""
    sentences = []
    for check in (numba_threads, check_layer):
        try:
            check()
        except ValueError as error:
            sentences.append(str(error))
    if THREADS in os.environ and not os.environ[THREADS].strip():
        sentences.append(f"{THREADS} is set to nothing, which counts as unset; unset it")
    if is_jit_disabled():
        sentences.append(str(jit_disabled()))
    return sentences
