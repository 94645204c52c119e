"""Optimisers over dictionaries of arrays, shared by `retune` and hand-written networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Adam:
    """Adam on parameters that are changed in place.

    Parameters
    ----------
    parameters : mapping of str to ndarray
        The arrays to train; they are kept by reference.
    learning_rate : float
        Relative to each array's root mean square at the start, so that diagonals of any magnitude
        move alike; an array of zeros takes it as it is.
    beta1, beta2, epsilon : float
        Decay of the moments, and the usual guard.

    References
    ----------
    .. [1] D. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization", arXiv 1412.6980, Alg. 1.
    """

    def __init__(
        self,
        parameters: Mapping[str, Array],
        learning_rate: float = 2e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
    ) -> None:
        self.parameters = parameters
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon
        self.rates = {
            name: learning_rate * (float(np.sqrt(np.mean(np.square(value)))) or 1.0)
            for name, value in parameters.items()
        }
        self.steps = 0
        self._first = {name: np.zeros_like(value) for name, value in parameters.items()}
        self._second = {name: np.zeros_like(value) for name, value in parameters.items()}

    def step(self, gradients: Mapping[str, Array], share: float = 1.0) -> None:
        """Take one step; `share` scales the learning rate (a schedule)."""
        self.steps += 1
        correction = np.sqrt(1 - self.beta2**self.steps) / (1 - self.beta1**self.steps)
        for name, value in self.parameters.items():
            gradient, first, second = gradients[name], self._first[name], self._second[name]
            first += (1 - self.beta1) * (gradient - first)
            second += (1 - self.beta2) * (np.square(gradient) - second)
            rate = share * self.rates[name] * correction
            value[...] -= rate * first / (np.sqrt(second) + self.epsilon)
