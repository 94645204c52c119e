"""What tells one kind of network from another: names of settings and tensors, and a few facts.

A kind is one file of `diba_np.networks.kinds`; `Config` holds the settings of one network under
the names that the rest of the package uses.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from diba_np.errors import FormatError
from diba_np.networks.blocks.activations import ACTIVATIONS
from diba_np.networks.blocks.rotary import frequencies

# what is left for a network that cannot be run here
WEIGHTS_ALONE = "the weights of any network are compressed by `model` without texts"

# model_type of a configuration -> module of `kinds`
KINDS = {
    "bert": "bert",
    "distilbert": "distilbert",
    "roberta": "roberta",
    "vit": "vit",
    "audio-spectrogram-transformer": "audio_spectrogram_transformer",
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "llama",
    "smollm3": "llama",
    "gpt2": "gpt2",
}


@dataclass(frozen=True)
class Kind:
    """A kind of network.

    Attributes
    ----------
    config : dict
        Field of `Config` -> key of the configuration, or (key, default).
    tensors : dict
        Place in the network -> name of its tensors without ".weight" and ".bias"; ``{}`` stands
        for the number of the layer, a tuple for names of which any may be there.
    prefix : str
        What names may begin with.
    decoder : bool
        Whether tokens look at those before them alone, and the next one is predicted.
    norm_first : bool
        Whether norms stand before attention and feed-forward, or after the sums with the residual.
    rms : bool
        Whether norms are RMS norms.
    transposed : tuple of str
        Places whose matrices are kept (n, m).
    pool : str
        What classes are told by: "first" token, "pair", the mean of the first two, with the
        activation of the pooling layer in `pool_activation`.
    pool_activation : str
    masked_activation : str
        Of the head for masked tokens; "" for that of the feed-forward.
    settle : callable, optional
        Turns the fields that were read (a dict) and the configuration into the final fields.
    """

    config: Mapping[str, str | tuple[str, Any]]
    tensors: Mapping[str, str | tuple[str, ...]]
    prefix: str = ""
    decoder: bool = False
    norm_first: bool = False
    rms: bool = False
    transposed: tuple[str, ...] = ()
    pool: str = "first"
    pool_activation: str = "tanh"
    masked_activation: str = ""
    settle: Callable[[dict[str, Any], Mapping[str, Any]], dict[str, Any]] | None = None


@dataclass(frozen=True)
class Config:
    """The settings of a network.

    Attributes
    ----------
    kind : str
        ``model_type`` of the source.
    layers, width, heads, inner : int
        ``width`` channels of the hidden states, ``inner`` of the feed-forward.
    epsilon : float
        Of the norms.
    activation : str
        Of the feed-forward.
    key_heads, head_width : int
        Heads of keys and values, channels of a head; 0 stands for `heads`, ``width / heads``.
    vocabulary : int
        0 where patches are read.
    positions : int
        Most tokens that there are positions of, 0 for any number.
    first_position : int
        Of the first token.
    padding : int
        Token that fills up rows.
    types : int
        Kinds of tokens.
    base : float
        Of rotary positions; 0 without them.
    scaling : dict or None
        Of rotary positions, see `diba_np.networks.blocks.rotary.frequencies`.
    unrotated : tuple of int
        Layers without rotary positions.
    window : int or None
        Tokens that one looks at.
    tied : bool or None
        Whether the head is the table of tokens; None where that follows from the tensors.
    image, patch, stride : (int, int)
        Rows and columns of what patches are cut from, of a patch, and from one to the next.
    channels : int
        Of an image.
    pooling : str
        What stands for a text: "mean", "cls" or "lasttoken", the mean, the first or the last of its
        tokens; another name is of what is not done here.
    sentence_length : int
        Most tokens of a text that becomes a vector, 0 where the source does not say.
    sentence_prompt : str
        What stands before each such text.
    sentence_lower : bool
        Whether these are read in small letters.
    source : dict
        The configuration as it was read.
    """

    kind: str
    layers: int
    width: int
    heads: int
    inner: int
    epsilon: float = 1e-12
    activation: str = "gelu"
    key_heads: int = 0
    head_width: int = 0
    vocabulary: int = 0
    positions: int = 0
    first_position: int = 0
    padding: int = 0
    types: int = 0
    base: float = 0.0
    scaling: Mapping[str, Any] | None = None
    unrotated: tuple[int, ...] = ()
    window: int | None = None
    tied: bool | None = None
    image: tuple[int, int] = (0, 0)
    patch: tuple[int, int] = (0, 0)
    stride: tuple[int, int] = (0, 0)
    channels: int = 0
    pooling: str = "mean"
    sentence_length: int = 0
    sentence_prompt: str = ""
    sentence_lower: bool = False
    source: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def most_tokens(self) -> int | None:
        """Most tokens of a row; None for any number."""
        return self.positions - self.first_position if self.positions else None

    @property
    def makes_vectors(self) -> bool:
        """Whether the source says how vectors of texts are made of the last hidden states."""
        return any(key in self.source for key in SENTENCES.values())

    @property
    def ends(self) -> list[int]:
        """Tokens that end a text: ``eos_token_id``, one or several or none."""
        ends = self.source.get("eos_token_id")
        return ends if isinstance(ends, list) else [] if ends is None else [ends]

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along both sides of the image."""
        rows, columns = (
            (whole - part) // step + 1
            for whole, part, step in zip(self.image, self.patch, self.stride, strict=True)
        )
        return rows, columns


