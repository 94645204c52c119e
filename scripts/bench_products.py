"""Time products of factorizations beside NumPy's dense products, and print a table.

    python scripts/bench_products.py [--threads 2] [--full] [--peers] [--dtype float64] [--json]

Both sides get the same number of threads and take turns within one run: each turn is a pause, an
untimed call and many timed ones. The pause is there because the threads of OpenBLAS and OpenMP go
on spinning for 20-30 ms after a call and would be timed with the other side. A time is the median
over all turns; a ratio is NumPy's time over ours, so below 1 is a loss. Errors are those of the
same operands against float64: of the result's norm, and for 16-bit tables also of the +-1 part.
"limit" is the share of the look-up rate that one thread reaches where the tables stay in L1,
times the threads; "memory" the share of a plain read of as many bytes on as many threads.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

POOLS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")

# m, n, bits a weight (k = bits * m n / (m + n), the diagonals not counted), batch sizes
TARGETS = [
    (384, 1536, 1.0, (1,)),
    (1024, 1024, 1.0, (1,)),
    (4096, 4096, 0.5, (1,)),
    (4096, 4096, 1.0, (1, 8, 16, 64, 512)),
    (4096, 4096, 2.0, (1, 64, 512)),
    (8192, 8192, 1.0, (1,)),
]
FULL = [
    (m, n, bits, (1, 8, 64, 512))
    for m, n in ((384, 1536), (1024, 1024), (4096, 4096), (8192, 8192))
    for bits in (0.5, 1.0, 2.0)
]
SMOKE = [(96, 64, 1.0, (1, 8, 20))]

Side = Callable[[], Any]
Row = dict[str, Any]


def pin(threads: int) -> None:
    """Start this script again with every pool of threads told its size; libraries read it once."""
    wanted = {name: str(threads) for name in POOLS}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | wanted)


class Clock:
    """Takes turns between sides and keeps every time."""

    def __init__(self, rounds: int, seconds: float, pause: float) -> None:
        self.rounds, self.seconds, self.pause = rounds, seconds, pause

    def turn(self, side: Side) -> list[float]:
        time.sleep(self.pause)
        side()
        times: list[float] = []
        spent = 0.0
        while (spent < self.seconds and len(times) < 1000) or len(times) < 3:
            start = time.perf_counter()
            side()
            times.append(time.perf_counter() - start)
            spent += times[-1]
        return times

    def compare(self, sides: dict[str, Side]) -> dict[str, dict[str, float]]:
        """Return median and quartiles of every side, in microseconds."""
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(self.rounds):
            for name, side in sides.items():
                times[name] += self.turn(side)
        told = {}
        for name, seconds in times.items():
            low, middle, high = statistics.quantiles(seconds, n=4)
            told[name] = {"us": 1e6 * middle, "low": 1e6 * low, "high": 1e6 * high}
        return told


# -- one factorization -----------------------------------------------------------------------------


def random_factors(m: int, n: int, bits: float, seed: int = 0) -> Any:
    import numpy as np

    from diba_np import DiBAFactors, PackedBits

    rng = np.random.default_rng(seed)
    k = max(1, round(bits * m * n / (m + n)))

    def binary(rows: int, columns: int) -> PackedBits:
        words = rng.integers(0, 2**64, (rows, -(-columns // 64)), np.uint64)
        if columns % 64:
            words[:, -1] &= np.uint64((1 << columns % 64) - 1)
        return PackedBits.from_words(words, columns)

    d1, d2, d3 = (rng.normal(size=size) for size in (m, k, n))
    return DiBAFactors(d1, binary(m, k), d2, binary(k, n), d3)


def exactly(f: Any, X: Any, shift: float = 0.0) -> Any:
    """``f @ X`` in float64, by blocks of unpacked rows."""
    import numpy as np

    def mix(bits: Any, Z: Any) -> Any:
        parts = [
            (bits[at : at + 512].to_dense() - shift) @ Z for at in range(0, bits.shape[0], 512)
        ]
        return np.concatenate(parts)

    Z = f.d2[:, None] * mix(f.b2, f.d3[:, None] * X.astype(float).reshape(len(X), -1))
    return (f.d1[:, None] * mix(f.b1, Z)).reshape(f.shape[0], *X.shape[1:])


def relative(found: Any, exact: Any, scale: Any) -> float:
    import numpy as np

    return float(np.linalg.norm(found - exact) / np.linalg.norm(scale))


# -- limits of the machine -------------------------------------------------------------------------


class Limits:
    """What this machine can do: look-ups out of cache, and plain reads of memory."""

    def __init__(self, clock: Clock, threads: int) -> None:
        self.clock, self.threads = clock, threads
        self._reads: dict[int, float] = {}
        self._rates: dict[tuple[str, bool], float] = {}

    def weights_per_ns(self, name: str, columns: int) -> float:
        """Weights (times columns) a nanosecond, the tables in L1: one thread times threads."""
        import numba
        import numpy as np

        from diba_np.products.product import Product

        key = (name, columns >= 16)
        if key not in self._rates:
            bits = random_factors(16384, 1, 960 * 16385 / 16384).b1  # 16384 x 960
            path = name.split(maxsplit=1)[0] if name.startswith(("avx2", "portable")) else None
            product = Product(bits, path=path)
            x = np.ones((bits.shape[1], 16 if key[1] else 1), np.float32)
            calls: dict[str, Side] = {
                "16-bit": lambda: product.vector_rounded(x[:, 0]),
                "avx2 16-bit": lambda: product.vector_rounded(x[:, 0]),
                "matrix": lambda: product.matrix(x),
            }
            call = calls.get("matrix" if key[1] else name, lambda: product.vector(x[:, 0]))
            before = numba.get_num_threads()
            numba.set_num_threads(1)
            try:
                us = self.clock.compare({"": call})[""]["low"]
            finally:
                numba.set_num_threads(before)
            size = bits.shape[0] * bits.shape[1] * x.shape[1]
            self._rates[key] = self.threads * size / us / 1e3
        return self._rates[key]

    def gigabytes_per_second(self, size: int) -> float:
        """Rate of reading `size` bytes again and again with all threads."""
        import numba
        import numpy as np

        size = 1 << max(16, size.bit_length())
        if size not in self._reads:

            @numba.njit(fastmath={"reassoc", "nsz"})
            def read_part(part: Any) -> Any:
                total = np.float32(0)
                for i in range(part.size):  # from 0 on, or the loop is not vectorized
                    total += part[i]
                return total

            @numba.njit(parallel=True, fastmath=False)
            def read(data: Any, parts: int, sums: Any) -> None:
                for p in numba.prange(parts):
                    start, stop = data.size * p // parts, data.size * (p + 1) // parts
                    sums[p] = read_part(data[start:stop])

            data = np.ones(size // 4, np.float32)
            sums = np.empty(self.threads, np.float32)
            us = self.clock.compare({"": lambda: read(data, self.threads, sums)})[""]["low"]
            self._reads[size] = size / us / 1e3
        return self._reads[size]

    def report(self) -> dict[str, Any]:
        return {
            "weights_per_ns": {f"{n}{' matrix' * m}": v for (n, m), v in self._rates.items()},
            "read_gb_per_s": {str(size): rate for size, rate in sorted(self._reads.items())},
        }


# -- cases -----------------------------------------------------------------------------------------


def dense_sides(A: Any, X: Any) -> dict[str, Side]:
    """NumPy's product, for matrices in every layout that BLAS may prefer."""
    import numpy as np

    if X.ndim == 1:
        return {"numpy": lambda: A @ X}
    columns, rows = np.asfortranarray(X), np.ascontiguousarray(X.T)
    return {
        "numpy A @ X": lambda: A @ X,
        "numpy A @ X (F)": lambda: A @ columns,
        "numpy X.T @ A.T": lambda: rows @ A.T,
    }


