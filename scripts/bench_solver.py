"""The solver beside its peer at equal stored bits, every scale counted; one thread.

python scripts/bench_solver.py                                  # the three matrices in data/
python scripts/bench_solver.py --weights minilm --seeds 3       # all 39 MiniLM weights
python scripts/bench_solver.py --weights FOLDER                 # every .npy there, 256 and up
python scripts/bench_solver.py --kinds                          # Gaussian, Toeplitz, DCT, ...
python scripts/bench_solver.py --coupled                        # seconds with a Gram matrix
python scripts/bench_solver.py --ranks 0.125 0.25 1             # its half step, exact in a share
python scripts/bench_solver.py --sizes 384 1024 2048 4096       # time against size, 1 bit
python scripts/bench_solver.py --threads 1 2 --sizes 2048       # wall time by threads, 1 bit

The peer is double binary factorization, 260 iterations, 16-bit scales (`diba_np.methods.dbf`).
Ours has `scale_bits="auto"` and `terms="auto"` unless told otherwise. Seconds are of the processor,
without compilation; a peer and what it is compared with take turns. `--cache FILE` keeps every run
as a line of JSON, so that a run that was ended goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from sources import MINILM, read_arrays

import diba_np
from diba_np import factorize
from diba_np.machine.process_pool import ProcessPool
from diba_np.matrix.quality import snr_db
from diba_np.methods.dbf import dbf
from diba_np.search import coupled

DATA = Path(__file__).resolve().parent.parent / "data"
LEAST_SIDE = 256
MOST_ROWS = 1536  # larger matrices are cut into row blocks
EFFORTS = ("fast", "balanced", "best")

# what the results depend on; a cached run of other code is not used
SOURCES = ("search/*.py", "kernels/*.py", "matrix/*.py", "methods/dbf.py", "machine/*.py")

Matrices = Iterator[tuple[str, np.ndarray]]


# -- matrices --------------------------------------------------------------------------------------


def weights(source: str | None, blocks: int) -> Matrices:
    """Yield (name, matrix) of data/, of a folder of .npy files, or of the MiniLM package."""
    if source == "minilm":
        tensors = read_arrays(MINILM, "model/model.safetensors")
    else:
        folder = DATA if source is None else Path(source)
        tensors = {p.stem: np.load(p, allow_pickle=False) for p in sorted(folder.glob("*.npy"))}
    for name, tensor in sorted(tensors.items()):
        if tensor.ndim == 2 and min(tensor.shape) >= LEAST_SIDE and tensor.dtype.kind == "f":
            rows = len(tensor)
            if rows <= MOST_ROWS:
                yield name, np.ascontiguousarray(tensor, np.float32)
                continue
            for b in range(blocks):
                start = b * (rows - MOST_ROWS) // max(blocks - 1, 1)
                part = tensor[start : start + MOST_ROWS]
                yield f"{name}[{start}:]", np.ascontiguousarray(part, np.float32)


def kinds(n: int = 256) -> Matrices:
    """Yield (name, matrix) of several synthetic kinds, the same at every call."""
    rng = np.random.default_rng(5)
    i = np.arange(n)
    yield "Gaussian", rng.standard_normal((n, n))
    yield "Toeplitz 0.9^d", 0.9 ** abs(i[:, None] - i)
    yield "Toeplitz, random", rng.standard_normal(2 * n - 1)[i[:, None] - i + n - 1]
    yield "DCT", np.cos(np.pi * (i[None] + 0.5) * i[:, None] / n) * np.sqrt(2 / n)
    turned = np.linalg.qr(rng.standard_normal((n, n)))[0]
    X = rng.standard_normal((2 * n, n)) * (i + 1.0) ** -0.5 @ turned
    yield "covariance", X.T @ X / len(X)
    low = rng.standard_normal((n, 16)) @ rng.standard_normal((16, n))
    yield "rank 16 + noise", low + 0.5 * rng.standard_normal((n, n))
    yield "sparse, 5 %", rng.standard_normal((n, n)) * (rng.random((n, n)) < 0.05)
    y, x = np.meshgrid(np.linspace(-1, 1, n), np.linspace(-1, 1, n))
    image = 128 + 40 * np.sin(3 * x + 2 * y * y) + 60 * (x**2 + y**2 < 0.4)
    yield "image", image - 50 * (abs(x - 0.3) < 0.1) + 5 * rng.standard_normal((n, n))
    rows, columns = (np.exp(1.5 * rng.standard_normal(s)) for s in ((n, 1), n))
    yield "scaled rows and columns", rng.standard_normal((n, n)) * rows * columns
    yield "mean 5", 5 + rng.standard_normal((n, n))
    outlier = rng.standard_normal((n, n))
    outlier[n // 3, n // 5] = 1e4
    yield "one entry of 10,000", outlier


# -- methods ---------------------------------------------------------------------------------------


def sign(A: np.ndarray) -> float:
    """SNR of the sign of each entry with a scale a row: 1 bit and 16 a row."""
    return snr_db(A, np.sign(A) * np.abs(A).mean(axis=1, keepdims=True))


def svd(A: np.ndarray, bits: float) -> float:
    """SNR of the truncated SVD with 16-bit factors at that many bits per weight."""
    m, n = A.shape
    rank = int(bits * m * n / (16 * (m + n)))
    U, s, Vt = np.linalg.svd(A.astype(np.float64), full_matrices=False)
    root = np.sqrt(s[:rank])
    left, right = ((U[:, :rank] * root).astype(np.float16), (root[:, None] * Vt[:rank]))
    return snr_db(A, left.astype(np.float64) @ right.astype(np.float16).astype(np.float64))


def code_version() -> str:
    """Return eight digits that change with the code of the solver."""
    package = Path(diba_np.__file__).parent
    found = {pattern: sorted(package.glob(pattern)) for pattern in SOURCES}
    for pattern, files in found.items():
        if not files:
            raise FileNotFoundError(f"{package / pattern}: no such file; SOURCES is out of date")
    read = (path.read_bytes() for files in found.values() for path in files)
    return hashlib.sha256(b"".join(read)).hexdigest()[:8]


class Runs:
    """Runs methods and keeps what came out, in a file if there is one."""

    def __init__(self, cache: str | None, scale_bits: str = "auto", terms: str = "auto") -> None:
        self.version = code_version()
        self.scale_bits: int | str = int(scale_bits) if scale_bits.isdigit() else scale_bits
        self.terms: int | str = int(terms) if terms.isdigit() else terms
        self.path = Path(cache) if cache else None
        self.known: dict[str, dict[str, Any]] = {}
        if self.path and self.path.exists():
            for line in self.path.read_text().splitlines():
                row = json.loads(line)
                self.known[row["key"]] = row

    def get(self, key: tuple[Any, ...], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        label = " | ".join(map(str, (*key, self.version)))
        if label not in self.known:
            started = time.process_time()
            row = {"key": label, **run()}
            row["seconds"] = round(time.process_time() - started, 3)
            self.known[label] = row
            if self.path:
                with open(self.path, "a") as file:
                    file.write(json.dumps(row) + "\n")
            print(json.dumps(row), file=sys.stderr, flush=True)
        return self.known[label]


def result(f: Any, A: np.ndarray) -> dict[str, Any]:
    widths = [term.scale_bits for term in f.terms]
    stored = widths[0] if len(widths) == 1 else widths
    return {"k": f.k, "scale_bits": stored, "snr": round(f.snr(A), 4)}


def search(
    runs: Runs, name: str, A: np.ndarray, bits: float, method: str, shift: float, seeds: int
) -> dict[str, float]:
    """Return the medians over the seeds of SNR and seconds of one method."""
    rows = []
    for seed in range(seeds):

        def run(seed: int = seed) -> dict[str, Any]:
            if method == "peer":
                return result(dbf(A, bits=bits, seed=seed, threads=1), A)
            f = factorize(
                A,
                bits=bits,
                shift=shift,
                effort=method,
                scale_bits=runs.scale_bits,
                terms=runs.terms,
                seed=seed,
                threads=1,
            )
            return result(f, A)

        told: tuple[Any, ...] = ()
        if method != "peer":
            told += () if runs.scale_bits == "auto" else (runs.scale_bits,)
            told += () if runs.terms == "auto" else (f"terms {runs.terms}",)
        rows.append(runs.get((name, A.shape, bits, method, shift, seed, *told), run))
    return {each: median(row[each] for row in rows) for each in ("snr", "seconds")}


def warm_up() -> None:
    """Compile, so that no run pays for it."""
    A = np.random.default_rng(0).standard_normal((40, 40))
    dbf(A, k=10, outer=3, threads=1)
    for gram in (None, drawn_gram(40)):
        factorize(A, k=10, gram=gram, effort="fast", scale_bits="auto", threads=1)


# -- tables ----------------------------------------------------------------------------------------


def table(header: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def compare(runs: Runs, matrices: list[tuple[str, np.ndarray]], args: argparse.Namespace) -> None:
    """Print each matrix's gain over the peer, and the mean and least of all."""
    columns = [(e, s) for s in args.shifts for e in args.efforts]
    titles = [f"{e}, {'0/1' if s == 0 else '±1' if s == 0.5 else s}" for e, s in columns]
    rows, gains, times = [], {}, {}
    for bits in args.bits:
        for name, A in matrices:
            peer = search(runs, name, A, bits, "peer", 0.5, args.seeds)
            cells = []
            for effort, shift in columns:
                own = search(runs, name, A, bits, effort, shift, args.seeds)
                gain = own["snr"] - peer["snr"]
                gains.setdefault((bits, effort, shift), []).append(gain)
                ratio = own["seconds"] / max(peer["seconds"], 1e-9)
                times.setdefault((bits, effort, shift), []).append(ratio)
                cells.append(f"{own['snr']:.3f} ({gain:+.3f}, {own['seconds']:.1f} s)")
            size = f"{A.shape[0]} × {A.shape[1]}"
            told = f"{peer['snr']:.3f} ({peer['seconds']:.1f} s)"
            rows.append([name, size, f"{bits:g}", told, *cells])
    if not args.summary:
        table(["matrix", "size", "bits", "peer", *titles], rows)
    summary = [
        [
            f"{bits:g}",
            title,
            str(len(gains[bits, e, s])),
            f"{mean(gains[bits, e, s]):+.3f}",
            f"{min(gains[bits, e, s]):+.3f}",
            f"{median(times[bits, e, s]):.2f}",
        ]
        for bits in args.bits
        for title, (e, s) in zip(titles, columns, strict=True)
    ]
    head = ["bits", "effort, alphabet", "matrices", "mean gain, dB", "least", "time / peer's"]
    table(head, summary)