# beginning of the first of ``architectures`` -> model_type, of older configurations without one
_CLASSES = {
    "DistilBert": "distilbert",
    "Roberta": "roberta",
    "Bert": "bert",
    "GPT2": "gpt2",
    "ViT": "vit",
    "Llama": "llama",
}


def _type_of(source: Mapping[str, Any]) -> Any:
    """Return the ``model_type`` of a configuration; older ones name a class alone."""
    if source.get("model_type") is not None:
        return source["model_type"]
    classes = source.get("architectures") or [""]
    return next(
        (kind for start, kind in _CLASSES.items() if str(classes[0]).startswith(start)), None
    )


# field of `Config` -> key of a configuration for what another file of a folder says of vectors
SENTENCES = {
    "pooling": "sentence_pooling",
    **{name: name for name in ("sentence_length", "sentence_prompt", "sentence_lower")},
}

# ends of ``architectures`` whose head would be taken for another, or lost: of encoders, of decoders
_OTHER_HEADS = {
    False: (
        "ForTokenClassification",
        "ForMultipleChoice",
        "ForQuestionAnswering",
        "ForNextSentencePrediction",
        "ForMaskedImageModeling",
    ),
    True: (
        "ForSequenceClassification",
        "ForTokenClassification",
        "ForQuestionAnswering",
        "DoubleHeadsModel",
    ),
}


def kind_of(name: Any) -> Kind:
    """Return the kind that a configuration's ``model_type`` names.

    Raises
    ------
    ValueError
        It is none of those.
    """
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(
            f"model_type must be one of {', '.join(KINDS)}, got {name!r}; {WEIGHTS_ALONE}"
        )
    kind: Kind = import_module(f"diba_np.networks.kinds.{KINDS[name]}").KIND
    return kind


def read_config(source: Mapping[str, Any], label: str = "config.json") -> Config:
    """Return the settings in a configuration.

    Parameters
    ----------
    source : mapping
        What a ``config.json`` holds.
    label : str
        What messages call it.

    Raises
    ------
    ValueError
        The kind of network is unknown.
    FormatError
        A setting is missing, or one that cannot be.
    """
    source = {**source, "model_type": _type_of(source)}
    kind = kind_of(source["model_type"])
    fields: dict[str, Any] = {}
    for name, place in kind.config.items():
        key, *default = (place,) if isinstance(place, str) else place
        value = source.get(key)
        if value is None:
            if not default:
                raise FormatError(f"{label}: {key}: found none, expected it")
            value = default[0]
        fields[name] = value
    if kind.decoder and not source.get("is_causal", True):
        raise ValueError(
            f"{label}: a {source['model_type']} must look at earlier tokens alone, this one looks "
            f"at later ones too (is_causal); {WEIGHTS_ALONE}"
        )
    if kind.settle is not None:
        try:
            fields = kind.settle(fields, source)
        except ValueError as error:
            raise ValueError(f"{label}: {error}; {WEIGHTS_ALONE}") from error
    fields |= {name: source[key] for name, key in SENTENCES.items() if source.get(key) is not None}
    config = Config(kind=source["model_type"], source=dict(source), **fields)
    if kind.decoder and not all(_is_count(end, -1) for end in config.ends):  # -1 stands for none
        raise FormatError(
            f"{label}: eos_token_id: found {source['eos_token_id']!r}, expected a token's number "
            "or a list of these"
        )
    return _checked(config, label)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


