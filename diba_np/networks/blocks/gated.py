"""The product of a gated feed-forward: an activated branch times a linear one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from diba_np.networks.blocks.activations import Activation

Array = NDArray[Any]


def gated(
    gate: Array, value: Array, activation: Activation
) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    """Return ``activation(gate) value`` and the step back to both, all of one shape."""
    opened, back_gate = activation(gate)

    def back(gradient: Array) -> tuple[Array, Array]:
        return back_gate(gradient * value), gradient * opened

    return opened * value, back
