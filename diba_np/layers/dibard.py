"""`retune` (DiBARD): the bits stay, the diagonals are refitted to data.

Squared error is solved in closed form from second moments, one diagonal after another, so that its
cost does not grow with the number of samples after one pass over them. Any other loss goes through
`DiBALinear`'s gradients, by L-BFGS on all samples or by Adam on minibatches.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diba_np.checks import check_count, check_number
from diba_np.layers.diagonal_fit import DiagonalFit
from diba_np.layers.linear import DiBALinear
from diba_np.machine.thread_pool import product_threads
from diba_np.matrix.factors import DiBAFactors
from diba_np.matrix.quality import without_figures
from diba_np.search.progress import thinned
from diba_np.training.losses import LOSSES, Loss
from diba_np.training.optimisers import SCHEDULES
from diba_np.training.samples import Samples, Source, open_samples

Array = NDArray[Any]

RETUNE_METHODS = ("als", "lbfgs", "adam")

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
        There are fewer samples to fit than channels; a diagonal spans so many decades that entries
        become zero in the bits they have; or Adam was ended by a loss or gradient that is not
        finite, and the best step before is what is kept.

    Notes
    -----
    als takes one pass over the samples, ``N n (n + m)`` flops, and then ``O((m + n) (k + n)^2)``
    and solves of order k and n a sweep, whatever N; and a product a step for the samples that
    judge. The others cost four packed products a sample and pass.

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
    if chosen not in RETUNE_METHODS:
        raise ValueError(f"method must be one of {', '.join(RETUNE_METHODS)}, got {chosen!r}")
    if chosen == "als" and not squared:
        raise ValueError(f'method="als" is for loss="mse", got loss="{name}"')
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
    fit = DiagonalFit(
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
        elif chosen == "lbfgs":
            fit.quasi_newton()
        else:
            fit.least_squares()
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
