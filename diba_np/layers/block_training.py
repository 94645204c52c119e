"""The steps of MESA for any network that holds `MESALinear` layers: blocks, codes, retraining."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any, TypeVar

from diba_np.checks import check_count, check_number
from diba_np.layers.linear import Layer
from diba_np.layers.mesa_linear import MESALinear, penalise
from diba_np.training.optimisers import gather, minimise

Batch = TypeVar("Batch")

RETRAINING = 0.3  # share of the first training's rate that the retraining begins with


def train_blocks(
    layers: MutableMapping[str, MESALinear],
    loss: Callable[[Batch], float],
    batches: Callable[[int], Iterable[Batch]],
    *,
    steps_per_epoch: int,
    alpha: float,
    levels: int | None = None,
    bits: float | Mapping[str, float] | None = None,
    epochs: int = 30,
    retrain: int = 8,
    learning_rate: float = 1e-2,
    others: Mapping[str, Layer] | None = None,
    relative: bool = True,
    clip: float | None = None,
    deltas: bool = True,
    decay: float = 0.0,
    ended: Callable[[int, float], Any] | None = None,
) -> list[float]:
    """Train blocks under the penalty on their differences, let weights share values, train these.

    Parameters
    ----------
    layers : mutable mapping of str to MESALinear
        Blocks that are numbers; those of codes are made numbers first. Each layer is replaced in
        the mapping when its weights come to share values, and rounded as it will be stored at the
        end: `loss` looks layers up there.
    loss : callable
        ``loss(batch) -> float``: runs forward and backward through the network, as for `minimise`.
    batches : callable
        ``batches(epoch)`` yields the batches of an epoch, 0 the first; the retraining counts on.
    steps_per_epoch : int
    alpha : float
        Weight of the block differences; the larger, the fewer bits the deltas take.
    levels : int, optional
        Values that the weights of a layer share, ``2**q``.
    bits : float or mapping of str to float, optional
        Instead of `levels`: the most levels that fit so many stored bits a weight, see
        `MESALinear.quantized`.
    epochs, retrain : int
        Of the training and of the retraining.
    learning_rate : float
        Of Adam; the retraining begins with 0.3 of it.
    others : mapping of str to Layer, optional
        Layers of other kinds that are trained along with these.
    relative, clip
        See `Adam`.
    deltas : bool
        See `MESALinear.quantized`.
    decay : float
        Weight decay of the blocks, decoupled from the gradient; shared values have none.
    ended : callable, optional
        Called with (epoch, its mean loss) after each; a true return value ends that training.

    Returns
    -------
    list of float
        The mean loss of every epoch, the penalty included.

    Raises
    ------
    TypeError, ValueError
        Both or none of `levels` and `bits` are given; `bits` are too few; what `minimise` refuses.
    """
    check_number(alpha, "alpha")
    check_count(epochs, "epochs", 0)
    check_count(retrain, "retrain", 0)
    if (levels is None) == (bits is None):
        raise TypeError("exactly one of levels and bits must be given")
    for name, layer in layers.items():
        if isinstance(bits, Mapping) and name not in bits:
            raise KeyError(f"bits has no {name!r}, which is one of the layers")
        if layer.coded:
            layers[name] = layer.uncoded()
    history: list[float] = []

    def run(count: int, rate: float, penalty: float) -> None:
        parameters, gradients = gather({**layers, **(others or {})})
        weights = {f"{name}.blocks": decay for name in layers} if decay else None
        done = len(history)

        def value(batch: Batch) -> float:
            reached = loss(batch)
            return reached + penalise(layers.values(), penalty) if penalty else reached

        history.extend(
            minimise(
                value,
                parameters,
                gradients,
                lambda epoch: batches(done + epoch),
                steps_per_epoch=steps_per_epoch,
                epochs=count,
                learning_rate=rate,
                relative=relative,
                clip=clip,
                decay=weights,
                ended=None if ended is None else lambda epoch, mean: ended(done + epoch, mean),
            )
        )

    run(epochs, learning_rate, alpha)
    for name, layer in layers.items():
        budget = bits[name] if isinstance(bits, Mapping) else bits
        layers[name] = layer.quantized(levels, bits=budget, deltas=deltas)
    run(retrain, RETRAINING * learning_rate, 0.0)
    for name, layer in layers.items():
        layers[name] = layer.rounded()
    return history
