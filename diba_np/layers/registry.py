"""One table from the method of a matrix to the layer that trains what it has beside its bits.

It names modules instead of importing them, as `diba_np.matrix.registry` does. A new method that
can be trained is one line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numpy.typing import ArrayLike, DTypeLike

from diba_np.matrix.registry import resolve

if TYPE_CHECKING:
    from diba_np.layers.linear import Layer

_DIBA, _CODED = ("layers.linear", "DiBALinear"), ("layers.coded_linear", "CodedLinear")
_MESA = ("layers.mesa_linear", "MESALinear")

# method -> (module, class) below diba_np
LAYERS: dict[str, tuple[str, str]] = {
    "diba": _DIBA,
    "sign": _CODED,
    "rtn": _CODED,
    "nf": _CODED,
    "gptq": _CODED,
    "bitat": _CODED,
    "mesa": _MESA,
}


def as_layer(
    matrix: Any, bias: ArrayLike | None = None, dtype: DTypeLike = "float32", name: str = "matrix"
) -> Layer:
    """Return a compressed matrix as a layer that can be trained.

    Parameters
    ----------
    matrix : CompressedMatrix, (m, n)
        Of one of the methods of `LAYERS`.
    bias : (m,) array_like, optional
        Start of the bias; by default that of a `DiBAFactors`, or zero.
    dtype : {float32, float64}
        Of the arithmetic.
    name : str
        What an error calls the matrix.

    Returns
    -------
    Layer
        `DiBALinear`, `CodedLinear` or `MESALinear`.

    Raises
    ------
    TypeError
        No layer trains matrices of that method.
    """
    place = LAYERS.get(getattr(matrix, "method", ""))
    if place is None:
        raise TypeError(
            f"{name} must be a matrix of one of the methods {', '.join(LAYERS)}, "
            f"got {getattr(matrix, 'method', '') or type(matrix).__name__}"
        )
    layer: Layer = resolve(place)(matrix, bias, dtype)
    return layer
