"""Diagonal and binary matrix factorization: ``A ~ D1 B1 D2 B2 D3``.

Three diagonals and two 0/1 matrices packed into 64-bit words stand for a dense matrix
(DiBA, arXiv 2605.05994). The public names below are loaded on first use, so that importing the
package compiles nothing and imports neither numba nor h5py nor scipy.sparse.linalg.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from diba_np._version import __version__

if TYPE_CHECKING:
    from diba_np.errors import BudgetError, ConvergenceWarning, FormatError
    from diba_np.layers.dibard import retune
    from diba_np.layers.linear import DiBALinear
    from diba_np.machine.versions import show_versions
    from diba_np.matrix.factors import DiBAFactors
    from diba_np.matrix.files import load
    from diba_np.matrix.packed_bits import PackedBits
    from diba_np.matrix.quality import snr_db
    from diba_np.methods.comparison import compare
    from diba_np.models.factorization import factorize_model
    from diba_np.search.factorization import factorize

__all__ = [
    "BudgetError",
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
    "BudgetError": "errors",
    "ConvergenceWarning": "errors",
    "DiBAFactors": "matrix.factors",
    "DiBALinear": "layers.linear",
    "FormatError": "errors",
    "PackedBits": "matrix.packed_bits",
    "compare": "methods.comparison",
    "factorize": "search.factorization",
    "factorize_model": "models.factorization",
    "load": "matrix.files",
    "retune": "layers.dibard",
    "show_versions": "machine.versions",
    "snr_db": "matrix.quality",
}

logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
