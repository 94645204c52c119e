"""Gram matrices of a model's inputs, by the name of the array that reads them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diba_np.checks import as_matrix
from diba_np.models.shapes import is_experts, matrix_shape
from diba_np.search.weights import check_gram
from diba_np.sources.opening import open_source


class Grams:
    """``X^T X / N`` by name, checked before any search.

    Parameters
    ----------
    source : mapping of str to array_like, or a source of such, or None
        Each (n, n), or (e, n, n) for the experts of an array (e, m, n).

    Attributes
    ----------
    given : dict
        The matrices by name; those that are all zero are not in it, unless other experts of the
        stack have inputs.
    nothing : list of str
        Names of matrices that were all zero, of a stack those of all experts.
    unit : float
        What the square of a weight's error counts there: the mean of the others' diagonals.

    Raises
    ------
    TypeError, ValueError
        One is not real, finite, square, symmetric, or has a negative eigenvalue.

    Warns
    -----
    UserWarning
        Some are all zero: what reads such inputs is factorized by its weights alone.
    """

    def __init__(self, source: Mapping[str, ArrayLike] | str | os.PathLike[str] | None) -> None:
        self.given: dict[str, NDArray[Any]] = {}
        self.nothing: list[str] = []
        self.unit = 1.0
        zero: list[str] = []  # for the warning
        if source is None or (isinstance(source, Mapping) and not source):
            return
        for entry in open_source(source):
            array = np.asanyarray(entry.read())
            parts = list(array) if array.ndim == 3 else [array]
            if not parts:
                raise ValueError(f"grams {entry.name!r} must have entries, got {array.shape}")
            name = f"grams {entry.name!r}"
            checked = [as_matrix(part, name) for part in parts]
            for part in checked:
                check_gram(part, name)
            empty = [i for i, part in enumerate(checked) if not part.any()]
            if len(empty) == len(checked):
                self.nothing.append(entry.name)
                zero.append(repr(entry.name))
                continue
            zero += [f"{entry.name!r} of expert {i}" for i in empty]
            self.given[entry.name] = np.stack(checked) if array.ndim == 3 else checked[0]
        if zero:
            warnings.warn(
                f"grams {', '.join(zero)} must not be all zero: factorized by the weights alone",
                UserWarning,
                stacklevel=4,
            )
        diagonals = [np.trace(g, axis1=-2, axis2=-1) / g.shape[-1] for g in self.given.values()]
        # of weights alone, so that their errors weigh what those of others do
        if diagonals:
            self.unit = float(np.mean([np.mean(d[d > 0]) for d in diagonals]))

    def check_names(self, names: list[str]) -> None:
        """Complain about a matrix for an array that is not there."""
        known = set(names)
        stray = [name for name in (*self.given, *self.nothing) if name not in known]
        if stray:
            raise ValueError(f"grams holds {stray[0]!r}, which is none of the {len(names)} arrays")

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Complain where a matrix does not fit the array of its name."""
        gram = self.given.get(name)
        n = matrix_shape(shape)[1]
        fitting = [(n, n), (shape[0], n, n)] if is_experts(shape) else [(n, n)]
        if gram is not None and gram.shape not in fitting:
            known = " or ".join(map(str, fitting))
            raise ValueError(f"grams {name!r} must have shape {known}, got {gram.shape}")

    def of(self, name: str, row: int, shape: tuple[int, ...]) -> NDArray[Any] | None:
        """Return the matrix for a row of the array of that name and shape, if there is one."""
        gram = self.given.get(name)
        if gram is None or gram.ndim < 3:
            return gram
        own = gram[row // shape[1]]
        return own if own.any() else None

    def share(self, name: str, other: str) -> bool:
        """Let an array count with the inputs of another name of it too; whether that is news."""
        gram = self.given.get(other)
        if gram is None:
            return False
        known = self.given.get(name)
        if known is not None and known.shape != gram.shape:
            raise ValueError(
                f"grams {name!r} and {other!r} are of one array, got {known.shape}, {gram.shape}"
            )
        self.given[name] = gram if known is None else known + gram
        self.nothing = [each for each in self.nothing if each != name]
        return True
