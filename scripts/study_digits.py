"""DiBARD on a network trained here: an MLP on MNIST digits, its hidden layers compressed.

python scripts/study_digits.py --plot data/study_digits.png    # the table and the figure
python scripts/study_digits.py --smoke                         # seconds, on drawn digits

The digits and their cut are those of `digits.py`: 6,000 to fit, 2,000 to validate, 2,000 to
test; the test digits are seen only at the end. They are averaged to 14×14, so that the study takes
minutes. An MLP 196-256-256-256-10 is trained, its three hidden layers are replaced at the same
stored bits, its head stays. Stages, each from its own bits but the last:

- replaced: bits and diagonals fitted to the weights alone;
- activations: to the Gram matrix of what the layer reads in the dense network;
- layer-wise: to what the compressed layers before it produce, diagonals and biases solved for;
- end to end: from there, Adam on diagonals and biases of all layers against the dense network's
  probabilities, as they are (no labels); the best epoch on the validation digits stays.

Integer codes: round to nearest when replaced, with compensation (GPTQ) where activations are known;
then only their scales and biases move. Random binaries: only diagonals and biases are fitted.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from digits import (
    Classifier,
    Digits,
    dense_mlp,
    drawn_digits,
    load_digits,
    pooled,
    pooled_shift,
    split,
    train_end_to_end,
)
from results import Results

import diba_np as dn
from diba_np.layers.linear import Layer
from diba_np.layers.registry import as_layer
from diba_np.methods import fit as fit_baseline
from diba_np.methods.random_bits import random_factors
from diba_np.networks.capture import capture
from diba_np.networks.layerwise import Layerwise, compress_layers

STAGES = ("replaced", "activations", "layer-wise", "end to end")
METHODS = ("DiBA", "integer codes", "random binaries")
RATIOS = (64, 32, 16, 8)


def compress(
    method: str, A: np.ndarray, bits: float, gram: np.ndarray | None, options: dict[str, Any]
) -> Any:
    """Compress one matrix by one method, with or without the Gram matrix of its inputs."""
    if method == "DiBA":
        return dn.factorize(A, bits=bits, gram=gram, **options)
    if method == "random binaries":
        return random_factors(A, bits=bits, gram=gram)
    if gram is None:
        return fit_baseline("rtn", A, bits)
    n = len(gram)
    ridged = gram + 1e-6 * np.trace(gram) / n * np.eye(n)
    # n rows of the same Gram matrix stand for the inputs
    return fit_baseline("gptq", A, bits, inputs=np.linalg.cholesky(ridged).T)


def rounded(layers: dict[str, Layer]) -> dict[str, Layer]:
    """Return the layers as they would be stored: 16-bit diagonals or scales."""
    return {name: layer.rounded() for name, layer in layers.items()}


def measure(
    network: Classifier,
    parts: dict[str, Digits],
    method: str,
    bits: float,
    args: argparse.Namespace,
    options: dict[str, Any],
    images: np.ndarray,
    folder: Path,
) -> dict[str, Any]:
    """Return test accuracy and seconds of every stage; layers are kept in `folder`."""
    row: dict[str, Any] = {"method": method, "bits": bits}
    row |= {"accuracy": {}, "changed": {}, "seconds": {}}
    fit, test = parts["fit"], parts["test"]
    mixed = np.random.default_rng(0).permutation(len(fit[0]))  # they come sorted by digit
    batches = np.array_split(fit[0][mixed], 10)
    started = time.perf_counter()

    def done(stage: str, layers: dict[str, Layer]) -> None:
        nonlocal started
        row["seconds"][stage] = time.perf_counter() - started
        row["accuracy"][stage] = network.accuracy(layers, test)
        row["changed"][stage] = network.changed(layers, test)
        told = f"{row['accuracy'][stage]:.2f} % in {row['seconds'][stage]:.0f} s"
        print(f"{method} {bits:g} bits, {stage}: {told}", file=sys.stderr, flush=True)
        started = time.perf_counter()

    for stage in STAGES[:2]:
        grams = {}
        if stage == "activations":
            read = capture(network.hidden, network.weights, batches, biases=network.biases)
            grams = {name: one.gram for name, one in read.items()}
        layers = {
            name: as_layer(
                compress(method, A, bits, grams.get(name), options), network.biases[name]
            )
            for name, A in network.weights.items()
        }
        done(stage, layers)
    made: Layerwise = compress_layers(
        network.stages,
        network.weights,
        batches,
        lambda name, A, gram: compress(method, A, bits, gram, options),
        biases=network.biases,
        folder=folder,
    )
    done("layer-wise", made.layers)
    row["layers"] = made.report
    train_end_to_end(
        network,
        made.layers,
        parts["validation"][0],
        images,
        pooled_shift,
        args.epochs,
        args.rate,
    )
    done("end to end", rounded(made.layers))
    return row


def show(rows: list[dict[str, Any]], dense: float, count: int) -> None:
    """Print accuracy and changed answers ± standard error of every stage."""

    def error(percent: float) -> float:
        return float(np.sqrt(percent * (100 - percent) / count))

    print(f"dense: {dense:.2f} ± {error(dense):.2f} % of {count} test digits")
    for title, key in (("right", "accuracy"), ("otherwise than the dense network", "changed")):
        print(f"\nanswered {title}, %")
        print("| method | ratio | " + " | ".join(STAGES) + " | s |")
        print("|---|---|" + "---|" * (len(STAGES) + 1))
        for row in rows:
            cells = [f"{row[key][s]:.2f} ± {error(row[key][s]):.2f}" for s in STAGES]
            seconds = sum(row["seconds"].values())
            ratio = round(32 / row["bits"])
            print(f"| {row['method']} | 1/{ratio} | {' | '.join(cells)} | {seconds:.0f} |")


def plot(path: Path, rows: list[dict[str, Any]], dense: float) -> None:
    """Draw accuracy against the ratio: a colour a method, dashed as replaced, full end to end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    ratios = sorted({round(32 / row["bits"]) for row in rows}, reverse=True)
    colours = dict(zip(METHODS, ("#0072B2", "#D55E00", "0.5"), strict=True))
    styles = {"replaced": ":", "layer-wise": "--", "end to end": "-"}
    for method in METHODS:
        own = {round(32 / r["bits"]): r["accuracy"] for r in rows if r["method"] == method}
        for stage, style in styles.items():
            axes.plot(
                [1 / r for r in ratios if r in own],
                [own[r][stage] for r in ratios if r in own],
                style,
                color=colours[method],
                marker="o" if stage == "end to end" else None,
                markersize=4,
                label=f"{method}, {stage}",
            )
    axes.axhline(dense, color="0.3", linewidth=0.8)
    axes.text(1 / ratios[0], dense, " dense", va="bottom", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_xticks([1 / r for r in ratios], [f"1/{r}" for r in ratios])
    axes.minorticks_off()
    axes.set_xlabel("storage ratio to float32, hidden layers")
    axes.set_ylabel("test accuracy in %")
    axes.grid(color="0.9")
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratios", type=int, nargs="+", default=list(RATIOS), help="1 / ratio")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--effort", default="balanced")
    parser.add_argument("--epochs", type=int, default=30, help="of the end-to-end training")
    parser.add_argument("--rate", type=float, default=5e-3, help="its learning rate")
    parser.add_argument("--dense-epochs", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", type=Path, metavar="PNG")
    parser.add_argument("--folder", type=Path, help="where rows are kept")
    parser.add_argument("--smoke", action="store_true", help="a small network, drawn digits")
    args = parser.parse_args()
    sizes = [196, 256, 256, 256, 10]
    if args.smoke:
        sizes = [196, 48, 10]
        args.ratios, args.effort, args.epochs, args.dense_epochs = [32, 16], "fast", 8, 8
        args.methods = list(METHODS)
    raw = split(drawn_digits(800) if args.smoke else load_digits())
    parts = {name: (pooled(X), y) for name, (X, y) in raw.items()}
    images = raw["fit"][0]
    settings = {
        "sizes": sizes, "effort": args.effort, "epochs": args.epochs, "rate": args.rate,
        "dense_epochs": args.dense_epochs, "smoke": args.smoke, "taught_by": "dense network",
    }  # fmt: skip
    results = Results("digits-smoke" if args.smoke else "digits", settings, args.folder)
    network = Classifier(dense_mlp(raw["fit"], sizes, pooled_shift, args.dense_epochs))
    dense = network.accuracy({}, parts["test"])
    options = {"effort": args.effort, "threads": args.threads}
    rows = []
    for ratio in args.ratios:
        for method in args.methods:
            kept = results.path.with_suffix("") / f"{method} {ratio} {args.effort}"
            row = results.get(
                f"{method} 1/{ratio}",
                lambda: measure(network, parts, method, 32 / ratio, args, options, images, kept),  # noqa: B023
            )
            rows.append(row)
    show(rows, dense, len(parts["test"][1]))
    if args.plot:
        plot(args.plot, rows, dense)
    return 0


if __name__ == "__main__":
    sys.exit(main())