def compare_kinds(runs: Runs, args: argparse.Namespace) -> None:
    """Print every kind beside the peer, the sign with a scale a row and the truncated SVD."""
    rows = []
    for bits in args.bits:
        for name, A in kinds(args.side):
            if args.only not in name:
                continue
            cells = [f"{search(runs, name, A, bits, 'peer', 0.5, args.seeds)['snr']:.2f}"]
            cells += [
                f"{search(runs, name, A, bits, effort, shift, args.seeds)['snr']:.2f}"
                for shift in args.shifts
                for effort in args.efforts
            ]
            by_sign = f"{sign(A):.2f}" if bits >= 1 else ""
            rows.append([name, f"{bits:g}", *cells, by_sign, f"{svd(A, bits):.2f}"])
    titles = [f"{e}, {'0/1' if s == 0 else '±1'}" for s in args.shifts for e in args.efforts]
    table(["kind", "bits", "peer", *titles, "sign × row scale", "SVD, 16 bits"], rows)


def drawn_gram(n: int) -> np.ndarray:
    """Return the Gram matrix of drawn inputs whose spectrum falls, (n, n)."""
    X = np.random.default_rng(0).standard_normal((4 * n, n))
    X *= np.arange(1, n + 1) ** -0.5
    gram: np.ndarray = X.T @ X / len(X)
    return gram


