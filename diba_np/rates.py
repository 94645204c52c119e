"""Rates for the layers of a network: a budget of bits, shared by what errors do to its outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from diba_np.budget import check_number
from diba_np.model_plan import Curve, Task, allocate, sample_curve
from diba_np.scales import ScaleBits, check_scale_bits
from diba_np.search.gram import check_output_weight
from diba_np.search.target import as_matrix


@dataclass(frozen=True)
class LayerRates:
    """What `measure_rates` found: how the error of each layer falls with its bits.

    Attributes
    ----------
    tasks : tuple of Task
        A layer each; ``energy`` is what leaving it out would cost.
    curves : tuple of Curve
    scale_bits : int or (int, int, int)
    """

    tasks: tuple[Task, ...]
    curves: tuple[Curve, ...]
    scale_bits: ScaleBits = 16

    def share(self, bits: float) -> dict[str, float]:
        """Return the stored bits per weight of each layer for which the sum of errors is least.

        Parameters
        ----------
        bits : float
            Per weight, over all layers.

        Raises
        ------
        TypeError, ValueError
            Of `bits`; it does not pay for one component of each layer.
        """
        sizes = [math.prod(task.shape) for task in self.tasks]
        budget = math.floor(check_number(bits, "bits", above=0.0) * sum(sizes))
        shares = allocate(self.tasks, self.curves, budget, self.scale_bits)
        # half a bit keeps the division from costing a component
        return {
            task.name: (share + 0.5) / size
            for task, share, size in zip(self.tasks, shares, sizes, strict=True)
        }


def measure_rates(
    weights: Mapping[str, ArrayLike],
    grams: Mapping[str, ArrayLike],
    sensitivities: Mapping[str, float],
    output_weights: Mapping[str, ArrayLike] | None = None,
    *,
    shift: float = 0.0,
    scale_bits: int | tuple[int, int, int] = 16,
    seed: int = 0,
    threads: int | None = None,
) -> LayerRates:
    """Measure how the error of each layer of a network falls with its bits.

    The error of a layer counts as ``s tr(W (A - A_hat) H (A - A_hat)^T)``: the network's output
    to second order, if H is the mean of ``x x^T`` over what the layer reads, the diagonal matrix W
    tells how outputs count beside each other, and s is the mean squared gradient of the network's
    output with respect to an output of the layer.

    Parameters
    ----------
    weights : mapping of str to (m, n) array_like
        Dense weights by name.
    grams : mapping of str to (n, n) array_like
        Mean of ``x x^T``, as `diba_np.capture.capture` gives it.
    sensitivities : mapping of str to float
        s, positive.
    output_weights : mapping of str to (m,) array_like, optional
        The diagonal of W, positive; 1 for layers that are not in it.
    shift, scale_bits, seed, threads
        As for `diba_np.factorize`.

    Returns
    -------
    LayerRates
        Its ``share(bits)`` gives the rate of each layer; it takes no time.

    Raises
    ------
    KeyError
        A layer without its Gram matrix or sensitivity.
    TypeError, ValueError

    Notes
    -----
    Three short searches on at most 256 x 256 entries of each layer, about a second a layer.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> A = rng.normal(size=(40, 40))
    >>> rates = measure_rates(
    ...     {"first": A, "last": A}, {"first": np.eye(40), "last": np.eye(40)},
    ...     {"first": 1.0, "last": 4.0},
    ... ).share(3.0)
    >>> rates["first"] < 3.0 < rates["last"]
    True
    """
    bits_of_scales = check_scale_bits(scale_bits)
    tasks: list[Task] = []
    curves: list[Curve] = []
    for name, given in weights.items():
        A = as_matrix(given, f"weights[{name!r}]").astype(np.float64)
        m, n = A.shape
        gram = as_matrix(grams[name], f"grams[{name!r}]").astype(np.float64)
        if gram.shape != (n, n):
            raise ValueError(f"grams[{name!r}] must have shape {(n, n)}, got {gram.shape}")
        size = check_number(sensitivities[name], f"sensitivities[{name!r}]", above=0.0)
        if output_weights is not None and name in output_weights:
            A *= np.sqrt(check_output_weight(output_weights[name], m))[:, None]
        energy = size * float(np.vdot(A, A @ gram))
        tasks.append(Task(len(tasks), name, 0, m, (m, n), True, energy))
        curves.append(sample_curve(A, gram, shift, seed, threads))
    return LayerRates(tuple(tasks), tuple(curves), bits_of_scales)
