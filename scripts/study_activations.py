"""Does it pay to know the inputs? MiniLM's layers on real sentences, with `inputs=` and without.

Each weight is factorized from what it reads on one half of the tweets; the SNR of its outputs is
measured on the other half, all at the same stored bits: the same solver without and with inputs,
double binary factorization with a weight for each column (the norm of its inputs), GPTQ, and the
two trellises, with look-ups and linear.

python scripts/study_activations.py            # the table
python scripts/study_activations.py --smoke    # one small case, for the tests; downloads nothing
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import diba_np as dn
from diba_np import methods
from diba_np.matrix.quality import output_snr_db
from diba_np.methods.dbf import dbf

DATA = Path(__file__).resolve().parent.parent / "data"

WEIGHTS = (
    "encoder.layer.0.attention.self.query.weight",
    "encoder.layer.3.attention.output.dense.weight",
    "encoder.layer.5.attention.self.value.weight",
    "encoder.layer.3.intermediate.dense.weight",
    "encoder.layer.3.output.dense.weight",
)

# a method takes (A, X of the fitting half, stored bits a weight, options) and gives its A_hat
Method = Callable[[np.ndarray, np.ndarray, float, dict[str, Any]], Any]
METHODS: dict[str, Method] = {
    "without inputs": lambda A, X, bits, options: dn.factorize(A, bits=bits, **options),
    "with inputs": lambda A, X, bits, options: dn.factorize(A, bits=bits, inputs=X, **options),
    "DBF, weighted": lambda A, X, bits, options: dbf(A, bits=bits, inputs=X, threads=1),
    "GPTQ": lambda A, X, bits, options: methods.fit("gptq", A, bits, inputs=X),
    "trellis": lambda A, X, bits, options: methods.fit("trellis", A, bits, inputs=X),
    "linear trellis": lambda A, X, bits, options: methods.fit("linear-trellis", A, bits, inputs=X),
}


def real_cases(names: tuple[str, ...], most_rows: int) -> dict[str, tuple[np.ndarray, ...]]:
    """Return name -> (A, inputs of the even tweets, inputs of the odd tweets)."""
    import minilm

    net = minilm.load()
    texts = net.rows_of(minilm.sentences("tweets")[0], minilm.TOKENS)
    layers = [name.removesuffix(".weight") for name in names]
    halves = [minilm.inputs_of(net, texts[start::2], layers) for start in (0, 1)]
    rng = np.random.default_rng(0)
    cases = {}
    for name, layer in zip(names, layers, strict=True):
        inputs = [half[layer] for half in halves]
        taken = [X[np.sort(rng.permutation(len(X))[:most_rows])] for X in inputs]
        cases[name] = (net.weights[layer], *taken)
    return cases


def made_case() -> dict[str, tuple[np.ndarray, ...]]:
    """Return a corner of a vendored matrix with two halves of correlated inputs made here."""
    A = np.load(DATA / "minilm_attention_384x384.npy", allow_pickle=False)[:96, :96]
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(96, 96)) / np.arange(1, 97)[:, None]
    return {"made": (A, *(rng.normal(size=(1000, 96)) @ mixing for _ in range(2)))}


def measure(
    name: str, case: tuple[np.ndarray, ...], bits: float, method: str, options: dict[str, Any]
) -> dict[str, Any]:
    A, X, other = case
    started = time.perf_counter()
    A_hat = METHODS[method](A, X, bits, options)
    seconds = time.perf_counter() - started
    return {
        "weight": name,
        "shape": list(A.shape),
        "rows": len(X),
        "bits": bits,
        "method": method,
        "snr": dn.snr_db(A, A_hat),
        "output_snr_fit": output_snr_db(A, A_hat, X),
        "output_snr": output_snr_db(A, A_hat, other),
        "seconds": seconds,
    }


def show(rows: list[dict[str, Any]], methods: list[str]) -> None:
    print("| weight | shape | bits | " + " | ".join(f"{m} (s)" for m in methods) + " | gain |")
    print("|---|---|---|" + "---|" * len(methods) + "---|")
    gains = []
    for start in range(0, len(rows), len(methods)):
        group = rows[start : start + len(methods)]
        snr = {row["method"]: row["output_snr"] for row in group}
        gain = ""
        if {"with inputs", "without inputs"} <= set(snr):
            gains.append(snr["with inputs"] - snr["without inputs"])
            gain = f"{gains[-1]:+.2f} dB"
        cells = " | ".join(f"{r['output_snr']:.2f} dB ({r['seconds']:.0f})" for r in group)
        m, n = group[0]["shape"]
        name = group[0]["weight"].removeprefix("encoder.").removesuffix(".weight")
        print(f"| {name} | {m}×{n} | {group[0]['bits']:g} | {cells} | {gain} |")
    if gains:
        print(f"\nmean gain {np.mean(gains):+.2f} dB, least {min(gains):+.2f} dB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", nargs="+", default=list(WEIGHTS))
    parser.add_argument("--bits", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--solver", default="auto")
    parser.add_argument("--shift", type=float, default=0.0)
    parser.add_argument("--rows", type=int, default=20000, help="most rows of each half")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="one small case, few sweeps")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    options: dict[str, Any] = {
        "solver": args.solver,
        "shift": args.shift,
        "threads": args.threads,
    }
    if args.smoke:
        cases, args.bits = made_case(), [1.0]
        options["max_sweeps"] = 30
    else:
        cases = real_cases(tuple(args.weights), args.rows)
    dn.factorize(np.eye(64) + 1, k=8, inputs=np.eye(64), max_sweeps=2)  # compile
    rows = []
    for name, case in cases.items():
        for bits in args.bits:
            for method in args.methods:
                rows.append(measure(name, case, bits, method, options))
                if not args.json:
                    row = rows[-1]
                    line = f"{name} {bits:g} bits {method}: {row['output_snr']:.2f} dB"
                    print(f"{line}, {row['seconds']:.0f} s", file=sys.stderr)
    if args.json:
        print(json.dumps(rows))
    else:
        show(rows, args.methods)
    return 0


if __name__ == "__main__":
    sys.exit(main())
