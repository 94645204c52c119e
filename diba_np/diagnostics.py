"""What a bug report needs: versions, and how this machine runs the package."""

from __future__ import annotations

import os
import platform
import sys
from functools import cache
from importlib import metadata
from typing import Any

from diba_np._version import __version__

# what the package runs on; what its extras add
REQUIRED = ("numpy", "scipy", "numba", "h5py")
OPTIONAL = ("matplotlib", "tqdm", "safetensors", "dask", "distributed")

NOT_INSTALLED = "not installed"


@cache
def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return NOT_INSTALLED


def versions() -> dict[str, str]:
    """Versions of Python, the package and its run-time dependencies, without importing them."""
    found = {"diba_np": __version__, "python": platform.python_version()}
    return found | {name: _version(name) for name in REQUIRED}


def show_versions() -> None:
    """Print the versions and the platform, one a line, to paste into a bug report.

    ``diba-np doctor`` prints these and how products run here.
    """
    lines = [f"{name} {version}" for name, version in versions().items()]
    lines += [f"platform {platform.platform()}", f"machine {platform.machine()}"]
    sys.stdout.write("\n".join(lines) + "\n")


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
    from diba_np import products
    from diba_np.threads import resolve_threads

    problems = []
    path, rounded = None, False
    try:
        path, rounded = products.kernel_path(), products.has_rounded()
    except ValueError as error:
        problems.append(str(error))
    cache = products.cache_folder()
    if cache is None:
        problems.append("compiled code is not kept: every process compiles again (NUMBA_CACHE_DIR)")
    told = {name: version for name, version in versions().items() if version == NOT_INSTALLED}
    problems += [f"{name} is not installed" for name in told]
    features = products.cpu_features()
    return {
        "versions": versions(),
        "optional": {name: _version(name) for name in OPTIONAL},
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_features": sorted(features & products.FEATURES),
        "paths": list(products.available_paths()),
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
