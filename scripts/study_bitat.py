"""BiTAT's variants, GPTQ and plain signs: what knowing the inputs gives at one bit a weight.

Output SNR on inputs that were not used for fitting. First the vendored attention matrix on drawn
inputs whose spectrum falls as 1/j, then MiniLM's layers on real sentences (fitted on the even
tweets, judged on the odd ones).

python scripts/study_bitat.py
python scripts/study_bitat.py --smoke    # drawn inputs alone, a quarter of the matrix; no download
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from diba_np.matrix.quality import output_snr_db
from diba_np.methods.bitat import binarize
from diba_np.methods.fitting import gram

DATA = Path(__file__).resolve().parent.parent / "data"

LAYERS = (
    "encoder.layer.0.attention.self.query.weight",
    "encoder.layer.3.attention.output.dense.weight",
    "encoder.layer.5.attention.self.value.weight",
)

# column of the table -> (order, flips) of `binarize`
VARIANTS = {
    "plain sign": ("plain", False),
    "ascending": ("ascending", False),
    "natural": ("natural", False),
    "descending": ("descending", False),
    "descending + flips": ("descending", True),
}

# (weights, inputs to fit on, inputs to judge on)
Layer = tuple[np.ndarray, np.ndarray, np.ndarray]


def drawn(part: int) -> Layer:
    """Return a corner of the attention matrix and correlated inputs drawn for it."""
    A = np.load(DATA / "minilm_attention_384x384.npy", allow_pickle=False)[:part, :part]
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.standard_normal((part, part)))[0]
    X = (rng.standard_normal((8000, part)) / np.sqrt(np.arange(1, part + 1))) @ Q.T
    return A, X[:6000], X[6000:]


def measure(name: str, layer: Layer) -> dict[str, float | str]:
    """Return the output SNR of every variant on one layer, dB."""
    A, X, other = (part.astype(np.float64) for part in layer)
    H = gram(X, A.shape[1])
    row: dict[str, float | str] = {"inputs": name}
    for variant, (order, flips) in VARIANTS.items():
        S, alpha = binarize(A, H, order, flips)
        row[variant] = round(output_snr_db(A, S * alpha[:, None], other), 2)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    layers = {"drawn, spectrum 1/j": drawn(96 if args.smoke else 384)}
    if not args.smoke:
        from study_activations import real_cases

        layers |= real_cases(LAYERS, 20000)
    rows = [measure(name, layer) for name, layer in layers.items()]
    if args.json:
        print(json.dumps(rows))
        return 0
    print("| inputs of | " + " | ".join(VARIANTS) + " |")
    print("|---|" + "--:|" * len(VARIANTS))
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
