"""Does it pay to know how outputs matter together? MiniLM's layers, with `output_weight=`.

Each weight is factorized under the Gram matrix of what it reads, outputs weighed not at all, each
on its own, or by the Gram matrix of the gradients of the network's outputs. The error
``tr(W E H E^T)`` is measured with W and H of other sentences, all at the same stored bits. Beside
it stands what no code of those bits can pass on average, for normal weights whose variances are
products of one of the row and one of the column in the axes of W and H.

python scripts/study_outputs.py             # the table
python scripts/study_outputs.py --smoke     # a small made network, for the tests
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from network_study import Task
from scipy.optimize import brentq

import diba_np as dn
from diba_np.matrix.quality import decibels
from diba_np.networks.calibration import calibration, iterate_batches
from diba_np.networks.importance import importance
from diba_np.networks.network import Network

Array = np.ndarray

WEIGHTS = ("no", "vector", "matrix")


def measures(
    net: Network, rows: Sequence[Sequence[int]], names: Sequence[str]
) -> dict[str, tuple[Array, Array]]:
    """Return W (m, m) of the outputs and H (n, n) of the inputs of some layers, on some rows."""
    data = calibration(net, rows, tokens=2048)
    matters = dict(importance(net, data))
    grams = {name: np.zeros((net.weights[name].shape[1],) * 2) for name in names}
    for at, inputs, mask in iterate_batches(data):

        def linear(name: str, x: Array, at: int = at, **how: Any) -> Any:
            if name in grams:
                root = np.sqrt(matters[name].tokens[at]).astype(x.dtype)
                weighed = (x * root[..., None]).reshape(-1, x.shape[-1])
                grams[name] += weighed.T @ weighed
            return net.plain(name, x, **how)

        net.last_hidden(inputs, mask, linear)
    return {name: (matters[name].outputs, grams[name]) for name in names}


def fitted(A: Array, W: Array, H: Array, weights: str, bits: float, **how: Any) -> Array:
    given = {"no": None, "vector": np.diag(W), "matrix": W}[weights]
    return dn.factorize(A, bits=bits, gram=H, output_weight=given, **how).to_dense()


def snr(A: Array, A_hat: Array, W: Array, H: Array) -> float:
    """Return ``tr(W A H A^T) / tr(W E H E^T)`` in dB."""
    signal, noise = (float(np.vdot(W @ E, E @ H)) for E in (A, A - A_hat))
    return decibels(signal, noise)


def bound(A: Array, W: Array, H: Array, bits: float) -> float:
    """Return the SNR in dB of reverse water-filling at so many bits a weight."""
    (w, U), (h, V) = (np.linalg.eigh(M) for M in (W, H))
    energy = (U.T @ A @ V) ** 2
    variances = np.outer(energy.mean(axis=1) * w, energy.mean(axis=0) * h) / energy.mean()
    variances = np.maximum(variances, 1e-12 * variances.max())

    def excess(level: float) -> float:
        return float(0.5 * np.log2(np.maximum(variances / np.exp(level), 1.0)).mean() - bits)

    level = np.exp(brentq(excess, np.log(variances.min()) - 3 * bits, np.log(variances.max())))
    return decibels(float(variances.sum()), float(np.minimum(variances, level).sum()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 2, 4])
    parser.add_argument("--bits", type=float, default=1.0)
    parser.add_argument("--rows", type=int, default=2000, help="sentences fitted to, and of others")
    parser.add_argument("--effort", default="fast")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="a small made network")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.smoke:
        import study_classes

        task: Task = study_classes.made()
        args.layers, args.rows, args.bits = [0], 20, 2.0
    else:
        import study_sentences

        task = study_sentences.real()
    net = task.net
    numbers = {f".{at}." for at in args.layers}
    names = [name for name in net.weights if any(number in name for number in numbers)]
    drawn = np.random.default_rng(0).permutation(len(task.fit))[: 2 * args.rows]
    own, other = (measures(net, [task.fit[i] for i in half], names) for half in np.split(drawn, 2))
    told = []
    for name in names:
        A = net.weights[name]
        row: dict[str, Any] = {"weight": name, "shape": list(A.shape), "bits": args.bits}
        for weights in WEIGHTS:
            started = time.process_time()
            how = {"effort": args.effort, "threads": args.threads}
            A_hat = fitted(A, *own[name], weights, args.bits, **how)
            row[weights] = snr(A, A_hat, *other[name])
            row[f"{weights} seconds"] = time.process_time() - started
        row["bound"] = bound(A, *other[name], args.bits)
        told.append(row)
        print(f"{name}: {row['matrix'] - row['vector']:+.2f} dB", file=sys.stderr, flush=True)
    if args.json:
        print(json.dumps(told))
        return 0
    print("| weight | shape | " + " | ".join(f"{w} (s)" for w in WEIGHTS) + " | gain | bound |")
    print("|---|---|" + "---|" * (len(WEIGHTS) + 2))
    for row in told:
        cells = " | ".join(f"{row[w]:.2f} ({row[f'{w} seconds']:.0f})" for w in WEIGHTS)
        name = row["weight"].removeprefix("encoder.")
        m, n = row["shape"]
        gain = f"{row['matrix'] - row['vector']:+.2f} dB"
        print(f"| {name} | {m}×{n} | {cells} | {gain} | {row['bound']:.2f} |")
    gains = [row["matrix"] - row["vector"] for row in told]
    print(f"\nmatrix over vector: mean {np.mean(gains):+.2f} dB, least {min(gains):+.2f} dB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
