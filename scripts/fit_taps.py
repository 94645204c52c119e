"""Find the taps of the linear trellis: Viterbi and least squares in turn, on normal samples.

python scripts/fit_taps.py                # every mode; prints `diba_np/methods/taps.py`'s table
python scripts/fit_taps.py --judge        # stored tables on fresh normal samples, in dB
python scripts/fit_taps.py --smoke        # one small mode, for the tests

A mode is (bits a step, weights a step, taps of a bit). From many random starts on few samples the
best go on with more; then small random changes of the best taps are followed by a few rounds each
and stay where the error falls. The same seed gives the same taps.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

from diba_np.kernels.viterbi import trellis_states, viterbi
from diba_np.methods.trellis_modes import LINEAR_MODES, LOOKUP_MODES

# (bits a step, weights a step, taps of a bit)
MODES = [(1, 1, 12), (4, 3, 3), (3, 2, 4), (2, 1, 6)]
MODES += [(5, 2, 3), (3, 1, 4), (7, 2, 2), (4, 1, 3)]


def signs(width: int) -> np.ndarray:
    """Return the signs of the bits of every state, (2^width, width), newest first."""
    states = np.arange(1 << width)[:, None]
    return 2.0 * ((states >> np.arange(width)) & 1) - 1.0


class Samples:
    """Normal samples, and the scratch that encoding them takes.

    Parameters
    ----------
    steps : int
    bits, weights : int
        Of a step.
    width : int
        Bits of a state.
    seed : int
    """

    def __init__(self, steps: int, bits: int, weights: int, width: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.x = rng.standard_normal((steps, weights)).astype(np.float32)
        self.bits, self.width = bits, width
        self.signs = signs(self.width)
        size = 1 << self.width
        self.scratch = (
            np.empty(size, np.float32),
            np.empty(size >> bits, np.float32),
            np.empty((steps, size >> bits), np.uint8),
        )
        self.codes = np.empty(steps, np.uint8)

    def encode(self, table: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the mean squared error under a table (V, 2^width), and the states."""
        table = np.ascontiguousarray(table, np.float32)
        ones = np.ones_like(self.x)
        start = viterbi(self.x, ones, table, self.bits, -1, -1, *self.scratch, self.codes)
        states = np.empty(len(self.x), np.int64)
        trellis_states(self.codes, self.bits, start, self.width, states)
        return float(np.mean((self.x - table[:, states].T) ** 2, dtype=np.float64)), states

    def improve(self, taps: np.ndarray, rounds: int) -> tuple[float, np.ndarray]:
        """Alternate encoding and least squares; return (error, taps) of the best round."""
        best = (np.inf, taps)
        for _ in range(rounds):
            error, states = self.encode(taps @ self.signs.T)
            if error < best[0]:
                best = (error, taps)
            chosen = self.signs[states]
            taps = np.linalg.lstsq(chosen, self.x.astype(np.float64), rcond=None)[0].T
        return best


def fit(mode: tuple[int, int, int], starts: int, steps: int, changes: int) -> np.ndarray:
    """Return the taps of a mode, (V, width)."""
    bits, weights, length = mode
    rng = np.random.default_rng([bits, weights, length])
    few = Samples(max(steps // 8, 256), bits, weights, bits * length, seed=1)
    found = []
    for _ in range(starts):
        taps = rng.standard_normal((weights, bits * length))
        taps *= 1.0 / np.sqrt(np.sum(taps**2, axis=1, keepdims=True))
        found.append(few.improve(taps, 12))
    found.sort(key=lambda item: item[0])
    many = Samples(steps, bits, weights, bits * length, seed=2)
    error, taps = min((many.improve(taps, 12) for _, taps in found[:4]), key=lambda item: item[0])
    for turn in range(changes):
        size = 0.15 * 0.5 ** (4.0 * turn / max(changes, 1))
        change = rng.standard_normal(taps.shape) * size * (rng.random(taps.shape) < 0.5)
        other = many.improve(taps + change, 5)
        if other[0] < error:
            error, taps = other
    return many.improve(taps, 12)[1]


def decibels(table: np.ndarray, bits: int, steps: int) -> float:
    """Return the signal-to-noise ratio on normal samples that no fit has seen."""
    fresh = Samples(steps, bits, len(table), table.shape[1].bit_length() - 1, seed=3)
    error, _ = fresh.encode(table)
    return float(10 * np.log10(np.mean(fresh.x.astype(np.float64) ** 2) / error))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modes", nargs="+", help="as 2,1,6", metavar="B,V,L")
    parser.add_argument("--starts", type=int, default=40)
    parser.add_argument("--steps", type=int, default=16384)
    parser.add_argument("--changes", type=int, default=60)
    parser.add_argument("--judge", action="store_true", help="judge the stored taps instead")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    modes = MODES
    if args.modes:
        modes = [tuple(int(part) for part in text.split(",")) for text in args.modes]
    if args.smoke:
        modes, args.starts, args.steps, args.changes = [(2, 1, 3)], 3, 512, 2
    if args.judge:
        print("| bits a weight | bits, weights a step, bits of a state | look-ups | taps | bound |")
        print("|---|---|---|---|---|")
        for mode in sorted((*LOOKUP_MODES, *LINEAR_MODES), key=lambda m: m.bits / m.weights):
            rate = mode.bits / mode.weights
            value = f"{decibels(mode.table, mode.bits, 8 * args.steps):.2f}"
            cells = ("", value) if mode.linear else (value, "")
            size = f"{mode.bits}, {mode.weights}, {mode.width}"
            print(f"| {rate:.3g} | {size} | {' | '.join(cells)} | {6.0206 * rate:.2f} |")
        return 0
    for mode in modes:
        taps = np.round(fit(mode, args.starts, args.steps, args.changes), 5)
        table = taps @ signs(taps.shape[1]).T
        print(f"    {mode}: (  # {decibels(table, mode[0], 4 * args.steps):.2f} dB")
        for row in taps:
            print("        (")
            for at in range(0, row.size, 6):
                print(f"            {', '.join(f'{value:g}' for value in row[at : at + 6])},")
            print("        ),")
        print("    ),", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
