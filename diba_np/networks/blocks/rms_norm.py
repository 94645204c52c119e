"""RMS norm: a layer norm without mean and bias."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from diba_np.kernels import norms
from diba_np.networks.blocks.block import Back, Block

Array = NDArray[Any]


class RMSNorm(Block):
    """``weight x / sqrt(mean(x^2) + epsilon)`` over the last axis.

    Parameters
    ----------
    weight : (d,) array_like
    epsilon : float
    dtype : {float32, float64}
    """

    def __init__(self, weight: ArrayLike, epsilon: float, dtype: DTypeLike = np.float32) -> None:
        super().__init__({"weight": weight}, dtype)
        self.epsilon = epsilon

    def forward(self, x: Array) -> tuple[Array, Back]:
        """Return the norm of x (..., d) and the step back."""
        weight = self.parameters["weight"]
        rows = np.ascontiguousarray(x.reshape(-1, len(weight)))
        y, inverse = np.empty_like(rows), np.empty(len(rows), x.dtype)
        norms.rms_norm(rows, weight, x.dtype.type(self.epsilon), inverse, y)

        def back(gradient: Array) -> Array:
            g = np.empty_like(rows)
            upstream = np.ascontiguousarray(gradient.reshape(rows.shape))
            norms.rms_norm_back(upstream, weight, rows, inverse, g, self.gradients["weight"])
            return g.reshape(gradient.shape)

        return y.reshape(x.shape), back