def our_sides(f: Any, X: Any, y: Any, paths: bool) -> Iterator[tuple[str, str, Side, Any]]:
    """(label, name of the kernel, call, operator it stands for)."""
    from diba_np.products.cpu import available_paths, has_rounded, kernel_path
    from diba_np.products.product import Product

    single = X.dtype == "float32"
    yield str(X.dtype), kernel_path() if single else "", lambda: f @ X, (f, X)
    if X.ndim > 1:
        return
    if not single:
        g = f.T
        yield "transpose", "", lambda: g @ y, (g, y)
        return
    if has_rounded():
        yield "16-bit tables", "16-bit", lambda: f.matvec_rounded(X), (f, X)
    g = f.T
    yield "transpose", kernel_path(), lambda: g @ y, (g, y)
    if has_rounded():
        yield "transpose, 16-bit tables", "16-bit", lambda: g.matvec_rounded(y), (g, y)
    for path in available_paths():
        if paths and path != kernel_path():
            product = Product(f.b2, f.b1, d_in=f.d3, d_mid=f.d2, d_out=f.d1, path=path)
            yield f"{path} path", path, lambda p=product: p.vector(X), (f, X)
            if path == "avx2" and has_rounded():
                label = f"{path} path, 16-bit tables"
                yield label, "avx2 16-bit", lambda p=product: p.vector_rounded(X), (f, X)


