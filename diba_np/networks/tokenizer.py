"""`Tokenizer`: texts to token ids and back, through the package `tokenizers`.

Kept as the JSON text of a ``tokenizer.json``, whatever it was read from.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from diba_np.errors import FormatError
from diba_np.networks.beside import numbered_tokens
from diba_np.networks.tokenizer_settings import as_settings_say
from diba_np.sources.entry import read_json
from diba_np.sources.gguf import need

_EXTRA = "texts need the package tokenizers: pip install 'diba-np[networks]'"


def _package() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(f"{_EXTRA}; without it give token ids") from error
    return tokenizers


@contextmanager
def _as_format_error(label: str) -> Iterator[None]:
    """Turn whatever the package, or what is made for it, finds wrong into a `FormatError`."""
    try:
        yield
    except (FormatError, ImportError, PermissionError, MemoryError):
        raise
    except Exception as error:  # the package raises nothing narrower
        raise FormatError(f"{label}: not readable as a tokenizer ({error})") from error


class Tokenizer:
    """What cuts texts into tokens.

    Parameters
    ----------
    text : str
        The contents of a ``tokenizer.json``.
    label : str
        What messages call it.

    Attributes
    ----------
    text : str
    """

    def __init__(self, text: str, label: str = "tokenizer.json") -> None:
        self.text, self.label = text, label

    @cached_property
    def _inner(self) -> Any:
        package = _package()
        with _as_format_error(self.label):
            inner = package.Tokenizer.from_str(self.text)
        inner.no_padding()
        inner.no_truncation()
        return inner

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Return the token ids of a text.

        Parameters
        ----------
        text : str
        special : bool
            Whether the tokens that the network wants around a text are put there.

        Raises
        ------
        ValueError
            The text is none of Unicode: it holds a lone surrogate, as bytes do that were no UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"texts must be Unicode, got {text[error.start]!r} at character {error.start}; "
                "read them as UTF-8"
            ) from error
        return list(self._inner.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids, special ones left out."""
        text: str = self._inner.decode([int(i) for i in ids], skip_special_tokens=True)
        return text

    @cached_property
    def ids(self) -> dict[str, int]:
        """Ids of all tokens, read without the package."""
        return {token: number for number, token in numbered_tokens(json.loads(self.text))}

    def id_of(self, token: str) -> int | None:
        """Return the id of a token, or None if it is none."""
        number: int | None = self._inner.token_to_id(token)
        return number

    def token_of(self, number: int) -> str:
        """Return the token of an id, ``<id 7>`` for one that only the network has a row for."""
        token: str | None = self._inner.id_to_token(int(number))
        return f"<id {int(number)}>" if token is None else token

    @cached_property
    def opening(self) -> tuple[int, ...]:
        """Tokens that are put before every text."""
        whole = self._inner.encode("a")
        own = [i for i, special in enumerate(whole.special_tokens_mask) if not special]
        return tuple(whole.ids[: own[0]]) if own else ()

    @cached_property
    def closes(self) -> bool:
        """Whether a token is put behind every text."""
        return bool(self._inner.encode("a").special_tokens_mask[-1:] == [1])

    @cached_property
    def mask(self) -> str | None:
        """The token that stands for one to be filled in, if there is one."""
        return next((t for t in ("[MASK]", "<mask>") if self.id_of(t) is not None), None)


# -- from what stands in a folder ------------------------------------------------------------------


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """Return the tokenizer in a folder of the Hugging Face layout, or None.

    It is ``tokenizer.json``, or made of an older folder's ``vocab.json`` with ``merges.txt``, or of
    ``vocab.txt``.

    Raises
    ------
    FormatError
    ImportError
        Files of the older kinds need the package `tokenizers`.
    """
    path = folder / "tokenizer.json"
    settings = read_json(folder / "tokenizer_config.json", optional=True)
    if path.is_file():
        with _as_format_error(str(path)):
            text = as_settings_say(path.read_text("utf-8"), settings, str(path))
            return Tokenizer(text, str(path))
    pieces, words = folder / "vocab.json", folder / "vocab.txt"
    if pieces.is_file() and (folder / "merges.txt").is_file():
        vocabulary = read_json(pieces)
        with _as_format_error(str(folder / "merges.txt")):
            lines = (folder / "merges.txt").read_text("utf-8").splitlines()
            parts = [line.split(" ") for line in lines if line and not line.startswith("#ver")]
            text = _old_byte_level(folder, vocabulary, [*map(tuple, parts)], settings)
            return Tokenizer(text, str(pieces))
    if words.is_file():
        with _as_format_error(str(words)):
            lines = words.read_text("utf-8").removesuffix("\n").split("\n")
            return Tokenizer(_word_pieces(lines, settings), str(words))
    return None


# tokens that stand for themselves in vocabularies of bytes, where no file beside says so
_NAMED = ("<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>")


