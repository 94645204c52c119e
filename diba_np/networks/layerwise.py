"""Compress a network layer by layer, each layer on what the compressed ones before it produce.

The network stays the caller's: a sequence of stages that call ``linear(name, x)`` for each layer.
Only second moments of a layer's inputs are kept, and the states between two stages lie on disk, so
memory does not grow with the number of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diba_np.checks import check_number
from diba_np.layers.linear import Layer
from diba_np.models.executors import Runner
from diba_np.networks.finished_layers import FinishedLayers
from diba_np.networks.layer_fit import Fit, LayerMoments, LayerSums, check_reads, fit_layer
from diba_np.networks.stages import (
    Batches,
    DenseWeights,
    Stage,
    StageLinear,
    States,
    dense_linear,
    groups_of,
    layers_linear,
    read_inputs,
    states_folder,
)

Array = NDArray[Any]

_IN_FLIGHT = 8  # layers, independent of each other, that wait for an executor's processes


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
    waiting : dict of str to LayerMoments
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
    waiting: dict[str, LayerMoments] = field(default_factory=dict)

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

    def _capture(
        self, stage: Stage, states: States, names: Sequence[str]
    ) -> dict[str, LayerMoments]:
        """Pass all batches to layers of one group in both networks, or in the dense one alone."""
        pairs = {
            name: LayerMoments(LayerSums(self.dense[name]), LayerSums(self.dense[name]))
            for name in names
        }
        dense, compressed = self.linears()
        every = round(1 / self.hold_out) if self.hold_out else 0
        every = min(max(every, 2), states.count) if every else 0
        for at, both in enumerate(states):
            one = other = read_inputs(stage, both[0], names, dense)
            if self.feedback:
                other = read_inputs(stage, both[1], names, compressed)
            judges = every > 1 and at % every == every - 1
            for name, pair in pairs.items():
                check_reads(name, at, one[name], other[name])
                (pair.held if judges else pair.fit).add(one[name], other[name])
        for name, pair in pairs.items():
            pair.finish(name)
        return pairs

    def fit_waiting(self) -> None:
        """Fit what waits, then report layers as far as all before them are there."""
        done = self.runner.run(fit_layer, list(self.waiting), self._arguments)
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
        """Return those of `fit_layer` for a layer that waits."""
        A, bias = self.dense[name], self.biases.get(name)
        return name, A, bias, self.waiting[name], self.fit, self.ridges, self.refit

    def _report(self, name: str, found: tuple[Layer, dict[str, Any]]) -> None:
        self.result.layers[name], report = found
        self.result.report.append(report)
        if self.callback is not None:
            self.callback(report)
