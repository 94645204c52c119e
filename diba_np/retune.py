"""`retune` (DiBARD): the bits stay, the diagonals are refitted to data.

Squared error is solved in closed form from second moments, one diagonal after another, so that its
cost does not grow with the number of samples after one pass over them. Any other loss goes through
`DiBALinear`'s gradients, by L-BFGS on all samples or by Adam on minibatches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diba_np import budget
from diba_np.factors import DiBAFactors
from diba_np.linear import DIAGONALS, DiBALinear
from diba_np.losses import LOSSES, Loss
from diba_np.moments import LeastSquares, moments
from diba_np.optim import Adam
from diba_np.search.target import as_matrix
from diba_np.threads import workers

Array = NDArray[Any]

METHODS = ("als", "lbfgs", "adam")


def retune(
    f: DiBAFactors,
    X: ArrayLike,
    Y: ArrayLike,
    *,
    loss: str | Loss = "mse",
    bias: bool = True,
    method: str | None = None,
    steps: int | None = None,
    batch_size: int = 256,
    learning_rate: float = 5e-3,
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
    X : (N, n) array_like
        Inputs, one sample a row. A memory map is read in blocks.
    Y : (N, m) array_like, or (N,) of int for class labels
        Targets of the outputs ``X A^T``, one sample a row.
    loss : {"mse", "cross_entropy"} or callable, default "mse"
        A callable takes ``(y_pred, y)`` of a batch and returns the mean loss over its samples and
        the gradient with respect to ``y_pred``.
    bias : bool, default True
        Whether a bias is fitted too; without it, one that `f` has is kept as it is.
    method : {"als", "lbfgs", "adam"}, optional
        Alternating closed forms from second moments (mse only, and its default), L-BFGS over all
        samples at once, or Adam on minibatches (the default for other losses).
    steps : int, optional
        Most sweeps of als (30), iterations of L-BFGS (100) or epochs of Adam (20).
    batch_size : int, default 256
        Samples of a minibatch, and of a block wherever all samples are passed through.
    learning_rate : float, default 5e-3
        Of Adam, relative to the root mean square of each diagonal.
    stay : float, default 0.0
        Weight on staying near the start: relative to the mean curvature in als, else the weight of
        the squared distance, relative to the size of each diagonal, that is added to the loss.
    validation : float, default 0.1
        Share of the samples that is held out and decides which step is kept; 0 judges on all.
    patience : int, default 5
        Steps without a better loss on what judges after which the fit ends.
    seed : int, default 0
        Draws the held-out samples and the minibatches.
    threads : int, optional
    callback : callable, optional
        Called with (step, loss on what judges); a true return value ends the fit.

    Returns
    -------
    DiBAFactors
        The same bits; diagonals and bias rounded to 16 bits. On the samples that judge it is never
        worse than `f`. ``record["retune"]`` tells the method, the losses and the seconds.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong kind, value or shape.

    Notes
    -----
    als takes one pass over the samples, ``N n (n + m)`` flops, and then ``O(k n (m + n))`` and a
    solve of order n a sweep, whatever N. The others cost four packed products a sample and pass.

    References
    ----------
    .. [1] N. Ono, arXiv 2605.05994, DiBARD.
    """
    if not isinstance(f, DiBAFactors):
        raise TypeError(f"f must be a DiBAFactors, got {type(f).__name__}")
    score, name = _check_loss(loss)
    inputs, targets = _check_samples(f, X, Y, name)
    squared = loss == "mse"  # a callable of that name may be another thing
    chosen = method or ("als" if squared else "adam")
    if chosen not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {chosen!r}")
    if chosen == "als" and not squared:
        raise ValueError(f'method="als" is for loss="mse", got loss={name!r}')
    if not 0 <= budget.check_number(validation, "validation") < 1:
        raise ValueError(f"validation must lie in [0, 1), got {validation:g}")
    if budget.check_number(stay, "stay") < 0:
        raise ValueError(f"stay must not be negative, got {stay:g}")
    most = {"als": 30, "lbfgs": 100, "adam": 20}[chosen]
    rng = np.random.default_rng(budget.check_count(seed, "seed", least=0))
    order = rng.permutation(len(inputs))
    held = round(validation * len(inputs))
    if held == 0:
        held_rows = fit_rows = np.arange(len(inputs))
    else:
        held_rows, fit_rows = np.sort(order[:held]), np.sort(order[held:])
    fit = _Fit(
        layer=DiBALinear(f),
        samples=(inputs, targets),
        loss=score,
        bias=bool(bias),
        fit_rows=fit_rows,
        held_rows=held_rows,
        steps=most if steps is None else budget.check_count(steps, "steps"),
        batch_size=budget.check_count(batch_size, "batch_size"),
        learning_rate=budget.check_number(learning_rate, "learning_rate", above=0.0),
        stay=float(stay),
        patience=budget.check_count(patience, "patience"),
        callback=callback,
    )
    started = time.monotonic()
    with workers(threads):
        start = fit.judge()
        fit.best, fit.kept = start, fit.snapshot()
        if chosen == "adam":
            fit.adam(rng)
        else:
            {"als": fit.least_squares, "lbfgs": fit.quasi_newton}[chosen]()
        fit.restore(fit.kept)
        record = f.record | {
            "retune": {
                "method": chosen,
                "loss": name,
                "samples": len(inputs),
                "held_out": held,
                "steps": fit.done,
                "loss_before": start,
                "seed": seed,
            }
        }
        result = fit.layer.to_factors(record)
        # judged again as rounded; the start is kept where rounding would make it worse than that
        fit.layer = DiBALinear(result)
        after = fit.judge()
    if not after <= start:
        result, after = (
            DiBAFactors(f.d1, f.b1, f.d2, f.b2, f.d3, f.shift, record, bias=f.bias),
            start,
        )
    result.record["retune"] |= {
        "loss_after": after,
        "seconds": round(time.monotonic() - started, 3),
    }
    return result


