"""Whole networks: read, run, compressed, kept in a file.

>>> from diba_np import networks
>>> net = networks.load("folder")                    # doctest: +SKIP
>>> net.perplexity(["A text.", "Another one."])      # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diba_np.networks.compression import compress
    from diba_np.networks.network import Network
    from diba_np.networks.reading import build, load

__all__ = ["Network", "build", "compress", "load"]

# public name -> module that defines it
_HOME = {
    "Network": "network",
    "build": "reading",
    "compress": "compression",
    "load": "reading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
