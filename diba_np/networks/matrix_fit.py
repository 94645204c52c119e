"""`Fit`: how one matrix of a network is fitted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diba_np.errors import BudgetError
from diba_np.matrix.base import CompressedMatrix
from diba_np.methods.weighted import FitOptions, fit_weighted, least_bits
from diba_np.networks.importance import KeptImportance

Array = NDArray[Any]

# bits of the diagonals' entries: DiBARD moves them, and few bits would take back what it gained
SCALE_BITS = 8

# most outputs of a matrix whose errors are weighed together; of wider ones each alone: coupled, the
# fit of 1536 x 576 takes 26 processor seconds instead of 9
COUPLED = 1024


@dataclass(frozen=True)
class Fit:
    """How one matrix is fitted: `compress_layers` calls it, also in other processes.

    Parameters
    ----------
    method, effort, seed, threads
        As of `compress`.
    bits : dict of str to float
        Bits a weight by matrix.
    outputs : KeptImportance or None
        Weights of the outputs.
    rows : (m,) array, optional
        Those of a matrix that is not of the trunk.
    looked_up : bool
        Whether the matrix is a table whose rows are looked up.
    """

    method: str
    effort: str
    seed: int
    threads: int | None
    bits: Mapping[str, float]
    outputs: KeptImportance | None
    rows: Array | None = None
    looked_up: bool = False

    def __call__(self, name: str, A: Array, gram: Array | None) -> CompressedMatrix:
        """Return the compressed A (m, n), errors weighed by a Gram matrix (n, n) and outputs.

        Raises
        ------
        BudgetError
            The matrix's bits are too few for the method.
        """
        weights = self.rows if self.outputs is None else self.outputs.outputs(name)
        if weights is not None and weights.ndim == 2:
            if self.method != "diba" or len(weights) > COUPLED:
                weights = np.diag(weights).copy()
        try:
            return fit_weighted(self.method, A, self.bits[name], gram, weights, self._options)
        except BudgetError as error:
            raise BudgetError(f"{name}: {error}") from error

    def least_bits(self, shape: tuple[int, int], weighed: bool) -> int:
        """Return the stored bits under which there is no fit; 0 where the entries decide."""
        return least_bits(self.method, shape, self._options, weighed)

    @property
    def _options(self) -> FitOptions:
        return FitOptions(self.seed, self.threads, self.effort, SCALE_BITS, self.looked_up)
