"""Adam over dictionaries of arrays, and the loop around it: for `retune` and networks of one's own.

Everything is trained in place: a layer (`diba_np.layers.linear`) holds ``parameters`` and
``gradients`` under the same keys, `gather` makes one flat pair of dictionaries of many layers, and
arrays of one's own (a LayerNorm, say) are added to both.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Batch = TypeVar("Batch")

SCHEDULES = ("cosine", "constant")


class Diverged(FloatingPointError):
    """A loss or a gradient is no longer finite: a step would leave nothing of the parameters."""

    def kept(self) -> str:
        """Return the sentence of a warning, where the best epoch before is what is kept."""
        why = str(self).rpartition("; ")[0]
        return f"the training ended early, what was best before is kept ({why})"


def gather(layers: Mapping[str, Any]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return ``(parameters, gradients)`` of many layers under ``"layer.parameter"``, by reference.

    Parameters
    ----------
    layers : mapping of str to layer
        Anything with the dictionaries ``parameters`` and ``gradients``.

    Examples
    --------
    >>> import diba_np as dn
    >>> layer = dn.DiBALinear(dn.factorize([[1.0, 2.0], [3.0, 4.0]], k=2))
    >>> sorted(gather({"out": layer})[0])
    ['out.bias', 'out.d1', 'out.d2', 'out.d3']
    """
    parameters, gradients = (
        {f"{at}.{name}": array for at, layer in layers.items() for name, array in of(layer).items()}
        for of in (operator.attrgetter("parameters"), operator.attrgetter("gradients"))
    )
    return parameters, gradients


def root_mean_square(value: Array) -> float:
    """Return the size of an array as learning rates and distances use it; 1 for zeros."""
    return float(np.sqrt(np.mean(np.square(value, dtype=np.float64)))) or 1.0


class Adam:
    """Adam on parameters that are changed in place.

    Parameters
    ----------
    parameters : mapping of str to ndarray
        The arrays to train; they are kept by reference.
    learning_rate : float
        See `relative`.
    relative : bool, default True
        Whether the rate is relative to each array's root mean square at the start, so that
        diagonals of any magnitude move alike; an array of zeros takes it as it is.
    clip : float, optional
        Largest norm of all gradients together; a larger one is scaled down to it. With `relative`
        each gradient counts times the size of its array: the norm is in units of the loss.
    decay : mapping of str to float, optional
        Weight decay of the arrays it names, decoupled from the gradient [2]_: before each step an
        array loses its rate times this of itself.
    beta1, beta2, epsilon : float
        Decay of the moments, and the usual guard.

    Attributes
    ----------
    steps : int
        Steps taken.
    first, second : dict of str to ndarray
        The moments of each array. With `steps` they are the state: what a run keeps to go on later,
        and puts back, the arrays in place.

    References
    ----------
    .. [1] D. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization", arXiv 1412.6980, Alg. 1.
    .. [2] I. Loshchilov, F. Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101.
    """

    def __init__(
        self,
        parameters: Mapping[str, Array],
        learning_rate: float = 2e-3,
        *,
        relative: bool = True,
        clip: float | None = None,
        decay: Mapping[str, float] | None = None,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
    ) -> None:
        self.parameters = parameters
        self.beta1, self.beta2, self.epsilon, self.clip = beta1, beta2, epsilon, clip
        self.decay = decay or {}
        self.sizes = {
            name: root_mean_square(value) if relative else 1.0 for name, value in parameters.items()
        }
        self.rates = {name: learning_rate * size for name, size in self.sizes.items()}
        self.steps = 0
        self.first = {name: np.zeros_like(value) for name, value in parameters.items()}
        self.second = {name: np.zeros_like(value) for name, value in parameters.items()}

    def norm(self, gradients: Mapping[str, Array]) -> float:
        """Return the norm that `clip` bounds."""
        squares = (
            self.sizes[name] ** 2 * float(np.vdot(gradients[name], gradients[name]))
            for name in self.parameters
        )
        return math.sqrt(sum(squares))

    def step(self, gradients: Mapping[str, Array], share: float = 1.0) -> None:
        """Take one step; `share` scales the learning rate (a schedule)."""
        self.steps += 1
        shrink = 1.0
        if self.clip is not None:
            norm = self.norm(gradients)
            shrink = min(1.0, self.clip / norm) if norm > 0 else 1.0
        correction = math.sqrt(1 - self.beta2**self.steps) / (1 - self.beta1**self.steps)
        for name, value in self.parameters.items():
            gradient = gradients[name] if shrink == 1.0 else gradients[name] * shrink
            first, second = self.first[name], self.second[name]
            first += (1 - self.beta1) * (gradient - first)
            second += (1 - self.beta2) * (np.square(gradient) - second)
            rate = share * self.rates[name]
            if self.decay.get(name):
                value[...] *= 1 - rate * self.decay[name]
            value[...] -= rate * correction * first / (np.sqrt(second) + self.epsilon)


