"""Tables of vectors by number: positions, kinds of tokens; tokens where they are not a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from diba_np.networks.blocks.block import Block

Array = NDArray[Any]


class Embedding(Block):
    """A table of rows that are looked up.

    Parameters
    ----------
    weight : (count, d) array_like
    dtype : {float32, float64}
    """

    def __init__(self, weight: ArrayLike, dtype: DTypeLike = np.float32) -> None:
        super().__init__({"weight": weight}, dtype)

    def forward(self, ids: Array) -> tuple[Array, Callable[[Array], None]]:
        """Return the rows of ids (...), (..., d), and what takes their gradient."""
        weight = self.parameters["weight"]

        def back(gradient: Array) -> None:
            np.add.at(self.gradients["weight"], ids, gradient)

        return weight[ids], back
