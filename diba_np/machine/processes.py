"""Whether another process is running, asked without a signal where a signal would end it."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from typing import Any

# of Windows: the right to ask, what a running process gives, and why one cannot be opened
_QUERY_LIMITED_INFORMATION = 0x1000
_STILL_ACTIVE = 259
_INVALID_PARAMETER = 87


def is_running(process: int) -> bool:
    """Tell whether there is a process of this number; if that cannot be told, it is.

    Parameters
    ----------
    process : int

    Returns
    -------
    bool
    """
    if sys.platform == "win32":  # where os.kill ends the process, whatever the signal
        library = ctypes.WinDLL("kernel32", use_last_error=True)
        return _is_running_on_windows(process, library, ctypes.get_last_error)
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _is_running_on_windows(process: int, kernel32: Any, last_error: Callable[[], int]) -> bool:
    """Ask the library of Windows; a process that must not be opened is there too."""
    if not 0 < process < 2**32:
        return False
    kernel32.OpenProcess.restype = ctypes.c_void_p  # a handle is as wide as an address
    handle = kernel32.OpenProcess(_QUERY_LIMITED_INFORMATION, False, ctypes.c_uint32(process))
    if not handle:
        return last_error() != _INVALID_PARAMETER
    handle = ctypes.c_void_p(handle)
    try:
        status = ctypes.c_uint32()
        if not kernel32.GetExitCodeProcess(handle, ctypes.byref(status)):
            return True
        return status.value == _STILL_ACTIVE
    finally:
        kernel32.CloseHandle(handle)
