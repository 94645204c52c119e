"""What ``tokenizer_config.json`` says of a tokenizer otherwise than ``tokenizer.json`` does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from diba_np.errors import FormatError
from diba_np.networks.beside import numbered_tokens

# classes of tokenizers whose settings say what stands around a text, whatever the file itself says
_SAYS_ENDS = ("LlamaTokenizer", "LlamaTokenizerFast")

# settings of BERT's tokenizers, which count more than the file's own, and their names there
_LETTERS = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}


def as_settings_say(text: str, settings: Mapping[str, Any], label: str) -> str:
    """Return a ``tokenizer.json`` changed where ``tokenizer_config.json`` contradicts it.

    Other software follows the settings: ``add_bos_token`` and ``add_eos_token`` of Llama's classes,
    what BERT's say of letters. What the settings leave out is as the file has it.

    Raises
    ------
    FormatError
        The file has no such token.
    """
    kind = settings.get("tokenizer_class")
    letters = {
        own: settings[name]
        for name, own in _LETTERS.items()
        if settings.get(name) is not None and kind != "PreTrainedTokenizerFast"
    }
    ends = {
        end: settings[f"add_{end}_token"]
        for end in ("bos", "eos")
        if settings.get(f"add_{end}_token") is not None and kind in _SAYS_ENDS
    }
    if not letters and not ends:
        return text
    whole = json.loads(text)
    said = dict(whole)
    normalizer = whole.get("normalizer") or {}
    if normalizer.get("type") == "BertNormalizer":
        said["normalizer"] = normalizer | letters
    around = dict(zip(("bos", "eos"), _ends(whole.get("post_processor")), strict=True))
    wanted = around | {end: [_named(settings, end)] if adds else [] for end, adds in ends.items()}
    if wanted != around:
        said["post_processor"] = _template(whole, wanted["bos"], wanted["eos"], label)
    return text if said == whole else json.dumps(said, ensure_ascii=False)


def _named(settings: Mapping[str, Any], end: str) -> str:
    """Return the token that settings name for an end of texts."""
    token = settings.get(f"{end}_token") or {"bos": "<s>", "eos": "</s>"}[end]
    return str(token["content"] if isinstance(token, dict) else token)


def _template(whole: Any, first: list[str], last: list[str], label: str) -> dict[str, Any]:
    """Return what puts tokens of a ``tokenizer.json`` before and after every text."""
    ids = {token: number for number, token in numbered_tokens(whole)}
    for token in (*first, *last):
        if token not in ids:
            raise FormatError(f"{label}: token {token}: found none, its settings add it to texts")
    before, after = (
        [{"SpecialToken": {"id": token, "type_id": 0}} for token in end] for end in (first, last)
    )
    single = [*before, {"Sequence": {"id": "A", "type_id": 0}}, *after]
    special = {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in (*first, *last)}
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": special,
    }


def _ends(processor: Mapping[str, Any] | None) -> tuple[list[str], list[str]]:
    """Return the tokens that what a ``tokenizer.json`` does last puts before and after a text."""
    parts = (processor or {}).get("processors", [processor or {}])
    single: list[Any] = next((part["single"] for part in parts if "single" in part), [])
    ends: tuple[list[str], list[str]] = [], []
    behind = False
    for part in single:
        if "SpecialToken" in part:
            ends[behind].append(part["SpecialToken"]["id"])
        else:
            behind = True
    return ends
