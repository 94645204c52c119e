"""Weights of a network's linear layers, and how they are stored.

Dense and frozen, three diagonals around frozen bits (DiBARD), or frozen codes with scales. The
matrix is made from the parameters once a step, and the gradient with respect to it pulled back to
them, which for batches of thousands of tokens costs less than mixing bits token by token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

import diba_np as dn
from diba_np.factors import DiBAFactors
from diba_np.linear import DIAGONALS
from diba_np.scales import round_diagonals

Array = np.ndarray


class Weight:
    """A matrix (m, n) that nothing trains.

    Attributes
    ----------
    parameters : dict of str to ndarray
        What may be trained, to be changed in place; `refresh` makes the matrix anew.
    matrix : (m, n) array
    """

    def __init__(self, matrix: Array) -> None:
        self.parameters: dict[str, Array] = {}
        self.matrix = matrix

    def refresh(self) -> None:
        """Make the matrix from the parameters."""

    def pull(self, gradient: Array) -> dict[str, Array]:
        """Turn the gradient with respect to the matrix into those of the parameters."""
        return {}


class DiBAWeight(Weight):
    """``D1 (B1 - shift) D2 (B2 - shift) D3`` with frozen bits.

    Notes
    -----
    With the gradient G of the matrix W: ``d1 g_d1 = rowsum(G W)``, ``g_d2 = rowsum((B1^T D1 G D3)
    B2)``, ``d3 g_d3 = colsum(G W)``; the forms below hold for zeros too. Cost 2 m n k flops each
    way.
    """

    def __init__(self, factors: DiBAFactors, dtype: Any = np.float32) -> None:
        self.shift = np.dtype(dtype).type(factors.shift)
        self.b1 = factors.b1.to_dense().astype(dtype) - self.shift
        self.b2 = factors.b2.to_dense().astype(dtype) - self.shift
        self.parameters = {name: np.array(getattr(factors, name), dtype) for name in DIAGONALS}
        self.refresh()

    @property
    def factors(self) -> DiBAFactors:
        """The factorization with the diagonals as they are."""
        d1, d2, d3 = (self.parameters[name] for name in DIAGONALS)
        return DiBAFactors(d1, self.b1 > 0, d2, self.b2 > 0, d3, shift=float(self.shift))

    def refresh(self) -> None:
        p = self.parameters
        self._inner = (self.b1 * p["d2"]) @ self.b2
        self.matrix = p["d1"][:, None] * self._inner * p["d3"]

    def pull(self, gradient: Array) -> dict[str, Array]:
        p = self.parameters
        right = gradient * p["d3"]
        both = p["d1"][:, None] * right
        return {
            "d1": np.einsum("ij,ij->i", right, self._inner),
            "d2": np.einsum("kj,kj->k", self.b1.T @ both, self.b2),
            "d3": np.einsum("ij,ij->j", p["d1"][:, None] * gradient, self._inner),
        }


class CodeWeight(Weight):
    """Frozen integer codes (m, n), with a scale for every row and group of columns (m, groups)."""

    def __init__(self, codes: Array, scales: Array, group: Array) -> None:
        self.codes, self.group = codes, group
        self._starts = np.flatnonzero(np.diff(group, prepend=-1))
        self.parameters = {"scales": scales}
        self.refresh()

    def refresh(self) -> None:
        self.matrix = self.codes * self.parameters["scales"][:, self.group]

    def pull(self, gradient: Array) -> dict[str, Array]:
        return {"scales": np.add.reduceat(gradient * self.codes, self._starts, axis=1)}


def store(weight: Weight) -> dict[str, Array]:
    """Return a weight as arrays; `restore` is its inverse."""
    if isinstance(weight, DiBAWeight):
        bits = {"b1": weight.b1 > 0, "b2": weight.b2 > 0}
        return {**bits, "shift": weight.shift, **weight.parameters}
    if isinstance(weight, CodeWeight):
        return {"codes": weight.codes, "group": weight.group, **weight.parameters}
    raise TypeError(f"no stored form for {type(weight).__name__}")


def restore(arrays: Mapping[str, Array]) -> Weight:
    """Return the weight that `store` made arrays of."""
    if "codes" in arrays:
        return CodeWeight(arrays["codes"], arrays["scales"].copy(), arrays["group"])
    d1, d2, d3 = (arrays[name] for name in DIAGONALS)
    shift = float(arrays.get("shift", 0.0))  # earlier files have none
    return DiBAWeight(dn.DiBAFactors(d1, arrays["b1"], d2, arrays["b2"], d3, shift=shift))


def round_stored(weight: Weight) -> None:
    """Round what was trained to the 16 bits that are counted."""
    p = weight.parameters
    if isinstance(weight, DiBAWeight):
        for name, value in zip(DIAGONALS, round_diagonals(*map(p.get, DIAGONALS)), strict=True):
            p[name][...] = value
    elif isinstance(weight, CodeWeight):
        unit = float(np.abs(p["scales"]).max()) or 1.0
        p["scales"][...] = (p["scales"] / unit).astype(np.float16).astype(np.float32) * unit
    weight.refresh()


def as_weight(made: Any) -> Weight:
    """Return what a method made as a weight whose diagonals or scales can be trained."""
    if isinstance(made, dn.DiBAFactors):
        return DiBAWeight(made)
    codes = np.zeros(made.shape, np.float32)
    codes[:, made.kept] = np.asarray(made.table, np.float32)[made.codes]
    group = np.zeros(made.shape[1], np.int64)
    if made.group:
        kept = np.flatnonzero(made.kept)
        for number, start in enumerate(range(0, len(kept), made.group)):
            group[kept[start] :] = number
    return CodeWeight(codes, made.scales.astype(np.float32) * np.float32(made.scale), group)
