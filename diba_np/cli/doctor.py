"""What ``diba-np doctor`` tells: versions, CPU, kernels, threads, cache, and what is wrong."""

from __future__ import annotations

import os
import platform
from typing import Any

from diba_np.machine.versions import NOT_INSTALLED, OPTIONAL, _version, versions
from diba_np.products.cpu import (
    FEATURES,
    available_paths,
    cache_folder,
    cpu_features,
    has_rounded,
    kernel_path,
)


def diagnose() -> dict[str, Any]:
    """Return versions, CPU, kernels, threads and cache, as ``diba-np doctor`` prints them.

    Returns
    -------
    dict
        ``versions`` and ``optional`` (package to version), ``platform``, ``machine``,
        ``cpu_features`` (those that choose a kernel), ``paths`` (kernel paths that this CPU runs,
        the fastest last), ``path`` (the one in use, or None), ``rounded`` (whether `matvec_rounded`
        has a kernel here), ``threads`` (by default), ``cache`` (folder of compiled code, or None if
        nothing is kept), ``environment`` (variables that bear on any of it) and ``problems``
        (sentences; empty if all is well).
    """
    from diba_np.machine.processors import resolve_threads

    problems = []
    path, rounded = None, False
    try:
        path, rounded = kernel_path(), has_rounded()
    except ValueError as error:
        problems.append(str(error))
    cache = cache_folder()
    if cache is None:
        problems.append("compiled code is not kept: every process compiles again (NUMBA_CACHE_DIR)")
    told = {name: version for name, version in versions().items() if version == NOT_INSTALLED}
    problems += [f"{name} is not installed" for name in told]
    features = cpu_features()
    return {
        "versions": versions(),
        "optional": {name: _version(name) for name in OPTIONAL},
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_features": sorted(features & FEATURES),
        "paths": list(available_paths()),
        "path": path,
        "rounded": rounded,
        "threads": resolve_threads(None),
        "cache": cache,
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("DIBA_NP_", "NUMBA_", "OMP_", "OPENBLAS_", "MKL_"))
        },
        "problems": problems,
    }
