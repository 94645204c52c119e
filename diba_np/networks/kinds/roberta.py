"""RoBERTa (Y. Liu et al., arXiv 1907.11692): BERT with positions counted from after the padding."""

from collections.abc import Mapping
from typing import Any

from diba_np.networks.kind import Kind
from diba_np.networks.kinds import bert


def _settle(fields: dict[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    settled, padding = bert.settle(fields, source), fields["padding"]
    # what is no int is refused later, by its name
    return settled | ({"first_position": padding + 1} if isinstance(padding, int) else {})


KIND = Kind(
    prefix="roberta.",
    masked_activation="gelu",
    settle=_settle,
    config={**bert.KIND.config, "padding": ("pad_token_id", 1)},
    tensors={
        **bert.KIND.tensors,
        "masked_dense": "lm_head.dense",
        "masked_norm": "lm_head.layer_norm",
        "masked_bias": ("lm_head", "lm_head.decoder"),
        "head": "lm_head.decoder",
        "pooler": "classifier.dense",
        "classifier": "classifier.out_proj",
        "summary": "pooler.dense",
    },
)
