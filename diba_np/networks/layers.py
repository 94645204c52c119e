"""The linear layers of a network by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping

from diba_np.layers.linear import Layer


class Layers(MutableMapping[str, Layer]):
    """The linear layers by name; dense ones are made when first asked for."""

    def __init__(self, source: Mapping[str, Layer]) -> None:
        self._source = source
        self._held: dict[str, Layer] = {}

    def __getitem__(self, name: str) -> Layer:
        if name not in self._held:
            self._held[name] = self._source[name]
        return self._held[name]

    def __setitem__(self, name: str, layer: Layer) -> None:
        if name not in self._source:
            raise KeyError(f"the network has no linear layer {name!r}")
        if not isinstance(layer, Layer):
            raise TypeError(f"{name!r} must be a Layer, got {type(layer).__name__}")
        self._held[name] = layer

    def __delitem__(self, name: str) -> None:
        """Put the source's layer back."""
        del self._held[name]

    def __contains__(self, name: object) -> bool:
        return name in self._source  # without making the layer

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)

    @property
    def source(self) -> Mapping[str, Layer]:
        """What makes the layers that nothing was put in the place of."""
        return self._source

    def held(self) -> dict[str, Layer]:
        """Return those that have been made or put there."""
        return {name: self._held[name] for name in self if name in self._held}
