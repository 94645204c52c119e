"""Fit one layer of a network to what it read and gave: moments summed over batches, then the fit.

A layer is fitted on the moments of some batches and judged by those of others, held out. How the
layers of a network come one after another is in ``networks/layerwise.py``.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diba_np.arrays import row_blocks
from diba_np.layers.linear import Layer
from diba_np.layers.registry import as_layer
from diba_np.matrix.base import CompressedMatrix
from diba_np.matrix.quality import decibels, snr_db
from diba_np.methods.fitting import check_fitted
from diba_np.networks.stages import Read, check_finite
from diba_np.search.weights import LEAST_SHRINKAGE, MOST_SHRINKAGE, SHRINKAGE
from diba_np.training.moments import LinearMoments, Moments, TargetMoments

Array = NDArray[Any]

_NONE = np.empty((0, 0))  # moments that are forgotten
_ROUNDING = 1e-12  # share of the inputs' squares that rounding leaves about equal inputs
Compressed = CompressedMatrix  # of a method that `diba_np.layers.registry` has a layer for
Fit = Callable[[str, Array, Array], Compressed]


class LayerSums:
    """Sums over the rows of some batches: moments, and what SNRs are of.

    Parameters
    ----------
    A : (m, n) array
        Dense weights.

    Attributes
    ----------
    targets : TargetMoments
    outputs : float
        Squares of the dense layer's outputs, without bias and what is added.
    inputs : float
        Squares of what it reads.
    moved : float
        Of the difference to what is read in the compressed network.
    """

    def __init__(self, A: Array) -> None:
        self.targets, self._A = TargetMoments(*A.shape), A
        self._reads: LinearMoments | None = None
        self.outputs = self.inputs = self.moved = 0.0

    def add(self, x: Read, z: Read) -> None:
        """Take in what is read in a batch: x in the dense network, z in the compressed one."""
        missing = None
        if x.added is not None and z.added is not None:
            missing = x.added - z.added
        for rows in row_blocks((len(x.x), sum(self._A.shape))):
            self._add_rows(
                x.x[rows],
                z.x[rows],
                None if missing is None else missing[rows],
                None if x.keep is None else x.keep[rows],
            )

    def _add_rows(self, x: Array, z: Array, missing: Array | None, w: Array | None) -> None:
        self.inputs += _squared(x, w)
        self.moved += _squared(x - z, w)
        m, n = self._A.shape
        if missing is None and m >= n and not self.targets.count:
            self._reads = self._reads or LinearMoments(n)
            self._reads.add(z, x, w)
            return
        self.finish()
        y = x @ self._A.T.astype(x.dtype, copy=False)
        self.targets.add(z, y if missing is None else y + missing, w)
        self.outputs += _squared(y, w)

    def finish(self) -> None:
        """Make targets of what was summed of inputs alone."""
        if self._reads is not None:
            self.outputs += self._reads.give_to(self.targets, self._A)
            self._reads = None  # as large as what is kept


def _squared(x: Array, w: Array | None) -> float:
    """Return the sum of squares over rows (N, n), each as much as its weight."""
    squares = np.einsum("ij,ij->i", x, x, dtype=np.float64)
    return float(squares.sum() if w is None else w @ squares)


@dataclass
class LayerMoments:
    """Sums over the batches that are fitted, and over those that judge."""

    fit: LayerSums
    held: LayerSums

    def finish(self, name: str) -> None:
        """Make targets, once, after all batches; where none is held out, those fitted judge."""
        self.fit.finish()
        self.held.finish()
        if not self.fit.targets.count:
            raise ValueError(f"{name!r} must read at least one row, got none")
        if not self.held.targets.count:
            self.held = self.fit


def check_reads(name: str, batch: int, x: Read, z: Read) -> None:
    """Check what a layer reads in the dense (x) and the compressed network (z) in one batch."""
    check_finite(name, batch, x, "dense")
    check_finite(name, batch, z, "compressed")
    one, other = (
        np.ones(len(read.x), bool) if read.chosen is None else read.chosen for read in (x, z)
    )
    if x.x.shape != z.x.shape or not np.array_equal(one, other):
        raise ValueError(
            f"{name!r} must read the same rows in both networks, but its keep= differs in batch "
            f"{batch}: {len(x.x)} rows count in the dense network, {len(z.x)} in the compressed "
            "one; a layer whose rows are routed needs one mask for both"
        )


def _effective(
    A: Array, data: Moments, ridges: Sequence[float], held: Moments | None
) -> tuple[Array, Array]:
    """Return the target and ``H + r I`` with the least ridge r; both float64, `data` as it was.

    With E = T^T Z - A H and ridge r the target is ``A + s E (H + r I)^-1``. The step s is 1, or
    with held-out moments the r and the s from 0 to 1 are taken that leave the least error there: a
    residual branch's losses are noise for the most part, which few rows seem to explain. Inputs
    that are all the same tell of the bias alone: the weights count by themselves.
    """
    spread = float(np.trace(data.xx))
    if spread <= _ROUNDING * (spread + float(data.x_mean @ data.x_mean)):
        return A, np.eye(len(data.xx))
    mean = spread / len(data.xx)
    values, vectors = np.linalg.eigh(data.xx)
    turned = (data.yx - A @ data.xx) @ vectors
    best, step = -np.inf, np.zeros_like(A)
    for ridge in ridges:
        whole = (turned / (np.maximum(values, 0.0) + ridge * mean)) @ vectors.T
        share, gain = 1.0, 0.0
        if held is not None and len(ridges) > 1:
            slope = float(np.vdot(whole, held.yx - A @ held.xx))
            bend = float(np.vdot(whole @ held.xx, whole))
            share = min(max(slope / bend, 0.0), 1.0) if bend > 0 else 0.0
            gain = 2 * share * slope - share * share * bend
        if gain > best:
            best, step = gain, share * whole
    gram = data.xx.copy()
    gram[np.diag_indices_from(gram)] += min(ridges) * mean
    return A + step, gram


def fit_layer(
    name: str,
    A: Array,
    bias: Array | None,
    pair: LayerMoments,
    fit: Fit,
    ridges: Sequence[float],
    refit: bool,
) -> tuple[Layer, dict[str, Any]]:
    """Fit layer `name`, A (m, n), to its moments; return it as it is stored, and its report."""
    started = time.monotonic()
    wide = A.astype(np.float64)
    data = pair.fit.targets.moments(bias is not None)
    count, held, judged = pair.fit.targets.count, pair.held, None
    if held is not pair.fit:
        judged = held.targets.moments(bias is not None)
        pair.fit = held  # its sums are not needed any more; wide layers have no room for them
    target, gram = _effective(wide, data, ridges, judged)
    if not refit:  # the means are enough; wide layers have no room for more
        data = dataclasses.replace(data, xx=_NONE, yx=_NONE)
    del judged, wide
    # few rows do not tell correlations apart; `factorize` shrinks by the least share itself
    share = min(SHRINKAGE * A.shape[1] / count, MOST_SHRINKAGE) - LEAST_SHRINKAGE
    if share > 0:
        squares = share * np.diag(gram)
        gram *= 1 - share
        gram[np.diag_indices_from(gram)] += squares
    made = check_fitted(fit(name, target, gram), A.shape, name)
    own = np.zeros(len(A)) if bias is None else bias
    layer = _with_bias(made, data, bias).rounded()
    if refit:
        better = _refitted(layer, data, bias).rounded()
        if _noise(better, held, own) < _noise(layer, held, own):
            layer = better
    moved = held.moved > 1e-12 * held.inputs
    report = {
        "name": name,
        "shape": list(A.shape),
        "bits_per_weight": layer.to_matrix().bits_per_weight,
        "snr_db": snr_db(A, layer.to_matrix().to_dense()),
        "output_snr_db": decibels(held.outputs, _noise(layer, held, own)) if held.outputs else None,
        "input_snr_db": decibels(held.inputs, held.moved) if moved else None,
        "seconds": round(time.monotonic() - started, 3),
    }
    return layer, report


def _with_bias(made: Compressed, data: Moments, bias: Array | None) -> Layer:
    """Make a layer whose bias, if it is to have one, makes up for the means."""
    start = np.zeros(made.shape[0])
    if bias is not None:
        start = bias + data.y_mean - made.to_dense() @ data.x_mean
    return as_layer(made, start, name="what fit returns")


def _refitted(layer: Layer, data: Moments, bias: Array | None) -> Layer:
    """Solve for the diagonals or scales, and for the bias by the means; a layer of its own."""
    other = layer.rounded()
    other.refit(data)  # without a bias all means are zero
    if bias is not None:
        other.parameters["bias"] += bias
    return other


def _noise(layer: Layer, sums: LayerSums, bias: Array) -> float:
    """Squared error of a layer's outputs against what it should give, the dense bias left out."""
    return sums.targets.noise(layer.to_matrix().to_dense(), layer.parameters["bias"] - bias)
