"""The tensors of a network by their places in it: names found, shapes checked, read when needed."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from diba_np.errors import FormatError
from diba_np.networks.kind import WEIGHTS_ALONE, Config, kind_of

Array = NDArray[Any]

# places of linear layers within a layer of the network, in the order in which they are called
LINEAR = ("joined", "query", "key", "value", "mix", "gate", "inner", "outer")
NORMS = ("mix_norm", "outer_norm")

# endings of tensors beside codes that other software made of a matrix
_OF_CODES = ("weight_scale", "weight_scale_inv", "weight_packed", "qweight", "SCB", "scales")
QUANTIZED = (
    "the weights are quantized already ({}), and their codes are not read; bring the network as it "
    "was before"
)
# heads: layers beside those of the trunk; a summary is read by other software alone
HEADS = ("masked_dense", "pooler", "classifier", "summary")
# tensors that hold nothing of their own: positions, masks, angles
_BUFFERS = re.compile(
    r"(^|\.)(inv_freq|position_ids|token_type_ids|cos_cached|sin_cached|attn_rot_embd\.weight"
    r"|attn\.(bias|masked_bias))$"
)
# of pretraining, beside the head that is read
_PAST_HEADS = ("cls.seq_relationship.",)
# places without ".weight", and those without ".bias"
BARE = ("first", "second", "places")
_UNBIASED = ("tokens", "head", "positions", "types")


class Tensor(Protocol):
    """A tensor that is read when it is asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self) -> Array: ...


def expected_shape(place: str, config: Config) -> tuple[int, ...] | None:
    """Return the shape of the tensor at a place, as the network uses it; None for any."""
    c = config
    queries, keys = c.heads * c.head_width, c.key_heads * c.head_width
    whole = math.prod(c.patch) * c.channels
    patches = math.prod(c.grid) if whole else 0
    shapes: dict[str, tuple[int, ...]] = {
        "tokens": (c.vocabulary, c.width),
        "head": (c.vocabulary, c.width),
        "positions": (c.positions, c.width),
        "types": (c.types, c.width),
        "joined": (queries + 2 * keys, c.width),
        "query": (queries, c.width),
        "key": (keys, c.width),
        "value": (keys, c.width),
        "mix": (c.width, queries),
        "gate": (c.inner, c.width),
        "inner": (c.inner, c.width),
        "outer": (c.width, c.inner),
        "masked_dense": (c.width, c.width),
        "pooler": (c.width, c.width),
        "summary": (c.width, c.width),
        "masked_bias": (c.vocabulary,),
        "patches": (c.width, whole),
        "first": (1, 1, c.width),
        "second": (1, 1, c.width),
        "places": (1, patches, c.width),
    }
    return (c.width,) if place.endswith("_norm") else shapes.get(place)


