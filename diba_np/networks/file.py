"""A network's file: a model's file with configuration and tokenizer beside the arrays.

Arrays have the names of the Hugging Face layout; matrices lie as they are used, (m, n), whatever
the source has. ``config.json``, ``tokenizer.json`` and what the source has beside them
(`diba_np.networks.beside`) are stored arrays of deflated UTF-8, and the record names the kind under
``"network"``.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diba_np.errors import FormatError
from diba_np.files.atomic import PathLike
from diba_np.matrix.stored_array import StoredArray
from diba_np.models.file import Item, ModelFactors, open_model, write_model
from diba_np.networks.assembly import EMBEDDINGS, tensor_name
from diba_np.networks.beside import is_beside
from diba_np.networks.tokenizer import Tokenizer

if TYPE_CHECKING:
    from diba_np.networks.network import Network

Array = NDArray[Any]

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
_MOST_TEXT = 1 << 28  # bytes of a configuration or a tokenizer

# where a stored bit of a network belongs
PARTS = (
    "layers",
    "layers kept dense",
    "embeddings and head",
    "norms and biases",
    "tokenizer and configuration",
)


def _deflated(text: str) -> StoredArray:
    return StoredArray.of(np.frombuffer(zlib.compress(text.encode(), 9), np.uint8))


def _inflated(stored: Any, label: str) -> str:
    if not isinstance(stored, StoredArray) or stored.values.dtype != np.uint8:
        raise FormatError(f"{label}: found no deflated text, expected it")
    try:
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(stored.values.tobytes(), _MOST_TEXT)
        if not unpacker.eof:
            raise ValueError(f"more than {_MOST_TEXT} bytes or an end too early")
        return text.decode()
    except (zlib.error, ValueError) as error:
        raise FormatError(f"{label}: not readable ({error})") from error


def save_network(net: Network, path: PathLike) -> int:
    """Write everything that a network needs to run; return the file's bytes.

    Parameters
    ----------
    net : Network
    path : path-like
        Written whole or not at all.
    """
    items: list[Item] = []
    for _, name, content in _contents(net):
        stored = isinstance(content, StoredArray)
        shape = content.array_shape if stored else content.shape
        items.append((name, shape, content.array_dtype if stored else "<f4", content))
    record = {**net.record, "network": net.config.kind, "compressed": sorted(net.compressed)}
    return write_model(path, items, record)


def _contents(net: Network) -> Iterator[tuple[str, str, Any]]:
    """Yield all that is stored of a network: to which of `PARTS` it belongs, its name, a matrix."""
    layers, dense, tables, others, texts = PARTS
    embeddings = set(map(net.tensors.find, EMBEDDINGS))
    outside, compressed = (net.token_name, net.head_name), net.compressed
    for name, layer in net.layers.items():
        part = tables if name in outside else layers if name in compressed else dense
        yield part, f"{name}.weight", layer.to_matrix()
        bias = layer.parameters["bias"]
        if name not in outside and (bias.any() or net.tensors.has(f"{name}.bias")):
            yield others, f"{name}.bias", StoredArray.of(bias.astype(np.float32))
    for owner, block in net.blocks.items():
        part = tables if owner in embeddings else others
        for what, value in block.parameters.items():
            yield part, tensor_name(owner, what), StoredArray.of(value.astype(np.float32))
    for name, text in _texts(net).items():
        yield texts, name, _deflated(text)


def _texts(net: Network) -> dict[str, str]:
    """Return the texts that are stored beside a network's arrays, by name."""
    texts = {CONFIG: json.dumps(dict(net.config.source))}
    if net.tokenizer is not None:
        texts[TOKENIZER] = net.tokenizer.text
    return texts | net.beside


class _InFile:
    """A `Tensor` of a network's file."""

    def __init__(self, model: ModelFactors, name: str) -> None:
        self._model, self._name = model, name
        self.shape = model.array_shape(name)

    def read(self) -> Array:
        """Return the array, decoded if it is compressed."""
        return self._model.dense(self._name)


class NetworkFile:
    """What is in a network's file; arrays are read when they are asked for.

    Parameters
    ----------
    path : path-like

    Attributes
    ----------
    model : ModelFactors
    config : dict
    tokenizer : Tokenizer or None
    tensors : dict of str to Tensor

    Raises
    ------
    FileNotFoundError
    FormatError
        It is no network's file, or damaged.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        self.model = open_model(path)
        if "network" not in self.model.record or CONFIG not in self.model:
            raise FormatError(
                f"{path}: found a model's arrays alone, expected a network with them; compress "
                "one with texts=, or `export` these to a folder with its config.json and tokenizer"
            )
        config = json.loads(_inflated(self.model[CONFIG], f"{path}: {CONFIG}"))
        if not isinstance(config, dict):
            raise FormatError(f"{path}: {CONFIG}: found no object, expected one")
        self.config: dict[str, Any] = config
        self.tokenizer = None
        if TOKENIZER in self.model:
            text = _inflated(self.model[TOKENIZER], f"{path}: {TOKENIZER}")
            self.tokenizer = Tokenizer(text, f"{path}: {TOKENIZER}")
        self.beside = {
            name: _inflated(self.model[name], f"{path}: {name}")
            for name in self.model
            if is_beside(name)
        }
        texts = {CONFIG, TOKENIZER, *self.beside}
        names = [name for name in self.model if name not in texts]
        self.tensors = {name: _InFile(self.model, name) for name in names}

    @cached_property
    def compressed(self) -> Mapping[str, Callable[[], Any]]:
        """What reads the matrix of each layer that is not dense, by the layer's name."""
        names: list[str] = self.model.record.get("compressed", [])
        return {name: partial(self.model.read, f"{name}.weight") for name in names}


def is_network(path: PathLike) -> bool:
    """Tell whether a file is a network's."""
    try:
        return "network" in open_model(path).record
    except FormatError:
        return False


def bits_by_part(net: Network) -> dict[str, tuple[int, int]]:
    """Return ``(stored bits, weights)`` of each of `PARTS`, as `save` writes a network.

    Kept dense are, of an encoder, what cuts patches and the layers of its head.
    """
    counts = dict.fromkeys(PARTS, (0, 0))
    for part, _, content in _contents(net):
        bits, weights = counts[part]
        size = 0 if part == PARTS[-1] else math.prod(content.shape)
        counts[part] = bits + content.storage_bits(), weights + size
    return counts
