"""Networks read from folders in the Hugging Face layout, GGUF files and files of their own."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from diba_np.errors import FormatError
from diba_np.networks import gguf_layout
from diba_np.networks.beside import (
    CHAT_TEMPLATE,
    MODULES,
    SENTENCE_FILES,
    TOKENIZER_CONFIG,
    WEIGHTLESS,
    read_beside,
)
from diba_np.networks.decoder import Decoder
from diba_np.networks.encoder import Encoder
from diba_np.networks.file import NetworkFile
from diba_np.networks.kind import SENTENCES, check_head, read_config
from diba_np.networks.network import Network
from diba_np.networks.tensors import QUANTIZED, Held, Tensor, Tensors
from diba_np.networks.tokenizer import gguf_tokenizer, read_tokenizer
from diba_np.sources.entry import Entry, read_json
from diba_np.sources.gguf import read_metadata
from diba_np.sources.opening import open_source

CONFIG = "config.json"

_TEMPLATE = "tokenizer.chat_template"  # of a GGUF file
_MODELOPT = "hf_quant_config.json"  # beside the configuration

Array = NDArray[Any]


class FromEntry:
    """A `Tensor` of a source, its values changed on reading.

    Parameters
    ----------
    entry : Entry
    change : callable, optional
        Takes the array and returns one of the same shape.
    """

    def __init__(self, entry: Entry, change: Callable[[Array], Array] | None = None) -> None:
        self._entry, self._change = entry, change

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the array: what reads the source cannot be."""
        return Held, (self.read(),)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.read().shape if self._entry.shape is None else self._entry.shape

    def read(self) -> Array:
        """Return the array."""
        values = self._entry.read()
        return values if self._change is None else self._change(values)


def load(
    path: str | os.PathLike[str], *, dtype: DTypeLike = np.float32, kind: str | None = None
) -> Network:
    """Read a network: a folder in the Hugging Face layout, a GGUF file, or what `save` wrote.

    Parameters
    ----------
    path : path-like
        A folder with ``config.json``, weights (safetensors, in shards or not, or torch's) and, for
        texts, ``tokenizer.json``; a ``.gguf`` of the architecture llama or qwen2.
    dtype : {float32, float64}
        Of the arithmetic.
    kind : str, optional
        ``model_type`` of a folder whose configuration, an old one, names none.

    Returns
    -------
    Network
        Its weights are read when they are needed.

    Raises
    ------
    FileNotFoundError
        There is no such file, or a folder has no ``config.json``.
    ValueError
        The kind of network is none of those that are known.
    FormatError
        Something is missing, damaged, or of another shape than the configuration says.
    ImportError
        A GGUF file needs the packages of the extra "networks".
    """
    path = Path(path)
    if path.is_dir():
        config = read_json(path / CONFIG)
        config |= _beside(path, config)
        if kind is not None:
            config["model_type"] = kind
        _check_not_quantized(path, config)
        # read later, maybe from another working folder
        entries = open_source(path.absolute())
        tensors = {entry.name: FromEntry(entry) for entry in entries}
        tokenizer, texts = read_tokenizer(path), read_beside(path)
    elif path.suffix.lower() == ".gguf":
        metadata = read_metadata(path)
        config, tensors = read_gguf(path, metadata)
        tokenizer, template = gguf_tokenizer(metadata, str(path)), metadata.get(_TEMPLATE)
        texts = {CHAT_TEMPLATE: template} if isinstance(template, str) else {}
    elif path.suffix.lower() in (".h5", ".hdf5"):
        return _open(path, dtype)
    elif not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    else:
        raise ValueError(f"{path}: expected a folder with {CONFIG}, a .gguf, or a network's .h5")
    net = build(config, tensors, tokenizer=tokenizer, dtype=dtype, label=str(path))
    net.beside = texts
    return net