def _old_byte_level(
    folder: Path,
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, ...]],
    settings: Mapping[str, Any],
) -> str:
    """Return the tokenizer of an older folder's bytes: GPT-2's, RoBERTa's or Qwen2's."""
    package = _package()
    ids, named = _named_tokens(folder, vocabulary, settings)
    added = [
        package.AddedToken(
            token,
            lstrip=bool(own.get("lstrip", token == "<mask>")),  # RoBERTa's takes the space before
            rstrip=bool(own.get("rstrip")),
            normalized=False,
            special=bool(own.get("special", True)),
        )
        for token, own in named.items()
    ]
    spaced = bool(settings.get("add_prefix_space"))
    qwen2 = str(settings.get("tokenizer_class")).startswith("Qwen2")
    plain = _byte_level(ids, merges, added, "qwen2" if qwen2 else "gpt-2", spaced=spaced)
    inner = package.Tokenizer.from_str(plain)
    if qwen2:
        inner.normalizer = package.normalizers.NFC()
    elif {"<s>", "</s>", "<mask>"} <= ids.keys():
        inner.post_processor = package.processors.RobertaProcessing(
            ("</s>", ids["</s>"]), ("<s>", ids["<s>"]), add_prefix_space=spaced
        )
    text: str = inner.to_str()
    return text


def _named_tokens(
    folder: Path, vocabulary: Mapping[str, int], settings: Mapping[str, Any]
) -> tuple[dict[str, int], dict[str, Mapping[str, Any]]]:
    """Return the ids of all tokens, and what is said of those that stand for themselves.

    ``added_tokens.json``, ``special_tokens_map.json`` and ``tokenizer_config.json`` name them.
    """
    beside = read_json(folder / "added_tokens.json", optional=True)
    entries = settings.get("added_tokens_decoder") or {}  # null where there are none
    ids = {**vocabulary, **beside, **{own["content"]: int(i) for i, own in entries.items()}}
    named: dict[str, Mapping[str, Any]] = {token: {"special": False} for token in beside}
    named |= {token: {} for token in _NAMED}
    special = read_json(folder / "special_tokens_map.json", optional=True)
    for key, value in {**settings, **special}.items():
        if key.endswith("_token") or key == "additional_special_tokens":
            for token in value if isinstance(value, list) else [value]:
                own = token if isinstance(token, dict) else {"content": token}
                if isinstance(own.get("content"), str):  # null, and add_bos_token is a bool
                    named[own["content"]] = own
    named |= {own["content"]: own for own in entries.values()}
    there = sorted(named.keys() & ids.keys(), key=lambda token: ids[token])
    return ids, {token: named[token] for token in there}


def _word_pieces(lines: Sequence[str], settings: Mapping[str, Any]) -> str:
    """Return BERT's tokenizer of a vocabulary, a token a line."""
    package = _package()
    vocabulary = {token: i for i, token in enumerate(lines)}
    inner = package.Tokenizer(package.models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.normalizer = package.normalizers.BertNormalizer(
        lowercase=bool(settings.get("do_lower_case", True)),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=bool(settings.get("tokenize_chinese_chars", True)),
    )
    inner.pre_tokenizer = package.pre_tokenizers.BertPreTokenizer()
    inner.decoder = package.decoders.WordPiece()
    special = [token for token in lines if token.startswith("[") and token.endswith("]")]
    inner.add_special_tokens(special)
    if "[CLS]" in vocabulary and "[SEP]" in vocabulary:
        inner.post_processor = package.processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
        )
    text: str = inner.to_str()
    return text


# how texts are cut before merging, by the names that GGUF has for it
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_CUTS = {
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _WORDS % ""),
    **dict.fromkeys(_LLAMA3, _WORDS % "{1,3}"),
    "tekken": _CASED,
}
_WHOLE = (*_LLAMA3, "tekken")  # words that are tokens are not put together by merges
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r")
_PLAIN = ("default", "gpt-2")


def _byte_level(
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, ...]],
    added: Sequence[Any],
    cut: str = "gpt-2",
    *,
    spaced: bool = False,
) -> str:
    """Return a byte-level BPE tokenizer.

    `added` are tokens that stand for themselves, `cut` says how texts are cut before merging,
    `spaced` puts a space before a text.
    """
    package = _package()
    before = package.pre_tokenizers
    whole = cut in _WHOLE
    inner = package.Tokenizer(
        package.models.BPE(dict(vocabulary), list(merges), ignore_merges=whole)
    )
    if cut in _CUTS:
        words = before.Split(package.Regex(_CUTS[cut]), "isolated")
        parts = [words, before.ByteLevel(add_prefix_space=spaced, use_regex=False)]
    else:
        parts = [before.ByteLevel(add_prefix_space=spaced)]
        if cut in _SINGLE_DIGITS:
            parts.insert(0, before.Digits(individual_digits=True))
    inner.pre_tokenizer = before.Sequence(parts)
    inner.decoder = package.decoders.ByteLevel()
    inner.add_tokens(list(added))
    text: str = inner.to_str()
    return text


