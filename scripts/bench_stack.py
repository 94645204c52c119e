"""Time a stack of factorizations beside one product for each of them, with one vector.

    python scripts/bench_stack.py [--bits 1] [--rounds 40] [--json]

The shapes are those of SmolLM2-135M, whose layers are 576 wide. Sides take turns; a time is the
median over all turns of processor seconds on one thread, so that other programs on the machine
count little. A ratio is the stack's time over that of the calls ``f @ x``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from bench_products import pin, random_factors

# name, (rows, columns) of each matrix; matrices of one list have the same input
GROUPS: dict[str, list[list[tuple[int, int]]]] = {
    "query, key, value": [[(576, 576), (192, 576), (192, 576)]],
    "output": [[(576, 576)]],
    "gate, up": [[(1536, 576), (1536, 576)]],
    "down": [[(576, 1536)]],
    "a layer, four stacks": [
        [(576, 576), (192, 576), (192, 576)],
        [(576, 576)],
        [(1536, 576), (1536, 576)],
        [(576, 1536)],
    ],
    "seven matrices, one stack": [
        [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (1536, 576)]
    ],
}
SMOKE = {"smoke": [[(32, 48), (16, 48)], [(48, 32)]]}

Side = Callable[[], Any]


def sides(shapes: list[list[tuple[int, int]]], bits: float, common: bool) -> dict[str, Side]:
    """Return the calls to compare: products, stacks, stacks that add a residual in place."""
    import numpy as np

    from diba_np import DiBAFactors
    from diba_np.products import Stack

    rng = np.random.default_rng(0)
    groups = []
    for i, group in enumerate(shapes):
        factors = [random_factors(m, n, bits, 10 * i + j) for j, (m, n) in enumerate(group)]
        if common:
            factors = [DiBAFactors(f.d1, f.b1, f.d2, f.b2, factors[0].d3) for f in factors]
        x = rng.normal(size=group[0][1]).astype(np.float32)
        stack = Stack(factors)
        groups.append((factors, x, stack, stack(x)))

    def calls() -> None:
        for factors, x, _, _ in groups:
            for f in factors:
                f @ x

    def stacks() -> None:
        for _, x, stack, out in groups:
            stack(x, out=out)

    def adding() -> None:
        for _, x, stack, out in groups:
            out.fill(0)
            stack(x, added=out, out=out)

    return {"calls": calls, "stack": stacks, "stack, adding": adding}


def compare(sides: dict[str, Side], rounds: int, seconds: float) -> dict[str, float]:
    """Return the median processor time of every side, in microseconds."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            side()
            count, start, spent = 0, time.process_time(), 0.0
            while spent < seconds or not count:
                for _ in range(10):
                    side()
                count += 10
                spent = time.process_time() - start
            times[name].append(1e6 * spent / count)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--bits", type=float, default=1.0, help="bits a weight")
    parser.add_argument("--rounds", type=int, default=40, help="turns of each side")
    parser.add_argument("--smoke", action="store_true", help="one tiny case, a second")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    pin(1)

    rows = []
    for name, shapes in (SMOKE if args.smoke else GROUPS).items():
        for common in (False, True):
            if common and all(len(group) == 1 for group in shapes):
                continue
            rounds, seconds = (2, 0.0) if args.smoke else (args.rounds, 2e-3)
            result = compare(sides(shapes, args.bits, common), rounds, seconds)
            for way, us in result.items():
                ratio = us / result["calls"]
                rows.append({"case": name, "one d3": common, "way": way, "us": us, "ratio": ratio})
    if args.json:
        print(json.dumps({"bits": args.bits, "rows": rows}))
        return
    print("| matrices | d3 | way | us | of the calls |\n|---|---|---|--:|--:|")
    for row in rows:
        d3 = "one" if row["one d3"] else "own"
        print(f"| {row['case']} | {d3} | {row['way']} | {row['us']:.1f} | {row['ratio']:.2f} |")


if __name__ == "__main__":
    main()