def compare_ranks(matrices: list[tuple[str, np.ndarray]], args: argparse.Namespace) -> None:
    """Print the output SNR and seconds by the share of directions that a half step is exact in."""
    rows, usual = [], coupled.RANK
    for bits in args.bits:
        for name, A in matrices:
            for effort in args.efforts:
                cells = []
                for share in args.ranks:
                    start = time.process_time()
                    coupled.RANK = share
                    try:
                        gram = drawn_gram(A.shape[1])
                        f = factorize(A, bits=bits, gram=gram, effort=effort, threads=1)
                    finally:
                        coupled.RANK = usual
                    seconds = time.process_time() - start
                    cells.append(f"{f.record['output_snr_db']:.2f} ({seconds:.1f})")
                rows.append([name, f"{bits:g}", effort, *cells])
    table(["matrix", "bits", "effort", *(f"{share:g}, dB (s)" for share in args.ranks)], rows)


def compare_coupled(matrices: list[tuple[str, np.ndarray]], args: argparse.Namespace) -> None:
    """Print processor seconds of fits with a Gram matrix of drawn inputs beside those without."""
    rows = []
    for bits in args.bits:
        for name, A in matrices:
            for W in (A, A.T) if A.shape[0] != A.shape[1] else (A,):
                for effort in args.efforts:
                    seconds = []
                    for gram in (None, drawn_gram(W.shape[1])):
                        start = time.process_time()
                        factorize(W, bits=bits, gram=gram, effort=effort, threads=1)
                        seconds.append(time.process_time() - start)
                    m, n = W.shape
                    cells = [f"{s:.1f}" for s in seconds] + [f"{seconds[1] / seconds[0]:.2f}"]
                    rows.append([name, f"{m} × {n}", f"{bits:g}", effort, *cells])
    table(["matrix", "size", "bits", "effort", "plain s", "with a Gram matrix s", "ratio"], rows)


