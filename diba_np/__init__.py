"""Diagonal and binary matrix factorization: ``A ~ D1 B1 D2 B2 D3``.

Three diagonals and two 0/1 matrices packed into 64-bit words stand for a dense matrix
(DiBA, arXiv 2605.05994). The public names below are loaded on first use, so that importing the
package compiles nothing and imports neither numba nor h5py nor scipy.sparse.linalg.
"""

from __future__ import annotations

import importlib
import logging
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from diba_np._version import __version__

if TYPE_CHECKING:
    from diba_np.bits import PackedBits
    from diba_np.compare import compare
    from diba_np.diagnostics import show_versions
    from diba_np.errors import ConvergenceWarning, FormatError
    from diba_np.factorize import factorize
    from diba_np.factors import DiBAFactors
    from diba_np.linear import DiBALinear
    from diba_np.metrics import snr_db
    from diba_np.model import factorize_model
    from diba_np.retune import retune
    from diba_np.store import load

__all__ = [
    "ConvergenceWarning",
    "DiBAFactors",
    "DiBALinear",
    "FormatError",
    "PackedBits",
    "__version__",
    "compare",
    "factorize",
    "factorize_model",
    "load",
    "retune",
    "show_versions",
    "snr_db",
]

# public name -> module that defines it
_HOME = {
    "ConvergenceWarning": "errors",
    "DiBAFactors": "factors",
    "DiBALinear": "linear",
    "FormatError": "errors",
    "PackedBits": "bits",
    "compare": "compare",
    "factorize": "factorize",
    "factorize_model": "model",
    "load": "store",
    "retune": "retune",
    "show_versions": "diagnostics",
    "snr_db": "metrics",
}

logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """The package's own module type: ``diba_np.factorize`` stays the function.

    Importing the submodule of the same name would otherwise put the module in its place.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOME and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