def _check_loss(loss: Any) -> tuple[Loss, str]:
    if callable(loss):
        return loss, getattr(loss, "__name__", "callable")
    if loss not in LOSSES:
        raise ValueError(f"loss must be a callable or one of {', '.join(LOSSES)}, got {loss!r}")
    return LOSSES[loss], loss


def _check_samples(f: DiBAFactors, X: ArrayLike, Y: ArrayLike, loss: str) -> tuple[Array, Array]:
    """Check kinds, shapes and finiteness of the samples; labels also against the outputs."""
    m, n = f.shape
    inputs = as_matrix(X, "X")
    if inputs.shape[1] != n:
        raise ValueError(f"X must have shape (N, {n}), got {inputs.shape}")
    targets = np.asanyarray(Y)
    if loss == "cross_entropy" and targets.ndim == 1:
        if targets.dtype.kind not in "iu":
            raise TypeError(f"Y must hold class labels as ints, got dtype {targets.dtype}")
        if len(targets) and not 0 <= targets.min() <= targets.max() < m:
            raise ValueError(
                f"Y must hold labels in [0, {m}), got {targets.min()}..{targets.max()}"
            )
    else:
        targets = as_matrix(targets, "Y")
        if targets.shape[1] != m:
            raise ValueError(f"Y must have shape (N, {m}), got {targets.shape}")
    if len(targets) != len(inputs):
        raise ValueError(f"X and Y must hold as many samples, got {len(inputs)} and {len(targets)}")
    return inputs, targets


