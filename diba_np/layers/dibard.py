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
from diba_np.search.progress import thinned
from diba_np.training.losses import LOSSES, Loss
from diba_np.training.moments import LeastSquares, moments
from diba_np.training.optimisers import SCHEDULES, minimise, root_mean_square
from diba_np.training.samples import Pair, Samples, Source, open_samples

Array = NDArray[Any]

METHODS = ("als", "lbfgs", "adam")

# With few samples the diagonals stay near their start: as if each were known beforehand to this
# share of its size. `stay` is then at least the square of its inverse over the samples.
_KNOWN_TO = 0.1


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
        The same bits; diagonals of as many bits as they had: 16, 32, or codes. On the
        samples that judge its objective is never above that of `f`. ``record["retune"]`` tells the
        settings, the losses, the history and the seconds.

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
        before = fit.begin(max(float(stay), few), few > 0, holds_bias=chosen != "als")
        if chosen == "adam":
            fit.adam(rng)
        else:
            {"als": fit.least_squares, "lbfgs": fit.quasi_newton}[chosen]()
        fit.restore(fit.kept)
        away = fit.distance()  # rounding may move magnitudes from one diagonal to another
        # of the diagonals before, and of the weights
        stale = ("snr_db", "output_snr_db")
        record = {name: value for name, value in f.record.items() if name not in stale} | {
            "retune": {
                "method": chosen,
                "loss": name,
                "bias": bool(bias),
                "samples": samples.count,
                "held_out": samples.held_count,
                "steps": fit.done,
                "kept_step": fit.kept_step,
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
        result = fit.layer.to_factors(record)
        # judged again as rounded; the start is kept where rounding would make it worse than that
        fit.layer = DiBALinear(result)
        after = fit.judge()
        if not after + away <= before:
            result = f.with_record(record)
            after, result.record["retune"]["kept_step"] = before, 0
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
    start: dict[str, Array] = field(default_factory=dict)
    units: dict[str, float] = field(default_factory=dict)  # of the distance of what is held
    best: float = np.inf
    kept: dict[str, Array] = field(default_factory=dict)
    kept_step: int = 0
    done: int = 0
    history: list[float] = field(default_factory=list)
    _waited: int = 0

    def begin(self, stay: float, few: bool = False, holds_bias: bool = False) -> float:
        """Judge and remember the start; return its loss.

        Where samples are few the bias is held as well, unless what fits it sees to that.
        """
        self.few = few
        if few and holds_bias and self.bias:
            outputs = np.concatenate([self.layer(x) for x, _ in self.samples.judging()])
            self.units["bias"] = root_mean_square(outputs)
        before = self.judge()
        if not math.isfinite(before):
            raise ValueError(f"the loss must be finite at the start, got {before:g}")
        self.weight = stay * (abs(before) or 1.0) if stay else 0.0
        self.best, self.kept, self.start = before, self.snapshot(), self.snapshot()
        self.units |= {name: root_mean_square(self.start[name]) for name in self.diagonals}
        return before

    @property
    def diagonals(self) -> list[str]:
        """The names of the diagonals among the layer's parameters."""
        return [name for name in self.layer.parameters if name != "bias"]

    def snapshot(self) -> dict[str, Array]:
        return {name: value.copy() for name, value in self.layer.parameters.items()}

    def restore(self, parameters: dict[str, Array]) -> None:
        for name, value in parameters.items():
            self.layer.parameters[name][...] = value

    def evaluate(self, x: Array, y: Array) -> tuple[float, Array]:
        """Return the mean loss of some samples and its gradient; check what a callable gave."""
        outputs = self.layer.forward(x)
        found = self.loss(outputs, y)
        if not isinstance(found, (tuple, list)) or len(found) != 2:
            raise TypeError(f"loss must return (value, gradient), got {found!r}")
        value, gradient = found
        if np.shape(gradient) != outputs.shape:
            raise ValueError(
                "loss must return (value, gradient) with a gradient of shape "
                f"{outputs.shape}, got {np.shape(gradient)}"
            )
        return float(value), np.asarray(gradient)

    def judge(self) -> float:
        """Return the mean loss over the samples that decide what is kept."""
        total, count = 0.0, 0
        for x, y in self.samples.judging():
            total += self.evaluate(x, y)[0] * len(x)
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
        data = moments(self.samples.fitted(), self.bias, offset)
        solver = LeastSquares(self.layer.factors, data, self.weight)
        # of the start, about the mean: that of the fit would be too small
        noise = data.error(self.layer.factors.to_dense().astype(np.float64))
        while True:
            solver.sweep()
            for name in self.diagonals:
                self.layer.parameters[name][...] = solver.d[name]
            if self.bias:
                moved = data.y_mean - solver.apply(data.x_mean) - own
                self.layer.parameters["bias"][...] = own + moved * self._trust(moved, noise)
            if self.ended():
                return

    def _trust(self, moved: Array, noise: float) -> float:
        """Return the share of a bias to believe: James and Stein's, where samples are few.

        `noise` is the squared error of a sample about the mean, `moved` the step of the bias.
        """
        if not self.few:
            return 1.0
        free = self.samples.fit_count - 1
        square = float(moved @ moved)
        if not free or not square:
            return 0.0
        # of few samples the noise itself is known badly: then it has to be exceeded by far
        return max(0.0, 1.0 - noise * (1.0 + 4.0 / free) / (free * square))

    def adam(self, rng: np.random.Generator) -> None:
        """Train on minibatches."""

        def loss(pair: Pair) -> float:
            return self.add_gradient(*pair) + self.add_distance_gradient()

        minimise(
            loss,
            self.trained(),
            self.layer.gradients,
            lambda epoch: self.samples.fitted(rng),
            steps_per_epoch=self.samples.steps,
            epochs=self.steps,
            learning_rate=self.learning_rate,
            schedule=self.schedule,
            clip=self.clip,
            ended=lambda epoch, value: self.ended(),
        )

    def quasi_newton(self) -> None:
        """Minimise over all samples at once with scipy's L-BFGS."""
        from scipy.optimize import minimize

        trained = self.trained()
        # in units of each array's size, so that one curvature fits all
        units = {name: root_mean_square(value) for name, value in trained.items()}
        cuts = np.cumsum([value.size for value in trained.values()])[:-1]

        def spread(flat: Array) -> None:
            parts = np.split(flat, cuts)
            for (name, value), part in zip(trained.items(), parts, strict=True):
                value[...] = part * units[name]

        def objective(flat: Array) -> tuple[float, Array]:
            spread(flat)
            value = self.full_gradient()
            parts = [self.layer.gradients[name] * units[name] for name in trained]
            return value, np.concatenate(parts).astype(np.float64)

        def each(flat: Array) -> None:
            spread(flat)
            if self.ended():
                raise StopIteration

        first = np.concatenate([value / units[name] for name, value in trained.items()])
        minimize(
            objective,
            first.astype(np.float64),
            jac=True,
            method="L-BFGS-B",
            callback=each,
            options={"maxiter": self.steps},
        )

    def trained(self) -> dict[str, Array]:
        names = [*self.diagonals, "bias"] if self.bias else self.diagonals
        return {name: self.layer.parameters[name] for name in names}

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
