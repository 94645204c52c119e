"""Peak memory of `factorize` on matrices that are read in row blocks, against its promise.

A matrix is written to a `.npy` file, mapped and factorized. Memory is what the process allocates
beyond the start: the highest anonymous resident memory (pages of the mapped file are not the
process's own, the system drops them as it likes), and the highest sum of NumPy's and Python's
allocations (tracemalloc). The promise is three float32 arrays of ``k (m + n)`` and of one block.

    python scripts/bench_large.py                      # both examples, seconds of the whole job
    python scripts/bench_large.py --sweeps 2           # memory only: two iterations, one round
    python scripts/bench_large.py --smoke
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from diba_np.files.checkpoint import Checkpoint
from diba_np.search.factorization import _entries, factorize
from diba_np.search.progress import SearchState

EXAMPLES = {"embedding": (30522, 384), "large": (16384, 4096)}
BITS = 1.0


def anonymous_bytes() -> int:
    """Return the process's own resident memory, that of mapped files not counted; Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("needs /proc/self/status with RssAnon, as Linux has it")


class Peak:
    """The highest `anonymous_bytes` while it is open, sampled every 5 ms."""

    def __enter__(self) -> Peak:
        self.start = self.highest = anonymous_bytes()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.005):
            self.highest = max(self.highest, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


class Timed(Checkpoint):
    """A checkpoint that counts its writes."""

    def __init__(self, path: Path, every: float) -> None:
        super().__init__(path, every)
        self.writes, self.seconds, self.bytes = 0, 0.0, 0

    def write(self, state: Any) -> None:
        began = time.perf_counter()
        super().write(state)
        self.seconds += time.perf_counter() - began
        self.writes += 1
        self.bytes = max(self.bytes, self.path.stat().st_size)


class Steps:
    """A callback: the seconds of an iteration and of a round; ends after a round if told so."""

    def __init__(self, short: bool) -> None:
        self.short = short
        self.at: dict[str, list[float]] = {}

    def __call__(self, seen: SearchState) -> bool:
        self.at.setdefault(seen.phase, []).append(seen.seconds)
        return self.short and seen.phase == "polish" and seen.step == 1

    def seconds(self, phase: str) -> float:
        times = self.at.get(phase, [])
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else float("nan")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Factorize a mapped matrix in this process and return the figures."""
    rng = np.random.default_rng(0)
    warm = rng.normal(size=(200, 100)).astype(np.float32)
    factorize(warm, bits=BITS, block_rows=64)  # kernels are compiled or loaded
    A = np.load(args.matrix, mmap_mode="r")
    steps = Steps(args.sweeps is not None)
    options: dict[str, Any] = {"max_sweeps": args.sweeps, "effort": args.effort, "callback": steps}
    if args.every:
        options["checkpoint"] = Timed(args.matrix.with_suffix(".ckpt"), args.every)
    if args.traced:
        tracemalloc.start()
    began = time.perf_counter()
    with Peak() as peak, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        f = factorize(A, bits=BITS, block_rows=args.block_rows, **options)
    seconds = time.perf_counter() - began
    m, n = f.shape
    block = min(_entries(A, args.block_rows) or 0, A.size)
    promise = 4 * 3 * (f.k * (m + n) + block)
    used = tracemalloc.get_traced_memory()[1] if args.traced else peak.highest - peak.start
    kept: dict[str, Any] = {}
    if args.every:
        keeper = options["checkpoint"]
        kept = {
            "writes": keeper.writes,
            "MB a write": keeper.bytes / 1e6,
            "s a write": keeper.seconds / max(keeper.writes, 1),
        }
        keeper.remove()
    return {
        "shape": f"{m} x {n}",
        "k": f.k,
        "block rows": -(-block // n),
        "peak MB": used / 1e6,
        "promise MB": promise / 1e6,
        "share": used / promise,
        "SNR dB": f.record["snr_db"],
        "s": seconds,
        "s an iteration": steps.seconds("relaxation"),
        "s a round": steps.seconds("polish"),
        **kept,
    }


def run_apart(args: list[str]) -> dict[str, Any]:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--child", *args]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def write_matrix(path: Path, shape: tuple[int, int]) -> None:
    """Write a matrix of that shape, of low rank with noise, in row blocks."""
    rng = np.random.default_rng(1)
    m, n = shape
    right = rng.normal(size=(32, n)).astype(np.float32) / np.float32(8)
    A = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    for at in range(0, m, 1024):
        rows = A[at : at + 1024]
        rows[:] = rng.standard_normal(rows.shape, dtype=np.float32)
        rows += rng.standard_normal((len(rows), 32), dtype=np.float32) @ right
    A.flush()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", choices=EXAMPLES)
    parser.add_argument("--matrix", type=Path, help="a .npy file instead of the examples")
    parser.add_argument("--block-rows", type=int)
    parser.add_argument("--effort", default="balanced")
    parser.add_argument("--sweeps", type=int, help="iterations; the polish is ended after a round")
    parser.add_argument("--every", type=float, help="seconds between checkpoints; without none")
    parser.add_argument("--traced", action="store_true", help="tracemalloc in place of pages")
    parser.add_argument("--smoke", action="store_true", help="a small matrix")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args)))
        return
    shapes = {"smoke": (900, 128)} if args.smoke else EXAMPLES
    if args.only:
        shapes = {args.only: EXAMPLES[args.only]}
    if args.smoke:
        args.traced, args.sweeps, args.every, args.block_rows = True, 3, 1e-3, 64
    header = None
    with tempfile.TemporaryDirectory() as folder:
        paths = [args.matrix] if args.matrix else [Path(folder) / f"{name}.npy" for name in shapes]
        for path in paths:
            if not args.matrix:
                write_matrix(path, shapes[path.stem])
            options = ["--matrix", str(path), "--effort", args.effort]
            for name in ("block_rows", "sweeps", "every"):
                if getattr(args, name) is not None:
                    options += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
            row = run_apart([*options, *(["--traced"] if args.traced else [])])
            if header is None:
                header = list(row)
                print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
            cells = (f"{v:.3g}" if isinstance(v, float) and v < 10 else v for v in row.values())
            cells = (f"{v:.0f}" if isinstance(v, float) else str(v) for v in cells)
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
