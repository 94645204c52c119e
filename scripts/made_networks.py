"""Small random encoders and rows of tokens, for the studies' `--smoke`; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import numpy as np

from diba_np import networks
from diba_np.networks.network import Network

WORDS = 40  # tokens; the first is the mask where tokens are masked
WIDTH, INNER, LAYERS, CLASSES = 16, 24, 1, 3


class Mask:
    """The part of a tokenizer that masking needs."""

    mask = "[MASK]"
    text = ""

    def id_of(self, token: str) -> int | None:
        """Return the number of a token, none but the mask's."""
        return 0 if token == self.mask else None


def random_network(head: str = "", seed: int = 0, layers: int = LAYERS) -> Network:
    """Return a small encoder with a head for "masked" tokens, "classes", or none."""
    config = {
        "model_type": "bert",
        "hidden_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": INNER,
        "max_position_embeddings": 16,
        "type_vocab_size": 2,
        "vocab_size": WORDS,
        "tie_word_embeddings": False,
    }
    shapes: dict[str, tuple[int, ...]] = {}
    norms = ["embeddings.LayerNorm"]
    tables = {"word": WORDS, "position": 16, "token_type": 2}
    for name, rows in tables.items():
        shapes[f"embeddings.{name}_embeddings"] = (rows, WIDTH)
    for i in range(layers):
        at = f"encoder.layer.{i}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            shapes[f"{at}.attention.{name}"] = (WIDTH, WIDTH)
        shapes[f"{at}.intermediate.dense"] = (INNER, WIDTH)
        shapes[f"{at}.output.dense"] = (WIDTH, INNER)
        norms += [f"{at}.attention.output.LayerNorm", f"{at}.output.LayerNorm"]
    if head == "masked":
        shapes["cls.predictions.transform.dense"] = (WIDTH, WIDTH)
        shapes["cls.predictions.decoder"] = (WORDS, WIDTH)
        norms.append("cls.predictions.transform.LayerNorm")
    elif head == "classes":
        shapes |= {"pooler.dense": (WIDTH, WIDTH), "classifier": (CLASSES, WIDTH)}
    rng = np.random.default_rng(seed)
    tensors: dict[str, Any] = {}
    for name, shape in shapes.items():
        table = "embeddings" in name
        scale = 1.0 if table else 1 / np.sqrt(shape[1])
        tensors[f"{name}.weight"] = scale * rng.normal(size=shape)
        if not table and name != "cls.predictions.decoder":
            tensors[f"{name}.bias"] = rng.normal(size=shape[0]) / 4
    for name in norms:
        tensors[f"{name}.weight"] = 1 + rng.normal(size=WIDTH) / 4
        tensors[f"{name}.bias"] = rng.normal(size=WIDTH) / 4
    if head == "masked":
        tensors["cls.predictions.bias"] = rng.normal(size=WORDS)
    tokenizer = Mask() if head == "masked" else None
    return networks.build(config, tensors, tokenizer=tokenizer)


def random_rows(count: int, seed: int = 0) -> list[list[int]]:
    """Return rows of 4 to 11 tokens, none of them the mask."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, WORDS, rng.integers(4, 12)).tolist() for _ in range(count)]
