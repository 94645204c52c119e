"""Forward and backward of `DiBALinear`: BLAS on unpacked bits against packed products, by batch.

python scripts/bench_layer.py            # the table in the docs
python scripts/bench_layer.py --smoke    # one small layer, for the tests

Medians of repeated calls, the sides in turns. "dense" is a dense layer's forward and backward with
the gradient of its weights.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import numpy as np

import diba_np as dn
from diba_np.matrix.budgets import largest_k

SHAPES = ((256, 256), (512, 256), (1536, 384), (2048, 2048))
BATCHES = (1, 64, 256, 2048)


def sides(
    shape: tuple[int, int], k: int, samples: int, rng: np.random.Generator
) -> dict[str, Callable[[], object]]:
    """Return the ways of one forward and backward."""
    m, n = shape
    x = rng.normal(size=(samples, n)).astype(np.float32)
    g = rng.normal(size=(samples, m)).astype(np.float32)
    W = rng.normal(size=shape).astype(np.float32)
    f = dn.DiBAFactors(
        np.ones(m), rng.integers(0, 2, (m, k)), np.ones(k), rng.integers(0, 2, (k, n)), np.ones(n)
    )

    def both(layer: dn.DiBALinear) -> Callable[[], object]:
        return lambda: (layer.forward(x), layer.backward(g))

    return {
        "dense": lambda: (x @ W.T, g @ W, g.T @ x),
        "packed": both(dn.DiBALinear(f, unpack=False)),
        "BLAS": both(dn.DiBALinear(f, unpack=True)),
        "auto": both(dn.DiBALinear(f)),
    }


def medians(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return microseconds."""
    told: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            told[name].append(time.perf_counter() - started)
    return {name: 1e6 * float(np.median(values)) for name, values in told.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    shapes, batches = ((64, 48),) if args.smoke else SHAPES, (1, 16) if args.smoke else BATCHES
    rng = np.random.default_rng(0)
    print("| layer | k | samples | dense us | packed us | BLAS us | auto us | auto / packed |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for m, n in shapes:
        k = largest_k(m, n, args.bits)
        for samples in batches:
            if m * n * samples > 3e9:
                continue
            us = medians(sides((m, n), k, samples, rng), args.repeats)
            cells = " | ".join(f"{us[name]:.0f}" for name in ("dense", "packed", "BLAS", "auto"))
            ratio = us["auto"] / us["packed"]
            print(f"| {m} × {n} | {k} | {samples} | {cells} | {ratio:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
