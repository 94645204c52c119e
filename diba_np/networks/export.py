"""A network as a folder in the Hugging Face layout, all its weights dense."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diba_np.files.atomic import atomic_folder, atomic_path
from diba_np.layers.linear import Layer
from diba_np.networks.assembly import tensor_name
from diba_np.networks.beside import TOKENIZER_CONFIG, made_tokenizer_config, without_lost_modules
from diba_np.networks.blocks.rotary import named_scaling
from diba_np.sources.safetensors import Writing, write_safetensors

if TYPE_CHECKING:
    from diba_np.networks.network import Network

Array = NDArray[Any]

_TYPES = ("torch_dtype", "dtype")  # keys of a configuration for that of the weights


def _dense_tensors(net: Network) -> Iterator[tuple[str, Writing]]:
    """Yield every tensor of a network by its name in the source, float32, decoded when written."""
    tensors = net.tensors
    for name, layer in net.layers.items():
        yield f"{name}.weight", _weight(net, name, layer)
        bias = layer.parameters["bias"]
        if name in (net.token_name, net.head_name):
            continue
        # has_bias reads a compressed matrix once more, where a bias may be nowhere else
        if tensors.has(f"{name}.bias") or (bias.any() and tensors.has_bias(name)):
            yield f"{name}.bias", _stored(bias)
        elif bias.any():
            raise ValueError(f"{name!r} has a bias, for which {net.config.kind} has no tensor")
    for owner, block in net.blocks.items():
        for what, value in block.parameters.items():
            yield tensor_name(owner, what), _stored(value)


def _stored(values: Array) -> Writing:
    return Writing("<f4", values.shape, lambda: [values.astype("<f4")])


def _weight(net: Network, name: str, layer: Layer) -> Writing:
    place = net.tensors.names.get(name)
    shape: tuple[int, ...] = layer.shape
    if place in net.kind.transposed:
        shape = shape[::-1]
    elif name == net.tensors.find("patches"):
        shape = (shape[0], net.config.channels, *net.config.patch)

    def pieces() -> list[Array]:
        dense = np.asarray(layer.to_matrix().to_dense(), "<f4")
        return [dense.T if place in net.kind.transposed else dense]

    return Writing("<f4", shape, pieces)


def export_network(net: Network, folder: str | os.PathLike[str]) -> Path:
    """Write a folder that other software loads, see `Network.export`; return it.

    Raises
    ------
    FileExistsError
        The folder is there and not empty.
    ValueError
        A layer has a bias, or rotary positions are stretched in a way, for which the layout has no
        name.

    Warns
    -----
    UserWarning
        The source makes vectors with weights of its own (``2_Dense``), which are not kept.
    """
    c = net.config
    # other software would round to the type that the source had
    config = dict(c.source) | {key: "float32" for key in _TYPES if key in c.source}
    if c.scaling is not None:
        named = named_scaling(c.head_width, c.base, c.scaling)
        if named is not c.scaling:
            config["rope_scaling"] = named
    home = Path(folder)
    if home.exists() and (not home.is_dir() or any(home.iterdir())):
        raise FileExistsError(f"{home} is there already; name a folder that is new or empty")
    texts = {"config.json": json.dumps(config, indent=2)}
    if net.tokenizer is not None:
        texts["tokenizer.json"] = text = net.tokenizer.text
        if text and TOKENIZER_CONFIG not in net.beside:
            most = c.most_tokens or c.source.get("max_position_embeddings")
            texts[TOKENIZER_CONFIG] = made_tokenizer_config(text, c.source, most)
    beside, lost = without_lost_modules(net.beside)
    if lost:
        warnings.warn(
            f"{net.tensors.label}: {', '.join(lost)} of sentence-transformers has weights that are "
            "not kept; modules.json is left out, so that other software reads the network alone",
            stacklevel=3,
        )
    texts |= beside
    tensors = dict(_dense_tensors(net))
    if home.is_dir():
        _write(home, tensors, texts)
        return home
    home.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(home) as part:
        _write(part, tensors, texts)
    return home


def _write(folder: Path, tensors: dict[str, Writing], texts: dict[str, str]) -> None:
    write_safetensors(folder / "model.safetensors", tensors)
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        with atomic_path(folder / name) as part:
            part.write_text(text, "utf-8")
