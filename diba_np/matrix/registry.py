"""One table from the name of a method, as files carry it, to the class that holds its matrices.

It names modules instead of importing them: `load` finds here whatever made a file, and nothing
that is not asked for is imported. A new method is one line.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# method -> (module, class) below diba_np
CLASSES: dict[str, tuple[str, str]] = {
    "diba": ("matrix.factors", "DiBAFactors"),
    "rows": ("matrix.row_blocks", "RowBlocks"),
    "stored": ("matrix.stored_array", "StoredArray"),
    "sign": ("methods.rounding", "SignRows"),
    "rtn": ("methods.rounding", "UniformRounding"),
    "nf": ("methods.rounding", "NormalFloat"),
    "gptq": ("methods.gptq", "GPTQ"),
    "trellis": ("methods.trellis", "Trellis"),
    "linear-trellis": ("methods.linear_trellis", "LinearTrellis"),
    "bqq": ("methods.bqq", "BQQ"),
    "bitat": ("methods.bitat", "BiTAT"),
    "bitat-binary": ("methods.binary_bitat", "BinaryBiTAT"),
    "svd": ("methods.svd", "TruncatedSVD"),
    "qswd": ("methods.qswd", "QSWD"),
    "fcqh": ("methods.deep_compression", "HuffmanCoded"),
    "deepc": ("methods.deep_compression", "DeepCompression"),
    "mesa": ("methods.mesa", "MESA"),
}

# what adapts a truncated factorization to its matrix: a search, which stands above this folder
ADAPTATION = ("search.adaptation", "adapt")


def resolve(place: tuple[str, str]) -> Any:
    """Return what stands at a (module, name) of the tables here."""
    module, name = place
    return getattr(import_module(f"diba_np.{module}"), name)


def class_of(method: str) -> Any:
    """Return the class that holds the matrices of a method.

    Raises
    ------
    KeyError
        No method has that name.
    """
    return resolve(CLASSES[method])
