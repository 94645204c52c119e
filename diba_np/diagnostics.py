"""Versions of what matters for a report or a record."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

from diba_np._version import __version__


def versions() -> dict[str, str]:
    """Versions of Python, the package and its run-time dependencies, without importing them."""
    found = {"diba_np": __version__, "python": platform.python_version()}
    for name in ("numpy", "scipy", "numba", "h5py"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def show_versions() -> None:
    """Print the versions and the platform, one a line, to paste into a bug report."""
    lines = [f"{name} {version}" for name, version in versions().items()]
    lines += [f"platform {platform.platform()}", f"machine {platform.machine()}"]
    sys.stdout.write("\n".join(lines) + "\n")
