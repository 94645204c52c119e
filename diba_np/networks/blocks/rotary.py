"""Rotary positions: pairs of channels turned by angles that grow with the position.

J. Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv 2104.09864.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from diba_np.checks import check_number
from diba_np.networks.blocks.block import Back

Array = NDArray[Any]

_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def frequencies(width: int, base: float, scaling: Mapping[str, Any] | None = None) -> Array:
    """Return the angles of one position, (width / 2,) float64.

    Parameters
    ----------
    width : int
        Channels of a head.
    base : float
    scaling : mapping, optional
        Stretches the angles for longer texts, as configurations have it under ``rope_scaling``:
        type "linear" with its ``factor``, "llama3", or "factors", a list to divide them by.

    Raises
    ------
    TypeError, ValueError
        The scaling is of another type, or one of its numbers is missing or not above 0.
    """
    angles = base ** -(np.arange(0, width, 2) / width)
    kind = "default" if scaling is None else scaling.get("rope_type", scaling.get("type"))
    if scaling is None or kind == "default":
        return angles
    if kind == "linear":
        return angles / _positive(scaling, "factor")
    if kind == "factors":
        factors = np.asarray(scaling.get("factors"), np.float64)
        if factors.shape != angles.shape or not (np.isfinite(factors) & (factors > 0)).all():
            raise ValueError(f"rope_scaling: factors must be {len(angles)} numbers above 0")
        divided: Array = angles / factors
        return divided
    if kind == "llama3":
        factor, low, high, length = (_positive(scaling, name) for name in _LLAMA3)
        if high <= low:
            raise ValueError(f"rope_scaling: {_LLAMA3[2]} must be above {_LLAMA3[1]}, got {high:g}")
        turns = length * angles / (2 * math.pi)
        # between the two bounds, given in turns over the original length, from one to the other
        share = np.clip((turns - low) / (high - low), 0.0, 1.0)
        stretched: Array = (1 - share) * angles / factor + share * angles
        return stretched
    raise ValueError(f'rope_scaling must be "linear", "llama3" or "default", got {kind!r}')


def named_scaling(
    width: int, base: float, scaling: Mapping[str, Any] | None
) -> Mapping[str, Any] | None:
    """Return a scaling of type "factors" as one of the types that other software knows.

    Parameters
    ----------
    width, base, scaling
        As of `frequencies`; a scaling of another type is returned as it is.

    Raises
    ------
    ValueError
        There is none that gives these angles.
    """
    if scaling is None or scaling.get("rope_type") != "factors":
        return scaling
    most = max(scaling["factors"])
    usual = dict(zip(_LLAMA3, (most, 1.0, 4.0, 8192), strict=True))  # of every Llama 3
    angles = frequencies(width, base, scaling)
    for named in ({"rope_type": "linear", "factor": most}, {"rope_type": "llama3", **usual}):
        if np.allclose(frequencies(width, base, named), angles, rtol=1e-5, atol=0):
            return named
    raise ValueError(
        "the factors of its rotary positions (rope_freqs) are not those of a Llama 3, the layout "
        "has no name for others; save keeps them"
    )


def _positive(scaling: Mapping[str, Any], name: str) -> float:
    return check_number(scaling.get(name), f"rope_scaling: {name}", above=0.0)


class Rotary:
    """Turns channels j and j + width / 2 of each head by the position times a frequency.

    Parameters
    ----------
    angles : (width / 2,) array
        As `frequencies` gives them.
    dtype : {float32, float64}
    """

    def __init__(self, angles: Array, dtype: DTypeLike = np.float32) -> None:
        self.angles, self.dtype = angles, np.dtype(dtype)
        self._cos = self._sin = np.empty((0, len(angles)), self.dtype)

    def tables(self, positions: int) -> tuple[Array, Array]:
        """Return cosines and sines (at least positions, width / 2)."""
        if len(self._cos) < positions:
            count = max(positions, 2 * len(self._cos))
            turned = np.arange(count)[:, None] * self.angles
            self._cos, self._sin = (f(turned).astype(self.dtype) for f in (np.cos, np.sin))
        return self._cos, self._sin

    def forward(self, x: Array) -> tuple[Array, Back]:
        """Return x (S, T, heads width) turned, positions from 0 on, and the step back."""
        tokens, half = x.shape[1], len(self.angles)
        cos, sin = (t[:tokens, None, None] for t in self.tables(tokens))

        def turn(x: Array, cos: Array, sin: Array) -> Array:
            pairs = x.reshape(*x.shape[:2], -1, 2, half)
            turned = np.empty_like(pairs)
            one, other = pairs[..., :1, :], pairs[..., 1:, :]
            turned[..., :1, :] = one * cos - other * sin
            turned[..., 1:, :] = other * cos + one * sin
            return turned.reshape(x.shape)

        return turn(x, cos, sin), lambda gradient: turn(gradient, cos, -sin)
