"""Floats that NumPy has not: bfloat16 and those of 8 bits, read and written to the bit.

float32 stands for their values everywhere but in files: each of them is one of float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

BFLOAT16 = "bfloat16"


@dataclass(frozen=True)
class SmallFloat:
    """How the bits of a type of at most 8 bits are read: sign, exponent, mantissa.

    Attributes
    ----------
    exponent, mantissa : int
        Bits of each; what is left of 8 is the sign.
    bias : int
        Of the exponent.
    nan : tuple of int
        Codes without the sign bit that are no number; with `unsigned_zero` the code of minus zero.
    infinity : int or None
        Code of infinity without the sign bit.
    unsigned_zero : bool
        Whether the code of minus zero is the one that is no number.
    """

    exponent: int
    mantissa: int
    bias: int
    nan: tuple[int, ...] = ()
    infinity: int | None = None
    unsigned_zero: bool = False

    @property
    def signed(self) -> bool:
        """Whether there is a sign bit."""
        return self.exponent + self.mantissa < 8

    def value(self, code: int) -> float:
        """Return what a code stands for."""
        sign = -1.0 if self.signed and code >> 7 else 1.0
        low = code & 127 if self.signed else code
        if (code == 128) if self.unsigned_zero else (low in self.nan):
            return math.nan
        if low == self.infinity:
            return sign * math.inf
        raised, fraction = low >> self.mantissa, low & ((1 << self.mantissa) - 1)
        if raised == 0 and self.signed:  # below the normal ones; a scale of exponents has none
            return sign * math.ldexp(fraction, 1 - self.bias - self.mantissa)
        return sign * math.ldexp(
            (1 << self.mantissa) + fraction, raised - self.bias - self.mantissa
        )


# by the name that ml_dtypes gives them; OCP 8-bit floating point specification 1.0, section 5,
# and the types without minus zero and infinities of Noune et al., arXiv:2206.02915
EIGHT_BITS = {
    "float8_e4m3fn": SmallFloat(4, 3, 7, nan=(0x7F,)),
    "float8_e5m2": SmallFloat(5, 2, 15, nan=(0x7D, 0x7E, 0x7F), infinity=0x7C),
    "float8_e4m3fnuz": SmallFloat(4, 3, 8, unsigned_zero=True),
    "float8_e5m2fnuz": SmallFloat(5, 2, 16, unsigned_zero=True),
    "float8_e8m0fnu": SmallFloat(8, 0, 127, nan=(0xFF,)),
}

# name of the type -> type of the words that hold it
SMALL_FLOATS: dict[str, np.dtype[Any]] = {
    BFLOAT16: np.dtype("<u2"),
    **dict.fromkeys(EIGHT_BITS, np.dtype("u1")),
}


def word_type(dtype: str) -> np.dtype[Any]:
    """Return NumPy's type of what a file holds for an array of that type."""
    return SMALL_FLOATS[dtype] if dtype in SMALL_FLOATS else np.dtype(dtype)


def value_type(dtype: str) -> np.dtype[Any]:
    """Return NumPy's type of an array's values: float32 where it has no type of that name."""
    return np.dtype(np.float32) if dtype in SMALL_FLOATS else np.dtype(dtype)


def narrowed(values: NDArray[Any], kind: np.dtype[Any]) -> NDArray[Any]:
    """Return floats in another type; what lies beyond its range becomes its largest.

    >>> narrowed(np.array([1.5, -70000.0], np.float32), np.dtype(np.float16)).tolist()
    [1.5, -65504.0]
    """
    if kind.itemsize < values.dtype.itemsize:
        most = np.finfo(kind).max
        values = np.clip(values, -most, most)
    return values.astype(kind, copy=False)


@lru_cache
def _table(dtype: str) -> NDArray[np.float32]:
    """Return the value of each code of 8 bits; a NaN keeps its code in its lowest bits."""
    table = np.array([EIGHT_BITS[dtype].value(code) for code in range(256)], np.float32)
    codes = np.arange(256, dtype=np.uint32)
    bits = (codes >> 7 << 31) | 0x7FC00000 | (codes & 127)
    nan = np.isnan(table)
    table.view(np.uint32)[nan] = bits[nan]
    return table


def decode(words: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Return the float32 values of the words of a small float, exactly.

    >>> decode(np.array([0x3F80, 0xC000], np.uint16), "bfloat16")
    array([ 1., -2.], dtype=float32)
    >>> decode(np.array([0x38, 0xFE], np.uint8), "float8_e4m3fn")
    array([   1., -448.], dtype=float32)
    """
    if dtype == BFLOAT16:
        return (np.asarray(words).astype(np.uint32) << 16).view(np.float32)
    values: NDArray[np.float32] = _table(dtype)[np.asarray(words)]
    return values


def encode(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Return the words of the nearest values of a small float, ties to the even code.

    What came from such words comes back as them, NaNs included. What lies beyond the largest
    finite value becomes that one in 8 bits, infinity in bfloat16.
    """
    wide = np.ascontiguousarray(values, np.float32)
    bits = wide.view(np.uint32)
    nan = np.isnan(wide)
    if dtype == BFLOAT16:
        rounded = bits + (0x7FFF + ((bits >> 16) & 1))
        # a NaN that keeps none of its bits would be infinity
        quiet = np.where(bits & 0x7F0000, bits, bits | 0x400000)
        return (np.where(nan, quiet, rounded) >> 16).astype("<u2")
    kind, table = EIGHT_BITS[dtype], _table(dtype)
    codes = np.flatnonzero(np.isfinite(table) & (np.arange(256) < (128 if kind.signed else 256)))
    steps = table[codes].astype(np.float64)  # rising, from zero or the smallest
    magnitude = np.abs(wide.astype(np.float64)) if kind.signed else wide.astype(np.float64)
    between = (steps[1:] + steps[:-1]) / 2
    index = np.searchsorted(between, magnitude)  # a tie goes to the lower one
    tie = (index < len(between)) & (magnitude == between[np.minimum(index, len(between) - 1)])
    index += tie & (codes[index] % 2 == 1)
    out = codes[index].astype(np.uint8)
    if kind.infinity is not None:
        out[np.isinf(wide)] = kind.infinity
    if kind.signed:
        out |= (bits >> 31 << 7).astype(np.uint8)
    if kind.unsigned_zero:
        out[out == 128] = 0
    own = ((bits >> 31 << 7) | (bits & 127)).astype(np.uint8)
    known = np.isnan(table)
    out[nan] = np.where(known[own[nan]], own[nan], np.flatnonzero(known)[0])
    return out
