"""Every check of an argument: one sentence that names it, the rule and the value; digests."""

from __future__ import annotations

import hashlib
import math
import operator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diba_np.arrays import in_float64, largest_magnitude, row_blocks


def check_number(value: Any, name: str, *, above: float = -math.inf) -> float:
    """Return `value` as a finite float greater than `above`.

    Raises
    ------
    TypeError, ValueError
    """
    if isinstance(value, (bool, str, bytes)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}") from None
    except OverflowError:
        raise ValueError(f"{name} must be finite, got one beyond the range of float64") from None
    if not math.isfinite(number) or number <= above:
        rule = "finite" if above == -math.inf else f"finite and above {above:g}"
        raise ValueError(f"{name} must be {rule}, got {number:g}")
    return number


def check_count(value: Any, name: str, least: int = 1) -> int:
    """Return `value` as an int of at least `least`.

    Raises
    ------
    TypeError, ValueError
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {type(value).__name__}") from None
    if count < least:
        raise ValueError(f"{name} must be at least {least}, got {count}")
    return count


def check_dense(values: Any, name: str) -> None:
    """Refuse what NumPy's own conversion would hide: sparse matrices and masked entries.

    Raises
    ------
    TypeError, ValueError
    """
    if hasattr(values, "tocsr"):
        its = f"{name}.toarray()" if name.isidentifier() else "its .toarray()"
        raise TypeError(f"{name} must be a dense array, got a sparse matrix; pass {its}")
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        count = int(np.ma.count_masked(values))
        raise ValueError(f"{name} must have no masked entries, got {count}")


def as_real(
    values: ArrayLike, name: str, rule: str = "be an array of real numbers"
) -> NDArray[Any]:
    """Return `values` as an array of real numbers that NumPy itself knows.

    Formats of the package ``ml_dtypes`` (bfloat16, float8, int4) become float32, which holds them
    all, and longdouble float64; every other array comes back uncopied.

    Raises
    ------
    TypeError
        The entries are not real numbers: "`name` must `rule`, got dtype ..."; a sparse matrix.
    ValueError
        Entries are masked.
    """
    check_dense(values, name)
    array = np.asanyarray(values)
    dtype = array.dtype
    if dtype.kind not in "buif" or dtype.itemsize > 8 or dtype.type.__module__ != "numpy":
        if dtype.type.__module__ == "ml_dtypes" and np.can_cast(dtype, np.float32):
            return array.astype(np.float32)
        if dtype.kind == "f" and dtype.type.__module__ == "numpy":
            return in_float64(array)
        raise TypeError(f"{name} must {rule}, got dtype {dtype}")
    return array


def single_vector(values: ArrayLike, name: str, size: int) -> NDArray[np.float32]:
    """Return a vector of so many real numbers as float32, a read-only copy.

    Raises
    ------
    TypeError
        Not real numbers.
    ValueError
        Of another shape; an entry is not finite in float32.
    """
    vector = as_real(values, name, "be a vector of real numbers")
    if vector.shape != (size,):
        raise ValueError(f"{name} must have shape ({size},), got {vector.shape}")
    with np.errstate(over="ignore"):
        single = np.array(vector, np.float32)
    wrong = np.flatnonzero(~np.isfinite(single))
    if wrong.size:
        raise ValueError(
            f"{name} must be finite in float32, got {vector[wrong[0]]} at {int(wrong[0])}"
        )
    single.setflags(write=False)
    return single


# magnitudes beyond these leave no room in float32 for the factors and their products
_LARGEST, _SMALLEST = 1e35, 1e-35


def as_matrix(A: ArrayLike, name: str = "A") -> NDArray[Any]:
    """Check that `A` is a real, finite, non-empty matrix; return it uncopied if it is an array.

    Formats that NumPy does not know come back as float32 or float64, as `as_real` has it.

    Raises
    ------
    TypeError
        Not an array of real numbers.
    ValueError
        Not two-dimensional, empty, or with NaN or infinity.
    """
    check_dense(A, name)
    try:
        matrix = np.asanyarray(A)
    except ValueError as error:  # ragged nested lists
        raise ValueError(f"{name} must be a rectangular 2-D array: {error}") from None
    if not isinstance(matrix, np.memmap):
        matrix = np.asarray(matrix)  # numpy.matrix and others give blocks of another shape
    matrix = as_real(matrix, name)
    if matrix.ndim != 2:
        raise ValueError(f"{name} must be 2-D, got shape {matrix.shape}")
    if 0 in matrix.shape:
        raise ValueError(f"{name} must have rows and columns, got shape {matrix.shape}")
    if matrix.dtype.kind == "f":
        count, first = 0, None
        for rows in row_blocks(matrix.shape):
            wrong = ~np.isfinite(matrix[rows])
            hits = int(wrong.sum())
            if hits and first is None:
                i, j = np.argwhere(wrong)[0]
                first = (rows.start + int(i), int(j))
            count += hits
        if count:
            entries = "entry" if count == 1 else "entries"
            raise ValueError(f"{name} contains {count} non-finite {entries}; first at {first}")
    return matrix


def as_samples(X: ArrayLike, name: str, width: int) -> NDArray[Any]:
    """Return samples as a matrix (N, width), one a row: leading axes are samples.

    Raises
    ------
    TypeError, ValueError
        As `as_matrix`, or the last axis is not of that width.
    """
    samples: Any = as_real(X, name)
    shape = tuple(samples.shape)
    if len(shape) < 2 or shape[-1] != width:
        raise ValueError(f"{name} must have shape (N, {width}), one sample a row, got {shape}")
    if len(shape) > 2:  # a memory map in row order stays one
        samples = samples.reshape(-1, width)
    return as_matrix(samples, name)


def check_magnitude(A: NDArray[Any], name: str) -> float:
    """Return the largest magnitude; ValueError where float32 scales could not carry it."""
    largest = largest_magnitude(A)
    check_largest(largest, name)
    return largest


def check_largest(largest: float, name: str) -> None:
    """Check the largest magnitude of a matrix: float32 scales have to carry it.

    Raises
    ------
    ValueError
    """
    if largest and not _SMALLEST <= largest <= _LARGEST:
        raise ValueError(
            f"the largest magnitude in {name} must lie in [{_SMALLEST:g}, {_LARGEST:g}], "
            f"got {largest:g}; scale {name} first"
        )


def digest(A: NDArray[Any]) -> str:
    """Return the SHA-256 of a matrix: its dtype, shape and entries in row order."""
    little = A.dtype.newbyteorder("<") if A.dtype.byteorder == ">" else A.dtype
    sha = hashlib.sha256(f"{little.str} {A.shape[0]} {A.shape[1]} ".encode())
    for rows in row_blocks(A.shape):
        sha.update(np.ascontiguousarray(A[rows], little).data)
    return sha.hexdigest()


def check_shift(shift: Any) -> float:
    """Return the alphabet shift as a float in [0, 1].

    Raises
    ------
    TypeError, ValueError
    """
    value = check_number(shift, "shift")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"shift must lie in [0, 1], got {value:g}")
    return value