def run_case(
    case: tuple[int, int, float],
    batch: int,
    clock: Clock,
    limits: Limits,
    peers: bool,
    dtype: str,
) -> list[Row]:
    """Time one matrix at one batch size; a row for each way to do the product."""
    import numpy as np

    m, n, bits = case
    rng = np.random.default_rng(1)
    f = random_factors(m, n, bits)
    A = rng.normal(size=(m, n)).astype(dtype)
    X = rng.normal(size=(n,) if batch == 1 else (n, batch)).astype(dtype)
    y = rng.normal(size=m).astype(dtype)
    ours = list(our_sides(f, X, y, paths=(bits == 1.0 and batch == 1)))
    sides = dense_sides(A, X) | {label: call for label, _, call, _ in ours}
    others = dict(peer_sides(A, X)) if peers else {}
    told = clock.compare(sides | others)
    best = min((told[name] for name in told if name.startswith("numpy")), key=lambda t: t["us"])
    weights = f.k * (m + n) * batch
    rows: list[Row] = []
    about = {"m": m, "n": n, "k": f.k, "bits": bits, "batch": batch}
    dense = {"gb_per_s": A.nbytes / best["us"] / 1e3}
    rows.append(about | {"way": f"numpy {dtype}", **best, "ratio": 1.0, **dense})
    for label, kernel, call, (g, operand) in ours:
        us = told[label]["us"]
        read = g.b1.tiles.nbytes + g.b2.tiles.nbytes
        exact = exactly(g, operand)
        row = about | {"way": label, **told[label], "ratio": best["us"] / us}
        row["error"] = relative(call(), exact, exact)
        if kernel.endswith("16-bit"):
            row["error_of_pm1_part"] = relative(call(), exact, exactly(g, operand, 0.5))
        row["gb_per_s"] = read / us / 1e3
        row["share_of_memory"] = row["gb_per_s"] / limits.gigabytes_per_second(read)
        if kernel:
            row["share_of_lookups"] = weights / us / 1e3 / limits.weights_per_ns(kernel, batch)
        rows.append(row)
    for label in others:
        rows.append(about | {"way": label, **told[label], "ratio": best["us"] / told[label]["us"]})
    return rows


# -- peers -----------------------------------------------------------------------------------------


def peer_sides(A: Any, X: Any) -> Iterator[tuple[str, Side]]:
    """Kernels of other runtimes, where they are installed, on a matrix of the same shape."""
    for maker in (_torch_sides, _onnxruntime_sides):
        try:
            yield from maker(A, X)
        except ImportError:
            continue
        except Exception as error:  # a build without one of the kernels is no reason to stop
            sys.stderr.write(f"{maker.__name__}: left out ({type(error).__name__}: {error})\n")


