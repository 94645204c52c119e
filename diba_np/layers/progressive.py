"""Progressive training: layer after layer from the bottom, each on what the compressed ones give.

The order of BiTAT (arXiv 2207.01394), for any method that `as_layer` has a layer for.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax

from diba_np.arrays import row_blocks
from diba_np.checks import as_samples, check_count, check_number
from diba_np.layers.chain import Chain
from diba_np.layers.linear import Layer
from diba_np.layers.registry import as_layer
from diba_np.matrix.base import CompressedMatrix
from diba_np.methods.binary_bitat import BinaryBiTAT, one_bit_inputs
from diba_np.methods.fitting import check_fitted, half_of
from diba_np.training.losses import LOSSES, Loss
from diba_np.training.moments import Moments, moments
from diba_np.training.optimisers import Diverged, minimise

Array = NDArray[Any]
Fit = Callable[[str, Array, Array], CompressedMatrix]
Batches = Callable[[int], Iterable[Array]]

_LEAST = 2.0**-24  # the smallest number above 0 in 16 bits


def train_progressively(
    dense: Chain,
    X: ArrayLike,
    fit: Fit,
    *,
    names: Sequence[str] | None = None,
    one_bit: Collection[str] = (),
    latent: bool = True,
    loss: str | Loss = "cross_entropy",
    epochs: int = 3,
    last_epochs: int = 20,
    batches: Batches | None = None,
    steps_per_epoch: int | None = None,
    batch_size: int = 64,
    validation: ArrayLike | None = None,
    learning_rate: float = 5e-3,
    clip: float | None = 1.0,
    ridge: float = 0.01,
    seed: int = 0,
    callback: Callable[[dict[str, Any]], Any] | None = None,
) -> Chain:
    """Compress the layers of a chain one after another, and train what is compressed after each.

    Layer l reads x in the dense chain and z in the compressed one. It is fitted to what the dense
    layer gives, ``|A x - A_hat z|^2`` about the means: to the target
    ``A + (T^T Z - A H)(H + r I)^-1`` with ``H = Z^T Z`` and ``T = X A^T``, under H. Then all layers
    that are compressed by now are trained together, through the dense ones above them, to give the
    outputs of the dense chain.

    Parameters
    ----------
    dense : Chain
        What is to be followed; it stays as it is, and so do its layers that are not named.
    X : (N, n) array_like
        Samples of what it reads.
    fit : callable
        ``fit(name, A, gram)`` returns a compressed matrix for the target A (m, n) and the Gram
        matrix (n, n) of what the layer reads. A method that wants inputs can take
        ``numpy.linalg.cholesky(gram).T``.
    names : sequence of str, optional
        Layers to compress, by default all.
    one_bit : collection of str
        Those of them that read one bit of each input, ``sign(z - t)``; `fit` is given the moments
        of these signs and must return a `BiTAT`. The ReLU before them is left out (`Chain`).
    latent : bool, default True
        Whether codes are trained as well, see `as_layer`.
    loss : {"cross_entropy", "mse"} or callable
        Between the outputs of the two chains. For "cross_entropy" both are scores of classes, and
        the dense chain's probabilities are aimed at; a callable takes ``(outputs, dense outputs)``
        and returns the mean loss and its gradient.
    epochs, last_epochs : int
        After each layer, and after the last one. With 0 nothing is trained.
    batches : callable, optional
        ``batches(epoch)`` yields arrays of samples, say X moved at every use; with
        `steps_per_epoch`. By default X in mixed batches of `batch_size`.
    steps_per_epoch : int, optional
    batch_size : int
    validation : (M, n) array_like, optional
        Samples that decide which epoch is kept; by default a tenth of X, not trained on then.
    learning_rate, clip
        See `diba_np.training.optimisers.Adam`; the rate is relative.
    ridge : float
        r over the mean of the diagonal of H.
    seed : int
        Mixes the batches.
    callback : callable, optional
        Called after each layer with ``name, bits_per_weight, loss_before, loss_after, seconds``:
        losses on `validation`, before and after that layer's training; after the last training
        with the name "all".

    Returns
    -------
    Chain
        The layers as they are stored, see `Layer.rounded`.

    Raises
    ------
    KeyError, TypeError, ValueError
        An argument is of the wrong kind, value or shape; what `as_layer` refuses.

    Warns
    -----
    UserWarning
        A training was ended by a loss or gradient that is not finite; the best epoch before stays.

    Notes
    -----
    In memory: X, and what each layer of both chains gives for it.
    """
    chosen = _chosen(dense, names, one_bit)
    if not callable(loss) and loss not in LOSSES:
        raise ValueError(f"loss must be a callable or one of {', '.join(LOSSES)}, got {loss!r}")
    if batches is not None and steps_per_epoch is None:
        raise ValueError("steps_per_epoch must be given with batches")
    check_count(epochs, "epochs", least=0)
    check_count(last_epochs, "last_epochs", least=0)
    check_count(batch_size, "batch_size")
    check_number(ridge, "ridge", above=0.0)
    fitted, judged = _split(dense, X, validation, seed)
    if batches is None:
        steps_per_epoch = -(-len(fitted) // batch_size)
    run = _Training(
        dense,
        loss,
        batches or _mixed(fitted, batch_size, seed),
        steps_per_epoch or 1,
        judged,
        check_number(learning_rate, "learning_rate", above=0.0),
        clip,
    )
    chain, reads = dense, dense.outputs(fitted)
    compressed: list[str] = []
    for at, name in enumerate(dense.layers):
        if name not in chosen:
            continue
        started = time.monotonic()
        x = reads[at - 1] if at else fitted
        z = chain.outputs(fitted)[at - 1] if at else fitted
        layer = _compressed(
            name, dense.layers[name], x, z, fit, name in one_bit, latent, float(ridge)
        )
        chain = chain.with_layers({name: layer})
        compressed.append(name)
        report = {"name": name, "bits_per_weight": layer.to_matrix().bits_per_weight}
        report |= run.train(chain, compressed, epochs)
        if callback is not None:
            callback({**report, "seconds": time.monotonic() - started})
    started = time.monotonic()
    report = {"name": "all", **run.train(chain, chosen, last_epochs)}
    if callback is not None:
        callback({**report, "seconds": time.monotonic() - started})
    return chain.with_layers({name: chain.layers[name].rounded() for name in chosen})


def _chosen(dense: Chain, names: Sequence[str] | None, one_bit: Collection[str]) -> list[str]:
    """Return the layers to compress; complain about names that are none."""
    chosen = list(dense.layers) if names is None else list(names)
    for name in (*chosen, *one_bit):
        if name not in dense.layers:
            raise KeyError(f"the chain has no layer {name!r}, it has {', '.join(dense.layers)}")
    apart = [name for name in one_bit if name not in chosen]
    if apart:
        raise ValueError(f"one_bit must name layers that are compressed, got {apart[0]!r}")
    return chosen


def _split(
    dense: Chain, X: ArrayLike, validation: ArrayLike | None, seed: int
) -> tuple[Array, Array]:
    """Return the samples that are fitted, and those that judge: by default a tenth of all."""
    first = next(iter(dense.layers.values()))
    samples = as_samples(X, "X", first.shape[1]).astype(first.dtype, copy=False)
    if validation is not None:
        judged = as_samples(validation, "validation", first.shape[1])
        return samples, judged.astype(first.dtype, copy=False)
    if len(samples) < 2:
        raise ValueError("X must hold two samples or more, one to judge, or pass validation=")
    order = np.random.default_rng(seed).permutation(len(samples))
    held = max(len(samples) // 10, 1)
    return samples[np.sort(order[held:])], samples[np.sort(order[:held])]


def _mixed(samples: Array, size: int, seed: int) -> Batches:
    """Return what yields samples in batches, in another order every epoch."""

    def batches(epoch: int) -> Iterator[Array]:
        order = np.random.default_rng([seed, epoch]).permutation(len(samples))
        for start in range(0, len(order), size):
            yield samples[order[start : start + size]]

    return batches


def _compressed(
    name: str,
    dense: Layer,
    x: Array,
    z: Array,
    fit: Fit,
    one_bit: bool,
    latent: bool,
    ridge: float,
) -> Layer:
    """Return a layer fitted to what the dense one gives for x, reading z in its place."""
    A = dense.to_matrix().to_dense().astype(np.float64)
    thresholds, size = np.zeros(A.shape[1]), 1.0
    if one_bit:
        thresholds, size = one_bit_inputs(z)
        # so that a ReLU before it can go: its zeros lie under their threshold as negative sums do
        rectified = z.min(axis=0) >= 0
        thresholds[rectified] = np.maximum(
            thresholds[rectified], half_of(thresholds, 1.0)[1] * _LEAST
        )
        z = np.where(z >= thresholds, size, -size)
    data = _moments(dense, x, z)
    mean = float(np.trace(data.xx)) / len(data.xx) or 1.0
    gram = data.xx + ridge * mean * np.eye(len(data.xx))
    target = A + np.linalg.solve(gram, (data.yx - A @ data.xx).T).T
    matrix = check_fitted(fit(name, target, gram), A.shape, name)
    if one_bit:
        matrix = BinaryBiTAT.of(matrix, thresholds, size)
    weight = target if latent else None
    layer = as_layer(matrix, None, dense.dtype, "what fit returns", latent=latent, weight=weight)
    layer.refit(data)
    return layer


def _moments(dense: Layer, x: Array, z: Array) -> Moments:
    """Return the moments of z and of what the dense layer gives for x, about the means."""
    parts = ((z[rows], dense(x[rows])) for rows in row_blocks((len(x), sum(dense.shape))))
    return moments(parts, True, np.zeros(dense.shape[0]))


class _Training:
    """Trains layers of a chain to give what the dense one gives; the best epoch stays."""

    def __init__(
        self,
        dense: Chain,
        loss: str | Loss,
        batches: Batches,
        steps: int,
        judged: Array,
        rate: float,
        clip: float | None,
    ) -> None:
        self.apply, self.batches, self.steps = dense.frozen(), batches, steps
        self.loss = loss if callable(loss) else LOSSES[loss]
        self.as_probabilities = loss == "cross_entropy"
        self.judged, self.rate, self.clip = judged, rate, clip
        self.wanted = self.aim(judged)

    def aim(self, x: Array) -> Array:
        """Return what the outputs for x should be."""
        y = self.apply(x)
        return softmax(y, axis=-1) if self.as_probabilities else y

    def train(self, chain: Chain, names: Sequence[str], epochs: int) -> dict[str, float]:
        """Train some layers in place; return the loss on what judges before and after."""
        parameters, gradients = chain.gather(names)

        def judge() -> float:
            return float(self.loss(chain.frozen()(self.judged), self.wanted)[0])

        def step(x: Array) -> float:
            value, gradient = self.loss(chain.forward(x), self.aim(x))
            chain.backward(np.ldexp(gradient, -power))
            return math.ldexp(float(value), -power)

        before = best = judge()
        power = 0 if self.as_probabilities else math.frexp(before)[1]
        kept = {name: value.copy() for name, value in parameters.items()}

        def ended(epoch: int, mean: float) -> None:
            nonlocal best, kept
            reached = judge()
            if reached < best:
                best, kept = reached, {name: value.copy() for name, value in parameters.items()}

        if epochs:
            try:
                minimise(
                    step,
                    parameters,
                    gradients,
                    self.batches,
                    steps_per_epoch=self.steps,
                    epochs=epochs,
                    learning_rate=self.rate,
                    clip=self.clip,
                    ended=ended,
                )
            except Diverged as error:
                warnings.warn(f"{names[-1]!r}: {error.kept()}", UserWarning, stacklevel=3)
        for name, value in kept.items():
            parameters[name][...] = value
        return {"loss_before": before, "loss_after": best}
