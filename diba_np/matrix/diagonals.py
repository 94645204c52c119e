"""Diagonals as they are stored: half or single precision, or codes of a few bits on a log grid."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

DIAGONALS = ("d1", "d2", "d3")

Vector = NDArray[np.float32]

HALF, SINGLE = 16, 32

# bits of an entry of d1, d2 and d3: one float width for all, or code widths for each
Widths = tuple[int, int, int]
ScaleBits = int | Widths

LEAST_CODE, MOST_CODE = 2, 8

# magnitudes under this share of the largest are rounding errors of zeros where a grid is fitted
_ZERO = 1e-12

# Half precision holds powers of two from the first on with all its bits, and nothing above the
# second. A diagonal whose entries lie further apart than from 1 down to the first is moved up.
_LEAST_NORMAL, _MOST_POWER = -14, 14


def round_half(vector: NDArray[np.floating], scale: float = 1.0) -> Vector:
    """Round to ``scale`` times a half-precision number, as float32; overflow is clipped."""
    limit = float(np.finfo(np.float16).max)
    scaled = np.clip(np.asarray(vector, np.float64) / scale, -limit, limit)
    return (scaled.astype(np.float16).astype(np.float64) * scale).astype(np.float32)


def _exponents(vector: NDArray[np.floating]) -> tuple[int, int]:
    """Return the exponents of the least and of the largest magnitude that is not zero.

    The largest as half precision rounds it, so that rounding again finds the same.
    """
    size = np.abs(np.asarray(vector, np.float64))
    size = size[size > 0]
    if not size.size:
        return 0, 0
    least, largest = np.floor(np.log2([size.min(), size.max()]))
    carried = float(np.float16(size.max() / 2.0**largest)) >= 2.0
    return int(least), int(largest) + carried


def half_scale(vector: NDArray[np.floating]) -> float:
    """Return the power of two over which half precision holds a vector.

    The one that brings the largest magnitude into [1, 2), or 2^14 times less where small entries
    would lose digits over it: 12 decades are held then, 9 of them with 11 bits.
    """
    least, largest = _exponents(vector)
    return float(2.0 ** (largest if least - largest >= _LEAST_NORMAL else largest - _MOST_POWER))


def half_shift(vector: NDArray[np.floating]) -> int:
    """Return by how many powers of two a diagonal is to be moved up before rounding it to half.

    0 where half precision holds all entries with 11 bits; else as many as the least entry needs
    and the largest allows.
    """
    least, largest = _exponents(vector)
    return max(0, min(_LEAST_NORMAL - least, _MOST_POWER - largest))


def stored_scale_bits(d1: Vector, d2: Vector, d3: Vector) -> int:
    """Return 16 if half precision keeps the three diagonals exactly, else 32.

    In a file d1 and d3 stand as they are and d2 over an overall scale.
    """
    exact = (
        np.array_equal(round_half(d1), d1)
        and np.array_equal(round_half(d2, half_scale(d2)), d2)
        and np.array_equal(round_half(d3), d3)
    )
    return HALF if exact else SINGLE


def half_diagonals(
    d1: NDArray[np.floating], d2: NDArray[np.floating], d3: NDArray[np.floating]
) -> tuple[Vector, Vector, Vector]:
    """Return the diagonals as 16 bits hold them, the magnitudes of d1 and d3 moved into d2.

    They are moved by the powers of two next to the means, and up where they span so many decades
    that small entries would be lost (`half_shift`): what has been rounded once stays as it is.
    """
    d1, d2, d3 = (np.array(d, np.float64) for d in (d1, d2, d3))
    units = []
    for outer in (d1, d3):
        unit = 2.0 ** np.round(np.log2(float(np.abs(outer).mean()) or 1.0))
        units.append(unit / 2.0 ** half_shift(outer / unit))
    d1, d2, d3 = d1 / units[0], d2 * units[0] * units[1], d3 / units[1]
    return round_half(d1), round_half(d2, half_scale(d2)), round_half(d3)


_ENTRIES = {"d1": "the rows", "d3": "the columns"}


def warn_of_zeros(name: str, before: NDArray[np.floating], after: NDArray[np.floating]) -> None:
    """Warn where entries of a diagonal that are not zero were rounded to zero.

    Warns
    -----
    UserWarning
    """
    lost = np.flatnonzero((np.asarray(before) != 0) & (np.asarray(after) == 0))
    if lost.size:
        warnings.warn(
            f"{name} spans too many decades for its bits: {lost.size} of {_ENTRIES[name]} become "
            f"zero, the first at {int(lost[0])}; use scale_bits=32",
            UserWarning,
            stacklevel=3,
        )


@dataclass(frozen=True)
class LogGrid:
    """Levels ``low * ratio**c`` for codes c of a few bits, with a sign and a zero if wanted.

    Attributes
    ----------
    bits : int
        Width of a code, the sign counted.
    low, ratio : float
        Exact in float32. A grid is stored as these two numbers: the sign of `low` stands for
        `signed`, that of `ratio` for `zero`.
    signed : bool
        Whether the highest bit of a code is a sign.
    zero : bool
        Whether the lowest level is zero instead of `low`.
    """

    bits: int
    low: float
    ratio: float
    signed: bool = False
    zero: bool = False

    def __post_init__(self) -> None:
        if not LEAST_CODE <= self.bits <= MOST_CODE:
            raise ValueError(
                f"code widths must lie in [{LEAST_CODE}, {MOST_CODE}], got {self.bits}"
            )
        single = (float(np.float32(self.low)), float(np.float32(self.ratio)))
        if single != (self.low, self.ratio) or not (self.low > 0 and self.ratio >= 1):
            raise ValueError(
                f"a grid needs low > 0 and ratio >= 1 in float32, got {self.low}, {self.ratio}"
            )
        if not np.isfinite(self.levels).all():
            raise ValueError(f"the levels of a grid must be finite in float32, got {self}")

    @cached_property
    def levels(self) -> Vector:
        """Magnitudes in ascending order; repeated products, so the same on every machine."""
        factors = np.full(2 ** (self.bits - self.signed), self.ratio)
        factors[0] = self.low
        with np.errstate(over="ignore"):
            levels = np.cumprod(factors).astype(np.float32)
        if self.zero:
            levels[1:] = levels[:-1].copy()
            levels[0] = 0.0
        return levels

    @property
    def values(self) -> NDArray[np.float64]:
        """All numbers that a code can stand for, ascending."""
        levels = self.levels.astype(np.float64)
        return np.unique(np.concatenate([-levels, levels])) if self.signed else levels

    def encode(self, vector: ArrayLike) -> NDArray[np.uint8]:
        """Return the codes of the nearest levels; an unsigned grid takes negatives for zero."""
        x = np.asarray(vector, np.float64)
        levels = self.levels.astype(np.float64)
        size = np.abs(x) if self.signed else np.maximum(x, 0.0)
        codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, size).astype(np.uint8)
        if self.signed:
            codes |= ((x < 0) & (levels[codes] > 0)).astype(np.uint8) << np.uint8(self.bits - 1)
        return codes

    def decode(self, codes: NDArray[np.uint8]) -> Vector:
        """Return the numbers that codes stand for."""
        magnitude = self.levels[codes & np.uint8(len(self.levels) - 1)]
        if not self.signed:
            return np.asarray(magnitude, np.float32)
        negative = codes >= len(self.levels)
        result: Vector = np.where(negative, -magnitude, magnitude)
        return result

    def round(self, vector: ArrayLike) -> Vector:
        """Return the nearest levels."""
        return self.decode(self.encode(vector))

    def to_pair(self) -> tuple[float, float]:
        """Return (low, ratio) with the two flags in their signs."""
        return (-self.low if self.signed else self.low, -self.ratio if self.zero else self.ratio)

    @classmethod
    def from_pair(cls, bits: int, pair: ArrayLike) -> LogGrid:
        """Make a grid of what `to_pair` gave."""
        low, ratio = (float(v) for v in np.asarray(pair, np.float32))
        return cls(bits, abs(low), abs(ratio), low < 0, ratio < 0)


Grids = tuple[LogGrid, LogGrid, LogGrid]

_TAILS_LOW = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2)
_TAILS_HIGH = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1)


def fit_grid(vector: NDArray[np.floating], weights: NDArray[np.floating], bits: int) -> LogGrid:
    """Fit a log grid to a vector: the range with the least weighted squared error.

    Parameters
    ----------
    vector : (size,) float
        A sign is spent only if an entry is negative, a level on zero only if one vanishes.
    weights : (size,) float
        Weight of an entry's squared error.
    bits : int
    """
    x = np.asarray(vector, np.float64)
    size = np.abs(x)
    largest = float(size.max(initial=0.0))
    dead = size <= _ZERO * largest
    flags = {"signed": bool((x < 0).any()), "zero": bool(dead.any())}
    steps = max(2 ** (bits - flags["signed"]) - 1 - flags["zero"], 1)
    if largest < np.finfo(np.float32).tiny:
        return LogGrid(bits, 1.0, 1.0, flags["signed"], True)
    logs = np.log(size[~dead])
    low = np.repeat(np.quantile(logs, _TAILS_LOW), len(_TAILS_HIGH))
    high = np.tile(np.quantile(logs, 1 - np.array(_TAILS_HIGH)), len(_TAILS_LOW))
    with np.errstate(over="ignore", invalid="ignore"):
        lows = np.exp(low).astype(np.float32)
        ratios = np.exp(np.maximum(high - low, 0.0) / steps).astype(np.float32)
        factors = np.repeat(ratios.astype(np.float64)[:, None], 2 ** (bits - flags["signed"]), 1)
        factors[:, 0] = lows
        levels = np.cumprod(factors, axis=1).astype(np.float32).astype(np.float64)
        if flags["zero"]:
            levels[:, 1:] = levels[:, :-1].copy()
            levels[:, 0] = 0.0
        errors = _rounding_errors(size, np.asarray(weights, np.float64), levels)
    best = int(np.where(np.isfinite(errors), errors, np.inf).argmin())
    return LogGrid(bits, float(lows[best]), float(ratios[best]), **flags)


def _rounding_errors(
    size: NDArray[np.float64], weights: NDArray[np.float64], levels: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the weighted squared error of rounding magnitudes to each row of ascending levels.

    From sums over the sorted magnitudes, so that a row costs its levels and not the magnitudes.
    """
    order = np.argsort(size, kind="stable")
    size, weights = size[order], weights[order]
    moments = np.zeros((3, len(size) + 1))
    for moment, terms in zip(moments, (weights, weights * size, weights * size**2), strict=True):
        np.cumsum(terms, out=moment[1:])
    inner = np.searchsorted(size, (levels[:, 1:] + levels[:, :-1]) / 2, side="right")
    ends = np.pad(inner, ((0, 0), (1, 1)), constant_values=((0, 0), (0, len(size))))
    count, first = (np.diff(moment[ends], axis=1) for moment in moments[:2])
    errors: NDArray[np.float64] = moments[2, -1] + np.sum(
        levels * (levels * count - 2.0 * first), axis=1
    )
    return errors


