"""bfloat16, which NumPy has not: the upper halves of float32's bits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BFLOAT16 = "bfloat16"  # in the place of NumPy's name of a type


def from_bfloat16(words: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return the float32 values of bfloat16 words.

    >>> from_bfloat16(np.array([0x3F80, 0xC000], np.uint16))
    array([ 1., -2.], dtype=float32)
    """
    return (np.asarray(words).astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the bfloat16 words of values that came from such; others are cut off."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype("<u2")
