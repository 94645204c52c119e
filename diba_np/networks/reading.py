"""Networks read from a folder in the Hugging Face layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from diba_np.errors import FormatError
from diba_np.networks.decoder import Decoder
from diba_np.networks.encoder import Encoder
from diba_np.networks.kind import kind_of, read_config
from diba_np.networks.network import Network
from diba_np.networks.tensors import Held, Tensor, Tensors

CONFIG, TOKENIZER = "config.json", "tokenizer.json"


def build(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor | Any],
    *,
    tokenizer: Any = None,
    dtype: DTypeLike = np.float32,
    label: str = "tensors",
) -> Network:
    """Return the network of a configuration and its tensors.

    Parameters
    ----------
    config : mapping
        What a ``config.json`` holds.
    tensors : mapping of str to array_like or Tensor
        By their names in the Hugging Face layout.
    tokenizer : Tokenizer, optional
    dtype : {float32, float64}
        Of the arithmetic.
    label : str
        What messages call the source.

    Returns
    -------
    Network
        An `Encoder` or a `Decoder`.

    Raises
    ------
    ValueError
        The kind of network is unknown.
    FormatError
        Settings or tensors are missing or contradict each other.
    """
    settings = read_config(config, f"{label}: config")
    held = {name: t if hasattr(t, "read") else Held(t) for name, t in tensors.items()}
    form = Decoder if kind_of(settings.kind).decoder else Encoder
    return form(Tensors(settings, held, label), tokenizer, dtype)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises
    ------
    FormatError
        It holds no JSON object.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(found, dict):
        raise FormatError(f"{path}: found {type(found).__name__}, expected an object")
    return found