def _torch_sides(A: Any, X: Any) -> Iterator[tuple[str, Side]]:
    import torch

    torch.set_num_threads(int(os.environ[POOLS[0]]))
    m, n = A.shape
    rows = torch.from_numpy(X.reshape(len(X), -1).T.copy())
    half = rows.bfloat16()
    int8 = torch.randint(-127, 127, (m, n), dtype=torch.int8)
    scale8 = torch.ones(m, dtype=torch.bfloat16)
    yield "torch int8 weights, bf16", lambda: torch._weight_int8pack_mm(half, int8, scale8)
    linear = torch.nn.Sequential(torch.nn.Linear(n, m, bias=False))
    dynamic = torch.ao.quantization.quantize_dynamic(linear, {torch.nn.Linear}, torch.qint8)

    def run_dynamic() -> Any:
        with torch.inference_mode():
            return dynamic(rows)

    yield "torch int8 dynamic", run_dynamic
    group = 128
    int4 = torch.randint(0, 16, (m, n), dtype=torch.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(int4, 1)
    scale4 = torch.ones(n // group, m, 2, dtype=torch.bfloat16)
    yield (
        "torch int4 weights, bf16",
        lambda: torch._weight_int4pack_mm_for_cpu(half, packed, group, scale4),
    )


def _onnxruntime_sides(A: Any, X: Any) -> Iterator[tuple[str, Side]]:
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    m, n = A.shape
    rows = np.ascontiguousarray(X.reshape(len(X), -1).T)
    rng = np.random.default_rng(0)
    block = 128
    blocks = -(-n // block)
    for bits, level, activations in ((4, 1, "float32"), (4, 4, "int8"), (2, 4, "int8")):
        packed = rng.integers(0, 256, (m, blocks, block * bits // 8), np.uint8)
        scales = np.ones(m * blocks, np.float32)
        told = {"K": n, "N": m, "bits": bits, "block_size": block, "accuracy_level": level}
        node = helper.make_node(
            "MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft", **told
        )
        graph = helper.make_graph(
            [node],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows.shape[0], n])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows.shape[0], m])],
            [numpy_helper.from_array(packed, "b"), numpy_helper.from_array(scales, "s")],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ[POOLS[0]])
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        feed = {"x": rows}
        label = f"onnxruntime MatMulNBits {bits} bit, {activations}"
        yield label, lambda s=session, feed=feed: s.run(None, feed)


# -- first use -------------------------------------------------------------------------------------

FIRST = """
import time; start = time.perf_counter()
import diba_np
imported = time.perf_counter()
import numpy as np
bits = diba_np.PackedBits.from_words(np.zeros((1024, 16), np.uint64), 1024)
ones = np.ones(1024, np.float32)
f = diba_np.DiBAFactors(ones, bits, ones, bits, ones)
ready = time.perf_counter()
f @ ones
first = time.perf_counter()
f @ ones
second = time.perf_counter()
print(imported - start, ready - imported, first - ready, first - start, second - first)
"""


def first_use(repeats: int) -> dict[str, float]:
    """Seconds that a fresh process takes to its first product, compiled code in the cache."""
    names = ("import", "construction", "first_product", "process_to_first_product", "second")
    runs = []
    for _ in range(repeats + 1):
        out = subprocess.run(
            [sys.executable, "-c", FIRST], capture_output=True, text=True, check=True
        ).stdout
        runs.append([float(value) for value in out.split()])
    medians = [statistics.median(values) for values in zip(*runs[1:], strict=True)]
    return dict(zip(names, medians, strict=True))


def threading_layer() -> str | None:
    """What Numba's parallel kernels ran on, None where none ran."""
    import numba

    try:
        return str(numba.threading_layer())
    except ValueError:
        return None


