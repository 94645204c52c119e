"""GGUF's settings and tensors under the names that the Hugging Face layout has for them.

A network read from GGUF is from then on one in the Hugging Face layout: names, order of rotated
channels, configuration.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from diba_np.errors import FormatError
from diba_np.networks.kind import SENTENCES, WEIGHTS_ALONE
from diba_np.sources.gguf import need

Array = NDArray[Any]

# key of a configuration -> end of the key in GGUF
_SETTINGS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
}
_OPTIONAL = ("head_dim", "rope_theta", "num_key_value_heads")
_SPECIAL = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

ARCHITECTURES = ("llama", "qwen2")
# by the numbers that GGUF has for them; 0 stands for none
_POOLINGS = {1: "mean", 2: "cls", 3: "lasttoken", 4: "rank"}
FACTORS = "rope_freqs.weight"  # what the angles of rotary positions are divided by


def config_of(metadata: Mapping[str, Any], names: Sequence[str], label: str) -> dict[str, Any]:
    """Return the configuration in a GGUF file's metadata, given the names of its tensors.

    Raises
    ------
    ValueError
        The architecture is another.
    FormatError
        A setting is missing.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{label}: general.architecture must be one of {', '.join(ARCHITECTURES)}, got "
            f"{architecture!r}; {WEIGHTS_ALONE}"
        )
    config: dict[str, Any] = {"model_type": architecture}
    for key, end in _SETTINGS.items():
        name = f"{architecture}.{end}"
        value = metadata.get(name) if key in _OPTIONAL else need(metadata, name, label)
        if value is None:
            continue
        if not isinstance(value, (int, float)):
            raise FormatError(f"{label}: {name}: found {value!r}, expected a number")
        config[key] = value
    for key, end in _SPECIAL.items():
        value = metadata.get(f"tokenizer.ggml.{end}_token_id")
        if value is not None:
            config[key] = value
    more = [metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ("eot", "eom")]
    ends = dict.fromkeys(end for end in (config.get("eos_token_id"), *more) if end is not None)
    if len(ends) > 1:  # a turn or a message ends as a text does
        config["eos_token_id"] = list(ends)
    rope = f"{architecture}.rope"
    width = config.get("head_dim") or config["hidden_size"] // (config["num_attention_heads"] or 1)
    turned = metadata.get(f"{rope}.dimension_count", width)
    if turned != width:
        raise ValueError(
            f"{label}: {rope}.dimension_count must be the {width} channels of a head, got {turned}"
        )
    old = metadata.get(f"{rope}.scale_linear")  # of files from before there were types
    factor = metadata.get(f"{rope}.scaling.factor", old)
    scaling = metadata.get(f"{rope}.scaling.type", "none" if factor is None else "linear")
    if scaling == "linear":
        if factor is None:
            factor = need(metadata, f"{rope}.scaling.factor", label)
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif scaling != "none":
        raise ValueError(
            f"{label}: rope.scaling.type must be none or linear, got {scaling!r}; {WEIGHTS_ALONE}"
        )
    pooling = metadata.get(f"{architecture}.pooling_type")
    if pooling:
        config[SENTENCES["pooling"]] = _POOLINGS.get(pooling, f"pooling_type {pooling}")
    if not metadata.get(f"{architecture}.attention.causal", True):
        config["is_causal"] = False
    config["tie_word_embeddings"] = "output.weight" not in names
    return config


def name_of(name: str) -> str:
    """Return the name of a tensor in the Hugging Face layout; one of GGUF's own keeps its end."""
    block = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    place, dot, end = (block[2] if block else name).rpartition(".")
    place = _NAMES.get(place, place)
    return f"model.layers.{block[1]}.{place}{dot}{end}" if block else f"{place}{dot}{end}"


def change_of(name: str, config: Mapping[str, Any]) -> Callable[[Array], Array]:
    """Return what puts rows of a tensor, by its GGUF name, in the order of the other layout.

    GGUF's llama turns neighbouring channels of queries and keys, Hugging Face's those half a head
    apart.
    """
    place = name.split(".")[-2] if "." in name else ""
    queries = int(config["num_attention_heads"])
    heads = {"attn_q": queries, "attn_k": int(config.get("num_key_value_heads") or queries)}
    if config["model_type"] != "llama" or place not in heads:
        return lambda values: values

    def change(values: Array) -> Array:
        pairs = values.reshape(heads[place], -1, 2, *values.shape[1:])
        return pairs.swapaxes(1, 2).reshape(values.shape)

    return change
