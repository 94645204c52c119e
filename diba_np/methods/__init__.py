"""The other methods, one file each, behind one interface.

`METHODS` names every method once; nothing is imported until it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diba_np.matrix.registry import class_of

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from diba_np.matrix.base import CompressedMatrix

# label -> (method in `diba_np.matrix.registry`, keyword arguments of `fit`)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "sign": ("sign", {}),
    "rtn": ("rtn", {}),
    "nf": ("nf", {}),
    "gptq": ("gptq", {}),
    "trellis": ("trellis", {}),
    "linear-trellis": ("linear-trellis", {}),
    "bqq": ("bqq", {}),
    "bitat": ("bitat", {}),
    "svd16": ("svd", {"width": 16}),
    "svd8": ("svd", {"width": 8}),
    "qswd": ("qswd", {}),
    "fcqh": ("fcqh", {}),
    "deepc": ("deepc", {}),
    "mesa": ("mesa", {}),
}

# what `compare` has in its table, in this order: first those that make a `DiBAFactors`
LABELS = ("diba", "dbf", *METHODS)


def get(label: str) -> tuple[type[CompressedMatrix], dict[str, Any]]:
    """Return ``(class, fit keywords)`` of the method called `label`.

    Raises
    ------
    ValueError
        If no method has that label.
    """
    if label not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {label!r}")
    method, keywords = METHODS[label]
    return class_of(method), dict(keywords)


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