# -- from a GGUF file ------------------------------------------------------------------------------

_CONTROL, _USER = 3, 4  # kinds of tokens in GGUF that stand for themselves


def gguf_tokenizer(metadata: Mapping[str, Any], label: str) -> Tokenizer | None:
    """Return the tokenizer in a GGUF file's metadata, or None where it has none.

    Raises
    ------
    FormatError
        It is of another kind than byte-level BPE ("gpt2") and SentencePiece ("llama").
    ImportError
        The package `tokenizers` is missing.

    Warns
    -----
    UserWarning
        How it cuts texts before merging is not known; None is returned.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model is None:
        return None
    if model not in ("gpt2", "llama"):
        raise FormatError(f"{label}: tokenizer.ggml.model: found {model}, expected gpt2, llama")
    cut, known = metadata.get("tokenizer.ggml.pre", "default"), (*_CUTS, *_SINGLE_DIGITS, *_PLAIN)
    if model == "gpt2" and cut not in known:
        warnings.warn(
            f"{label}: tokenizer.ggml.pre: found {cut!r}, known are {', '.join(known)}; texts are "
            "not read, give token ids",
            stacklevel=3,
        )
        return None
    with _as_format_error(label):
        return Tokenizer(_gguf_text(metadata, model, label), label)


def _gguf_text(metadata: Mapping[str, Any], model: str, label: str) -> str:
    """Return the tokenizer in a GGUF file's metadata."""
    tokens = need(metadata, "tokenizer.ggml.tokens", label)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    kinds = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    _check_count(kinds, "token_type", len(tokens), label)
    package = _package()
    added = [
        package.AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (_CONTROL, _USER)
    ]
    cut = metadata.get("tokenizer.ggml.pre", "default")
    if model == "llama":
        scores = need(metadata, "tokenizer.ggml.scores", label)
        _check_count(scores, "scores", len(tokens), label)
        spaced = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        text = _sentence_pieces(vocabulary, scores, added, spaced)
    else:
        pairs = need(metadata, "tokenizer.ggml.merges", label)
        merges = [tuple(pair.split(" ", 1)) for pair in pairs]
        text = _byte_level(vocabulary, merges, added, cut)
    ends = {"bos": model == "llama" or cut in _WHOLE, "eos": False}  # where the file says nothing
    around = []
    for end, usual in ends.items():
        key = f"tokenizer.ggml.{end}_token_id"
        if metadata.get(f"tokenizer.ggml.add_{end}_token", usual and key in metadata):
            number = need(metadata, key, label)
            if number not in range(len(tokens)):
                raise FormatError(
                    f"{label}: {key}: found {number!r}, expected an int in [0, {len(tokens) - 1}]"
                )
            around.append([tokens[number]])
        else:
            around.append([])
    return _surrounded(text, around[0], around[1], vocabulary)


def _check_count(values: Sequence[Any], name: str, count: int, label: str) -> None:
    if len(values) != count:
        raise FormatError(
            f"{label}: tokenizer.ggml.{name}: found {len(values)} entries, expected one for each "
            f"of {count} tokens"
        )


def _surrounded(text: str, first: list[str], last: list[str], vocabulary: Mapping[str, int]) -> str:
    """Return a tokenizer that puts tokens before and after every text."""
    if not first and not last:
        return text
    package = _package()
    inner = package.Tokenizer.from_str(text)
    inner.post_processor = package.processors.TemplateProcessing(
        single=[*first, "$A", *last],
        special_tokens=[(token, vocabulary[token]) for token in dict.fromkeys(first + last)],
    )
    text = inner.to_str()
    return text


def _sentence_pieces(
    vocabulary: Mapping[str, int], scores: Sequence[float], added: Sequence[Any], spaced: bool
) -> str:
    """Return SentencePiece's BPE: merges in the order of the scores of what they give.

    `added` are tokens that stand for themselves, `spaced` puts a space before a text.
    """
    package = _package()
    merges = []
    for token, number in vocabulary.items():
        for cut in range(1, len(token)):
            parts = token[:cut], token[cut:]
            if parts[0] in vocabulary and parts[1] in vocabulary:
                merges.append((-scores[number], vocabulary[parts[0]], vocabulary[parts[1]], parts))
    ordered = [parts for *_, parts in sorted(merges)]
    inner = package.Tokenizer(
        package.models.BPE(dict(vocabulary), ordered, fuse_unk=True, byte_fallback=True)
    )
    norms, decoders = package.normalizers, package.decoders
    begin, strip = ([norms.Prepend("▁")], [decoders.Strip(" ", 1, 0)]) if spaced else ([], [])
    inner.normalizer = norms.Sequence([*begin, norms.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    inner.add_tokens(list(added))
    text: str = inner.to_str()
    return text
