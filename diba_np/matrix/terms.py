"""What a sum of several terms is made of, and its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diba_np.arrays import RowIndex
from diba_np.matrix.diagonals import DIAGONALS

if TYPE_CHECKING:
    from diba_np.matrix.factors import DiBAFactors

Terms = tuple["DiBAFactors", ...]


def single_terms(terms: Iterable[Any], kind: type[DiBAFactors]) -> Terms:
    """Return the single terms of some factorizations; TypeError or ValueError if they do not fit.

    Parameters
    ----------
    terms : iterable
    kind : type
        What each must be.
    """
    given = list(terms)
    for i, term in enumerate(given):
        if not isinstance(term, kind):
            raise TypeError(f"terms must hold {kind.__name__}, got {type(term).__name__} at {i}")
        if term.bias is not None:
            raise ValueError(f"terms must have no bias, term {i} has one; give that of the sum")
    single = tuple(part for term in given for part in term.terms)
    kinds = sorted({(term.shape, term.shift) for term in single})
    if len(kinds) != 1:
        shapes = ", ".join(f"{shape} with shift {shift:g}" for shape, shift in kinds) or "none"
        raise ValueError(f"terms must be of one shape and shift, got {shapes}")
    return single


def diagonal_names(factors: DiBAFactors) -> list[dict[str, str]]:
    """Return for each term what d1, d2 and d3 are called among those of all terms.

    >>> from diba_np.matrix.factors import DiBAFactors
    >>> f = DiBAFactors([1.0], [[1]], [1.0], [[1]], [1.0])
    >>> diagonal_names(f)
    [{'d1': 'd1', 'd2': 'd2', 'd3': 'd3'}]
    >>> diagonal_names(DiBAFactors.from_terms([f, f]))[1]
    {'d1': 'd1.1', 'd2': 'd2.1', 'd3': 'd3.1'}
    """
    if len(factors.terms) == 1:
        return [{name: name for name in DIAGONALS}]
    return [{name: f"{name}.{i}" for name in DIAGONALS} for i in range(len(factors.terms))]


def expander(
    terms: Terms, columns: RowIndex = slice(None)
) -> Callable[[RowIndex], NDArray[np.float32]]:
    """Return a function from a slice or vector of rows to those of the sum.

    Of their entries those in the c `columns`. It holds the right halves (k, c); a row then costs
    ``2 k c`` flops in one product.
    """
    kind: Any = np.float32
    for f in terms:
        largest = [float(np.abs(d).max()) or 1.0 for d in (f.d2, f.d3)]
        # where d2 d3 leaves float32's range the product with d1 may lie within
        if not 1e-20 < largest[0] * largest[1] < 1e25:
            kind = np.float64
    shift = kind(terms[0].shift)
    halves = []
    for f in terms:
        half = (f.b2.to_dense()[:, columns] - shift) * f.d2[:, None].astype(kind)
        half *= f.d3[columns]
        halves.append(half)
    right = halves[0] if len(halves) == 1 else np.concatenate(halves)

    def left(f: DiBAFactors, rows: RowIndex) -> NDArray[Any]:
        values: NDArray[Any] = f.b1[rows].to_dense() - shift
        values *= f.d1[rows, None]
        return values

    def expand(rows: RowIndex) -> NDArray[np.float32]:
        parts = [left(f, rows) for f in terms]
        values = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        product: NDArray[np.float32] = (values @ right).astype(np.float32, copy=False)
        return product

    return expand
