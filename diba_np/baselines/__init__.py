"""The other methods, one file each, behind one interface.

`METHODS` names every method once; nothing is imported until it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from diba_np.baselines.base import CompressedMatrix
    from diba_np.container import Container

# label -> (module, class, keyword arguments of `fit`)
METHODS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sign": ("rounding", "SignRows", {}),
    "rtn": ("rounding", "UniformRounding", {}),
    "nf": ("rounding", "NormalFloat", {}),
    "gptq": ("gptq", "GPTQ", {}),
    "bitat": ("bitat", "BiTAT", {}),
    "svd16": ("svd", "TruncatedSVD", {"width": 16}),
    "svd8": ("svd", "TruncatedSVD", {"width": 8}),
    "qswd": ("qswd", "QSWD", {}),
    "fcqh": ("deepc", "HuffmanCoded", {}),
    "deepc": ("deepc", "DeepCompression", {}),
    "mesa": ("mesa", "MESA", {}),
}

# in the files of whole models, beside factorizations
_IN_MODELS = (("stored", "StoredArray"), ("stored", "RowBlocks"))


def _find(module: str, name: str) -> type[CompressedMatrix]:
    found: type[CompressedMatrix] = getattr(import_module(f"{__name__}.{module}"), name)
    return found


def get(label: str) -> tuple[type[CompressedMatrix], dict[str, Any]]:
    """Return ``(class, fit keywords)`` of the method called `label`.

    Raises
    ------
    ValueError
        If no method has that label.
    """
    if label not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {label!r}")
    module, name, keywords = METHODS[label]
    return _find(module, name), dict(keywords)


def fit(
    label: str, A: ArrayLike, bits: float, inputs: ArrayLike | None = None, seed: int = 0
) -> CompressedMatrix:
    """Compress `A` with the method called `label` within `bits` bits per weight.

    Parameters
    ----------
    label : str
        A key of `METHODS`.
    A : (m, n) array_like, real
    bits : float
        Budget, in bits per weight; everything stored is counted.
    inputs : (N, n) array_like, optional
        Cached inputs of the layer, one sample a row.
    seed : int
        Seed of the random generator, where the method draws at all.

    Returns
    -------
    CompressedMatrix
    """
    cls, keywords = get(label)
    return cls.fit(A, bits, inputs=inputs, seed=seed, **keywords)


def rebuild(contents: Container) -> CompressedMatrix:
    """Build the compressed matrix that a file holds, whichever of these methods made it.

    Raises
    ------
    FormatError
        Of an unknown method, or inconsistent.
    """
    from diba_np.errors import FormatError

    found = contents.attributes["method"]
    homes = [home[:2] for home in METHODS.values()] + list(_IN_MODELS)
    classes = {cls.method: cls for cls in (_find(*home) for home in homes)}
    if found not in classes:
        raise FormatError(
            f"{contents.label}: attribute method: found {found!r}, "
            f"expected one of {', '.join(classes)}"
        )
    return classes[found].rebuild(contents)
