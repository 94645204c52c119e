"""A linear layer of any kind as a block."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from diba_np.layers.linear import Layer
from diba_np.networks.blocks.block import Back

Array = NDArray[Any]


def linear(layer: Layer, x: Array, added: Array | None = None) -> tuple[Array, Back]:
    """Return the outputs of a layer for x (..., n), plus what is added (..., m), and the step back.

    The step back adds to the layer's gradients; a layer may stand at several places.
    """
    own = layer.twin()
    y = own.forward(x)
    if added is not None:
        y += added
    return y, own.backward
