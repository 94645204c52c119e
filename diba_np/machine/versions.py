"""What a bug report needs: versions, and how this machine runs the package."""

from __future__ import annotations

import platform
import sys
from functools import cache
from importlib import metadata

from diba_np._version import __version__

# what the package runs on; what its extras add
REQUIRED = ("numpy", "scipy", "numba", "h5py")
OPTIONAL = ("threadpoolctl", "matplotlib", "tqdm", "tokenizers", "gguf", "dask", "distributed")

NOT_INSTALLED = "not installed"


@cache
def version_of(name: str) -> str:
    """Return the version of an installed package, or `NOT_INSTALLED`."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return NOT_INSTALLED


def versions() -> dict[str, str]:
    """Versions of Python, the package and its run-time dependencies, without importing them."""
    table = {"diba_np": __version__, "python": platform.python_version()}
    return table | {name: version_of(name) for name in REQUIRED}


def show_versions() -> None:
    """Print the versions and the platform, one a line, to paste into a bug report.

    ``diba-np doctor`` prints these and how products run here.
    """
    lines = [f"{name} {version}" for name, version in versions().items()]
    lines += [f"platform {platform.platform()}", f"machine {platform.machine()}"]
    sys.stdout.write("\n".join(lines) + "\n")
