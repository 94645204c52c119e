"""Budgets: what ``k=``, ``bits=``, ``ratio=`` and ``snr=`` mean."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import NDArray

from diba_np.checks import check_count, check_number
from diba_np.errors import BudgetError
from diba_np.machine.processors import memory

Numbers = Sequence[float] | NDArray[Any]

SMALL_K = 1024  # takes seconds for a small matrix, whatever the dense one would take

DENSE_BITS = 32  # the dense matrix that a storage ratio of 1 stands for is float32
_SLACK = 1e-12  # stored bits over the entries, times the entries, may come out this share smaller
GRID_BITS = 64  # the two float32 numbers that describe the grid of a coded diagonal


def chosen(budgets: dict[str, Any]) -> tuple[str, Any]:
    """Return the one (name, value) that is given.

    Raises
    ------
    TypeError
        None or several are given.
    """
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        names = ", ".join(f"{name}={value}" for name, value in given.items()) or "none"
        raise TypeError(f"give exactly one of {', '.join(f'{n}=' for n in budgets)}, got {names}")
    return next(iter(given.items()))


def intermediate_dimension(
    name: str,
    value: Any,
    shape: tuple[int, int],
    scale_bits: int | tuple[int, int, int] = 16,
) -> int:
    """Return k for a budget of ``k``, ``bits`` (stored bits per weight) or ``ratio``.

    Raises
    ------
    BudgetError
        The budget is too small for a single component.
    TypeError, ValueError
        It is not a number, or too large: for the memory, or as of `check_most`.
    """
    m, n = shape
    check_most(name, value, shape)
    if name == "k":
        return _within_reach(check_count(value, "k"), shape, f"k={value}")
    number = check_number(value, name, above=0.0)
    k = largest_k(m, n, rate_of(name, number), scale_bits)
    if k < 1:
        least = storage_bits(m, n, 1, scale_bits) / (m * n)
        raise BudgetError(
            f"{name}={number:g} is too small for a {m} x {n} matrix: "
            f"k=1 already takes {name}={least / rate_of(name, 1.0):.4g}"
        )
    return _within_reach(k, shape, f"{name}={number:g}")


def rate_of(name: str, value: Any) -> float:
    """Return the stored bits per weight of a budget of ``bits`` or ``ratio``."""
    return float(value) * (DENSE_BITS if name == "ratio" else 1)


def check_most(name: str, value: Any, shape: tuple[int, int]) -> None:
    """Refuse a budget of ``k``, ``bits`` or ``ratio`` that the dense float32 matrix is within.

    One with a k of at most `SMALL_K` is none the less taken.

    Raises
    ------
    TypeError, ValueError
    """
    m, n = shape
    most = DENSE_BITS * m * n / (m + n)  # of the binaries alone: whatever the diagonals will be
    if name == "k":
        given, k = f"k={value}", float(check_count(value, "k"))
        remedy = f"k of at most {max(SMALL_K, int(most))}"
    else:
        limit = 1 if name == "ratio" else DENSE_BITS
        number = check_number(value, name, above=0.0)
        given, k = f"{name}={number:g}", number / limit * most
        remedy = f"{name} of at most {limit}"
        if name == "ratio":
            remedy += f" ({number:g} times smaller is ratio=1/{number:g})"
    if k > max(SMALL_K, most):
        raise ValueError(
            f"{given} is too large for a {m} x {n} matrix: it is more than the dense "
            f"float32 matrix takes; give {remedy}, or keep the matrix as it is"
        )


def _within_reach(k: int, shape: tuple[int, int], given: str) -> int:
    """Return k if the memory can hold a float32 copy of the two binaries."""
    m, n = shape
    held, most = 4 * k * (m + n), memory()
    if held > most:
        raise ValueError(
            f"{given} is too large for a {m} x {n} matrix: a solver's float32 copy of the "
            f"binaries takes {held / 2**30:.0f} GiB, this process may use {most / 2**30:.0f}"
        )
    return k


def usual_k(goal: float, shape: tuple[int, int]) -> int:
    """Return about the k that reaches `goal` dB: 5 dB a bit, at most 32 bits per weight."""
    m, n = shape
    most = max(1, int(DENSE_BITS * m * n / (m + n)))
    return min(most, max(1, round(goal / 5.0 * m * n / (m + n))))


def smallest_k(
    reach: Callable[[int], float],
    goal: float,
    shape: tuple[int, int],
    first: int | None = None,
    slope: float | None = None,
    least: int = 1,
) -> int:
    """Return the smallest k at which ``reach(k) >= goal``, by bracketing.

    Parameters
    ----------
    reach : callable
        SNR in dB at k; called once for each k that is tried.
    goal : float
        dB.
    shape : (int, int)
        Sets the most that makes sense: 32 bits per weight.
    first : int, optional
        The k to try first; by default what 5 dB a bit need.
    slope : float, optional
        About what one more component brings, in dB; by default goal over k.
    least : int, default 1
        The smallest k that can be tried.

    Returns
    -------
    int
        With ``reach(k) >= goal`` and, unless k is `least`, ``reach(k - 1) < goal``.

    Raises
    ------
    ValueError
        The goal is not reached with as many bits as the dense float32 matrix has.
    """
    m, n = shape
    most = max(1, int(DENSE_BITS * m * n / (m + n)))
    seen: dict[int, float] = {}
    low, high = least - 1, most + 1  # reach(low) < goal <= reach(high), as far as known
    if least > most:
        raise ValueError(
            f"snr={goal:g} dB is not reached: k is to be {least} at least, "
            f"the dense float32 matrix takes the bits of k={most}"
        )
    guess = min(most, max(least, first or usual_k(goal, shape)))
    while high - low > 1:
        seen[guess] = reach(guess)
        if seen[guess] >= goal:
            high = guess
        else:
            low = guess
        if low == most:
            best = max(seen, key=lambda k: seen[k])  # more components may round worse
            raise BudgetError(
                f"snr={goal:g} dB is not reached: {seen[best]:.4g} dB at k={best} is the best of "
                f"{len(seen)} tried up to k={low}, where the dense float32 matrix takes no more "
                'bits; effort="best" may reach more, or scale_bits=32 where diagonals had fewer'
            )
        last = seen[guess]
        each = max(slope or 0.0, abs(goal) / (2.0 * guess), 1e-9)
        if low in seen and high in seen and math.isfinite(seen[high]):
            share = (goal - seen[low]) / max(seen[high] - seen[low], 1e-9)
            guess = low + round(share * (high - low))
        elif high in seen:  # nothing too small yet
            guess = high - 1 - int(min((last - goal) / each, high / 2))
        else:
            guess = low + 1 + int(min((goal - last) / each, 1.0 * low))
        guess = min(max(guess, low + 1), high - 1)
    return high


def _widths(scale_bits: int | tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Return the bits of an entry of d1, d2 and d3, and those of all grids."""
    if isinstance(scale_bits, tuple):
        return (*scale_bits, 3 * GRID_BITS)
    return (scale_bits, scale_bits, scale_bits, 0)


