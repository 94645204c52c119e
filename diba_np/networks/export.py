"""A network as a folder in the Hugging Face layout, all its weights dense."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diba_np.files.atomic import atomic_path

if TYPE_CHECKING:
    from diba_np.networks.network import Network

Array = NDArray[Any]


def dense_tensors(net: Network) -> Iterator[tuple[str, Array]]:
    """Yield every tensor of a network by its name in the source, float32, matrices decoded.

    Raises
    ------
    ValueError
        A layer has a bias for which the layout has no name.
    """
    tensors = net.tensors
    for name, layer in net.layers.items():
        place = tensors.names.get(name)
        weight = np.asarray(layer.to_matrix().to_dense(), np.float32)
        if place in net.kind.transposed:
            weight = weight.T
        elif name == tensors.find("patches"):
            weight = weight.reshape(len(weight), net.config.channels, *net.config.patch)
        yield f"{name}.weight", np.ascontiguousarray(weight)
        bias = layer.parameters["bias"]
        if name in (net.token_name, net.head_name):
            continue
        if tensors.has_bias(name):
            yield f"{name}.bias", bias.astype(np.float32)
        elif bias.any():
            raise ValueError(f"{name!r} has a bias, for which {net.config.kind} has no tensor")
    for owner, block in net.blocks.items():
        for what, value in block.parameters.items():
            yield f"{owner}.{what}".replace("..", ".").rstrip("."), value.astype(np.float32)


def export_network(net: Network, folder: str | os.PathLike[str]) -> Path:
    """Write ``config.json``, ``model.safetensors`` and ``tokenizer.json``; return the folder.

    Raises
    ------
    FileExistsError
        The folder is there and not empty.
    ValueError
        As of `dense_tensors`.
    """
    home = Path(folder)
    if home.exists() and (not home.is_dir() or any(home.iterdir())):
        raise FileExistsError(f"{home} is there already; name a folder that is new or empty")
    home.mkdir(parents=True, exist_ok=True)
    write_safetensors(home / "model.safetensors", dict(dense_tensors(net)))
    texts = {"config.json": json.dumps(dict(net.config.source), indent=2)}
    if net.tokenizer is not None:
        texts["tokenizer.json"] = net.tokenizer.text
    for name, text in texts.items():
        with atomic_path(home / name) as part:
            part.write_text(text, "utf-8")
    return home


def write_safetensors(path: Path, arrays: dict[str, Array]) -> None:
    """Write float32 arrays as a safetensors file: the header's length, the header, the bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, array in arrays.items():
        end = at + 4 * array.size
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as part, open(part, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array, "<f4").tobytes())