def _check_not_quantized(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse weights that are codes of some other method."""
    named = [config.get(name) for name in ("quantization_config", "compression_config")]
    settings = next(filter(None, named), None)
    place, method = folder / CONFIG, settings
    if settings is None and (folder / _MODELOPT).exists():
        place, settings = folder / _MODELOPT, read_json(folder / _MODELOPT)
        method = settings.get("producer", "ModelOpt")
    elif isinstance(settings, dict):
        method = settings.get("quant_method")
    if settings is not None:
        raise FormatError(f"{place}: {QUANTIZED.format(method)}")


def _beside(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what files beside a folder's configuration say of ends and of vectors of texts."""
    generation = read_json(folder / "generation_config.json", optional=True)
    files = [file for name in SENTENCE_FILES if (file := folder / name).is_file()]
    sentences = read_json(files[0]) if files else {}
    prompt = _prompt(folder)
    settings = {
        "eos_token_id": generation.get("eos_token_id"),
        SENTENCES["sentence_length"]: sentences.get("max_seq_length") or _longest(folder, config),
        SENTENCES["sentence_lower"]: sentences.get("do_lower_case"),
        SENTENCES["sentence_prompt"]: prompt,
    }
    # modules of sentence-transformers, each in a folder 1_Name; lengths are always made 1 here
    names = sorted(p.name for p in folder.glob("[0-9]_*") if p.is_dir())
    steps = []
    for name in names:
        step = name[2:].lower()
        if step == "pooling":
            steps += _poolings(read_json(folder / name / CONFIG, optional=True), bool(prompt))
        elif step not in WEIGHTLESS:
            steps.append(step)
    if steps:
        settings[SENTENCES["pooling"]] = " and ".join(steps)
    return {key: value for key, value in settings.items() if value is not None}


def _longest(folder: Path, config: Mapping[str, Any]) -> int | None:
    """Return how many tokens of a text a folder of sentence-transformers reads, not told there."""
    if not (folder / MODULES).is_file():
        return None
    said = read_json(folder / TOKENIZER_CONFIG, optional=True).get("model_max_length")
    counts = (said, config.get("max_position_embeddings"), config.get("n_positions"))
    return min((count for count in counts if isinstance(count, int) and count > 0), default=None)


def _prompt(folder: Path) -> str | None:
    """Return what a folder of sentence-transformers puts before a text, where it is told nothing.

    Raises
    ------
    FormatError
        It names a prompt that it does not have.
    """
    path = folder / "config_sentence_transformers.json"
    settings = read_json(path, optional=True)
    name, prompts = settings.get("default_prompt_name"), settings.get("prompts") or {}
    if name is None:
        return None
    if not isinstance(prompts, dict) or not isinstance(prompts.get(name), str):
        raise FormatError(f"{path}: default_prompt_name: found {name!r}, expected one of prompts")
    return str(prompts[name])


def _poolings(settings: Mapping[str, Any], prompted: bool) -> list[str]:
    """Return the names of the poolings whose vectors a sentence's is made of."""
    if prompted and settings.get("include_prompt") is False:
        return [f"{name} without the prompt" for name in _poolings(settings, False)]
    start, ends = "pooling_mode_", ("_tokens", "_token")
    names = [key for key, chosen in settings.items() if key.startswith(start) and chosen]
    said = settings.get("pooling_mode", names)  # of newer folders: a name, or a list of them
    names = [str(name) for name in (said if isinstance(said, list) else [said])]
    bare = [name.removeprefix(start).removesuffix(ends[0]).removesuffix(ends[1]) for name in names]
    return ["mean" if name == "mean_sqrt_len" else name for name in bare]  # of one direction


def _open(path: Path, dtype: DTypeLike) -> Network:
    """Return the network in a file that `Network.save` wrote; its arrays are read when needed."""
    file = NetworkFile(path)
    settings = read_config(file.config, f"{path}: config")
    tensors = Tensors(settings, file.tensors, str(path), compressed=file.compressed, oriented=True)
    net = _network(tensors, file.tokenizer, dtype)
    net.record, net.beside = dict(file.model.record), file.beside
    return net


def _network(tensors: Tensors, tokenizer: Any, dtype: DTypeLike) -> Network:
    """Return the network of some tensors, in the form of its kind."""
    form = Decoder if tensors.kind.decoder else Encoder
    return form(tensors, tokenizer, dtype)


def read_gguf(
    path: Path, metadata: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, FromEntry]]:
    """Return configuration and tensors of a GGUF file in the Hugging Face layout.

    Raises
    ------
    ValueError
        The architecture is not known.
    FormatError
    """
    # read later, maybe from another working folder
    entries = {entry.name: entry for entry in open_source(path.absolute())}
    config = gguf_layout.config_of(metadata, list(entries), str(path))
    factors = entries.pop(gguf_layout.FACTORS, None)
    if factors is not None:
        stretch = config.get("rope_scaling", {}).get("factor", 1.0)
        divided = [float(value) * stretch for value in factors.read()]
        config["rope_scaling"] = {"rope_type": "factors", "factors": divided}
    tokens = entries.get("token_embd.weight")
    if tokens is None:
        raise FormatError(f"{path}: tensor token_embd.weight: found none, expected it")
    config["vocab_size"] = int((tokens.shape or tokens.read().shape)[0])
    return config, {
        gguf_layout.name_of(name): FromEntry(entry, gguf_layout.change_of(name, config))
        for name, entry in entries.items()
    }


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
        Settings or tensors are missing or contradict each other; a part of a layer, or a whole
        layer, is stored that the network would be without.

    Warns
    -----
    UserWarning
        A head of its own is read, which the configuration says is the table of tokens; something
        is stored beside the layers that the network would be without.
    """
    settings = read_config(config, f"{label}: config")
    held = {name: t if hasattr(t, "read") else Held(t) for name, t in tensors.items()}
    found = Tensors(settings, held, label)
    if _denies_tie(found):
        warnings.warn(
            f"{label}: tie_word_embeddings says that the head is the table of tokens, but the head "
            "stored is another; that one is read, as of transformers 5 (earlier: the table)",
            stacklevel=3,
        )
        settings = read_config({**config, "tie_word_embeddings": False}, f"{label}: config")
        found = Tensors(settings, held, label)
    net = _network(found, tokenizer, dtype)
    has_head = net.head_name is not None or net.tensors.find("classifier") is not None
    if has_head or net.tensors.unread():
        check_head(settings, f"{label}: config")
    found.check_unread()
    return net


def _denies_tie(tensors: Tensors) -> bool:
    """Tell whether a head that should be the table of tokens is stored beside it as another."""
    names = [f"{tensors.find(place)}.weight" for place in ("tokens", "head")]
    if not tensors.config.tied or not all(map(tensors.has, names)):
        return False
    table, head = (tensors.tensors[name].read() for name in names)
    return not np.array_equal(table, head)
