"""`Block`: parameters under names, and gradients that add up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

Array = NDArray[Any]
# turns the gradient of a block's output into that of its input
Back = Callable[[Array], Array]


class Block:
    """A part of a network with parameters of its own.

    Its ``forward(x, ...)`` returns the output and a function, the step back: called with the
    gradient of a loss with respect to the output it adds to `gradients` and returns the gradient
    with respect to x.

    Parameters
    ----------
    parameters : mapping of str to array_like
    dtype : {float32, float64}
        Of the arithmetic; arrays of it are kept by reference.

    Attributes
    ----------
    parameters : dict of str to ndarray
        To be changed in place.
    gradients : dict of str to ndarray
        The same shapes; sums since the last `zero_grad`.
    """

    def __init__(self, parameters: Mapping[str, ArrayLike], dtype: DTypeLike = np.float32) -> None:
        self.parameters: dict[str, Array] = {
            name: np.ascontiguousarray(value, dtype) for name, value in parameters.items()
        }
        self.gradients = {name: np.zeros_like(value) for name, value in self.parameters.items()}

    def zero_grad(self) -> None:
        """Set the accumulated gradients to zero."""
        for gradient in self.gradients.values():
            gradient[...] = 0