@dataclass
class _Fit:
    """One call of `retune`: the layer in training and what judges it."""

    layer: DiBALinear
    samples: tuple[Array, Array]
    loss: Loss
    bias: bool
    fit_rows: NDArray[np.intp]
    held_rows: NDArray[np.intp]
    steps: int
    batch_size: int
    learning_rate: float
    stay: float
    patience: int
    callback: Callable[[int, float], Any] | None
    best: float = np.inf
    kept: dict[str, Array] = field(default_factory=dict)
    done: int = 0
    _waited: int = 0

    def snapshot(self) -> dict[str, Array]:
        return {name: value.copy() for name, value in self.layer.parameters.items()}

    def restore(self, parameters: dict[str, Array]) -> None:
        for name, value in parameters.items():
            self.layer.parameters[name][...] = value

    def batch(self, rows: NDArray[np.intp]) -> tuple[Array, Array]:
        x, y = self.samples
        targets = y[rows] if y.dtype.kind in "iu" and y.ndim == 1 else y[rows].astype(np.float32)
        return x[rows].astype(np.float32), targets

    def blocks(self, rows: NDArray[np.intp]) -> Iterator[NDArray[np.intp]]:
        for start in range(0, len(rows), self.batch_size):
            yield rows[start : start + self.batch_size]

    def judge(self) -> float:
        """Return the mean loss over the samples that decide what is kept."""
        total = 0.0
        for rows in self.blocks(self.held_rows):
            x, y = self.batch(rows)
            total += self.loss(self.layer.forward(x), y)[0] * len(rows)
        return total / len(self.held_rows)

    def ended(self) -> bool:
        """Judge the present parameters, keep the best; return whether the fit is over."""
        self.done += 1
        value = self.judge()
        if value < self.best * (1 - 1e-6):
            self._waited = 0
        else:
            self._waited += 1
        if value < self.best:
            self.best, self.kept = value, self.snapshot()
        stop = self.callback is not None and bool(self.callback(self.done, value))
        return stop or self._waited >= self.patience or self.done >= self.steps

    def least_squares(self) -> None:
        """Alternate the closed forms of d1, d2 and d3; the bias follows from the means."""
        x, y = self.samples
        own = self.layer.parameters["bias"].astype(np.float64)
        offset = np.zeros_like(own) if self.bias else own
        data = moments(x, y, self.fit_rows, self.bias, offset)
        solver = LeastSquares(self.layer.factors, data, self.stay)
        while True:
            solver.sweep()
            for name in DIAGONALS:
                self.layer.parameters[name][...] = solver.d[name]
            if self.bias:
                self.layer.parameters["bias"][...] = data.y_mean - solver.apply(data.x_mean)
            if self.ended():
                return

    def adam(self, rng: np.random.Generator) -> None:
        """Train on minibatches; the rate falls to zero along a half cosine."""
        trained = self._trained()
        start = self.snapshot()
        optimiser = Adam(trained, self.learning_rate)
        batches = -(-len(self.fit_rows) // self.batch_size)
        while True:
            for at, rows in enumerate(self.blocks(rng.permutation(self.fit_rows))):
                done = (self.done + at / batches) / self.steps
                self._loss_and_gradient(np.sort(rows), start)
                optimiser.step(self.layer.gradients, 0.5 * (1 + np.cos(np.pi * done)))
            if self.ended():
                return

    def quasi_newton(self) -> None:
        """Minimise over all samples at once with scipy's L-BFGS."""
        from scipy.optimize import minimize

        trained, start = self._trained(), self.snapshot()
        # in units of each array's size, so that one curvature fits all
        units = {name: _size(value) for name, value in trained.items()}
        cuts = np.cumsum([value.size for value in trained.values()])[:-1]

        def spread(flat: Array) -> None:
            parts = np.split(flat, cuts)
            for (name, value), part in zip(trained.items(), parts, strict=True):
                value[...] = part * units[name]

        def objective(flat: Array) -> tuple[float, Array]:
            spread(flat)
            value = self._loss_and_gradient(self.fit_rows, start)
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

    def _trained(self) -> dict[str, Array]:
        names = (*DIAGONALS, "bias") if self.bias else DIAGONALS
        return {name: self.layer.parameters[name] for name in names}

    def _loss_and_gradient(self, rows: NDArray[np.intp], start: dict[str, Array]) -> float:
        """Return the mean loss of some samples; the layer's gradients are those of that mean."""
        self.layer.zero_grad()
        total = 0.0
        for block in self.blocks(rows):
            x, y = self.batch(block)
            value, gradient = self.loss(self.layer.forward(x), y)
            share = len(block) / len(rows)
            total += value * share
            self.layer.backward(gradient * np.float32(share))
        for name, now in self.layer.parameters.items() if self.stay else ():
            away = (now - start[name]) / _size(start[name])
            total += self.stay * float(np.vdot(away, away)) / away.size
            self.layer.gradients[name] += 2 * self.stay * away / (away.size * _size(start[name]))
        return total


def _size(value: Array) -> float:
    """Root mean square; 1 for zeros."""
    return float(np.sqrt(np.mean(np.square(value)))) or 1.0
