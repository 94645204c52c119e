"""`retune` (DiBARD): the bits stay, the diagonals are refitted to data.

Squared error is solved in closed form from second moments, one diagonal after another, so that its
cost does not grow with the number of samples after one pass over them. Any other loss goes through
`DiBALinear`'s gradients, by L-BFGS on all samples or by Adam on minibatches.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diba_np.checks import check_count, check_number
from diba_np.layers.linear import DiBALinear
from diba_np.machine.thread_pool import product_threads
from diba_np.matrix.factors import DiBAFactors
from diba_np.matrix.quality import without_figures
from diba_np.search.progress import thinned
from diba_np.training.losses import LOSSES, Loss
from diba_np.training.moments import LeastSquares, Moments, moments
from diba_np.training.optimisers import SCHEDULES, minimise, root_mean_square
from diba_np.training.samples import Pair, Samples, Source, open_samples

Array = NDArray[Any]

METHODS = ("als", "lbfgs", "adam")

# With few samples the diagonals stay near their start: as if each were known beforehand to this
# share of its size. `stay` is then at least the square of its inverse over the samples.
_KNOWN_TO = 0.1

_BIAS_STEPS = 5  # iterations for a bias alone


def retune(
    f: DiBAFactors,
    X: ArrayLike | Source,
    Y: ArrayLike | None = None,
    *,
    loss: str | Loss = "mse",
    bias: bool = True,
    method: str | None = None,
    steps: int | None = None,
    batch_size: int = 256,
    learning_rate: float = 5e-3,
    schedule: str = "cosine",
    clip: float | None = None,
    stay: float = 0.0,
    validation: float = 0.1,
    patience: int = 5,
    seed: int = 0,
    threads: int | None = None,
    callback: Callable[[int, float], Any] | None = None,
) -> DiBAFactors:
    """Refit the diagonals, and a bias, of a factorization to inputs and targets; the bits stay.

    Parameters
    ----------
    f : DiBAFactors, (m, n)
    X : (..., n) array_like, or batches
        Inputs, one sample a row; leading axes are samples. A memory map is read in blocks. Or, with
        `Y` left out, batches ``(x, y)`` of any sizes: an iterable that can be iterated again, or a
        callable that returns an iterator. Every pass must give the same samples in the same order.
    Y : (..., m) array_like, or (...) of int for class labels
        Targets of the outputs ``X A^T``, one for each sample.
    loss : {"mse", "cross_entropy"} or callable, default "mse"
        "mse" is the squared error summed over the outputs, "cross_entropy" that of the softmax
        with labels or probabilities `Y`; both are means over samples. A callable takes
        ``(y_pred, y)`` of a batch and returns the mean loss over its samples and the gradient
        with respect to ``y_pred``.
    bias : bool, default True
        Whether a bias is fitted too; without it, one that `f` has is kept as it is.
    method : {"als", "lbfgs", "adam"}, optional
        Alternating closed forms from second moments (mse only, and its default), L-BFGS over all
        samples at once, or Adam on minibatches (the default for other losses).
    steps : int, optional
        Most sweeps of als (30), iterations of L-BFGS (100) or epochs of Adam (20).
    batch_size : int, default 256
        Samples of a minibatch, and of a block wherever all samples are passed through. Batches
        that are given stay as they are.
    learning_rate : float, default 5e-3
        Of Adam, relative to the root mean square of each diagonal.
    schedule : {"cosine", "constant"}
        Of Adam's rate.
    clip : float, optional
        Largest norm of Adam's gradient (`diba_np.training.optimisers.Adam`).
    stay : float, default 0.0
        Weight on staying near the start. The objective is the loss plus `stay` times the loss at
        the start times the squared distance: of each diagonal relative to its root mean square at
        the start, a mean over its entries, summed over the three. With fewer samples N to fit than
        channels it is at least ``100 (1 / N - 1 / n)``: as if each entry were known beforehand to a
        tenth. Of the bias als then takes the share that exceeds its noise; for the other methods
        its distance counts too, relative to the outputs' root mean square.
    validation : float, default 0.1
        Share of the samples, at least one of two or more, that is held out and decides which step
        is kept; 0 judges on all.
    patience : int, default 5
        Steps without a better objective on what judges after which the fit ends.
    seed : int, default 0
        Draws the held-out samples and the minibatches.
    threads : int, optional
    callback : callable, optional
        Called with (step, objective on what judges); a true return value ends the fit.

    Returns
    -------
    DiBAFactors
        The same bits; diagonals of as many bits as they had: 16, 32, or codes, and a bias fitted
        to them as rounded. On the samples that judge its objective is never above that of `f`, or
        of `f` with a bias alone. ``record["retune"]`` tells the settings, the losses before and
        after, the history of the objective (of diagonals not yet rounded) and the seconds.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong kind, value or shape.

    Warns
    -----
    UserWarning
        There are fewer samples to fit than channels; or a diagonal spans so many decades that
        entries become zero in the bits they have.

    Notes
    -----
    als takes one pass over the samples, ``N n (n + m)`` flops, and then ``O(k n (m + n))`` and a
    solve of order n a sweep, whatever N; and a product a step for the samples that judge. The
    others cost four packed products a sample and pass.

    References
    ----------
    .. [1] N. Ono, arXiv 2605.05994, DiBARD.
    """
    if not isinstance(f, DiBAFactors):
        raise TypeError(
            f"f must be a DiBAFactors, got {type(f).__name__}; scales of other methods are trained "
            "by the layers that diba_np.layers.registry.as_layer makes"
        )
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable, got {type(callback).__name__}")
    score, name = _check_loss(loss)
    squared = loss == "mse"  # a callable of that name may be another thing
    chosen = method or ("als" if squared else "adam")
    if chosen not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {chosen!r}")
    if chosen == "als" and not squared:
        raise ValueError(f'method="als" is for loss="mse", got loss={name!r}')
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if not 0 <= check_number(validation, "validation") < 1:
        raise ValueError(f"validation must lie in [0, 1), got {validation:g}")
    if check_number(stay, "stay") < 0:
        raise ValueError(f"stay must not be negative, got {stay:g}")
    most = {"als": 30, "lbfgs": 100, "adam": 20}[chosen]
    size = check_count(batch_size, "batch_size")
    rng = np.random.default_rng(check_count(seed, "seed", least=0))
    samples = open_samples(X, Y, f.shape, loss == "cross_entropy", float(validation), size, seed)
    few = _few(samples, f.shape)
    fit = _Fit(
        layer=DiBALinear(f),
        samples=samples,
        loss=score,
        bias=bool(bias),
        steps=most if steps is None else check_count(steps, "steps"),
        learning_rate=check_number(learning_rate, "learning_rate", above=0.0),
        schedule=schedule,
        clip=None if clip is None else check_number(clip, "clip", above=0.0),
        patience=check_count(patience, "patience"),
        callback=callback,
    )
    started = time.monotonic()
    with product_threads(threads):
        before = fit.begin(max(float(stay), few), few > 0, by_gradients=chosen != "als")
        if chosen == "adam":
            fit.adam(rng)
        else:
            {"als": fit.least_squares, "lbfgs": fit.quasi_newton}[chosen]()
        record = without_figures(f.record) | {
            "retune": {
                "method": chosen,
                "loss": name,
                "bias": bool(bias),
                "samples": samples.count,
                "held_out": samples.held_count,
                "steps": fit.done,
                "kept_step": 0,  # `rounded` decides
                "stay": max(float(stay), few),
                "seed": seed,
                "history": thinned(fit.history),
                "loss_before": before,
            }
            | (
                {"learning_rate": learning_rate, "schedule": schedule, "batch_size": size}
                if chosen == "adam"
                else {}
            )
        }
        result, after = fit.rounded(record, before)
    result.record["retune"] |= {
        "loss_after": after,
        "seconds": round(time.monotonic() - started, 3),
    }
    return result


def _few(samples: Samples, shape: tuple[int, int]) -> float:
    """Return the least `stay` for so few samples, 0 from as many as channels on; warn if few.

    Each diagonal is taken for normal about its start, `_KNOWN_TO` wide, and the loss at the start
    for the noise of the outputs: the posterior's weight falls as 1 / N.
    """
    count, n = samples.fit_count, shape[1]
    if count >= n:
        return 0.0
    warnings.warn(
        f"X has {count} samples to fit for {n} channels: too few to tell all their correlations, "
        "so the diagonals stay near their start",
        UserWarning,
        stacklevel=3,
    )
    return (1.0 / count - 1.0 / n) / _KNOWN_TO**2


def _check_loss(loss: Any) -> tuple[Loss, str]:
    if callable(loss):
        return loss, getattr(loss, "__name__", "callable")
    if loss not in LOSSES:
        raise ValueError(f"loss must be a callable or one of {', '.join(LOSSES)}, got {loss!r}")
    return LOSSES[loss], loss


def _with_bias(f: DiBAFactors, bias: Array) -> DiBAFactors:
    """Return a factorization with another bias; one of zeros is left out."""
    own = bias if bias.any() else None
    if len(f.terms) > 1:
        return DiBAFactors.from_terms(f.terms, f.record, bias=own)
    parts = (f.d1, f.b1, f.d2, f.b2, f.d3, f.shift)
    return DiBAFactors(*parts, f.record, grids=f.grids, bias=own)


@dataclass
class _Fit:
    """One call of `retune`: the layer in training and what judges it."""

    layer: DiBALinear
    samples: Samples
    loss: Loss
    bias: bool
    steps: int
    learning_rate: float
    schedule: str
    clip: float | None
    patience: int
    callback: Callable[[int, float], Any] | None
    weight: float = 0.0  # of the distance, in units of the loss
    few: bool = False  # whether samples are too few to trust their means
    bias_unit: float = 1.0  # its size, or that of the outputs where it begins with zeros
    scale: float = 1.0  # the size of the loss at the start
    start: dict[str, Array] = field(default_factory=dict)
    units: dict[str, float] = field(default_factory=dict)  # of the distance of what is held
    best: float = np.inf
    kept: dict[str, Array] = field(default_factory=dict)
    kept_step: int = 0
    done: int = 0
    history: list[float] = field(default_factory=list)
    data: Moments | None = None  # of als, and the squared error of a sample about the mean
    noise: float = 0.0
    _waited: int = 0

    def begin(self, stay: float, few: bool = False, by_gradients: bool = False) -> float:
        """Judge and remember the start; return its loss.

        Where samples are few the bias is held as well, unless what fits it sees to that.
        """
        self.few = few
        if few and by_gradients and self.bias:
            self.units["bias"] = self.output_size()
        before = self.judge()
        if not math.isfinite(before):
            raise ValueError(f"the loss must be finite at the start, got {before:g}")
        self.scale = abs(before) or 1.0
        self.weight = stay * self.scale
        self.best, self.kept, self.start = before, self.snapshot(), self.snapshot()
        self.units |= {name: root_mean_square(self.start[name]) for name in self.diagonals}
        own = self.start["bias"]
        if self.bias and by_gradients:
            self.bias_unit = (
                root_mean_square(own) if own.any() else self.output_size(self.loss is LOSSES["mse"])
            )
        return before

    def output_size(self, targets: bool = False) -> float:
        """Return the root mean square of the outputs that judge, with that of their targets."""
        squares, count = 0.0, 0
        for x, y in self.samples.judging():
            for values in (self.layer(x), y) if targets else (self.layer(x),):
                squares += float(np.sum(np.square(values, dtype=np.float64)))
                count += values.size
        return math.sqrt(squares / count) or 1.0

    @property
    def diagonals(self) -> list[str]:
        """The names of the diagonals among the layer's parameters."""
        return [name for name in self.layer.parameters if name != "bias"]

    def snapshot(self) -> dict[str, Array]:
        return {name: value.copy() for name, value in self.layer.parameters.items()}

    def restore(self, parameters: dict[str, Array]) -> None:
        for name, value in parameters.items():
            self.layer.parameters[name][...] = value

    def evaluate(self, x: Array, y: Array, layer: DiBALinear | None = None) -> tuple[float, Array]:
        """Return the mean loss of some samples and its gradient; check what a callable gave."""
        outputs = (layer or self.layer).forward(x)
        found = self.loss(outputs, y)
        if not isinstance(found, (tuple, list)) or len(found) != 2:
            raise TypeError(f"loss must return (value, gradient), got {found!r}")
        value, gradient = found
        if np.shape(gradient) != outputs.shape:
            raise ValueError(
                "loss must return (value, gradient) with a gradient of shape "
                f"{outputs.shape}, got {np.shape(gradient)}"
            )
        try:
            return float(value), np.asarray(gradient)
        except (TypeError, ValueError):
            kind = f"an array of shape {np.shape(value)}" if np.ndim(value) else repr(value)
            raise TypeError(
                f"loss must return (value, gradient) with a number as value, got {kind}"
            ) from None

    def judge(self, layer: DiBALinear | None = None) -> float:
        """Return the mean loss over the samples that decide what is kept."""
        total, count = 0.0, 0
        for x, y in self.samples.judging():
            total += self.evaluate(x, y, layer)[0] * len(x)
            count += len(x)
        return total / count

    def distance(self) -> float:
        """Return the weighted squared distance from the start of what is held there."""
        if not self.weight:
            return 0.0
        total = 0.0
        for name, unit in self.units.items():
            away = (self.layer.parameters[name] - self.start[name]) / unit
            total += float(np.mean(np.square(away, dtype=np.float64)))
        return self.weight * total

    def ended(self) -> bool:
        """Judge the present parameters, keep the best; return whether the fit is over."""
        self.done += 1
        value = self.judge() + self.distance()
        self.history.append(value)
        if value < self.best - 1e-6 * abs(self.best):
            self._waited = 0
        else:
            self._waited += 1
        if value < self.best:
            self.best, self.kept, self.kept_step = value, self.snapshot(), self.done
        stop = self.callback is not None and bool(self.callback(self.done, value))
        return stop or self._waited >= self.patience or self.done >= self.steps

    def least_squares(self) -> None:
        """Alternate the closed forms of d1, d2 and d3; the bias follows from the means."""
        own = self.layer.parameters["bias"].astype(np.float64)
        offset = np.zeros_like(own) if self.bias else own
        self.data = data = moments(self.samples.fitted(), self.bias, offset)
        solver = LeastSquares(self.layer.factors, data, self.weight)
        # of the start, about the mean: that of the fit would be too small
        self.noise = data.error(self.layer.factors.to_dense().astype(np.float64))
        while True:
            solver.sweep()
            for name in self.diagonals:
                self.layer.parameters[name][...] = solver.d[name]
            if self.bias:
                self.layer.parameters["bias"][...] = self._bias_from(
                    data, solver.apply(data.x_mean)
                )
            if self.ended():
                return

    def _bias_from(self, data: Moments, outputs: Array) -> Array:
        """Return the bias of als; `outputs` are those of the mean input, without any."""
        own = self.start["bias"].astype(np.float64)
        moved = data.y_mean - outputs - own
        return own + moved * self._trust(moved)

    def _trust(self, moved: Array) -> float:
        """Return the share of a step of the bias to believe: James and Stein's, of few samples."""
        if not self.few:
            return 1.0
        free = self.samples.fit_count - 1
        square = float(moved @ moved)
        if not free or not square:
            return 0.0
        # of few samples the noise itself is known badly: then it has to be exceeded by far
        return max(0.0, 1.0 - self.noise * (1.0 + 4.0 / free) / (free * square))

    def adam(self, rng: np.random.Generator) -> None:
        """Train on minibatches."""
        scaled, gradients = _Scaled(self), {}

        def loss(pair: Pair) -> float:
            scaled.spread()
            self.layer.zero_grad()
            value = self.add_gradient(*pair) + self.add_distance_gradient()
            gradients.update(scaled.gradients())
            return value

        def ended(epoch: int, value: float) -> bool:
            scaled.spread()
            return self.ended()

        minimise(
            loss,
            scaled.values,
            gradients,
            lambda epoch: self.samples.fitted(rng),
            steps_per_epoch=self.samples.steps,
            epochs=self.steps,
            learning_rate=self.learning_rate,
            schedule=self.schedule,
            clip=None if self.clip is None else self.clip / self.scale,
            ended=ended,
        )

    def quasi_newton(self) -> None:
        """Minimise over all samples at once with scipy's L-BFGS."""
        scaled = _Scaled(self)
        values = scaled.values
        cuts = np.cumsum([value.size for value in values.values()])[:-1]

        def spread(flat: Array) -> None:
            for value, part in zip(values.values(), np.split(flat, cuts), strict=True):
                value[...] = part
            scaled.spread()

        def objective(flat: Array) -> tuple[float, Array]:
            spread(flat)
            value = self.full_gradient() / self.scale
            return value, np.concatenate(list(scaled.gradients().values())).astype(np.float64)

        def each(flat: Array) -> None:
            spread(flat)
            if self.ended():
                raise StopIteration

        _lbfgs(objective, np.concatenate(list(values.values())), self.steps, each)

    def rounded(self, record: dict[str, Any], before: float) -> tuple[DiBAFactors, float]:
        """Return what is best of what can be stored, and its loss: the fit, rounded, or the start.

        Rounding parts coarse diagonals from their bias, or undoes their fit: both are judged with
        a bias fitted to them as well.
        """
        start = self.layer.factors.with_record(record)
        best, least, after, step = start, before, before, 0
        self.restore(self.kept)
        fitted = self.layer.to_factors(record)
        for factors, kept, at in ((fitted, self.kept, self.kept_step), (start, self.start, 0)):
            self.restore(kept)
            biases = [kept["bias"], self.best_bias(factors)] if self.bias else [kept["bias"]]
            for bias in biases:
                self.layer.parameters["bias"][...] = bias
                loss = self.judge(DiBALinear(factors, bias))
                # rounding may move magnitudes from one diagonal to another: not as rounded
                value = loss + self.distance()
                if value < least:
                    best, least, after, step = _with_bias(factors, bias), value, loss, at
        best.record["retune"]["kept_step"] = step
        return best, after

    def best_bias(self, factors: DiBAFactors) -> Array:
        """Return the bias that fits the fitted samples best beside diagonals that stay."""
        if self.data is not None:
            outputs = factors.to_dense().astype(np.float64) @ self.data.x_mean
            return self._bias_from(self.data, outputs)
        layer, unit = DiBALinear(factors), self.bias_unit
        bias, start = layer.parameters["bias"], self.start["bias"]
        held = self.units.get("bias")
        weight = self.weight / (bias.size * held**2) if held else 0.0

        def objective(flat: Array) -> tuple[float, Array]:
            bias[...] = flat * unit
            away = bias - start
            value, slope = weight * float(away @ away), 2.0 * weight * away
            for x, y in self.samples.fitted():
                part, gradient = self.evaluate(x, y, layer)
                share = len(x) / self.samples.fit_count
                value += share * part
                slope = slope + share * gradient.sum(axis=0)
            return value / self.scale, slope * (unit / self.scale)

        return _lbfgs(objective, bias / unit, _BIAS_STEPS) * unit

    def add_gradient(self, x: Array, y: Array, share: float = 1.0) -> float:
        """Add `share` times the gradient of the mean loss of some samples; return that share."""
        value, gradient = self.evaluate(x, y)
        self.layer.backward(share * gradient)
        return value * share

    def add_distance_gradient(self) -> float:
        """Add the gradient of `distance` and return its value."""
        if not self.weight:
            return 0.0
        for name, unit in self.units.items():
            start = self.start[name]
            scale = 2.0 * self.weight / (start.size * unit**2)
            self.layer.gradients[name] += scale * (self.layer.parameters[name] - start)
        return self.distance()

    def full_gradient(self) -> float:
        """Return the objective of all fitted samples; the layer's gradients are its."""
        self.layer.zero_grad()
        count = self.samples.fit_count
        total = math.fsum(self.add_gradient(x, y, len(x) / count) for x, y in self.samples.fitted())
        return total + self.add_distance_gradient()


