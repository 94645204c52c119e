"""Tokens a second of a language model whose layers, table of tokens and head are packed.

export OPENBLAS_NUM_THREADS=1 NUMBA_NUM_THREADS=1
python scripts/bench_tokens.py               # the sizes of SmolLM2-135M at 1 and 2 bits
python scripts/bench_tokens.py --dense       # beside them float32 through the same code
python scripts/bench_tokens.py --method linear-trellis --bits 2 3

The bits are random: time depends on sizes alone. Tokens are read one by one at batch 1 after a
prompt of 128; rates are per second of processor time, the best of five runs of 40 tokens, which a
busy machine disturbs least. Bytes are those of the file, with a tokenizer left out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench_linear_trellis import random_trellis

import diba_np as dn
from diba_np import networks
from diba_np.layers.linear import DiBALinear
from diba_np.layers.trellis_linear import TrellisLinear
from diba_np.networks.generation import Session

SIZES: dict[str, Any] = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
}
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 200,
}
PROMPT, TOKENS = 128, 40


def dense_network(sizes: dict[str, Any], rng: np.random.Generator) -> networks.Network:
    """Return a llama of random weights with a tied head."""
    width, inner = sizes["hidden_size"], sizes["intermediate_size"]
    keys = width // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    shapes = {"model.embed_tokens": (sizes["vocab_size"], width)}
    tensors: dict[str, Any] = {"model.norm.weight": np.ones(width, np.float32)}
    for i in range(sizes["num_hidden_layers"]):
        at = f"model.layers.{i}"
        for name, rows in (("q", width), ("k", keys), ("v", keys), ("o", width)):
            shapes[f"{at}.self_attn.{name}_proj"] = (rows, width)
        shapes |= {f"{at}.mlp.{name}_proj": (inner, width) for name in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj"] = (width, inner)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{norm}.weight"] = np.ones(width, np.float32)
    for name, shape in shapes.items():
        tensors[f"{name}.weight"] = rng.standard_normal(shape, np.float32) / np.sqrt(shape[1])
    return networks.build({"model_type": "llama", "tie_word_embeddings": True, **sizes}, tensors)


def packed_network(
    dense: networks.Network, bits: float, rng: np.random.Generator
) -> networks.Network:
    """Return the network with random factorizations of so many bits a weight in all places."""
    made = {}
    for name, layer in dense.layers.items():
        (m, n), scale = layer.shape, 16
        k = int((bits * m * n - scale * (m + n)) / (m + n + scale))
        b1, b2 = (dn.PackedBits(rng.integers(0, 2, shape, np.uint8)) for shape in ((m, k), (k, n)))
        d1, d2, d3 = (rng.standard_normal(size).astype(np.float16) for size in (m, k, n))
        made[name] = DiBALinear(dn.DiBAFactors(d1, b1, d2 / np.float16(k), b2, d3, 0.5))
    return dense.replaced(made)


def trellis_network(
    dense: networks.Network, bits: float, rng: np.random.Generator
) -> networks.Network:
    """Return the network with linear trellises of random paths in all places.

    Both sides are rotated, of the table of tokens, whose rows are looked up, the inputs alone.
    """
    made = {}
    for name, layer in dense.layers.items():
        rotation = "both" if layer.shape[0] < dense.config.vocabulary else "inputs"
        made[name] = TrellisLinear(random_trellis(layer.shape, rotation, rng, int(bits)))
    return dense.replaced(made)


def rate(net: networks.Network, prompt: int, tokens: int, runs: int) -> tuple[float, float]:
    """Return tokens a second of processor time: of the prompt, and one by one after it."""
    ids = np.random.default_rng(1).integers(0, net.config.vocabulary, prompt)
    first, later = [], []
    for _ in range(runs + 1):  # the first one compiles
        session = Session(net, prompt + tokens)
        started = time.process_time()
        session.read(ids)
        first.append(time.process_time() - started)
        session.step(int(ids[0]))
        started = time.process_time()
        for token in ids[1:tokens]:
            session.step(int(token))
        later.append(time.process_time() - started)
    return prompt / min(first[1:]), (tokens - 1) / min(later[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--bits", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--method", choices=("diba", "linear-trellis"), default="diba")
    parser.add_argument("--dense", action="store_true", help="the float32 network too")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="a small network, one run")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    dense = dense_network(SMALL if args.smoke else SIZES, rng)
    if args.smoke:
        args.runs = 1
    packed = packed_network if args.method == "diba" else trellis_network
    rows = []
    for bits in [*args.bits, *([32.0] if args.dense else [])]:
        net = dense if bits == 32.0 else packed(dense, bits, rng)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.h5"
            size = net.save(path)
            prompt, token = rate(networks.load(path), PROMPT, TOKENS, args.runs)
        rows.append({"bits": bits, "bytes": size, "prompt": prompt, "tokens": token})
        if not args.json:
            print(f"{bits:4g} bits  {size / 1e6:6.1f} MB  prompt {prompt:5.0f}/s  {token:5.0f}/s")
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
