"""`Chain`: layers one after another with ReLU between, forwards and backwards."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from diba_np.layers.dense_linear import DenseLinear
from diba_np.layers.linear import Layer
from diba_np.training.optimisers import gather

Array = NDArray[Any]


class Chain:
    """Layers one after another: ``x -> layer(... relu(layer(x)))``, ReLU between each two.

    Before a layer that reads signs alone (`Layer.reads_signs`) there is no ReLU: its thresholds are
    in that place.

    Parameters
    ----------
    layers : mapping of str to Layer
        From the bottom; each reads as many numbers as the one before it gives.

    Attributes
    ----------
    layers : dict of str to Layer

    Examples
    --------
    >>> import numpy as np
    >>> chain = Chain.of_dense({"a": np.eye(3), "b": np.ones((1, 3))}, dtype=float)
    >>> chain.forward(np.array([[1.0, -2.0, 3.0]])), chain.backward(np.ones((1, 1)))
    (array([[4.]]), array([[1., 0., 1.]]))
    """

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        if not layers:
            raise ValueError("layers must hold at least one layer, got none")
        self.layers = dict(layers)
        names = list(self.layers)
        for below, name in pairwise(names):
            given, read = self.layers[below].shape[0], self.layers[name].shape[1]
            if given != read:
                raise ValueError(
                    f"{name!r} must read what {below!r} gives, {given} numbers, it reads {read}"
                )
        self._passed: list[Array] = []

    @classmethod
    def of_dense(
        cls,
        weights: Mapping[str, ArrayLike],
        biases: Mapping[str, ArrayLike] | None = None,
        dtype: DTypeLike = np.float32,
        trained: bool = False,
    ) -> Chain:
        """Return a chain of `DenseLinear`.

        Parameters
        ----------
        weights : mapping of str to (m, n) array_like
            From the bottom.
        biases : mapping of str to (m,) array_like, optional
            Zeros for those that have none.
        dtype : {float32, float64}
        trained : bool, default False
            Whether the matrices are parameters as well as the biases.
        """
        own = biases or {}
        return cls({n: DenseLinear(A, own.get(n), dtype, trained) for n, A in weights.items()})

    def with_layers(self, layers: Mapping[str, Layer]) -> Chain:
        """Return a chain in which some layers stand in the places of those of the same names."""
        unknown = [name for name in layers if name not in self.layers]
        if unknown:
            raise KeyError(
                f"the chain has no layer {unknown[0]!r}, it has {', '.join(self.layers)}"
            )
        return Chain({**self.layers, **layers})

    def gather(
        self, names: Collection[str] | None = None
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Return ``(parameters, gradients)`` of some layers or all, as `minimise` takes them."""
        return gather({n: self.layers[n] for n in (self.layers if names is None else names)})

    def zero_grad(self) -> None:
        """Set the gradients of all layers to zero."""
        for layer in self.layers.values():
            layer.zero_grad()

    def rounded(self) -> Chain:
        """Return the chain as it is after storing, see `Layer.rounded`."""
        return Chain({name: layer.rounded() for name, layer in self.layers.items()})

    def _has_relu(self, at: int) -> bool:
        """Tell whether the outputs of layer number `at` go through a ReLU."""
        following = list(self.layers.values())[at + 1 :]
        return bool(following) and not following[0].reads_signs

    def _run(self, x: ArrayLike, apply: Mapping[str, Callable[[Any], Array]]) -> Array:
        value: Any = x
        self._passed = []
        for at, name in enumerate(self.layers):
            value = apply[name](value)
            if self._has_relu(at):
                value = np.maximum(value, 0)
            self._passed.append(value)
        result: Array = value
        return result

    def forward(self, x: ArrayLike) -> Array:
        """Return the outputs of (..., n) samples, and keep what `backward` needs."""
        return self._run(x, {name: layer.forward for name, layer in self.layers.items()})

    def __call__(self, x: ArrayLike) -> Array:
        """Return the outputs, and keep nothing."""
        return self.outputs(x)[-1]

    def outputs(self, x: ArrayLike) -> list[Array]:
        """Return what comes after every layer, ReLU included where there is one."""
        before = self._passed
        try:
            self._run(x, self.layers)
            return self._passed
        finally:
            self._passed = before

    def frozen(self) -> Callable[[ArrayLike], Array]:
        """Return what gives the outputs of many samples, until parameters change."""
        other = Chain(self.layers)
        apply = {name: layer.frozen() for name, layer in self.layers.items()}
        return lambda x: other._run(x, apply)

    def backward(self, gy: ArrayLike) -> Array:
        """Add to the gradients of all layers and return the one with respect to x.

        Parameters
        ----------
        gy : (..., m) array_like
            Gradient of the loss with respect to the last output of `forward`.
        """
        if not self._passed:
            raise ValueError("backward needs a forward before it")
        g = np.asarray(gy)
        for at, layer in reversed(list(enumerate(self.layers.values()))):
            if self._has_relu(at):
                g = g * (self._passed[at] > 0)
            g = layer.backward(g)
        return g