def compare_sizes(runs: Runs, args: argparse.Namespace) -> None:
    """Print seconds and memory against size at one bit; sizes in ascending order.

    Memory is the most that the process has held so far, Python and the compiler included.
    """
    rows = []
    for side in sorted(args.sizes):
        A = np.random.default_rng(side).standard_normal((side, side)).astype(np.float32)
        for effort in args.efforts:

            def run(A: np.ndarray = A, effort: str = effort) -> dict[str, Any]:
                f = factorize(A, bits=1.0, effort=effort, scale_bits="auto", threads=1)
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
                return {**result(f, A), "gib": round(peak, 2)}

            own = runs.get(("size", side, effort), run)
            # all that grows fastest, products and inverses, grows with the cube of the side
            each = own["seconds"] / (side / 1000) ** 3
            cells = [f"{own['seconds']:.1f}", f"{each:.1f}", f"{own['gib']:.2f}"]
            rows.append([f"{side} × {side}", str(own["k"]), effort, *cells, f"{own['snr']:.2f}"])
    each = "seconds / (side / 1000)³"
    table(["size", "k", "effort", "seconds", each, "peak GiB", "SNR, dB"], rows)


def one_search(side: int, effort: str, threads: int) -> tuple[float, float]:
    """Return wall and processor seconds of a search at one bit, compiled before."""
    A = np.random.default_rng(side).standard_normal((side, side)).astype(np.float32)
    factorize(A[:64, :64], bits=1.0, effort=effort, threads=threads)
    wall, cpu = time.perf_counter(), time.process_time()
    factorize(A, bits=1.0, effort=effort, threads=threads)
    return time.perf_counter() - wall, time.process_time() - cpu


