"""`Tokenizer`: texts to token ids and back, through the package `tokenizers`.

Kept as the JSON text of a ``tokenizer.json``, whatever it was read from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from diba_np.errors import FormatError
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
        """
        return list(self._inner.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids, special ones left out."""
        text: str = self._inner.decode([int(i) for i in ids], skip_special_tokens=True)
        return text

    def id_of(self, token: str) -> int | None:
        """Return the id of a token, or None if it is none."""
        number: int | None = self._inner.token_to_id(token)
        return number

    def token_of(self, number: int) -> str:
        """Return the token of an id."""
        return str(self._inner.id_to_token(int(number)))

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
    if path.is_file():
        with _as_format_error(str(path)):
            return Tokenizer(path.read_text("utf-8"), str(path))
    pieces, words = folder / "vocab.json", folder / "vocab.txt"
    if pieces.is_file() and (folder / "merges.txt").is_file():
        vocabulary = read_json(pieces)
        with _as_format_error(str(folder / "merges.txt")):
            lines = (folder / "merges.txt").read_text("utf-8").splitlines()
            parts = [line.split(" ") for line in lines if line and not line.startswith("#ver")]
            return Tokenizer(_byte_level(vocabulary, [*map(tuple, parts)], ()), str(pieces))
    if words.is_file():
        settings = folder / "tokenizer_config.json"
        lower = not settings.is_file() or bool(read_json(settings).get("do_lower_case", True))
        with _as_format_error(str(words)):
            lines = words.read_text("utf-8").split("\n")
            return Tokenizer(_word_pieces([line for line in lines if line], lower), str(words))
    return None


def _word_pieces(lines: Sequence[str], lower: bool) -> str:
    """Return BERT's tokenizer of a vocabulary, a token a line."""
    package = _package()
    vocabulary = {token: i for i, token in enumerate(lines)}
    inner = package.Tokenizer(package.models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.normalizer = package.normalizers.BertNormalizer(lowercase=lower)
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
_CUTS = {"qwen2": _WORDS % "", "llama-bpe": _WORDS % "{1,3}", "llama3": _WORDS % "{1,3}"}
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r")


def _byte_level(
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, ...]],
    special: Sequence[str],
    cut: str = "gpt-2",
) -> str:
    """Return a byte-level BPE tokenizer; `cut` says how texts are cut before merging."""
    package = _package()
    before = package.pre_tokenizers
    inner = package.Tokenizer(package.models.BPE(dict(vocabulary), list(merges)))
    if cut in _CUTS:
        words = before.Split(package.Regex(_CUTS[cut]), "isolated")
        parts = [words, before.ByteLevel(add_prefix_space=False, use_regex=False)]
    else:
        parts = [before.ByteLevel(add_prefix_space=False)]
        if cut in _SINGLE_DIGITS:
            parts.insert(0, before.Digits(individual_digits=True))
    inner.pre_tokenizer = before.Sequence(parts)
    inner.decoder = package.decoders.ByteLevel()
    inner.add_special_tokens(list(special))
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
    """
    model = metadata.get("tokenizer.ggml.model")
    if model is None:
        return None
    if model not in ("gpt2", "llama"):
        raise FormatError(f"{label}: tokenizer.ggml.model: found {model}, expected gpt2, llama")
    with _as_format_error(label):
        return Tokenizer(_gguf_text(metadata, model, label), label)


def _gguf_text(metadata: Mapping[str, Any], model: str, label: str) -> str:
    """Return the tokenizer in a GGUF file's metadata."""
    tokens = need(metadata, "tokenizer.ggml.tokens", label)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    kinds = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind in (_CONTROL, _USER)]
    if model == "llama":
        scores = need(metadata, "tokenizer.ggml.scores", label)
        text = _sentence_pieces(vocabulary, scores, special)
    else:
        pairs = need(metadata, "tokenizer.ggml.merges", label)
        merges = [tuple(pair.split(" ", 1)) for pair in pairs]
        text = _byte_level(
            vocabulary, merges, special, metadata.get("tokenizer.ggml.pre", "default")
        )
    if metadata.get("tokenizer.ggml.add_bos_token", model == "llama"):
        first = need(metadata, "tokenizer.ggml.bos_token_id", label)
        text = _beginning(text, tokens[int(first)], vocabulary)
    return text


def _beginning(text: str, token: str, vocabulary: Mapping[str, int]) -> str:
    """Return a tokenizer that puts a token before every text."""
    package = _package()
    inner = package.Tokenizer.from_str(text)
    inner.post_processor = package.processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, vocabulary[token])]
    )
    found: str = inner.to_str()
    return found


def _sentence_pieces(
    vocabulary: Mapping[str, int], scores: Sequence[float], special: Sequence[str]
) -> str:
    """Return SentencePiece's BPE: merges in the order of the scores of what they give."""
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
    inner.normalizer = norms.Sequence([norms.Prepend("▁"), norms.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    inner.add_special_tokens(list(special))
    text: str = inner.to_str()
    return text
