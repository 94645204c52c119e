"""The four systems of the sources on the same networks, at equal stored bits: who keeps what.

python scripts/study_four.py                      # all of it; goes on where it was interrupted
python scripts/study_four.py --parts digits --jobs 2
python scripts/study_four.py --only-finished --plot data/study_four.png
python scripts/study_four.py --special            # QSWD against what it contains
python scripts/study_four.py --smoke --folder F   # small networks; downloads nothing

DiBA, QSWD, MESA and BiTAT, integer codes beside them. Two networks on digits, trained here with
three seeds each (`four_digits.py`), and the reaction network of 50 classes, all 72 matrices
(`study_classes.py`). Every system goes as far as its source says: bits fitted to the weights alone
(replaced); to what the compressed layers before give (layer-wise); then what it trains, through the
whole network, taught by the dense one (end to end): DiBA and codes their diagonals or scales, QSWD
and BiTAT their codes too, MESA its blocks under the penalty and then the values they share.

Heads and embeddings stay. Bits a weight count everything stored of the replaced matrices. A cell
that has not been run is not in the table.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import digits
import four_digits as fd
import network_study
import numpy as np
import study_classes
from results import Results

from diba_np import networks
from diba_np.methods.qswd import QSWD
from diba_np.models.executors import Runner

DATA = Path(__file__).resolve().parent.parent / "data"

PARTS = ("digits", "classes")
KINDS = ("payload", "scales", "index", "codebook")
STYLES = {"replaced": ":", "layer-wise": "--", "end to end": "-"}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "0.5")

Cell = tuple[str, str, float, int]  # network, method, bits (0: the method's own point), seed


# -- digits ----------------------------------------------------------------------------------------


def key_of(cell: Cell) -> str:
    """Return the key of a cell's row: another rate or temperature of a method is another row."""
    network, method, bits, seed = cell
    how = fd.METHODS[method]
    taught = f"rate {how.rate:g}, temperature {how.temperature:g}"
    return f"{network}, {method}, {bits:g}, seed {seed}, {taught}"


def cells_of(args: argparse.Namespace) -> list[Cell]:
    """Return the cells of the digits, the first seed of all before the second."""
    return [
        (network, method, bits, seed)
        for seed in args.seeds
        for network in args.networks
        for method in args.methods
        for bits in fd.METHODS[method].bits
        if bits == 0 or bits in args.bits
    ]


def measured(cell: Cell, folder: Path, epochs: int, dense_epochs: int, smoke: bool) -> Any:
    """Measure one cell; a process that makes several reads the digits once."""
    network, method, bits, seed = cell
    images = _images(smoke)
    chosen = (fd.SMALL if smoke else fd.NETWORKS)[network]
    path = folder / f"{network}-{seed}-{dense_epochs}-epochs.npz"  # of others it is another one
    temperature = fd.METHODS[method].temperature
    dense = fd.dense_of(chosen, images, seed, dense_epochs, path, temperature)
    row = fd.measure(chosen, images, dense, method, bits, epochs)
    row["dense"] = dense.accuracy({}, fd.parts_of(chosen, images)["test"])
    return row


_held: dict[bool, Any] = {}


def _images(smoke: bool) -> Any:
    if smoke not in _held:
        _held[smoke] = digits.split(digits.drawn_digits(700) if smoke else digits.load_digits())
    return _held[smoke]


