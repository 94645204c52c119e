"""BERT (J. Devlin et al., arXiv 1810.04805)."""

from collections.abc import Mapping
from typing import Any

from diba_np.networks.kind import Kind


def settle(fields: dict[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields as they are, if each token looks at all and positions are in a table."""
    positions = source.get("position_embedding_type") or "absolute"
    if positions != "absolute":
        raise ValueError(
            f"a {source['model_type']} must have absolute positions, this one has {positions!r}"
        )
    if source.get("is_decoder"):
        raise ValueError(
            f"a {source['model_type']} must be an encoder, this one is a decoder (is_decoder)"
        )
    return fields


KIND = Kind(
    prefix="bert.",
    settle=settle,
    config={
        "layers": "num_hidden_layers",
        "width": "hidden_size",
        "heads": "num_attention_heads",
        "inner": "intermediate_size",
        "epsilon": ("layer_norm_eps", 1e-12),
        "activation": ("hidden_act", "gelu"),
        "vocabulary": "vocab_size",
        "positions": "max_position_embeddings",
        "types": ("type_vocab_size", 2),
        "padding": ("pad_token_id", 0),
        "tied": ("tie_word_embeddings", True),
    },
    tensors={
        "tokens": "embeddings.word_embeddings",
        "positions": "embeddings.position_embeddings",
        "types": "embeddings.token_type_embeddings",
        "start_norm": "embeddings.LayerNorm",
        "query": "encoder.layer.{}.attention.self.query",
        "key": "encoder.layer.{}.attention.self.key",
        "value": "encoder.layer.{}.attention.self.value",
        "mix": "encoder.layer.{}.attention.output.dense",
        "mix_norm": "encoder.layer.{}.attention.output.LayerNorm",
        "inner": "encoder.layer.{}.intermediate.dense",
        "outer": "encoder.layer.{}.output.dense",
        "outer_norm": "encoder.layer.{}.output.LayerNorm",
        "masked_dense": "cls.predictions.transform.dense",
        "masked_norm": "cls.predictions.transform.LayerNorm",
        "masked_bias": ("cls.predictions", "cls.predictions.decoder"),
        "head": "cls.predictions.decoder",
        "pooler": "pooler.dense",
        "classifier": "classifier",
    },
)
