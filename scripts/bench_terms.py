"""Several terms beside a single one: SNR and seconds of the search, and products of the same k.

python scripts/bench_terms.py                          # the matrices in data/, 2, 3 and 4 bits
python scripts/bench_terms.py --kinds                  # synthetic kinds, 256 x 256
python scripts/bench_terms.py --products               # time of products, T terms over one

Seconds are of the processor, on one thread, without compilation; the two sides take turns.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("NUMBA_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from bench_solver import kinds, table

from diba_np import DiBAFactors, PackedBits, factorize

DATA = Path(__file__).resolve().parent.parent / "data"


def seconds_of(run: Callable[[], Any]) -> tuple[Any, float]:
    """Return the result of a call and the processor's seconds."""
    start = time.process_time()
    result = run()
    return result, time.process_time() - start


def compare_searches(matrices: dict[str, np.ndarray], args: argparse.Namespace) -> None:
    """Print SNR and seconds of one term and of as many as are chosen."""
    rows = []
    for name, A in matrices.items():
        if args.only not in name:
            continue
        for bits in args.bits:
            how = {"bits": bits, "scale_bits": "auto", "effort": args.effort, "threads": 1}
            one, spent = seconds_of(lambda how=how, A=A: factorize(A, terms=1, **how))
            several, more = seconds_of(lambda how=how, A=A: factorize(A, terms="auto", **how))
            gain = several.snr(A) - one.snr(A)
            sizes = ", ".join(str(term.k) for term in several.terms)
            cells = [f"{one.snr(A):.2f} ({spent:.1f})", f"{several.snr(A):.2f} ({more:.1f})"]
            rows.append([name, f"{bits:g}", *cells, f"{gain:+.2f}", sizes])
            print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    head = ["matrix", "bits", "one term, dB (s)", "as chosen, dB (s)", "gain, dB", "k of the terms"]
    table(head, rows)


def random_term(m: int, n: int, k: int, rng: np.random.Generator) -> DiBAFactors:
    """Return one term of random bits and diagonals."""
    b1, b2 = (PackedBits(rng.integers(0, 2, s, dtype=np.uint8)) for s in ((m, k), (k, n)))
    return DiBAFactors(rng.random(m), b1, rng.random(k), b2, rng.random(n))


def compare_products(args: argparse.Namespace) -> None:
    """Print the time of products with T terms over that with a single one of the same k."""
    rng, rows = np.random.default_rng(0), []
    for side in args.sides:
        for count in args.terms:
            k = round(count * side / 2 / 1.0)  # about a bit a weight each
            one = random_term(side, side, k, rng)
            sizes = [k // count + (i < k % count) for i in range(count)]
            several = DiBAFactors.from_terms([random_term(side, side, s, rng) for s in sizes])
            for columns in args.columns:
                shape = (side,) if columns == 1 else (side, columns)
                x = rng.random(shape, dtype=np.float32)
                for f in (one, several):
                    f @ x
                _, once = seconds_of(lambda x=x, f=one: f @ x)
                repeats = max(1, min(200, int(0.02 / max(once, 1e-6))))
                ratios, base = [], []
                for _ in range(args.rounds):
                    spent = []
                    for f in (one, several):
                        _, total = seconds_of(
                            lambda x=x, f=f, count=repeats: [f @ x for _ in range(count)]
                        )
                        spent.append(total / repeats)
                    base.append(spent[0])
                    ratios.append(spent[1] / spent[0])
                cells = [f"{side}²", str(count), str(k), str(columns)]
                rows.append([*cells, f"{1e6 * median(base):.1f}", f"{median(ratios):.3f}"])
                print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    table(["size", "terms", "k", "columns", "one term, µs", "terms / one term"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", action="store_true")
    parser.add_argument("--side", type=int, default=256, help="of the synthetic kinds")
    parser.add_argument("--only", default="", help="matrices whose name contains this")
    parser.add_argument("--bits", type=float, nargs="+", default=[2.0, 3.0, 4.0])
    parser.add_argument("--effort", default="balanced")
    parser.add_argument("--products", action="store_true")
    parser.add_argument("--sides", type=int, nargs="+", default=[384, 1024, 4096])
    parser.add_argument("--terms", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--columns", type=int, nargs="+", default=[1, 4, 64])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--smoke", action="store_true", help="a small case of everything")
    args = parser.parse_args()
    if args.smoke:
        args.bits, args.effort, args.rounds = [3.0], "fast", 1
        args.sides, args.terms, args.columns = [40], [2], [1, 3]
        compare_searches({"Gaussian": np.random.default_rng(0).standard_normal((48, 40))}, args)
        compare_products(args)
        return 0
    if args.products:
        compare_products(args)
        return 0
    factorize(np.random.default_rng(0).normal(size=(70, 60)), bits=3.0, terms=2, threads=1)
    if args.kinds:
        compare_searches(dict(kinds(args.side)), args)
        return 0
    found = {path.stem: np.load(path, allow_pickle=False) for path in sorted(DATA.glob("*.npy"))}
    compare_searches(found, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
