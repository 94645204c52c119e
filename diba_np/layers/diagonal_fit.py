"""`DiagonalFit`: diagonals and a bias trained beside bits that stay, and what is kept of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diba_np.layers.linear import DiBALinear
from diba_np.matrix.factors import DiBAFactors
from diba_np.training.losses import LOSSES, Loss
from diba_np.training.moments import LeastSquares, Moments, moments
from diba_np.training.optimisers import Diverged, minimise, root_mean_square
from diba_np.training.samples import Pair, Samples

Array = NDArray[Any]

_BIAS_STEPS = 5  # iterations for a bias alone


@dataclass
class DiagonalFit:
    """One call of `retune`: the layer in training, what judges it, and the best step so far.

    It minimises the loss plus `distance`, that from the start. Call `begin`, then one of
    `least_squares`, `quasi_newton` and `adam`, then `rounded`.
    """

    # what is asked
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
    # the start, and what of it is held
    start: dict[str, Array] = field(default_factory=dict)
    held_units: dict[str, float] = field(default_factory=dict)  # sizes that count as one away
    weight: float = 0.0  # of the distance, in units of the loss
    few: bool = False  # whether samples are too few to trust their means
    # sizes at the start, so that optimisers work on numbers near one
    scale: float = 1.0  # of the loss
    power: int = 0  # the exponent of 2 nearest to that
    bias_unit: float = 1.0  # of the bias, or of the outputs where it begins with zeros
    # steps, and the best of them
    done: int = 0
    history: list[float] = field(default_factory=list)
    best: float = np.inf
    kept: dict[str, Array] = field(default_factory=dict)
    kept_step: int = 0
    _waited: int = 0  # steps since one was better
    # of least squares alone
    data: Moments | None = None
    noise: float = 0.0  # the squared error of a sample at the start, about the mean

    def begin(self, stay: float, few: bool = False, by_gradients: bool = False) -> float:
        """Judge and remember the start; return its loss.

        Where samples are few the bias is held as well, unless what fits it sees to that.
        """
        self.few = few
        if few and by_gradients and self.bias:
            self.held_units["bias"] = self.output_size()
        before = self.judge()
        if not math.isfinite(before):
            raise ValueError(f"the loss must be finite at the start, got {before:g}")
        self.scale = abs(before) or 1.0
        self.power = round(math.log2(self.scale))
        self.weight = stay * self.scale
        self.best, self.kept, self.start = before, self.snapshot(), self.snapshot()
        self.held_units |= {name: root_mean_square(self.start[name]) for name in self.diagonals}
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
    def gradient_unit(self) -> float:
        """What the layer's float32 gradients are in: a power of two, which changes no digit."""
        return 2.0**self.power

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
        for name, unit in self.held_units.items():
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

        try:
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
        except Diverged as error:
            warnings.warn(error.kept(), UserWarning, stacklevel=3)

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
                    own = bias if bias.any() else None
                    best, least, after, step = factors.with_bias(own), value, loss, at
        best.record["retune"]["kept_step"] = step
        return best, after

    def best_bias(self, factors: DiBAFactors) -> Array:
        """Return the bias that fits the fitted samples best beside diagonals that stay."""
        if self.data is not None:
            outputs = factors.to_dense().astype(np.float64) @ self.data.x_mean
            return self._bias_from(self.data, outputs)
        layer, unit = DiBALinear(factors), self.bias_unit
        bias, start = layer.parameters["bias"], self.start["bias"]
        held = self.held_units.get("bias")
        weight = self.weight / (bias.size * held**2) if held else 0.0
        power = int(np.frexp(unit)[1])

        def objective(flat: Array) -> tuple[float, Array]:
            bias[...] = flat * unit
            away = bias - start
            near = np.ldexp(away, -power)  # whose square float32 holds
            value = weight * math.ldexp(float(near @ near), 2 * power)
            slope = 2.0 * weight * away
            for x, y in self.samples.fitted():
                part, gradient = self.evaluate(x, y, layer)
                share = len(x) / self.samples.fit_count
                value += share * part
                slope = slope + share * gradient.sum(axis=0)
            return value / self.scale, slope * (unit / self.scale)

        return _lbfgs(objective, bias / unit, _BIAS_STEPS) * unit

    def add_gradient(self, x: Array, y: Array, share: float = 1.0) -> float:
        """Add `share` times the gradient of the mean loss of some samples; return that share.

        The layer's gradients are in `gradient_unit`.
        """
        value, gradient = self.evaluate(x, y)
        self.layer.backward(np.ldexp(share * gradient, -self.power))
        return value * share

    def add_distance_gradient(self) -> float:
        """Add the gradient of `distance` and return its value."""
        if not self.weight:
            return 0.0
        for name, unit in self.held_units.items():
            start = self.start[name]
            scale = 2.0 * self.weight / (start.size * unit**2 * self.gradient_unit)
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

    def __init__(self, fit: DiagonalFit) -> None:
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
        own, scale = self.fit.layer.gradients, self.fit.scale / self.fit.gradient_unit
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
