"""Compress a network layer by layer, each layer on what the compressed ones before it produce.

The network stays the caller's: a sequence of stages that call ``linear(name, x)`` for each layer.
Only second moments of a layer's inputs are kept, and the states between two stages lie on disk, so
memory does not grow with the number of samples.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diba_np.arrays import row_blocks
from diba_np.checks import check_number
from diba_np.layers.linear import Layer
from diba_np.layers.registry import as_layer
from diba_np.matrix.base import CompressedMatrix
from diba_np.matrix.quality import decibels, snr_db
from diba_np.methods.fitting import check_fitted
from diba_np.models.executors import Runner
from diba_np.networks.finished_layers import FinishedLayers
from diba_np.networks.stages import (
    Batches,
    DenseWeights,
    Read,
    Stage,
    StageLinear,
    States,
    check_finite,
    dense_linear,
    groups_of,
    layers_linear,
    read_inputs,
    states_folder,
)
from diba_np.search.weights import LEAST_SHRINKAGE, MOST_SHRINKAGE, SHRINKAGE
from diba_np.training.moments import LinearMoments, Moments, TargetMoments

Array = NDArray[Any]

_IN_FLIGHT = 8  # layers, independent of each other, that wait for an executor's processes
_NONE = np.empty((0, 0))  # moments that are forgotten
_ROUNDING = 1e-6  # share of the inputs' squares that sums of float32 leave about equal means
Compressed = CompressedMatrix  # of a method that `diba_np.layers.registry` has a layer for
Fit = Callable[[str, Array, Array], Compressed]


@dataclass
class Layerwise:
    """What `compress_layers` returns.

    Attributes
    ----------
    layers : dict of str to Layer
        In the order of the network, of the class that `LAYERS` names for the method.
    report : list of dict
        For each layer ``name, shape, bits_per_weight, snr_db`` (of the weights),
        ``output_snr_db`` (of the layer's outputs in the compressed network against those in the
        dense one, on the batches held out; None where those are zero), ``input_snr_db`` (the same
        of its inputs), ``seconds``.
    """

    layers: dict[str, Layer] = field(default_factory=dict)
    report: list[dict[str, Any]] = field(default_factory=list)


def compress_layers(
    stages: Sequence[Stage],
    weights: Mapping[str, ArrayLike],
    batches: Batches,
    fit: Fit,
    *,
    biases: Mapping[str, ArrayLike] | None = None,
    ridge: float | Sequence[float] = 0.01,
    refit: bool = True,
    hold_out: float = 0.1,
    feedback: bool = True,
    compressed_batches: Batches | None = None,
    runner: Runner | None = None,
    folder: str | Path | None = None,
    scratch: str | Path | None = None,
    dense_states: str | Path | None = None,
    callback: Callable[[dict[str, Any]], Any] | None = None,
) -> Layerwise:
    """Compress the layers of a network one after another, feedback from layer to layer included.

    Layer l reads x in the dense network and z in the compressed one. It is fitted to
    ``|t - z A_hat^T|^2``, where t is what it gives in the dense network, ``x A^T``; where a
    residual branch is added to it, t also makes good what that branch lost,
    ``x A^T + added_x - added_z``. This is a fit under the Gram matrix of z to the effective target
    ``(T^T Z + r A) (H + r I)^-1`` with ``H = Z^T Z`` and the ridge r, rows weighted. Where there is
    a bias, moments are about the means and the bias takes up the difference. Then the diagonals
    (scales of an integer code) are solved for on the same moments.

    Parameters
    ----------
    stages : sequence of callables
        ``stage(state, linear) -> state``, one after another the whole network: an embedding, each
        block. A state is an array, or a tuple or dict of arrays. A stage obtains the outputs of a
        layer, bias included, by ``linear(name, x)`` with x (..., n); by
        ``linear(name, x, added=h)`` the outputs plus h (..., m), the residual branch. With
        ``keep=``, of the shape of x without its last axis, rows outside a mask count for nothing in
        the fit (padding), or each row as much as its weight. A stage may be cut short while it
        waits for a layer.
    weights : mapping of str to (m, n) array_like
        Dense weights by name; a mapping that reads them when asked for is asked again at every
        stage, and weights of one stage at a time are held. Layers that are not called are left
        out, names that are called and not here are a KeyError. A name is to be called once in all
        stages.
    batches : iterable or callable
        First states; an iterable that can be iterated again, or a callable that returns an
        iterator.
    fit : callable
        ``fit(name, A, gram)`` returns a matrix that a layer can train for the effective
        target A (m, n) and the Gram matrix (n, n), float64, weighted mean over samples. It may use
        neither, or weigh outputs (``output_weight=`` of `factorize`). A method that wants inputs
        can take ``numpy.linalg.cholesky(gram).T``.
    biases : mapping of str to (m,) array_like, optional
        Of the layers that have one; those get a new one.
    ridge : float or sequence of float, default 0.01
        r over the mean of the diagonal of H: how much the dense weights pull. Of several the one is
        taken whose target is the best for the batches held out, and as much of the way from the
        dense weights to that target as is best for them, from nothing to all.
    refit : bool, default True
        Whether diagonals and bias are solved for after `fit`; kept only if the error falls, on the
        batches held out where there are such.
    hold_out : float, default 0.1
        Share of the batches, at least one of two or more, that is not fitted and gives the
        reported output SNR; with 0 it is that of the fit.
    feedback : bool, default True
        False fits every layer to what it reads in the dense network: layers are then independent of
        each other, and as many as `runner` has processes are fitted at once. What the compressed
        layers before one lose is then made good by none.
    compressed_batches : iterable or callable, optional
        First states of the compressed network where they are not those of the dense one.
    runner : Runner, optional
        Runs the fits of a group of layers, in processes of its own or on an executor; `fit` and
        what it returns must then go through a pickle, and a script that defines `fit` stand under
        ``if __name__ == "__main__":``. By default they run here one by one.
    folder : path, optional
        Finished layers are kept there, a file each; a later call with the same network and folder
        goes on where the first one ended. Another way of fitting needs another folder.
    scratch : path, optional
        Where a temporary folder for the states is made.
    dense_states : path, optional
        Folder where the dense network's states between all stages stay, so that a later call with
        the same stages and batches (another budget, another way of fitting) runs the compressed
        network alone between stages. Several processes may share it; nothing removes it.
    callback : callable, optional
        Called with each layer's report.

    Returns
    -------
    Layerwise

    Raises
    ------
    KeyError, TypeError, ValueError
        An argument is of the wrong kind, value or shape; `folder` holds other layers, or
        `dense_states` states of another network or of other batches.

    Notes
    -----
    Layers that are called one after the other with the same array (query, key, value) share their
    passes. Each group of layers in a stage takes a pass of both networks, from the stage's start to
    the group, and the stage as a whole another: cut into stages that begin with their only group, a
    network runs once. On disk: the states of both networks around one stage, with `dense_states`
    the dense one's around all. In memory: up to ``16 n (m + 4 n)`` bytes of moments for each layer
    of a group, the states of one batch, a dense copy of the stage's layers, and what `fit` takes.
    """
    ridges = [
        check_number(r, "ridge", above=0.0)
        for r in (ridge if isinstance(ridge, Sequence) else [ridge])
    ]
    if not ridges:
        raise ValueError("ridge must hold at least one number, got none")
    if not 0 <= check_number(hold_out, "hold_out") < 1:
        raise ValueError(f"hold_out must lie in [0, 1), got {hold_out:g}")
    dense = DenseWeights(weights)
    run = _Run(
        dense=dense,
        biases=_checked_biases(biases, dense),
        fit=fit,
        ridges=ridges,
        refit=refit,
        hold_out=hold_out,
        feedback=feedback,
        runner=runner or Runner(1, 1),
        parts=FinishedLayers(None if folder is None else Path(folder)),
        callback=callback,
    )
    if run.read_all():
        return run.result
    with states_folder(None if scratch is None else Path(scratch)) as space:
        states = States(
            space,
            batches,
            None if dense_states is None else Path(dense_states),
            compressed_batches,
            both=feedback,
        )
        for number, stage in enumerate(stages):
            for names in groups_of(stage, states.first(), dense, run.biases):
                run.take(stage, states, names)
            if number + 1 < len(stages):
                states.advance(stage, *run.linears())
            dense.release()
        run.fit_waiting()
    run.parts.finish(run.order)
    return run.result


def _checked_biases(
    biases: Mapping[str, ArrayLike] | None, dense: DenseWeights
) -> dict[str, Array]:
    """Return the biases in float64, each of a layer that there is and of its size."""
    given = {name: np.asarray(b, np.float64) for name, b in (biases or {}).items()}
    for name, b in given.items():
        if name not in dense:
            raise KeyError(f"biases has {name!r}, which weights has not")
        if b.shape != dense.shapes[name][:1]:
            raise ValueError(
                f"biases[{name!r}] must have shape ({dense.shapes[name][0]},), got {b.shape}"
            )
    return given


# -- layers of a network ---------------------------------------------------------------------------


@dataclass
class _Run:
    """One call of `compress_layers`: what it was given, checked, and how far it is.

    Attributes
    ----------
    result : Layerwise
        Layers before which none is missing; what was reported.
    order : list of str
        Layers that were called so far.
    finished : dict of str to (Layer, dict)
        Those that are fitted, with their reports.
    waiting : dict of str to _Pair
        Those that wait for their fit.
    """

    dense: DenseWeights
    biases: dict[str, Array]
    fit: Fit
    ridges: Sequence[float]
    refit: bool
    hold_out: float
    feedback: bool
    runner: Runner
    parts: FinishedLayers
    callback: Callable[[dict[str, Any]], Any] | None
    result: Layerwise = field(default_factory=Layerwise)
    order: list[str] = field(default_factory=list)
    finished: dict[str, tuple[Layer, dict[str, Any]]] = field(default_factory=dict)
    waiting: dict[str, _Pair] = field(default_factory=dict)

    def read_all(self) -> bool:
        """Take the layers of a folder that holds all of them; tell whether it does."""
        for name, found in self.parts.whole(self.dense):
            self._report(name, found)
        return bool(self.result.layers)

    def linears(self) -> tuple[StageLinear, StageLinear]:
        """Return what runs the layers of the dense and of the compressed network."""
        return (
            dense_linear(self.dense, self.biases),
            layers_linear(self.dense, self.biases, self.result.layers),
        )

    def take(self, stage: Stage, states: States, names: Sequence[str]) -> None:
        """Read or begin the layers of a group; fit what waits where that is enough."""
        twice = [name for name in names if name in self.order]
        if twice:
            raise ValueError(f"each layer must be called once, {twice[0]!r} is called again")
        self.order += names
        kept = {name: self.parts.read(name, self.dense[name]) for name in names}
        self.finished |= {name: found for name, found in kept.items() if found is not None}
        missing = [name for name in names if kept[name] is None]
        if missing:
            self.waiting |= self._capture(stage, states, missing)
        enough = _IN_FLIGHT if self.runner.foreign else self.runner.jobs
        if self.feedback or len(self.waiting) >= enough:
            self.fit_waiting()

    def _capture(self, stage: Stage, states: States, names: Sequence[str]) -> dict[str, _Pair]:
        """Pass all batches to layers of one group in both networks, or in the dense one alone."""
        pairs = {name: _Pair(_Sums(self.dense[name]), _Sums(self.dense[name])) for name in names}
        dense, compressed = self.linears()
        every = round(1 / self.hold_out) if self.hold_out else 0
        every = min(max(every, 2), states.count) if every else 0
        for at, both in enumerate(states):
            one = other = read_inputs(stage, both[0], names, dense)
            if self.feedback:
                other = read_inputs(stage, both[1], names, compressed)
            judges = every > 1 and at % every == every - 1
            for name, pair in pairs.items():
                _check_pair(name, at, one[name], other[name])
                (pair.held if judges else pair.fit).add(one[name], other[name])
        for name, pair in pairs.items():
            pair.fit.finish()
            pair.held.finish()
            if not pair.fit.targets.count:
                raise ValueError(f"{name!r} must read at least one row, got none")
            if not pair.held.targets.count:
                pair.held = pair.fit
        return pairs

    def fit_waiting(self) -> None:
        """Fit what waits, then report layers as far as all before them are there."""
        done = self.runner.run(_compress, list(self.waiting), self._arguments)
        for name, found in done:
            # only now: the call of a process that was killed is made again
            del self.waiting[name]
            self.parts.write(name, self.dense[name], *found)
            self.finished[name] = found
        for name in self.order[len(self.result.report) :]:
            if name not in self.finished:
                return
            self._report(name, self.finished[name])

    def _arguments(self, name: str) -> tuple[Any, ...]:
        """Return those of `_compress` for a layer that waits."""
        A, bias = self.dense[name], self.biases.get(name)
        return name, A, bias, self.waiting[name], self.fit, self.ridges, self.refit

    def _report(self, name: str, found: tuple[Layer, dict[str, Any]]) -> None:
        self.result.layers[name], report = found
        self.result.report.append(report)
        if self.callback is not None:
            self.callback(report)


# -- one layer -------------------------------------------------------------------------------------


class _Sums:
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
        if missing is None and m >= n:
            self._reads = self._reads or LinearMoments(n)
            self._reads.add(z, x, w)
            return
        y = x @ self._A.T.astype(x.dtype, copy=False)
        self.targets.add(z, y if missing is None else y + missing, w)
        self.outputs += _squared(y, w)

    def finish(self) -> None:
        """Make targets of what was summed of inputs alone; once, after all rows."""
        if self._reads is not None:
            self.outputs += self._reads.add_to(self.targets, self._A)
            self._reads = None  # as large as what is kept


def _squared(x: Array, w: Array | None) -> float:
    """Return the sum of squares over rows (N, n), each as much as its weight."""
    squares = np.einsum("ij,ij->i", x, x, dtype=np.float64)
    return float(squares.sum() if w is None else w @ squares)


@dataclass
class _Pair:
    """Sums over the batches that are fitted, and over those that judge."""

    fit: _Sums
    held: _Sums


def _check_pair(name: str, batch: int, x: Read, z: Read) -> None:
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


def _compress(
    name: str,
    A: Array,
    bias: Array | None,
    pair: _Pair,
    fit: Fit,
    ridges: Sequence[float],
    refit: bool,
) -> tuple[Layer, dict[str, Any]]:
    """Fit one layer; return it as it is stored, and its report."""
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


def _noise(layer: Layer, sums: _Sums, bias: Array) -> float:
    """Squared error of a layer's outputs against what it should give, the dense bias left out."""
    return sums.targets.noise(layer.to_matrix().to_dense(), layer.parameters["bias"] - bias)
