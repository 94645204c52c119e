"""Layer norm."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from diba_np.kernels import norms
from diba_np.networks.blocks.block import Back, Block

Array = NDArray[Any]


class LayerNorm(Block):
    """``weight (x - mean) / sqrt(variance + epsilon) + bias`` over the last axis.

    Parameters
    ----------
    weight, bias : (d,) array_like
    epsilon : float
    dtype : {float32, float64}
    """

    def __init__(
        self, weight: ArrayLike, bias: ArrayLike, epsilon: float, dtype: DTypeLike = np.float32
    ) -> None:
        super().__init__({"weight": weight, "bias": bias}, dtype)
        self.epsilon = epsilon

    def forward(self, x: Array) -> tuple[Array, Back]:
        """Return the norm of x (..., d) and the step back."""
        weight, bias = self.parameters["weight"], self.parameters["bias"]
        rows = np.ascontiguousarray(x.reshape(-1, len(weight)))
        unit, y, inverse = np.empty_like(rows), np.empty_like(rows), np.empty(len(rows), x.dtype)
        norms.layer_norm(rows, weight, bias, x.dtype.type(self.epsilon), unit, inverse, y)

        def back(gradient: Array) -> Array:
            g = np.empty_like(unit)
            upstream = np.ascontiguousarray(gradient.reshape(unit.shape))
            sums = self.gradients["weight"], self.gradients["bias"]
            norms.layer_norm_back(upstream, weight, unit, inverse, g, *sums)
            return g.reshape(gradient.shape)

        return y.reshape(x.shape), back
