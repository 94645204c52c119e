"""What ``diba-np doctor`` tells: versions, CPU, kernels, threads, cache, and what is wrong."""

from __future__ import annotations

import os
import platform
from typing import Any

from diba_np import environment
from diba_np.machine.blas import blas_problem
from diba_np.machine.processors import processors, resolve_threads
from diba_np.machine.versions import NOT_INSTALLED, OPTIONAL, version_of, versions


def diagnose() -> dict[str, Any]:
    """Return versions, CPU, kernels, threads and cache, as ``diba-np doctor`` prints them.

    Returns
    -------
    dict
        ``versions`` and ``optional`` (package to version), ``platform``, ``machine``,
        ``cpu_features`` (those that choose a kernel), ``paths`` (kernel paths that this CPU runs,
        the fastest last), ``path`` (the one in use, or None), ``rounded`` (whether `matvec_rounded`
        has a kernel here), ``threads`` (by default), ``threading_layer`` (of products on
        several threads, or None: it cannot be loaded), ``cache`` (folder of compiled code, or None
        if nothing is kept), ``environment`` (variables that bear on any of it) and ``problems``
        (sentences; empty if all is well).
    """
    kernels, problems = _kernels()
    missing = {name: version for name, version in versions().items() if version == NOT_INSTALLED}
    problems += [f"{name} is not installed" for name in missing]
    return {
        "versions": versions(),
        "optional": {name: version_of(name) for name in OPTIONAL},
        "platform": platform.platform(),
        "machine": platform.machine(),
        **kernels,
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("DIBA_NP_", "NUMBA_", "OMP_", "OPENBLAS_", "MKL_"))
        },
        "problems": problems,
    }


def _kernels() -> tuple[dict[str, Any], list[str]]:
    """Return what is found of kernels and threads, and what is wrong with them."""
    report: dict[str, Any] = {
        "cpu_features": [],
        "paths": [],
        "path": None,
        "rounded": False,
        "threads": processors(),
        "threading_layer": None,
        "cache": None,
    }
    problems = environment.problems()
    problems += [problem] if (problem := blas_problem()) else []
    try:
        environment.check_variables()
        from diba_np.products import cpu
    except ValueError as error:  # of a variable that the kernels cannot be loaded with
        return report, problems if str(error) in problems else [*problems, str(error)]
    from diba_np.kernels.threads import layer_in_use

    report["cpu_features"] = sorted(cpu.cpu_features() & cpu.FEATURES)
    report["paths"] = list(cpu.available_paths())
    report["threads"], report["cache"] = resolve_threads(None), cpu.cache_folder()
    try:
        report["path"], report["rounded"] = cpu.kernel_path(), cpu.has_rounded()
    except ValueError as error:
        problems.append(str(error))
    try:
        report["threading_layer"] = layer_in_use()
    except ValueError as error:
        problems.append(str(error))
    if report["cache"] is None and not environment.is_jit_disabled():
        problems.append("compiled code is not kept: every process compiles again (NUMBA_CACHE_DIR)")
    return report, problems
