"""Files beside a network's weights that other software reads: kept as texts, not used here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diba_np.errors import FormatError

TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
MODULES = "modules.json"

# of sentence-transformers, how texts are read; older folders name it after the kind of network
SENTENCE_FILES = tuple(f"sentence_{kind}_config.json" for kind in ("bert", "roberta", "distilbert"))

# of tokenizers, of what is generated, of images and sounds, of sentence-transformers
_NAMES = (
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    CHAT_TEMPLATE,
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    MODULES,
    *SENTENCE_FILES,
    "config_sentence_transformers.json",
)
# modules of sentence-transformers that a network without further weights stands for
WEIGHTLESS = ("transformer", "pooling", "normalize")

_MODULE = re.compile(r"\d+_\w+/config\.json", re.ASCII)

_LONGEST = 1 << 24  # bytes of one

# tokens by what they usually are, as encoders name them
_USUAL = {
    "[UNK]": ("unk_token",),
    "[CLS]": ("cls_token",),
    "[SEP]": ("sep_token",),
    "[PAD]": ("pad_token",),
    "[MASK]": ("mask_token",),
    "<unk>": ("unk_token",),
    "<s>": ("cls_token",),
    "</s>": ("sep_token",),
    "<pad>": ("pad_token",),
    "<mask>": ("mask_token",),
}


def is_beside(name: str) -> bool:
    """Tell whether a file of that name, its folder before it, is one of those that are kept.

    >>> is_beside("generation_config.json"), is_beside("1_Pooling/config.json"), is_beside("../x")
    (True, True, False)
    """
    return name in _NAMES or _MODULE.fullmatch(name) is not None


def without_lost_modules(texts: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return texts without those of sentence-transformers if a module of it is not kept; which.

    Kept are the network itself and what has no weights, pooling and lengths.
    """
    modules = [name for name in texts if _MODULE.fullmatch(name)]
    lost = [
        name.partition("/")[0]
        for name in modules
        if name.partition("_")[2].partition("/")[0].lower() not in WEIGHTLESS
    ]
    rest = {name: text for name, text in texts.items() if name not in (MODULES, *modules)}
    return (rest if lost else dict(texts)), sorted(lost)


def read_beside(folder: Path) -> dict[str, str]:
    """Return the texts of those files that a folder has, by name.

    Raises
    ------
    FormatError
        One is no UTF-8, or longer than 16 MiB.
    """
    paths = [folder / name for name in _NAMES] + sorted(folder.glob("*_*/config.json"))
    names = {path.relative_to(folder).as_posix(): path for path in paths if path.is_file()}
    return {name: _read(path) for name, path in names.items() if is_beside(name)}


def _read(path: Path) -> str:
    size = path.stat().st_size
    if size > _LONGEST:
        raise FormatError(f"{path}: found {size} bytes, expected at most {_LONGEST}")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not readable as UTF-8 ({error})") from error


def made_tokenizer_config(tokenizer: str, config: Mapping[str, Any], most: int | None) -> str:
    """Return the ``tokenizer_config.json`` of a ``tokenizer.json`` that has none beside it.

    Parameters
    ----------
    tokenizer : str
        The text of ``tokenizer.json``.
    config : mapping
        The network's ``config.json``, whose ``bos_token_id`` and so on name tokens.
    most : int or None
        Tokens that the network reads at most.
    """
    tokens = dict(numbered_tokens(json.loads(tokenizer)))
    named: dict[str, str] = {}
    for token in tokens.values():
        named.update((name, token) for name in _USUAL.get(token, ()))
    if "mask_token" not in named:  # of no encoder
        named = {name: token for name, token in named.items() if name[:3] not in ("cls", "sep")}
    for end in ("bos", "eos", "pad", "unk", "cls", "sep", "mask"):
        number = config.get(f"{end}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if number in tokens:
            named[f"{end}_token"] = tokens[number]
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    if most:
        settings["model_max_length"] = most
    return json.dumps(settings | {"clean_up_tokenization_spaces": False}, indent=2)


def numbered_tokens(tokenizer: Any) -> Iterator[tuple[Any, str]]:
    """Yield number and text of a ``tokenizer.json``'s tokens, those that are added last."""
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, dict):
        yield from ((number, token) for token, number in vocabulary.items())
    else:  # of a unigram model: pairs of token and score
        yield from ((number, pair[0]) for number, pair in enumerate(vocabulary))
    yield from ((own["id"], own["content"]) for own in tokenizer.get("added_tokens") or ())
