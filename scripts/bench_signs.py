"""One-bit weights and inputs by XNOR and popcount, against the dense float32 product.

python scripts/bench_signs.py            # the table in the docs
python scripts/bench_signs.py --smoke    # one small layer, for the tests

Processor seconds of one thread, medians of blocks of calls, the sides in turns. "signs" is what
`BiTATLinear.frozen` does for a layer that reads signs: comparisons, packing, products, scales and
bias; "kernel" is the product of packed signs alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import numpy as np

from diba_np.kernels.signs import multiply_signs, pack_sides
from diba_np.methods.binary_bitat import SignProduct, sign_tiles

SHAPES = ((256, 256), (300, 784), (768, 768), (3072, 768), (4096, 4096))
BATCHES = (1, 64)


def sides(shape: tuple[int, int], samples: int, rng: np.random.Generator) -> dict[str, Callable]:
    """Return the ways of one product."""
    m, n = shape
    x = rng.normal(size=(samples, n)).astype(np.float32)
    signs = rng.choice(np.array([-1, 1], np.float32), size=shape)
    ones, zeros = np.ones(m, np.float32), np.zeros(max(m, n), np.float32)
    product = SignProduct(signs, zeros[:n], ones, zeros[:m])
    packed = np.empty((samples, -(-n // 64)), np.uint64)
    rows = np.empty((m, -(-n // 64)), np.uint64)
    out = np.empty((samples, m), np.float32)
    pack_sides(x, zeros[:n], packed)
    pack_sides(signs, zeros[:n], rows)
    tiles = sign_tiles(rows)
    turned = np.ascontiguousarray(signs.T)
    expected = np.where(x >= 0, np.float32(1), np.float32(-1)) @ turned
    if not np.array_equal(product(x), expected):
        raise SystemExit(f"the products of signs differ at {shape}, {samples} samples")
    return {
        "dense": lambda: x @ turned,
        "signs": lambda: product(x),
        "kernel": lambda: multiply_signs(packed, tiles, n, ones, zeros[:m], out),
    }


def medians(runs: dict[str, Callable], seconds: float, repeats: int) -> dict[str, float]:
    """Return microseconds of a call; each block of calls takes about so many seconds."""
    counts, measured = {}, {name: [] for name in runs}
    for name, run in runs.items():
        run()
        started = time.thread_time()
        run()
        counts[name] = max(int(seconds / max(time.thread_time() - started, 1e-6)), 1)
    for _ in range(repeats):
        for name, run in runs.items():
            started = time.thread_time()
            for _ in range(counts[name]):
                run()
            measured[name].append((time.thread_time() - started) / counts[name])
    return {name: 1e6 * float(np.median(values)) for name, values in measured.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    shapes, batches = ((65, 70),) if args.smoke else SHAPES, (1, 3) if args.smoke else BATCHES
    seconds, repeats = (1e-4, 1) if args.smoke else (5e-3, args.repeats)
    rng = np.random.default_rng(0)
    print("| layer | samples | dense us | signs us | kernel us | dense / signs | dense / kernel |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for m, n in shapes:
        for samples in batches:
            us = medians(sides((m, n), samples, rng), seconds, repeats)
            cells = " | ".join(f"{us[name]:.1f}" for name in ("dense", "signs", "kernel"))
            ratios = " | ".join(f"{us['dense'] / us[name]:.1f}" for name in ("signs", "kernel"))
            print(f"| {m} × {n} | {samples} | {cells} | {ratios} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
