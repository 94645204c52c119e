"""Llama (H. Touvron et al., arXiv 2302.13971), and Mistral, Qwen2, SmolLM, which are built alike.

Biases are there where the file has them (Qwen2: of queries, keys and values).
"""

from collections.abc import Mapping
from typing import Any

from diba_np.networks.kind import Kind

_BASES = {"smollm3": 2e6}  # of rotary positions where a configuration names none; else 1e4


def _settle(fields: dict[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    # newer configurations have the positions' settings together
    rotary = source.get("rope_parameters") or source.get("rope_scaling") or {}
    if not isinstance(rotary, Mapping):
        raise ValueError(f"rope_scaling must be an object, got {rotary!r}")
    rotary, kind = dict(rotary), source["model_type"]
    base = next(
        value
        for value in (rotary.pop("rope_theta", None), fields["base"], _BASES.get(kind, 1e4))
        if value is not None
    )
    if base == 0:
        raise ValueError("rope_theta must be above 0, got 0")
    share = rotary.pop("partial_rotary_factor", source.get("partial_rotary_factor"))
    if share not in (None, 1):
        raise ValueError(f"a {kind} must turn all channels of a head, got a share of {share!r}")
    if kind == "mistral":
        fields["window"] = source.get("sliding_window", 4096)
    elif source.get("use_sliding_window"):
        raise ValueError(f"a {kind} must look at all tokens before, this one has windows")
    else:
        fields["window"] = None
    if kind == "smollm3" and fields["tied"] is None:
        fields["tied"] = True
    return fields | {
        "base": base,
        "scaling": rotary or None,
        "unrotated": _unrotated(source, fields["layers"]) if kind == "smollm3" else (),
    }


def _unrotated(source: Mapping[str, Any], layers: Any) -> tuple[int, ...]:
    """Return the layers without rotary positions: those of a list, else every so many-th."""
    turned = source.get("no_rope_layers")
    if turned is not None:
        if not isinstance(turned, (list, tuple)):
            raise ValueError(f"no_rope_layers must be a list, got {turned!r}")
        if len(turned) != layers:
            raise ValueError(
                f"no_rope_layers must have an entry for each of {layers} layers, got {len(turned)}"
            )
        return tuple(i for i, turns in enumerate(turned) if not turns)
    interval = source.get("no_rope_layer_interval", 4)
    if not isinstance(interval, int) or isinstance(interval, bool) or interval < 1:
        raise ValueError(f"no_rope_layer_interval must be an int from 1 on, got {interval!r}")
    return tuple(range(interval - 1, layers, interval)) if isinstance(layers, int) else ()


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
        "base": ("rope_theta", None),
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
