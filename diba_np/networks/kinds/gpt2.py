"""GPT-2 (A. Radford et al., 2019), whose matrices are kept transposed."""

from collections.abc import Mapping
from typing import Any

from diba_np.networks.kind import Kind


def _settle(fields: dict[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    if source.get("scale_attn_by_inverse_layer_idx") or not source.get("scale_attn_weights", True):
        raise ValueError(
            "a gpt2 must scale its scores by the root of the heads' width alone, this one does not"
        )
    return fields | {"inner": fields["inner"] or 4 * fields["width"]}


KIND = Kind(
    prefix="transformer.",
    decoder=True,
    norm_first=True,
    transposed=("joined", "mix", "inner", "outer"),
    settle=_settle,
    config={
        "layers": "n_layer",
        "width": "n_embd",
        "heads": "n_head",
        "inner": ("n_inner", 0),
        "epsilon": ("layer_norm_epsilon", 1e-5),
        "activation": ("activation_function", "gelu_new"),
        "vocabulary": "vocab_size",
        "positions": "n_positions",
        "padding": ("pad_token_id", 0),
        "tied": ("tie_word_embeddings", True),
    },
    tensors={
        "tokens": "wte",
        "positions": "wpe",
        "mix_norm": "h.{}.ln_1",
        "joined": "h.{}.attn.c_attn",
        "mix": "h.{}.attn.c_proj",
        "outer_norm": "h.{}.ln_2",
        "inner": "h.{}.mlp.c_fc",
        "outer": "h.{}.mlp.c_proj",
        "end_norm": "ln_f",
        "head": "lm_head",
    },
)