def cold_compilation() -> float:
    """Seconds of ``diba-np warmup`` with an empty cache."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        out = subprocess.run(
            [sys.executable, "-m", "diba_np", "warmup", "--json"],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"NUMBA_CACHE_DIR": folder},
        ).stdout
    return float(json.loads(out)["seconds"])


# -- report ----------------------------------------------------------------------------------------

HEAD = "| matrix | bits | batch | product | us | x NumPy | error | GB/s | memory | limit |"


def line(row: Row) -> str:
    """One row of the table; a cell that was not measured stays empty."""

    def cell(name: str, form: str) -> str:
        return format(row[name], form) if name in row else ""

    error = cell("error", ".0e")
    if "error_of_pm1_part" in row:
        error += f" ({row['error_of_pm1_part']:.0e} of +-1)"
    cells = [
        f"{row['m']} x {row['n']}",
        f"{row['bits']:g}",
        str(row["batch"]),
        row["way"],
        f"{row['us']:.3g}" if row["us"] < 1000 else f"{row['us']:.0f}",
        f"{row['ratio']:.2f}",
        error,
        cell("gb_per_s", ".0f"),
        cell("share_of_memory", ".0%"),
        cell("share_of_lookups", ".0%"),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side")
    parser.add_argument("--only", default="", help="cases whose name holds this: 4096x4096")
    parser.add_argument("--full", action="store_true", help="every size at every bits and batch")
    parser.add_argument("--peers", action="store_true", help="torch and onnxruntime too")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--cold", action="store_true", help="time compilation without a cache")
    parser.add_argument("--smoke", action="store_true", help="one tiny case, a second")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    cases = [
        ((m, n, bits), batch)
        for m, n, bits, batches in (SMOKE if args.smoke else FULL if args.full else TARGETS)
        for batch in batches
        if args.only in f"{m}x{n} {bits:g} {batch}"
    ]
    if not cases:
        parser.error(
            f"no case holds {args.only!r}; one is called '4096x4096 1 64': size bits batch"
        )
    pin(args.threads)

    import numpy as np

    from diba_np.machine.versions import versions
    from diba_np.products.cpu import kernel_path

    clock = Clock(2, 0.0, 0.0) if args.smoke else Clock(args.rounds, 0.08, 0.06)
    limits = Limits(clock, args.threads)
    load = os.getloadavg()[0]
    if load > 1 and not args.smoke:
        sys.stderr.write(
            f"the machine is busy (load {load:.1f}): threads that spin lose time slices, NumPy's "
            "longer calls more than ours, so the ratios say little\n"
        )
    if "OPENBLAS_CORETYPE" in os.environ:
        sys.stderr.write(
            "OPENBLAS_CORETYPE is set: NumPy may not use all that this CPU has, which flatters the "
            "ratios of matrices\n"
        )
    if not args.json:
        print(
            f"{platform.machine()}, {args.threads} threads, {kernel_path()} path, load {load:.1f}"
        )
        print(", ".join(f"{name} {version}" for name, version in versions().items()), "\n")
        print(HEAD + "\n" + "|---|" + "--:|" * 9)
    rows: list[Row] = []
    for case, batch in cases:
        made = run_case(case, batch, clock, limits, args.peers, args.dtype)
        rows += made
        if not args.json:
            print("\n".join(map(line, made)), flush=True)
    report = {
        "threads": args.threads,
        "path": kernel_path(),
        "load": [load, os.getloadavg()[0]],
        "machine": platform.machine(),
        "blas": np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"],  # type: ignore[index]
        "blas_core": os.environ.get("OPENBLAS_CORETYPE", "detected"),
        "threading_layer": threading_layer(),
        "versions": versions(),
        "limits": limits.report(),
        "first_use_s": first_use(1 if args.smoke else 5),
        "rows": rows,
    }
    if args.cold:
        report["cold_compilation_s"] = cold_compilation()
    if args.json:
        print(json.dumps(report))
        return
    print("\nread, GB/s by bytes:", report["limits"]["read_gb_per_s"])
    print("look-ups, weights a ns:", report["limits"]["weights_per_ns"])
    print("first use, s:", report["first_use_s"])
    if args.cold:
        print("compilation without a cache, s:", report["cold_compilation_s"])


if __name__ == "__main__":
    main()