def run_digits(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of the digits that are kept or can be made, seeds put together."""
    settings = {
        "epochs": args.epochs,
        "dense_epochs": args.dense_epochs,
        "smoke": args.smoke,
    }
    results = Results("four-smoke" if args.smoke else "four", settings, args.folder)
    folder = results.path.with_suffix("")
    cells = cells_of(args)
    missing = [cell for cell in cells if key_of(cell) not in results.rows]
    if missing and not args.only_finished:
        with Runner(args.jobs, 1) as runner:
            rows = runner.run(
                measured,
                missing,
                lambda cell: (cell, folder, args.epochs, args.dense_epochs, args.smoke),
            )
            for cell, row in rows:
                results.get(key_of(cell), lambda row=row: row)
                reached = ", ".join(f"{stage} {v:.2f}" for stage, v in row["accuracy"].items())
                seconds = sum(row["seconds"].values())
                print(f"{key_of(cell)}: {reached}, {seconds:.0f} s", file=sys.stderr, flush=True)
    return together(cells, results.rows)


def together(cells: Sequence[Cell], held: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each network, method and bits, over the seeds that are there."""
    groups: dict[tuple[str, str, float], list[Any]] = {}
    for cell in cells:
        if key_of(cell) in held:
            groups.setdefault(cell[:3], []).append(held[key_of(cell)])
    rows = []
    for (network, method, bits), seeds in groups.items():
        row: dict[str, Any] = {"network": network, "method": method, "bits": bits}
        row["seeds"] = len(seeds)
        row["dense"] = spread([one["dense"] for one in seeds])
        for stage in fd.STAGES:
            reached = [one["accuracy"][stage] for one in seeds if stage in one["accuracy"]]
            row[stage] = spread(reached) if reached else None
        # of the same seed: how much the training of the dense network differs does not count
        row["lost"] = spread([one["dense"] - one["accuracy"]["end to end"] for one in seeds])
        row["changed"] = spread([one["changed"]["end to end"] for one in seeds])
        row["stored"] = {
            kind: float(np.mean([one["stored"][kind] / one["weights"] for one in seeds]))
            for kind in KINDS
        }
        row["us"], row["dense_us"] = (
            float(np.median([one[name] for one in seeds])) for name in ("us", "dense_us")
        )
        row["seconds"] = float(np.mean([sum(one["seconds"].values()) for one in seeds]))
        rows.append(row)
    return rows


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard error; of one value the error is not a number."""
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return float(np.mean(values)), float(error)


def plus_minus(value: tuple[float, float] | None) -> str:
    if value is None:
        return ""
    mean, error = value
    return f"{mean:.2f}" if np.isnan(error) else f"{mean:.2f} ± {error:.2f}"


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of the digits' table."""
    lines = []
    for network in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == network]
        # the one of most seeds, since a run may have been ended among them
        dense = max(own, key=lambda row: row["seeds"])
        lines += [
            f"{network}, dense {plus_minus(dense['dense'])} %, products {dense['dense_us']:.0f} us",
            "",
            "| method | bits | " + " | ".join(fd.STAGES) + " | points lost | changed % | "
            "stored: payload + scales + index + books | us | s | seeds |",
            "|---|--:|" + "---|" * (len(fd.STAGES) + 3) + "--:|--:|--:|",
        ]
        for row in own:
            parts = list(row["stored"].values())
            stored = f"{sum(parts):.2f}: " + " + ".join(f"{part:.2f}" for part in parts)
            cells = [
                row["method"],
                f"{row['bits']:g}" if row["bits"] else "own",
                *(plus_minus(row[name]) for name in (*fd.STAGES, "lost", "changed")),
                stored,
                f"{row['us']:.0f}",
                f"{row['seconds']:.0f}",
                str(row["seeds"]),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return lines


# -- the reaction network --------------------------------------------------------------------------

# name here -> name in the studies of networks
CLASSES = {
    "DiBA": "diba",
    "QSWD": "qswd",
    "MESA": "mesa",
    "BiTAT": "bitat",
    "integer codes": "codes",
}
SMOKED = ("QSWD", "MESA")  # the others are tested with the studies of one task


def run_classes(args: argparse.Namespace) -> list[str]:
    """Return the lines of the table of the 50 classes: what is kept or can be made."""
    names = [name for name in args.methods if name in (SMOKED if args.smoke else CLASSES)]
    options = ["--variants", "all", "--methods", *(CLASSES[name] for name in names)]
    options += ["--ratios", *(str(Fraction(bits) / 32) for bits in args.bits)]
    options += ["--jobs", str(args.jobs), "--stages", "weights", "activations", "end to end"]
    if args.folder is not None:
        options += ["--folder", str(args.folder / "classes")]
    options += [f"--{name}" for name in ("smoke", "only-finished") if getattr(args, _plain(name))]
    parser = network_study.parser_of(__doc__)
    study, dense, rows = network_study.run(
        parser,
        parser.parse_args(options),
        study_classes.real,
        functools.partial(study_classes.made, 1),
    )
    return class_table(study, dense, rows)


def _plain(name: str) -> str:
    return name.replace("-", "_")


def class_table(
    study: network_study.Study, dense: dict[str, Any], rows: Sequence[dict[str, Any]]
) -> list[str]:
    """Return the lines of a table: a row for each method and rate."""
    labels = {name: label for label, name in CLASSES.items()}
    columns = ("weights", "activations", "end to end")
    titles = ("replaced", "layer-wise", "end to end")
    lines = [
        f"{study.task.title}, dense {network_study.text_of(dense)}, {len(study.task.judge)} rows",
        "",
        "| method | bits | " + " | ".join(titles) + " | "
        "stored: payload + scales + index + books | us | dense us | CPU s |",
        "|---|--:|" + "---|" * (len(titles) + 1) + "--:|--:|--:|",
    ]
    for (variant, method, ratio), stages in network_study.by_chain(rows).items():
        scores = [stages.get(stage) for stage in columns]
        cells = [labels[method], f"{32 * float(Fraction(ratio)):g}"]
        cells += ["" if row is None else network_study.text_of(row["scores"]) for row in scores]
        path = study.path((variant, method, ratio, "end to end"))
        cells += _stored_and_times(study, path) if path.exists() else ["", "", ""]
        cells.append(f"{sum(row['cpu_seconds'] for row in stages.values()):.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _stored_and_times(study: network_study.Study, path: Path) -> list[str]:
    """Return stored bits a weight by kind, and microseconds of all products, ours and dense."""
    small = networks.load(path)
    matrices = {name: layer.to_matrix() for name, layer in small.compressed.items()}
    weights = {name: study.task.net.weights[name] for name in matrices}
    count = sum(A.size for A in weights.values())
    parts = [
        sum(f.storage_breakdown().get(kind, 0) for f in matrices.values()) / count for kind in KINDS
    ]
    times = fd.product_times(matrices, weights, 30)
    stored = f"{sum(parts):.2f}: " + " + ".join(f"{part:.2f}" for part in parts)
    return [stored, *(f"{us:.0f}" for us in times)]


# -- the special cases of QSWD ---------------------------------------------------------------------

# name -> settings for m rows and rank r: (band height, r, nonzeros a column, bits of C, bits of Z)
SPECIAL: dict[str, Callable[[int, int], list[tuple[int, ...]]]] = {
    "SVD, 8-bit factors": lambda m, r: [(m, r, r, 8, 8)],
    "vector quantization": lambda m, r: [(d, r, 1, 8, 0) for d in (2, 4, 8, 16)],
    "sparse PCA": lambda m, r: [(m, r, max(r // part, 1), 8, 4) for part in (4, 8, 16)],
}


def special(A: np.ndarray, rates: Sequence[float]) -> list[str]:
    """Return the lines of a table: QSWD as it chooses, and held to what it contains, SNR in dB."""
    lines = [
        "| bits | QSWD | " + " | ".join(SPECIAL) + " |",
        "|--:|--:|" + "--:|" * len(SPECIAL),
    ]
    for bits in rates:
        values = [QSWD.fit(A, bits).snr(A)]
        values += [_held_to(A, bits, name) for name in SPECIAL]
        lines.append(f"| {bits:g} | " + " | ".join(f"{value:.2f}" for value in values) + " |")
    return lines


def _held_to(A: np.ndarray, bits: float, name: str) -> float:
    """Return the best SNR of one special case within the bits, each with its largest rank."""
    m, n = A.shape
    largest: dict[int, tuple[int, ...]] = {}
    for r in sorted({int(2 ** (e / 4)) for e in range(4, 45)}):
        for way, setting in enumerate(SPECIAL[name](m, r)):
            if r < n * max(m // setting[0], 1) and _fits(A, bits, setting):
                largest[way] = setting
    return max(QSWD.fit(A, bits, setting=setting).snr(A) for setting in largest.values())


def _fits(A: np.ndarray, bits: float, setting: tuple[int, ...]) -> bool:
    from diba_np.methods.qswd_fit import Setting

    return bool(Setting(A.shape, *setting).bits() <= bits * A.size)


# -- the figure ------------------------------------------------------------------------------------


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw what is right against stored bits: dotted as replaced, full end to end.

    A method's own points are diamonds.
    """
    from matplotlib.figure import Figure

    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure = Figure(figsize=(5 * len(networks), 4), layout="constrained")
    colours = dict(zip(fd.METHODS, COLOURS, strict=False))
    handles: dict[str, Any] = {}
    for axes, network in zip(
        np.atleast_1d(figure.subplots(1, len(networks))), networks, strict=True
    ):
        own = [row for row in rows if row["network"] == network]
        level = max(own, key=lambda row: row["seeds"])["dense"][0]
        axes.axhline(level, color="0.3", linewidth=0.8)
        for method, (stage, style), whole in itertools.product(
            colours, STYLES.items(), (True, False)
        ):
            points = sorted(
                (sum(row["stored"].values()), *row[stage])
                for row in own
                if row["method"] == method and row[stage] is not None and (row["bits"] > 0) == whole
            )
            if points and (whole or stage == "end to end"):
                x, y, error = zip(*points, strict=True)
                marker = ("o" if whole else "D") if stage == "end to end" else None
                handles[f"{method}, {stage}" if whole else f"{method}, its own point"] = (
                    axes.errorbar(
                        x,
                        y,
                        yerr=np.nan_to_num(error),
                        marker=marker,
                        markersize=4,
                        color=colours[method],
                        linestyle=style if whole else "none",
                    )
                )
        axes.set_xscale("log", base=2)
        axes.set_ylim(80, 99)
        axes.set_xlabel("stored bits a weight")
        axes.set_ylabel("test accuracy in %")
        axes.set_title(network)
        axes.grid(color="0.9")
    figure.legend(
        list(handles.values()), list(handles), loc="outside right center", frameon=False, fontsize=8
    )
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--networks", nargs="+", choices=fd.NETWORKS, default=list(fd.NETWORKS))
    parser.add_argument("--methods", nargs="+", choices=fd.METHODS, default=list(fd.METHODS))
    parser.add_argument("--bits", nargs="+", type=float, default=list(fd.BITS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the digits")
    parser.add_argument("--epochs", type=int, default=20, help="end to end, on digits")
    parser.add_argument("--dense-epochs", type=int, default=40)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--folder", type=Path, help="where results are kept")
    parser.add_argument("--only-finished", action="store_true", help="run nothing")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    parser.add_argument("--special", action="store_true", help="QSWD against what it contains")
    parser.add_argument("--smoke", action="store_true", help="small networks, drawn digits")
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
    if args.smoke:
        if args.folder is None:
            parser.error("--smoke needs --folder")
        args.networks, args.bits, args.seeds = ["MLP"], [1.0], [0, 1]
        args.epochs, args.dense_epochs = 4, 10
    if args.special:
        A = np.load(DATA / "minilm_attention_384x384.npy", allow_pickle=False)
        print("\n".join(special(A[:64, :64] if args.smoke else A, args.bits)))
        return 0
    rows = run_digits(args) if "digits" in args.parts else []
    print("\n".join(table(rows)))
    if "classes" in args.parts:
        print("\n".join(run_classes(args)))
    if args.plot:
        draw(args.plot, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