# fields that a configuration sets -> what holds of them, and its name in messages
_NEEDED = (lambda value: _is_count(value, 1), "an int from 1 on")
_COUNT = (_is_count, "an int from 0 on")
_REAL = (lambda value: _is_number(value) and value >= 0, "a number from 0 on")
_SIDES = (lambda value: value == (0, 0) or all(_is_count(v, 1) for v in value), "ints from 1 on")
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("layers", "width", "heads", "inner"), _NEEDED),
    **dict.fromkeys(("key_heads", "head_width", "vocabulary"), _COUNT),
    **dict.fromkeys(("positions", "types", "channels", "sentence_length"), _COUNT),
    **dict.fromkeys(("epsilon", "base"), _REAL),
    **dict.fromkeys(("image", "patch", "stride"), _SIDES),
    "padding": (lambda value: _is_count(value, -1), "an int"),  # some write -1 for none
    "window": (lambda value: value is None or _is_count(value, 1), "an int from 1 on, or null"),
    "tied": (lambda value: value is None or isinstance(value, bool), "true or false"),
    **dict.fromkeys(("activation", "pooling"), (lambda value: isinstance(value, str), "a name")),
    "sentence_prompt": (lambda value: isinstance(value, str), "a text"),
    "sentence_lower": (lambda value: isinstance(value, bool), "true or false"),
}


def _checked(config: Config, label: str) -> Config:
    """Return the settings with widths of heads filled in, their values checked."""
    for name, (holds, rule) in _RULES.items():
        value = getattr(config, name)
        if not holds(value):
            raise FormatError(f"{label}: {name}: found {value!r}, expected {rule}")
    key_heads = config.key_heads or config.heads
    if config.heads % key_heads:
        raise FormatError(
            f"{label}: found {config.heads} heads on {key_heads} of keys, expected a multiple"
        )
    if not config.head_width and config.width % config.heads:
        raise FormatError(
            f"{label}: found width {config.width} for {config.heads} heads, expected a multiple"
        )
    if config.activation not in ACTIVATIONS:
        raise FormatError(
            f"{label}: found activation {config.activation!r}, expected {', '.join(ACTIVATIONS)}; "
            f"{WEIGHTS_ALONE}"
        )
    width = config.head_width or config.width // config.heads
    if config.base:
        try:
            frequencies(width, config.base, config.scaling)
        except (TypeError, ValueError) as error:
            raise FormatError(f"{label}: {error}; {WEIGHTS_ALONE}") from error
    # one that the table of tokens does not have: any will do, rows are masked there
    padding = config.padding if 0 <= config.padding < config.vocabulary else 0
    return dataclasses.replace(config, key_heads=key_heads, head_width=width, padding=padding)


def check_head(config: Config, label: str) -> None:
    """Refuse a network with a head, which its configuration says is another than the one read.

    Raises
    ------
    ValueError
    """
    decoder = kind_of(config.kind).decoder
    classes = config.source.get("architectures") or [""]
    name = str(classes[0] if isinstance(classes, (list, tuple)) else classes)
    if name.endswith(_OTHER_HEADS[decoder]):
        heads = "of the next token" if decoder else "for masked tokens and classes of whole rows"
        raise ValueError(
            f"{label}: architectures: the head of a {name} is not read, only heads {heads} are; "
            f"{WEIGHTS_ALONE}"
        )
