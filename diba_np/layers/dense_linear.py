"""`DenseLinear`: a dense matrix as a layer, beside the compressed ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from diba_np.layers.linear import Layer, check_bias, check_float
from diba_np.matrix.stored_array import StoredArray
from diba_np.training.moments import Moments

Array = NDArray[Any]


class DenseLinear(Layer):
    """``y = x A^T + bias``.

    Parameters
    ----------
    weight : (m, n) array_like
        A; of the dtype it is kept as it is, a memory map too, unless it is trained.
    bias : (m,) array_like, optional
    dtype : {float32, float64}
    trained : bool, default False
        Whether the matrix is a parameter; otherwise the bias alone is.

    Attributes
    ----------
    parameters : dict of str to ndarray
        ``bias (m,)``, and ``weight (m, n)`` if it is trained.
    weight : (m, n) ndarray
    """

    def __init__(
        self,
        weight: ArrayLike,
        bias: ArrayLike | None = None,
        dtype: DTypeLike = np.float32,
        trained: bool = False,
    ) -> None:
        kind = check_float(dtype)
        self.weight = np.array(weight, kind) if trained else np.asarray(weight, kind)
        if self.weight.ndim != 2:
            raise ValueError(f"weight must be a matrix, got shape {self.weight.shape}")
        m, n = self.weight.shape
        parameters = {"bias": np.array(check_bias(bias, m), kind)}
        if trained:
            parameters["weight"] = self.weight
        super().__init__((m, n), parameters, kind)

    def _forward(self, samples: Array) -> tuple[Array, Any]:
        y = samples @ self.weight.T
        y += self.parameters["bias"]
        return y, None

    def _backward(self, g: Array, samples: Array, kept: Any) -> Array:
        self.gradients["bias"] += g.sum(axis=0)
        if "weight" in self.gradients:
            self.gradients["weight"] += g.T @ samples
        gx: Array = g @ self.weight
        return gx

    def lookup(self, ids: Array) -> tuple[Array, Callable[[Array], None]]:
        """Return rows of the matrix, and what takes their gradient; see `Layer.lookup`."""

        def back(gradient: Array) -> None:
            if "weight" in self.gradients:
                np.add.at(self.gradients["weight"], ids, gradient)

        return self.weight[ids], back

    def to_matrix(self) -> StoredArray:
        """Return the matrix in float32."""
        return StoredArray.of(np.asarray(self.weight, np.float32))

    def rounded(self) -> DenseLinear:
        """Return a new layer with a copy of the parameters; nothing is rounded."""
        trained = "weight" in self.parameters
        return DenseLinear(self.weight, self.parameters["bias"], self.dtype, trained)

    def refit(self, data: Moments) -> None:
        """Set the bias by the means; the matrix stays as it is."""
        self.parameters["bias"][...] = data.y_mean - self.weight @ data.x_mean
