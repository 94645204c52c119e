"""Small networks of every kind with random tensors, for the tests of this folder."""

import math

import numpy as np

from diba_np import networks
from diba_np.networks.kind import kind_of, read_config
from diba_np.networks.tensors import LINEAR, NORMS, expected_shape

WORDS = {"vocab_size": 19, "pad_token_id": 1}
BERT = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
    "hidden_act": "gelu",
} | WORDS
LLAMA = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
} | WORDS
VIT = BERT | {"image_size": 8, "patch_size": 4, "num_channels": 2}
CONFIGS = {
    "bert": BERT | {"type_vocab_size": 2},
    "distilbert": {
        "dim": 8,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dim": 12,
        "max_position_embeddings": 16,
    }
    | WORDS,
    "roberta": BERT | {"max_position_embeddings": 18, "layer_norm_eps": 1e-5},
    "vit": VIT,
    "audio-spectrogram-transformer": BERT
    | {
        "patch_size": 4,
        "num_mel_bins": 8,
        "max_length": 10,
        "frequency_stride": 3,
        "time_stride": 2,
    },
    "llama": LLAMA,
    "mistral": LLAMA | {"sliding_window": 3, "tie_word_embeddings": False, "head_dim": 4},
    "qwen2": LLAMA | {"tie_word_embeddings": True, "rope_theta": 1000.0},
    "smollm3": LLAMA | {"no_rope_layers": [1, 0]},
    "gpt2": {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16} | WORDS,
}
# heads that a network may have: places of its tensors that are left out
PATCHES = ("vit", "audio-spectrogram-transformer")
TOKENS = [kind for kind in CONFIGS if kind not in PATCHES]
DECODERS = ["llama", "mistral", "qwen2", "smollm3", "gpt2"]
CLASSES = 3


def config_of(kind, **more):
    return {"model_type": kind} | CONFIGS[kind] | more


def tensors_of(kind, head="masked", seed=0, **more):
    """Random tensors by name; of encoders with the head "masked", "classes", "score" or none."""
    rng = np.random.default_rng(seed)
    settings, own = read_config(config_of(kind, **more)), kind_of(kind)
    made = {}

    def put(place, name):
        if place in ("first", "second", "places"):
            shape = expected_shape(place, settings)
            beside = sum(part in own.tensors for part in ("first", "second"))
            shape = shape if place != "places" else (1, shape[1] + beside, shape[2])
            made[name] = rng.normal(size=shape)
        elif place == "masked_bias":
            made[f"{name}.bias"] = rng.normal(size=settings.vocabulary)
        elif place.endswith("_norm"):
            made[f"{name}.weight"] = 1 + rng.normal(size=settings.width) / 4
            if not own.rms:
                made[f"{name}.bias"] = rng.normal(size=settings.width) / 4
        else:
            shape = expected_shape(place, settings)
            if place == "classifier":
                shape = (1 if head == "score" else CLASSES, settings.width)
            weight = rng.normal(size=shape) / math.sqrt(shape[1])
            if place == "patches":
                weight = weight.reshape(shape[0], settings.channels, *settings.patch)
            made[f"{name}.weight"] = weight.T if place in own.transposed else weight
            biased = not own.rms or (kind == "qwen2" and place in ("query", "key", "value"))
            if biased and place not in ("tokens", "positions", "types", "head"):
                made[f"{name}.bias"] = rng.normal(size=shape[0]) / 4

    for place, patterns in own.tensors.items():
        if not own.decoder:
            if head != "masked" and (place.startswith("masked_") or place == "head"):
                continue
            if head not in ("classes", "score") and place in (
                "pooler",
                "classifier",
                "classifier_norm",
            ):
                continue
        elif place == "head" and kind in ("qwen2", "gpt2", "smollm3"):
            continue
        pattern = patterns if isinstance(patterns, str) else patterns[0]
        bare = place in ("head", "pooler", "classifier", "classifier_norm")
        bare = bare or place.startswith("masked_")
        if not bare:
            pattern = own.prefix + pattern
        inside = place in LINEAR or place in NORMS
        for i in range(settings.layers if inside else 1):
            put(place, pattern.format(i))
        if place == "head" and settings.tied:
            del made[f"{pattern}.weight"]  # the table of tokens
    return made


def network(kind, head=None, dtype=np.float64, seed=0, **more):
    """A small network; encoders of patches have classes, of tokens the masked head by default."""
    head = head or ("classes" if kind in PATCHES else "masked")
    return networks.build(
        config_of(kind, **more), tensors_of(kind, head, seed, **more), dtype=dtype
    )


def inputs_of(kind, seed=1, rows=3, tokens=7):
    """Inputs and a mask (None for patches and decoders)."""
    rng = np.random.default_rng(seed)
    config = read_config(config_of(kind))
    if kind == "vit":
        return rng.normal(size=(rows, config.channels, *config.image)), None
    if kind in PATCHES:
        return rng.normal(size=(rows, *config.image[::-1])), None
    ids = rng.integers(2, config.vocabulary, (rows, tokens))
    mask = np.arange(tokens) < np.array([tokens, tokens - 3, tokens - 1])[:rows, None]
    return np.where(mask, ids, config.padding), mask
