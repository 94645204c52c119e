"""SNR against storage ratio for 40 real matrices: text, chemistry, speech, vision.

python scripts/study_matrices.py --plot data/study_matrices.png    # the table and the figure
python scripts/study_matrices.py --smoke                           # three corners, no download

The first experiment of the DiBA paper (arXiv 2605.05994). Strict 0/1, 16-bit diagonals, every
stored bit counted, float32 dense = 1. Convolutions are taken as (out, in x kernel). The exit code
is 1 if for any matrix the SNR does not rise strictly with the ratio. Rows are kept as they come:
an ended run goes on.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from results import Results
from sources import (
    HANDWRITING,
    MINILM,
    RAPIDOCR,
    RXNFP,
    SILERO,
    read_arrays,
)

import diba_np as dn

DATA = Path(__file__).resolve().parent.parent / "data"

RATIOS = (64, 32, 16, 8)  # 1 / ratio

Tensors = Mapping[str, np.ndarray]

# the colours of the categories, told apart also by who sees few colours
COLOURS = {"text": "#0072B2", "chemistry": "#D55E00", "speech": "#009E73", "vision": "#CC79A7"}


def _bert(at: str, layer: int) -> list[str]:
    parts = ("attention.self.query", "attention.self.value", "attention.output.dense")
    ends = (*parts, "intermediate.dense", "output.dense")
    return [f"{at}encoder.layer.{layer}.{end}.weight" for end in ends]


@functools.cache
def _read(kind: str) -> Tensors:
    """Return the tensors of one model."""
    if kind == "minilm":
        return read_arrays(MINILM, "model/model.safetensors")
    if kind == "rxnfp":
        return read_arrays(RXNFP, "bert_pretrained/pytorch_model.bin")
    if kind == "silero":
        return read_arrays(SILERO, "data/silero_vad_16k.safetensors")
    if kind == "handwriting":
        return read_arrays(HANDWRITING, "models/handwriting_model.pth")
    return read_arrays(RAPIDOCR, f"models/{kind}_infer.onnx")


def _largest(kind: str, count: int) -> list[str]:
    """Names of the largest matrices of an ONNX model, most entries first, one of a shape twice.

    Those with more than 2^20 entries, word lists mostly, and depthwise kernels are left out.
    """
    names, shapes = [], []
    tensors = {n: a for n, a in _read(kind).items() if a.ndim >= 2 and a.dtype.kind == "f"}
    for name in sorted(tensors, key=lambda n: (-tensors[n].size, n)):
        shape = as_matrix(tensors[name]).shape
        if min(shape) >= 64 and tensors[name].size <= 1 << 20 and shapes.count(shape) < 2:
            names.append(name)
            shapes.append(shape)
    return names[:count]


def as_matrix(tensor: np.ndarray) -> np.ndarray:
    """Return (out, everything else) of a weight, float32."""
    return np.ascontiguousarray(tensor.reshape(len(tensor), -1), np.float32)


def choose() -> list[tuple[str, str, str]]:
    """Return (category, model, tensor) of the 40 matrices."""
    speech = ["lstm_cell.weight_ih", "lstm_cell.weight_hh"] + [
        f"conv{i}.weight" for i in range(1, 5)
    ]
    return [
        *(("text", "minilm", name) for layer in (0, 3) for name in _bert("", layer)),
        *(("chemistry", "rxnfp", name) for layer in (0, 6) for name in _bert("bert.", layer)),
        *(("speech", "silero", name) for name in speech),
        ("vision", "handwriting", "fc_layers.0.weight"),
        ("vision", "handwriting", "conv_layers.6.weight"),
        *(("vision", kind, name) for kind in OCR for name in _largest(kind, 6)),
    ]


OCR = ("ch_PP-OCRv4_rec", "ch_PP-OCRv4_det")


def corners() -> dict[str, tuple[str, Callable[[], np.ndarray]]]:
    """Return name -> (category, matrix) for the smoke run, from ``data/``."""
    files = {
        "minilm_attention_384x384": "text",
        "rxnfp_query_256x256": "chemistry",
        "minilm_intermediate_1536x384": "text",
    }
    return {
        name: (kind, lambda path=DATA / f"{name}.npy": np.load(path, allow_pickle=False)[:64, :64])
        for name, kind in files.items()
    }


def measure(A: np.ndarray, ratio: int, options: dict[str, Any]) -> dict[str, Any]:
    started = time.perf_counter()
    f = dn.factorize(A, ratio=1 / ratio, **options)
    seconds = time.perf_counter() - started
    return {"snr": f.snr(A), "k": f.k, "stored": f.storage_ratio(), "seconds": seconds}


def plot(path: Path, curves: dict[str, tuple[str, list[float]]], ratios: list[int]) -> None:
    """Draw each curve in the colour of its category."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    told: set[str] = set()
    for category, values in curves.values():
        axes.plot(
            [1 / r for r in ratios],
            values,
            color=COLOURS[category],
            linewidth=1,
            alpha=0.8,
            label=None if category in told else category,
        )
        told.add(category)
    axes.set_xscale("log", base=2)
    axes.set_xticks([1 / r for r in ratios], [f"1/{r}" for r in ratios])
    axes.minorticks_off()
    axes.set_xlabel("storage ratio to float32")
    axes.set_ylabel("SNR in dB")
    axes.grid(color="0.9")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratios", type=int, nargs="+", default=list(RATIOS), help="1 / ratio")
    parser.add_argument("--effort", default="balanced")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", type=Path, metavar="PNG")
    parser.add_argument("--folder", type=Path, help="where rows are kept")
    parser.add_argument("--smoke", action="store_true", help="three corners of data/, few sweeps")
    args = parser.parse_args()
    ratios = sorted(args.ratios, reverse=True)
    options: dict[str, Any] = {"effort": args.effort}
    if args.smoke:
        ratios, options = [24, 16, 8], {"effort": "fast"}
        cases = corners()
    else:
        cases = {
            f"{model}: {name}": (
                kind,
                lambda model=model, name=name: as_matrix(_read(model)[name]),
            )
            for kind, model, name in choose()
        }
    results = Results("matrices-smoke" if args.smoke else "matrices", options, args.folder)
    options["threads"] = args.threads
    curves: dict[str, tuple[str, list[float]]] = {}
    print("| category | matrix | shape | " + " | ".join(f"1/{r}" for r in ratios) + " |")
    print("|---|---|---|" + "---|" * len(ratios))
    falls = []
    for name, (kind, make) in cases.items():
        A = make()
        rows = []
        for ratio in ratios:
            rows.append(results.get(f"{name} 1/{ratio}", lambda: measure(A, ratio, options)))  # noqa: B023
            print(f"{name} 1/{ratio}: {rows[-1]['snr']:.2f} dB", file=sys.stderr, flush=True)
        values = [row["snr"] for row in rows]
        curves[name] = kind, values
        if not all(b > a for a, b in itertools.pairwise(values)):
            falls.append(name)
        cells = " | ".join(f"{value:.2f}" for value in values)
        print(f"| {kind} | {name} | {A.shape[0]}×{A.shape[1]} | {cells} |", flush=True)
    print("\nMeans in dB:")
    for kind in dict.fromkeys(kind for kind, _ in curves.values()):
        of = [values for k, values in curves.values() if k == kind]
        cells = " | ".join(f"{value:.2f}" for value in np.mean(of, axis=0))
        print(f"| {kind} | {len(of)} matrices | | {cells} |")
    if args.plot:
        plot(args.plot, curves, ratios)
    if falls:
        print(f"\ndoes not rise strictly with the ratio: {', '.join(falls)}")
        return 1
    print(f"\nrises strictly with the ratio on all {len(curves)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
