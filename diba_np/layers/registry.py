"""Two tables from the method of a matrix to the layer that trains it.

`LAYERS`: what a matrix has beside its bits is trained (diagonals, scales); `LATENT`: what its bits
stand for too, by latent values with straight-through gradients. They name modules instead of
importing them, as `diba_np.matrix.registry` does, and the command line offers those that are here.
A new method that can be trained is one line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diba_np.matrix.registry import resolve

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike

    from diba_np.layers.linear import Layer

_DIBA, _CODED = ("layers.linear", "DiBALinear"), ("layers.coded_linear", "CodedLinear")
_SIGNS = ("layers.bitat_linear", "BiTATLinear")
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
    "linear-trellis": ("layers.trellis_linear", "TrellisLinear"),
    "qswd": ("layers.qswd_linear", "QSWDLinear"),
}

# the same for those whose codes are trained as well; these layers also take ``weight=``
LATENT: dict[str, tuple[str, str]] = {
    "bitat": _SIGNS,
    "bitat-binary": _SIGNS,
    "qswd": ("layers.qswd_linear", "LatentQSWDLinear"),
}


def as_layer(
    matrix: Any,
    bias: ArrayLike | None = None,
    dtype: DTypeLike = "float32",
    name: str = "matrix",
    *,
    latent: bool = False,
    weight: ArrayLike | None = None,
) -> Layer:
    """Return a compressed matrix as a layer that can be trained.

    Parameters
    ----------
    matrix : CompressedMatrix, (m, n)
        Of a method of `LAYERS`, with `latent` of one of `LATENT`.
    bias : (m,) array_like, optional
        Start of the bias; by default that of a `DiBAFactors`, or zero.
    dtype : {float32, float64}
        Of the arithmetic.
    name : str
        What an error calls the matrix.
    latent : bool, default False
        Whether the codes are trained too, by latent values with straight-through gradients, and
        not only what the matrix has beside them.
    weight : (m, n) array_like, optional
        With `latent`: the dense weights, which tell latent values how near they are to a change.

    Returns
    -------
    Layer
        What it computes at the start is the matrix and the bias, with `latent` as without.

    Raises
    ------
    TypeError
        No layer trains matrices of that method in that way.
    ValueError
        `weight` is given without `latent`, or is of another shape.
    """
    table = LATENT if latent else LAYERS
    place = table.get(getattr(matrix, "method", ""))
    if place is None:
        raise TypeError(
            f"{name} must be a matrix of one of the methods {', '.join(table)}, "
            f"got {getattr(matrix, 'method', '') or type(matrix).__name__}"
        )
    if not latent:
        if weight is not None:
            raise ValueError("weight is where latent values start: pass latent=True with it")
        layer: Layer = resolve(place)(matrix, bias, dtype)
        return layer
    trained: Layer = resolve(place)(matrix, bias, dtype, weight=weight)
    return trained