class _Scaled:
    """What is trained, in float64 and each array in its own unit, as is the loss in the start's.

    So neither optimisers' absolute tolerances nor one curvature for all depend on units of data.

    Attributes
    ----------
    values : dict of str to float64 array
    """

    def __init__(self, fit: _Fit) -> None:
        self.fit = fit
        self.units = {name: root_mean_square(fit.start[name]) for name in fit.diagonals}
        if fit.bias:
            self.units["bias"] = fit.bias_unit
        parameters = fit.layer.parameters
        self.values = {
            name: parameters[name].astype(np.float64) / unit for name, unit in self.units.items()
        }

    def spread(self) -> None:
        """Bring the values to the layer."""
        for name, value in self.values.items():
            self.fit.layer.parameters[name][...] = value * self.units[name]

    def gradients(self) -> dict[str, Array]:
        """Return the gradients of the layer as those with respect to the values."""
        own, scale = self.fit.layer.gradients, self.fit.scale
        return {name: own[name] * np.float64(unit / scale) for name, unit in self.units.items()}


def _lbfgs(
    objective: Callable[[Array], tuple[float, Array]],
    first: Array,
    steps: int,
    callback: Callable[[Array], None] | None = None,
) -> Array:
    """Minimise a function that returns (value, gradient) with scipy's L-BFGS."""
    from scipy.optimize import minimize

    result: Array = minimize(
        objective,
        first.astype(np.float64),
        jac=True,
        method="L-BFGS-B",
        callback=callback,
        options={"maxiter": steps},
    ).x
    return result