def share_of_rate(schedule: str, done: float, least: float = 0.0) -> float:
    """Return the share of the learning rate once the share `done` of all steps is taken.

    "cosine" falls from 1 to `least` along a half cosine, "constant" stays 1.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if schedule == "constant":
        return 1.0
    return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def check_finite(value: float, gradients: Mapping[str, Array], where: str) -> None:
    """Refuse a loss and gradients that no step can be taken by: `Diverged`, from `where` on."""
    wrong = [name for name, g in gradients.items() if not np.isfinite(g).all()]
    if math.isfinite(value) and not wrong:
        return
    what = f"the gradient of {wrong[0]} is not finite" if wrong else ""
    if not math.isfinite(value):
        what = f"the loss is {value:g}"
    raise Diverged(
        f"{where}: {what}; look for what is not finite in the batch, or take a smaller learning "
        "rate; parameters are as they were before it"
    )


def minimise(
    loss: Callable[[Batch], float],
    parameters: Mapping[str, Array],
    gradients: Mapping[str, Array],
    batches: Callable[[int], Iterable[Batch]],
    *,
    steps_per_epoch: int,
    epochs: int = 1,
    learning_rate: float = 2e-3,
    schedule: str = "cosine",
    relative: bool = True,
    clip: float | None = None,
    decay: Mapping[str, float] | None = None,
    ended: Callable[[int, float], Any] | None = None,
) -> list[float]:
    """Train arrays in place with Adam; return the mean loss of every epoch.

    Parameters
    ----------
    loss : callable
        ``loss(batch) -> float``: runs forward and backward and so adds to `gradients`, which this
        loop sets to zero before.
    parameters, gradients : mapping of str to ndarray
        By reference, as `gather` returns them.
    batches : callable
        ``batches(epoch)`` yields the batches of an epoch, 0 the first.
    steps_per_epoch : int
        How many those are; the schedule goes by it.
    epochs : int
    learning_rate, relative, clip, decay
        See `Adam`.
    schedule : {"cosine", "constant"}
        Of the rate over all epochs.
    ended : callable, optional
        Called with (epoch, its mean loss) after each; a true return value ends the training.

    Raises
    ------
    ValueError
        Of an unknown schedule, or an epoch without a batch.
    Diverged
        A loss or a gradient is not finite; the parameters are as they were before that batch. It is
        a FloatingPointError.
    """
    optimiser = Adam(parameters, learning_rate, relative=relative, clip=clip, decay=decay)
    history: list[float] = []
    for epoch in range(epochs):
        values = []
        for at, batch in enumerate(batches(epoch)):
            for gradient in gradients.values():
                gradient[...] = 0
            values.append(loss(batch))
            check_finite(values[-1], gradients, f"epoch {epoch}, batch {at}")
            done = (epoch + min(at / steps_per_epoch, 1.0)) / epochs
            optimiser.step(gradients, share_of_rate(schedule, done))
        if not values:
            raise ValueError(f"batches must yield at least one batch, got none in epoch {epoch}")
        history.append(float(np.mean(values)))
        if ended is not None and ended(epoch, history[-1]):
            break
    return history