def compare_threads(args: argparse.Namespace) -> None:
    """Print wall time by the number of threads at one bit, in turns; the machine should be idle.

    In the last line as many processes search at once, on a thread each: what the machine gives.
    """
    rows = []
    most = max(args.threads)
    pool = ProcessPool(most, 1)
    for side in sorted(args.sizes):
        for effort in args.efforts:
            spent: dict[str, list[tuple[float, float]]] = {}
            for _ in range(args.seeds):
                for count in args.threads:
                    found = spent.setdefault(f"{count}", [])
                    found.append(one_search(side, effort, count))
                made = pool.run(one_search, [(side, effort, 1)] * most, lambda each: each)
                spent.setdefault(f"{most} processes", []).extend(each for _, each in made)
            first = median(wall for wall, _ in spent[f"{args.threads[0]}"])
            for name, found in spent.items():
                wall, cpu = (median(each) for each in zip(*found, strict=True))
                done = most if "processes" in name else 1
                cells = [f"{wall:.1f}", f"{cpu:.1f}", f"{done * first / wall:.2f}"]
                rows.append([f"{side} × {side}", effort, name, *cells])
    pool.end()
    table(["size", "effort", "threads", "wall s", "processor s", "speed"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", metavar="FOLDER|minilm")
    parser.add_argument("--only", default="", help="matrices whose name contains this")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="each N-th matrix only")
    parser.add_argument("--blocks", type=int, default=2, help="row blocks of a tall matrix")
    parser.add_argument("--kinds", action="store_true")
    parser.add_argument("--coupled", action="store_true", help="seconds with a Gram matrix")
    parser.add_argument(
        "--ranks", type=float, nargs="+", metavar="SHARE", help="exact directions of a half step"
    )
    parser.add_argument("--side", type=int, default=256, help="of the synthetic kinds")
    parser.add_argument("--sizes", type=int, nargs="+", metavar="SIDE")
    parser.add_argument("--threads", type=int, nargs="+", help="with --sizes, --seeds for repeats")
    parser.add_argument("--bits", type=float, nargs="+", default=[0.5, 1.0, 2.0])
    parser.add_argument("--efforts", nargs="+", choices=EFFORTS, default=["fast", "balanced"])
    parser.add_argument("--shifts", type=float, nargs="+", default=[0.0, 0.5])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--scale-bits", default="auto", help="of our diagonals: auto, 16, 2 to 8")
    parser.add_argument("--terms", default="auto", help="of ours that are summed: auto, 1, 2, ...")
    parser.add_argument("--summary", action="store_true", help="only means and least gains")
    parser.add_argument("--cache", metavar="FILE")
    parser.add_argument("--smoke", action="store_true", help="a small case of everything")
    args = parser.parse_args()
    runs = Runs(args.cache, args.scale_bits, args.terms)
    if args.smoke:
        args.bits, args.efforts, args.side, args.sizes = [2.0], ["fast"], 40, [48]
        rng = np.random.default_rng(0)
        compare(runs, [("Gaussian", rng.standard_normal((48, 40)))], args)
        compare_coupled([("Gaussian", rng.standard_normal((48, 40)))], args)
        args.ranks = [0.125, 1.0]
        compare_ranks([("Gaussian", rng.standard_normal((48, 40)))], args)
        compare_kinds(runs, args)
        compare_sizes(runs, args)
        args.threads = [1, 2]
        compare_threads(args)
        return 0
    warm_up()
    if args.kinds:
        compare_kinds(runs, args)
    if args.sizes and args.threads:
        compare_threads(args)
    elif args.sizes:
        compare_sizes(runs, args)
    if not args.kinds and not args.sizes:
        found = [(n, A) for n, A in weights(args.weights, args.blocks) if args.only in n]
        if args.ranks:
            compare_ranks(found[:: args.every], args)
        elif args.coupled:
            compare_coupled(found[:: args.every], args)
        else:
            compare(runs, found[:: args.every], args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