class Tensors:
    """What a network's source holds, by place.

    Parameters
    ----------
    config : Config
    tensors : mapping of str to Tensor
        By their names in the source.
    label : str
        What messages call the source.
    compressed : mapping of str to callable, optional
        Of layers that are not dense: name -> what reads the matrix.
    oriented : bool
        Whether all matrices lie (m, n), whatever the kind says.

    Attributes
    ----------
    names : dict of str to str
        Name of each linear layer of the trunk, in the order of their calls -> its place.
    """

    def __init__(
        self,
        config: Config,
        tensors: Mapping[str, Tensor],
        label: str,
        *,
        compressed: Mapping[str, Callable[[], Any]] | None = None,
        oriented: bool = False,
    ) -> None:
        self.config, self.label = config, label
        self.compressed = dict(compressed or {})
        self.kind = kind_of(config.kind)
        self._transposed = () if oriented else self.kind.transposed
        # older checkpoints have other names for what norms multiply by and add
        renamed = {"gamma": "weight", "beta": "bias"}
        self.tensors = {
            f"{base}.{renamed.get(end, end)}".lstrip("."): tensor
            for name, tensor in tensors.items()
            for base, _, end in [name.rpartition(".")]
        }
        self.names: dict[str, str] = {}
        for i in range(config.layers):
            for place in LINEAR:
                name = self.find(place, i)
                if name is not None:
                    self.names[name] = place
        self._check()

    def find(self, place: str, layer: int = 0) -> str | None:
        """Return the name at a place without ".weight", or None where the network has none."""
        for pattern in self._patterns(place):
            base = pattern.format(layer)
            for name in (base, self.kind.prefix + base):
                if any(f"{name}{end}" in self.tensors for end in ("", ".weight", ".bias")):
                    return name
        return None

    def need(self, place: str, layer: int = 0) -> str:
        """Return the name at a place.

        Raises
        ------
        FormatError
            The network has no such tensor.
        """
        name = self.find(place, layer)
        if name is None:
            pattern = self.kind.tensors[place]
            first = pattern if isinstance(pattern, str) else pattern[0]
            raise FormatError(
                f"{self.label}: tensor {self.kind.prefix}{first.format(layer)}.weight: "
                "found none, expected it"
            )
        return name

    def _check(self) -> None:
        """Compare the shapes of all that the network uses with its configuration."""
        for place in self.kind.tensors:
            inside = place in LINEAR or place in NORMS
            for i in range(self.config.layers if inside else 1):
                optional = place in ("types", "head", *HEADS) or place.startswith("masked_")
                optional |= place == "classifier_norm"
                name = self.find(place, i) if optional else self.need(place, i)
                if name is not None:
                    self._check_shape(place, name)

    def _check_shape(self, place: str, name: str) -> None:
        expected = expected_shape(place, self.config)
        if place == "places" and expected is not None:
            beside = sum(part in self.kind.tensors for part in ("first", "second"))
            expected = (1, expected[1] + beside, expected[2])
        for end in _OF_CODES:
            if f"{name}.{end}" in self.tensors:
                of_codes = f"{name}.{end}"
                raise FormatError(f"{self.label}: {QUANTIZED.format(of_codes)}")
        full = next((n for n in (f"{name}.weight", name) if n in self.tensors), None)
        if place == "masked_bias":
            full = f"{name}.bias"
        if expected is None or (full is None and (place == "head" or name in self.compressed)):
            return
        full = full or f"{name}.weight"
        if full not in self.tensors:
            raise FormatError(f"{self.label}: tensor {full}: found none, expected it")
        shape = tuple(self.tensors[full].shape)
        used = shape[::-1] if place in self._transposed else shape
        if place == "patches":
            used = (shape[0], math.prod(shape[1:]))
        if used != expected:
            wanted = expected[::-1] if place in self._transposed else expected
            raise FormatError(
                f"{self.label}: tensor {full}: found shape {shape}, expected {wanted}"
            )
        self._check_bias(place, f"{name}.bias", expected)

    def _check_bias(self, place: str, full: str, expected: tuple[int, ...]) -> None:
        """Compare the bias of a norm, which needs one, or of a linear layer, if it has one."""
        is_norm = place.endswith("_norm")
        if full not in self.tensors:
            if is_norm and not self.kind.rms:
                raise FormatError(f"{self.label}: tensor {full}: found none, expected it")
            return
        shape = tuple(self.tensors[full].shape)
        if (is_norm or place in LINEAR) and shape != expected[:1]:
            raise FormatError(
                f"{self.label}: tensor {full}: found shape {shape}, expected {expected[:1]}"
            )

    def unread(self) -> list[str]:
        """Return the full names of tensors that no place takes, but for known buffers."""
        taken = {name for place in self.kind.tensors for name in self._full_names(place)}
        return [name for name in self.tensors if name not in taken and not _BUFFERS.search(name)]

    def check_unread(self) -> None:
        """Refuse tensors that no place takes, without which this would be another network.

        Raises
        ------
        FormatError
            One is of a layer or of something else that is read.

        Warns
        -----
        UserWarning
            There are others.
        """
        layers = self.config.layers
        patterns = [name for place in (*LINEAR, *NORMS) for name in self._patterns(place)]
        starts = {re.escape(pattern.partition("{}")[0]) for pattern in patterns}
        inside = re.compile(rf"({re.escape(self.kind.prefix)})?({'|'.join(starts)})(\d+)\.")
        read = {self.find(place) for place in self.kind.tensors}
        others = []
        for name in self.unread():
            layer = inside.match(name)
            if layer is not None and int(layer[3]) >= layers:
                key = self.kind.config["layers"]
                raise FormatError(
                    f"{self.label}: tensor {name}: found a layer of number {layer[3]}, expected "
                    f"the last to be {layers - 1}, since {key} is {layers}; mend that"
                )
            if layer is not None or name.rpartition(".")[0] in read:
                raise FormatError(
                    f"{self.label}: tensor {name}: no place of a {self.config.kind} takes it, "
                    "without it this would be another network; adapters are to be merged into the "
                    f"weights; {WEIGHTS_ALONE}"
                )
            if not name.removeprefix(self.kind.prefix).startswith(_PAST_HEADS):
                others.append(name)
        if others:
            more = f" and {len(others) - 3} more" if len(others) > 3 else ""
            warnings.warn(
                f"{self.label}: no place of a {self.config.kind} takes {', '.join(others[:3])}"
                f"{more}; left out, also of what is written",
                stacklevel=4,
            )

    def _patterns(self, place: str) -> tuple[str, ...]:
        patterns = self.kind.tensors.get(place, ())
        return (patterns,) if isinstance(patterns, str) else patterns

    def _full_names(self, place: str) -> Iterator[str]:
        """Yield the full names of what a place takes; of several stored for it, all of them."""
        ends = ["" if place in BARE else ".weight", ".bias"]
        if place in (*BARE, *_UNBIASED) or (place.endswith("_norm") and self.kind.rms):
            ends.pop()
        if place == "masked_bias":
            ends.pop(0)
        for pattern in self._patterns(place):
            for i in range(self.config.layers if "{}" in pattern else 1):
                base = pattern.format(i)
                for name in (base, self.kind.prefix + base):
                    yield from (name + end for end in ends)

    def has(self, name: str) -> bool:
        """Tell whether there is a tensor of that full name."""
        return name in self.tensors

    def array(self, name: str) -> Array:
        """Return a tensor by its full name, in its own type.

        Raises
        ------
        FormatError
            It holds NaN or infinity.
        """
        values = self.tensors[name].read()
        finite = np.isfinite(values)
        if not finite.all():
            at = tuple(map(int, np.argwhere(~finite)[0]))
            raise FormatError(
                f"{self.label}: tensor {name}: found {values[at]} at {at}, expected finite numbers"
            )
        return values

    def bias(self, name: str) -> Array | None:
        """Return the bias of a layer, if it has one."""
        return self.array(f"{name}.bias") if self.has(f"{name}.bias") else None

    def matrix(self, name: str) -> Array:
        """Return the weights (m, n) of a linear layer, in their own type."""
        values = self.array(f"{name}.weight")
        values = values.reshape(len(values), -1)
        return values.T if self.names.get(name) in self._transposed else values

    def has_bias(self, name: str) -> bool:
        """Tell whether a layer has a bias in the layout of its kind."""
        if self.has(f"{name}.bias"):
            return True
        # files of an early version hold the bias with the matrix
        build = self.compressed.get(name)
        return build is not None and getattr(build(), "bias", None) is not None


class Lazy(Mapping[str, Any]):
    """A mapping whose values are made each time that they are asked for.

    Parameters
    ----------
    names : iterable of str
    make : callable
        Takes a name and returns its value.
    """

    def __init__(self, names: Any, make: Callable[[str], Any]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # without making its value

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Held:
    """A `Tensor` that is an array already.

    Parameters
    ----------
    array : array_like
    """

    def __init__(self, array: Any) -> None:
        self._array = np.asarray(array)
        self.shape = self._array.shape

    def read(self) -> Array:
        """Return the array."""
        return self._array
