"""Llama (H. Touvron et al., arXiv 2302.13971), and Mistral, Qwen2, SmolLM, which are built alike.

Biases are there where the file has them (Qwen2: of queries, keys and values).
"""

from collections.abc import Mapping
from typing import Any

from diba_np.networks.kind import Kind


def _settle(fields: dict[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    # newer configurations have the positions' settings together
    rotary = source.get("rope_parameters") or source.get("rope_scaling") or {}
    if not isinstance(rotary, Mapping):
        raise ValueError(f"rope_scaling must be an object, got {rotary!r}")
    rotary = dict(rotary)
    base = rotary.pop("rope_theta", None) or fields["base"]
    if source["model_type"] == "mistral":
        fields["window"] = source.get("sliding_window", 4096)
    elif source.get("use_sliding_window"):
        raise ValueError(
            f"a {source['model_type']} must look at all tokens before, this one has windows"
        )
    else:
        fields["window"] = None
    rotated = fields.pop("rotated") or ()
    if not isinstance(rotated, (list, tuple)):
        raise ValueError(f"no_rope_layers must be a list, got {rotated!r}")
    return fields | {
        "base": base,
        "scaling": rotary or None,
        "unrotated": tuple(i for i, turns in enumerate(rotated) if not turns),
    }


KIND = Kind(
    prefix="model.",
    decoder=True,
    norm_first=True,
    rms=True,
    settle=_settle,
    config={
        "layers": "num_hidden_layers",
        "width": "hidden_size",
        "heads": "num_attention_heads",
        "key_heads": ("num_key_value_heads", 0),
        "head_width": ("head_dim", 0),
        "inner": "intermediate_size",
        "epsilon": ("rms_norm_eps", 1e-6),
        "activation": ("hidden_act", "silu"),
        "vocabulary": "vocab_size",
        "base": ("rope_theta", 10000.0),
        "rotated": ("no_rope_layers", None),
        "padding": ("pad_token_id", 0),
        "tied": ("tie_word_embeddings", None),
    },
    tensors={
        "tokens": "embed_tokens",
        "mix_norm": "layers.{}.input_layernorm",
        "query": "layers.{}.self_attn.q_proj",
        "key": "layers.{}.self_attn.k_proj",
        "value": "layers.{}.self_attn.v_proj",
        "mix": "layers.{}.self_attn.o_proj",
        "outer_norm": "layers.{}.post_attention_layernorm",
        "gate": "layers.{}.mlp.gate_proj",
        "inner": "layers.{}.mlp.up_proj",
        "outer": "layers.{}.mlp.down_proj",
        "end_norm": "norm",
        "head": "lm_head",
    },
)
