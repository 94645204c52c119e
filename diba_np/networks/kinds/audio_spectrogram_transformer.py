"""Audio spectrogram transformer (Y. Gong et al., arXiv 2104.01778).

It reads spectrograms (S, frames, mel bins); patches overlap.
"""

from collections.abc import Mapping
from typing import Any

from diba_np.networks.kind import Kind
from diba_np.networks.kinds import vit


def _settle(fields: dict[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    frames = fields.pop("frames")
    return fields | {
        "image": (fields["image"], frames),
        "patch": vit.pair(fields["patch"]),
        "stride": (fields["stride"], source.get("time_stride") or 10),
        "channels": 1,
    }


KIND = Kind(
    prefix="audio_spectrogram_transformer.",
    norm_first=True,
    pool="pair",
    settle=_settle,
    config={name: key for name, key in vit.KIND.config.items() if name != "channels"}
    | {
        "image": ("num_mel_bins", 128),
        "frames": ("max_length", 1024),
        "stride": ("frequency_stride", 10),
    },
    tensors={
        **{place: name for place, name in vit.KIND.tensors.items() if place != "summary"},
        "second": "embeddings.distillation_token",
        "classifier_norm": "classifier.layernorm",
        "classifier": "classifier.dense",
    },
)
