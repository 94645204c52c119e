"""Compare logits with those of torch and transformers, on small random networks of every kind.

python scripts/check_networks.py                                    # needs torch and transformers
python scripts/check_networks.py --record data/network_logits.npz   # keeps it for a test

Prints the largest difference of each kind, as a share of the largest logit. Weights are random, the
networks have a few thousand of them each.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from diba_np import networks
from diba_np.sources.opening import open_source

BERT: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
}
LLAMA = BERT | {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 29}
WORDS = {"vocab_size": 29, "max_position_embeddings": 20, "pad_token_id": 1}
SCALED = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# name -> (kind, what the network is for, settings)
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("bert", "MaskedLM", BERT | WORDS),
    "bert, classes": ("bert", "SequenceClassification", BERT | WORDS),
    "distilbert": (
        "distilbert",
        "MaskedLM",
        {"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12, **WORDS},
    ),
    "distilbert, classes": (
        "distilbert",
        "SequenceClassification",
        {"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12, **WORDS},
    ),
    "roberta": ("roberta", "MaskedLM", BERT | WORDS | {"type_vocab_size": 1}),
    "roberta, classes": ("roberta", "SequenceClassification", BERT | WORDS),
    "vit": ("vit", "ImageClassification", BERT | {"image_size": 8, "patch_size": 4}),
    "audio-spectrogram-transformer": (
        "audio-spectrogram-transformer",
        "AudioClassification",
        BERT
        | {
            "patch_size": 4,
            "num_mel_bins": 8,
            "max_length": 11,
            "frequency_stride": 3,
            "time_stride": 2,
        },
    ),
    "llama": ("llama", "CausalLM", LLAMA),
    "llama, tied": ("llama", "CausalLM", LLAMA | {"tie_word_embeddings": True}),
    "llama, longer": ("llama", "CausalLM", LLAMA | {"rope_scaling": {**SCALED}}),
    "mistral": ("mistral", "CausalLM", LLAMA | {"sliding_window": 3, "head_dim": 4}),
    "qwen2": ("qwen2", "CausalLM", LLAMA | {"tie_word_embeddings": True}),
    "smollm3": ("smollm3", "CausalLM", LLAMA | {"no_rope_layers": [1, 0], "pad_token_id": 0}),
    "gpt2": (
        "gpt2",
        "CausalLM",
        {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 20, "vocab_size": 29},
    ),
}


def theirs(name: str, folder: Path) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Make a random network, save it, return inputs, mask and its logits."""
    import torch
    import transformers

    kind, task, settings = CASES[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, num_labels=3, **settings)
    config._attn_implementation = "eager"
    net = getattr(transformers, f"AutoModelFor{task}").from_config(config).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    net.save_pretrained(folder)
    rng = np.random.default_rng(0)
    mask = None
    if kind == "vit":
        inputs = rng.normal(size=(2, 3, 8, 8)).astype(np.float32)
    elif kind == "audio-spectrogram-transformer":
        inputs = rng.normal(size=(2, 11, 8)).astype(np.float32)
    else:
        inputs = rng.integers(2, 29, (3, 9))
        if task != "CausalLM":
            mask = np.arange(9) < np.array([9, 5, 7])[:, None]
            inputs = np.where(mask, inputs, 1)
    with torch.no_grad():
        given = torch.from_numpy(inputs)
        if mask is None:
            logits = net(given).logits
        else:
            logits = net(given, attention_mask=torch.from_numpy(mask.astype(np.int64))).logits
    return inputs, mask, logits.numpy()


def difference(ours: np.ndarray, logits: np.ndarray, mask: np.ndarray | None) -> float:
    """Return the largest difference as a share of the largest logit, padding left out."""
    kept = np.ones(logits.shape[:1], bool) if mask is None or logits.ndim == 2 else mask
    return float(np.abs(ours - logits)[kept].max() / np.abs(logits[kept]).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--record", type=Path, help="keep networks and logits in this .npz")
    args = parser.parse_args()
    kept: dict[str, np.ndarray] = {}
    for name in CASES:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            inputs, mask, logits = theirs(name, folder)
            found = difference(networks.load(folder).logits(inputs, mask), logits, mask)
            print(f"{name:32s} {found:.1e}", flush=True)
            kept[f"{name}/config"] = np.array((folder / "config.json").read_text())
            kept[f"{name}/inputs"], kept[f"{name}/logits"] = inputs, logits
            if mask is not None:
                kept[f"{name}/mask"] = mask
            for entry in open_source(folder):
                kept[f"{name}/tensor {entry.name}"] = np.array(entry.read())
    if args.record:
        np.savez_compressed(args.record, **kept)


if __name__ == "__main__":
    main()