def pack_codes(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack codes into a stream of bytes, least significant bit first."""
    planes = np.unpackbits(codes[:, None], axis=1, count=bits, bitorder="little")
    return np.packbits(planes.ravel(), bitorder="little")


def unpack_codes(stream: NDArray[np.uint8], bits: int, size: int) -> NDArray[np.uint8]:
    """Undo `pack_codes`.

    Raises
    ------
    ValueError
        Bits behind the last code are not zero.
    """
    flat = np.unpackbits(stream, bitorder="little")
    if flat[bits * size :].any():
        raise ValueError("bits behind the last code are not zero")
    planes = flat[: bits * size].reshape(size, bits)
    return np.packbits(planes, axis=1, bitorder="little").ravel()


def check_scale_bits(scale_bits: Any) -> ScaleBits:
    """Return 16, 32 or three code widths; an int from 2 to 8 stands for three of it.

    Raises
    ------
    TypeError, ValueError
    """
    rule = "scale_bits must be 16, 32, an int in [2, 8] or three of them"
    if isinstance(scale_bits, (tuple, list)):
        widths = tuple(scale_bits)
        if len(widths) != 3:
            raise ValueError(f"{rule}, got {scale_bits!r}")
    else:
        widths = (scale_bits,) * 3
    if any(isinstance(w, bool) or not isinstance(w, (int, np.integer)) for w in widths):
        raise TypeError(f"{rule}, got {scale_bits!r}")
    if widths in {(HALF,) * 3, (SINGLE,) * 3}:
        return int(widths[0])
    if not all(LEAST_CODE <= w <= MOST_CODE for w in widths):
        raise ValueError(f"{rule}, got {scale_bits!r}")
    return (int(widths[0]), int(widths[1]), int(widths[2]))
