"""Vision transformer (A. Dosovitskiy et al., arXiv 2010.11929)."""

from collections.abc import Mapping
from typing import Any

from diba_np.networks.kind import Kind


def pair(value: Any) -> tuple[int, int]:
    """Return (rows, columns) of one number or two."""
    sides = value if isinstance(value, (list, tuple)) else (value, value)
    if len(sides) != 2 or 0 in sides:
        raise ValueError(f"sizes of images and patches must be one count or two, got {value!r}")
    return sides[0], sides[1]


def _settle(fields: dict[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    image, patch = pair(fields["image"]), pair(fields["patch"])
    return fields | {"image": image, "patch": patch, "stride": patch}


KIND = Kind(
    prefix="vit.",
    norm_first=True,
    settle=_settle,
    config={
        "layers": "num_hidden_layers",
        "width": "hidden_size",
        "heads": "num_attention_heads",
        "inner": "intermediate_size",
        "epsilon": ("layer_norm_eps", 1e-12),
        "activation": ("hidden_act", "gelu"),
        "image": ("image_size", 224),
        "patch": ("patch_size", 16),
        "channels": ("num_channels", 3),
    },
    tensors={
        "patches": "embeddings.patch_embeddings.projection",
        "first": "embeddings.cls_token",
        "places": "embeddings.position_embeddings",
        "query": "encoder.layer.{}.attention.attention.query",
        "key": "encoder.layer.{}.attention.attention.key",
        "value": "encoder.layer.{}.attention.attention.value",
        "mix_norm": "encoder.layer.{}.layernorm_before",
        "mix": "encoder.layer.{}.attention.output.dense",
        "outer_norm": "encoder.layer.{}.layernorm_after",
        "inner": "encoder.layer.{}.intermediate.dense",
        "outer": "encoder.layer.{}.output.dense",
        "end_norm": "layernorm",
        "classifier": "classifier",
        "summary": "pooler.dense",
    },
)
