"""Activation functions; each returns its output and the step back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import erf, expit

from diba_np.kernels import activations as kernels
from diba_np.networks.blocks.block import Back

Array = NDArray[Any]
Activation = Callable[[Array], tuple[Array, Back]]

_TANH_CUBE = 0.044715  # of the approximation of GELU by tanh


def gelu(x: Array) -> tuple[Array, Back]:
    """Return ``x Phi(x)`` with the distribution function Phi of the normal law."""
    x = np.ascontiguousarray(x)
    density = x * x
    density *= -0.5
    np.exp(density, out=density)
    y, slope = np.empty_like(x), np.empty_like(x)
    if x.dtype == np.float32:
        kernels.gelu(*(array.reshape(-1) for array in (x, density, y, slope)))
    else:
        below = 0.5 * (1 + erf(x * math.sqrt(0.5)))
        y[...] = x * below
        slope[...] = below + x * density / math.sqrt(2 * math.pi)
    return y, lambda gradient: gradient * slope


def gelu_tanh(x: Array) -> tuple[Array, Back]:
    """Return ``x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2``, GPT-2's GELU."""
    root = math.sqrt(2 / math.pi)
    squares = x * x
    bent = np.tanh(x * (root + root * _TANH_CUBE * squares))
    below = 0.5 * (1 + bent)

    def back(gradient: Array) -> Array:
        slope = 0.5 * x * (1 - bent * bent) * (root + 3 * root * _TANH_CUBE * squares)
        g: Array = gradient * (below + slope)
        return g

    return x * below, back


def silu(x: Array) -> tuple[Array, Back]:
    """Return ``x / (1 + exp(-x))``."""
    share = expit(x)
    y = x * share
    return y, lambda gradient: gradient * (share + y * (1 - share))


def relu(x: Array) -> tuple[Array, Back]:
    """Return ``max(x, 0)``."""
    positive = x > 0
    return x * positive, lambda gradient: gradient * positive


def tanh(x: Array) -> tuple[Array, Back]:
    """Return ``tanh(x)``."""
    y = np.tanh(x)
    return y, lambda gradient: gradient * (1 - y * y)


# by the names that configurations have for them
ACTIVATIONS: dict[str, Activation] = {
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": relu,
    "silu": silu,
    "swish": silu,
    "tanh": tanh,
}