def storage_bits(m: int, n: int, k: int, scale_bits: int | tuple[int, int, int] = 16) -> int:
    """Return the bits of a factorization: ``k (m + n) + b1 m + b2 k + b3 n``.

    `scale_bits` is one float width for the three diagonals, or three code widths; with codes each
    diagonal takes `GRID_BITS` more.
    """
    b1, b2, b3, grids = _widths(scale_bits)
    return k * (m + n) + b1 * m + b2 * k + b3 * n + grids


def bits_within(m: int, n: int, bits_per_weight: float) -> int:
    """Return how many stored bits a budget allows, as many as make it up exactly if any do.

    Examples
    --------
    >>> 666 / (10 * 17) * 10 * 17, bits_within(10, 17, 666 / (10 * 17))
    (665.9999999999999, 666)
    """
    budget = bits_per_weight * m * n * (1.0 + _SLACK)
    return math.floor(budget) if math.isfinite(budget) else sys.maxsize


def largest_k(
    m: int, n: int, bits_per_weight: float, scale_bits: int | tuple[int, int, int] = 16
) -> int:
    """Return the largest intermediate dimension within a budget; below 1 if nothing fits.

    Examples
    --------
    >>> largest_k(384, 384, 1.0), largest_k(4096, 4096, 2.0), largest_k(384, 384, 1.0, (4, 3, 4))
    (172, 4072, 187)
    """
    b1, b2, b3, grids = _widths(scale_bits)
    return (bits_within(m, n, bits_per_weight) - b1 * m - b3 * n - grids) // (m + n + b2)


def lower_hull(x: Numbers, y: Numbers) -> list[int]:
    """Return which points are corners of the lower convex hull, from the first to the last.

    Parameters
    ----------
    x : sequence of float
        Rising. One that does not rise takes the place of those that lie not before it.
    y : sequence of float

    Examples
    --------
    >>> lower_hull([0, 1, 2, 3], [9.0, 8.0, 1.0, 0.5])
    [0, 2, 3]
    """
    hull: list[int] = []
    for i in range(len(x)):
        while hull and x[i] <= x[hull[-1]]:
            hull.pop()
        while len(hull) > 1:
            a, b = hull[-2:]
            if (y[a] - y[b]) * (x[i] - x[b]) > (y[b] - y[i]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(i)
    return hull
