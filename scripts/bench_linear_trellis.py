"""Products of the linear trellis beside those of DiBA at the same bits, one thread, random bits.

python scripts/bench_linear_trellis.py                # the table
python scripts/bench_linear_trellis.py --smoke        # one small size, for the tests
python scripts/bench_linear_trellis.py --rest data/minilm_attention_384x384.npy
                                                      # as a last term on a term of DiBA: dB

Processor time, medians of interleaved calls; 2 bits a weight (DiBA: k = n), of which the linear
trellis codes one of 400 columns at 1.5, as its fits do to pay for scales. "rotated" turns the
inputs, or both sides. Ratios above 1 mean that the linear trellis is faster.
"""

from __future__ import annotations

import argparse
import sys
import time

import numba
import numpy as np

import diba_np as dn
from diba_np import methods
from diba_np.matrix.quality import snr_db
from diba_np.methods.linear_trellis import LinearTrellis
from diba_np.methods.trellis_fit import Coded
from diba_np.methods.trellis_modes import LINEAR_MODES


def random_trellis(
    shape: tuple[int, int], rotation: str, rng: np.random.Generator, bits: int = 2
) -> LinearTrellis:
    """Return a matrix of random paths at so many bits a weight, one of 400 columns at 1.5."""
    m, n = shape
    few = -(-n // 400)
    modes = [(mode.bits, mode.weights) for mode in LINEAR_MODES]
    # (mode, columns), in the order of the modes
    parts = sorted([(modes.index((bits, 1)) + 1, n - few), (modes.index((3, 2)) + 1, few)])
    used = [number for number, _ in parts]
    chosen = np.full(n, [columns for _, columns in parts].index(n - few), np.uint8)
    chosen[rng.choice(n, few, replace=False)] = 1 - chosen[0]
    codes = []
    for number, columns in parts:
        mode = LINEAR_MODES[number - 1]
        size = columns, -(-m // mode.weights)
        codes.append(rng.integers(0, 1 << mode.bits, size).astype(np.uint8))
    return LinearTrellis(shape, Coded(rotation, used, chosen, codes), 0)


def random_factors(n: int, rng: np.random.Generator) -> dn.DiBAFactors:
    """Return an (n, n) factorization of random bits with k = n."""
    first, second = (dn.PackedBits(rng.integers(0, 2, (n, n))) for _ in range(2))
    return dn.DiBAFactors(np.ones(n), first, np.ones(n), second, np.ones(n))


def print_rest(path: str, rates: tuple[float, ...]) -> None:
    """Print the SNR of the linear trellis alone, and on what a term of DiBA leaves over."""
    A = np.load(path).astype(np.float64)
    print("| stored bits | linear trellis | on a term of DiBA at 0.5 bits | at 1 bit |")
    print("|---|---|---|---|")
    first = [dn.factorize(A, bits=bits, effort="fast") for bits in (0.5, 1.0)]
    for bits in rates:
        cells = [f"{methods.fit('linear-trellis', A, bits).snr(A):.2f}"]
        for f in first:
            dense = f.to_dense()
            rest = methods.fit("linear-trellis", A - dense, bits - f.bits_per_weight)
            cells.append(f"{snr_db(A, dense + rest.to_dense()):.2f}")
        print(f"| {bits:g} | {' | '.join(cells)} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--rest", metavar="MATRIX.npy", help="see above")
    args = parser.parse_args()
    if args.rest:
        print_rest(args.rest, (3.0,) if args.smoke else (2.5, 3.0, 4.0))
        return 0
    if args.smoke:
        args.sizes, args.repeats = [64], 3
    numba.set_num_threads(1)
    rng = np.random.default_rng(0)
    print("| size | rotated | product | DiBA µs | linear trellis µs | ratio |")
    print("|---|---|---|---|---|---|")
    for n in args.sizes:
        f = random_factors(n, rng)
        for rotation in ("none", "inputs", "both"):
            g = random_trellis((n, n), rotation, rng)
            for name, b in (("vector", 1), ("transpose", 1), ("64 columns", 64)):
                x = rng.standard_normal((n, b)).astype(np.float32)
                x = x[:, 0] if b == 1 else x
                pair = [one.T if name == "transpose" else one for one in (f, g)]
                times: tuple[list[float], list[float]] = ([], [])
                for one in pair:
                    one @ x
                for _ in range(args.repeats):
                    for one, spent in zip(pair, times, strict=True):
                        start = time.process_time()
                        one @ x
                        spent.append(time.process_time() - start)
                ours, theirs = (1e6 * float(np.median(spent)) for spent in times)
                cells = f"{ours:.0f} | {theirs:.0f} | {ours / theirs:.2f}"
                print(f"| {n}² | {rotation} | {name} | {cells} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
