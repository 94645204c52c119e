"""DistilBERT (V. Sanh et al., arXiv 1910.01108)."""

from diba_np.networks.kind import Kind

KIND = Kind(
    prefix="distilbert.",
    pool_activation="relu",
    config={
        "layers": "n_layers",
        "width": "dim",
        "heads": "n_heads",
        "inner": "hidden_dim",
        "activation": ("activation", "gelu"),
        "vocabulary": "vocab_size",
        "positions": "max_position_embeddings",
        "padding": ("pad_token_id", 0),
        "tied": ("tie_word_embeddings", True),
    },
    tensors={
        "tokens": "embeddings.word_embeddings",
        "positions": "embeddings.position_embeddings",
        "start_norm": "embeddings.LayerNorm",
        "query": "transformer.layer.{}.attention.q_lin",
        "key": "transformer.layer.{}.attention.k_lin",
        "value": "transformer.layer.{}.attention.v_lin",
        "mix": "transformer.layer.{}.attention.out_lin",
        "mix_norm": "transformer.layer.{}.sa_layer_norm",
        "inner": "transformer.layer.{}.ffn.lin1",
        "outer": "transformer.layer.{}.ffn.lin2",
        "outer_norm": "transformer.layer.{}.output_layer_norm",
        "masked_dense": "vocab_transform",
        "masked_norm": "vocab_layer_norm",
        "masked_bias": "vocab_projector",
        "head": "vocab_projector",
        "pooler": "pre_classifier",
        "classifier": "classifier",
    },
)
