"""What the studies of whole networks share: stages, the store of what ran, tables, figures.

A study compresses the linear layers of a pretrained network by `diba_np.networks.compress` at
several storage ratios (float32 = 1) and judges it after each stage on rows that nothing was fitted
to:

- weights: every matrix on its own, bits fitted to the weights alone;
- trained: from there diagonals (or scales), layer norms and biases are trained through the whole
  network, taught by the dense one (DiBARD); the bits stay;
- activations: bits fitted layer by layer to what the compressed layers before give;
- end to end: from there as under "trained".

Integer codes and random bits at the same stored bits go through the same stages, random bits
through the first two. Each finished stage lies in the cache folder, in between finished layers and
the state of training: a study that was interrupted goes on where it was. With `--jobs` methods and
ratios run side by side, in as many processes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from results import Results
from sources import cache_folder

from diba_np import networks
from diba_np.models.executors import Runner
from diba_np.networks.evaluation import evaluate
from diba_np.networks.network import Network

Scores = dict[str, tuple[float, float]]  # name -> mean and standard error
Chain = tuple[str, str, str, bool]  # variant, method, ratio, whether it is fitted to activations
Cell = tuple[str, str, str, str]  # variant, method, ratio, stage

RATIOS = ("1/64", "1/32", "1/16", "1/8")
VARIANTS = {"all": (), "attention": ("*.attention.*",)}
STAGES = {  # whether fitted to activations, whether trained
    "weights": (False, False),
    "trained": (False, True),
    "activations": (True, False),
    "end to end": (True, True),
}
# name -> method of `diba_np.networks.compress`
METHODS = {
    "diba": "diba",
    "codes": "gptq",
    "random": "random",
    "trellis": "linear-trellis",
    "best": "best",
    "qswd": "qswd",
    "mesa": "mesa",
    "bitat": "bitat",
}
LABELS = {
    "diba": "DiBA",
    "codes": "integer codes",
    "random": "random bits",
    "trellis": "linear trellis",
    "best": "the better of DiBA and trellis",
    "qswd": "QSWD",
    "mesa": "MESA",
    "bitat": "BiTAT",
}
OWN = ("diba", "codes", "random")  # methods of the studies of one task
BLIND = ("random",)  # has no bits to fit to activations
MOST_BITS = {"bitat": Fraction(9, 8)}  # stored bits a weight that a method can use


class Task:
    """What a network is for: the network, rows to fit to, rows that judge.

    Parameters
    ----------
    net : Network
        The dense one.
    fit, judge : list of list of int
        Tokens of the rows; nothing is fitted to those that judge.
    labels : (N,) int array, optional
        Classes of the rows that judge.
    """

    name = title = ""

    def __init__(
        self,
        net: Network,
        fit: Sequence[Sequence[int]],
        judge: Sequence[Sequence[int]],
        labels: np.ndarray | None = None,
    ) -> None:
        self.net, self.fit, self.judge, self.labels = net, list(fit), list(judge), labels

    def mix(self, count: int) -> None:
        """Put so many rows made of others beside those to fit to."""
        raise SystemExit(f"--mixed: rows of {self.name} cannot be made of others")

    def scores(self, net: Network) -> Scores:
        """Return how good a network is, with standard errors."""
        found = evaluate(net, self.judge, labels=self.labels)
        return {"accuracy": (found["accuracy"], found["accuracy_error"])}


class Study:
    """One task with what has been made for it.

    Parameters
    ----------
    task : Task
    folder : Path
        Where finished stages are kept.
    args : argparse.Namespace
        What `main` parsed.
    """

    def __init__(self, task: Task, folder: Path, args: argparse.Namespace) -> None:
        self.task, self.folder, self.args = task, folder, args
        self.dense_folder = folder / "dense"  # what all chains read of the dense network
        if args.mixed:
            task.mix(args.mixed)
        names = "effort calibration rows taper mixed epochs rate"
        settings = {name: getattr(args, name) for name in names.split()}
        settings["tokens"] = [sum(map(len, rows)) for rows in (task.fit, task.judge)]
        self.results = Results(task.name, settings, folder)

    def dense(self) -> Scores:
        """Return the scores of the dense network."""
        scores: Scores = self.results.get("dense", lambda: self.task.scores(self.task.net))
        return scores

    def path(self, cell: Cell) -> Path:
        """Return the network's file after a stage."""
        return self.folder / f"{key_of(cell)}.h5"

    def tokens(self, rows: int, share: float = 1.0) -> int:
        """Return about the tokens of so many rows, or of a share of them."""
        lengths = np.array([len(row) for row in self.task.fit])
        return max(1, round(share * min(rows, len(lengths)) * float(lengths.mean())))

    def rows(self, chain: Chain) -> list[dict[str, Any]]:
        """Return what the stages of a chain came to; those that are not kept are made."""
        rows = []
        for cell in cells_of(chain, self.args.stages):
            if self.args.only_finished and key_of(cell) not in self.results.rows:
                continue
            named = dict(zip(("variant", "method", "ratio", "stage"), cell, strict=True))
            row = self.results.get(key_of(cell), lambda cell=cell: self.stage(cell))
            rows.append(named | row)
        return rows

    def stage(self, cell: Cell) -> dict[str, Any]:
        """Make the network of a stage, write it, judge it."""
        variant, method, ratio, stage = cell
        activations, trained = STAGES[stage]
        bits = 32 * float(Fraction(ratio))
        parts = self.folder / f"{key_of((variant, method, ratio, str(activations)))}.parts"
        # above a bit a weight there is less to regain
        share = min(1.0, 1 / bits) ** self.args.taper
        started = time.process_time()
        small = networks.compress(
            self.task.net,
            self.task.fit,
            bits=bits,
            method=METHODS[method],
            effort=self.args.effort,
            include=VARIANTS[variant],
            embeddings=False,
            activations=activations,
            codes=True,
            epochs=self.args.epochs if trained else 0,
            rate=self.args.rate,
            calibrate=self.tokens(self.args.calibration),
            taught=self.tokens(self.args.rows, share),
            threads=self.args.threads,
            folder=parts,
            dense_folder=self.dense_folder,
            callback=lambda facts: tell(f"{key_of(cell)}: {json.dumps(facts)}"),
        )
        seconds = time.process_time() - started
        small.save(self.path(cell))
        if trained:
            shutil.rmtree(parts)
        row = {
            "scores": self.task.scores(small),
            "bits": stored_bits(small),
            "cpu_seconds": seconds,
            "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        }
        tell(f"{key_of(cell)}: {text_of(row['scores'])}, {seconds:.0f} s")
        return row


def stored_bits(net: Network) -> float:
    """Return the stored bits a weight of the compressed matrices."""
    matrices = [layer.to_matrix() for layer in net.compressed.values()]
    weights = sum(int(np.prod(matrix.shape)) for matrix in matrices)
    return float(sum(matrix.storage_bits() for matrix in matrices) / weights)


def tell(line: str) -> None:
    """Write a line of progress."""
    print(line, file=sys.stderr, flush=True)


def cells_of(chain: Chain, wanted: Sequence[str]) -> list[Cell]:
    """Return the stages of a chain that are wanted."""
    *what, activations = chain
    return [(*what, stage) for stage in wanted if STAGES[stage][0] == activations]  # type: ignore[misc]


def chains_of(args: argparse.Namespace) -> list[Chain]:
    """Return what is asked for, without rates and stages that a method has not."""
    return [
        (variant, method, ratio, activations)
        for variant, method, ratio in itertools.product(args.variants, args.methods, args.ratios)
        for activations in (False, True)
        if 32 * Fraction(ratio) <= MOST_BITS.get(method, 32)
        and not (activations and method in BLIND)
    ]


def key_of(cell: Cell) -> str:
    """Return the name of a stage in files."""
    return "-".join(cell).replace("/", "_").replace(" ", "_")


def text_of(scores: Scores) -> str:
    """Return scores as text: percent for accuracies, three digits for cosines."""
    parts = []
    for name, (mean, error) in scores.items():
        if name == "cosine":
            parts.append(f"{mean:.3f} ± {error:.3f}")
        else:
            parts.append(f"{100 * mean:.1f} ± {100 * error:.1f} %")
    return " / ".join(parts)


def by_chain(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Return the rows by variant, method and ratio, then by stage."""
    seen: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        seen.setdefault((row["variant"], row["method"], row["ratio"]), {})[row["stage"]] = row
    return seen


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of the table: a row for each variant, method and ratio.

    Bits are those of the last stage; seconds are of making the stages shown; memory is the most
    that the process had until then.
    """
    lines = [
        "| matrices | method | ratio | bits | " + " | ".join(STAGES) + " | CPU s | MiB |",
        "|---|---|---|--:|" + "---|" * len(STAGES) + "--:|--:|",
    ]
    for (variant, method, ratio), stages in by_chain(rows).items():
        scores = [text_of(stages[s]["scores"]) if s in stages else "" for s in STAGES]
        *_, last = stages.values()
        seconds = sum(row["cpu_seconds"] for row in stages.values())
        most = max(row["peak_mib"] for row in stages.values())
        cells = [variant, LABELS[method], ratio, f"{last['bits']:.2f}", *scores]
        lines.append(f"| {' | '.join([*cells, f'{seconds:.0f}', str(most)])} |")
    return lines


def draw(path: Path, title: str, dense: Scores, rows: Sequence[dict[str, Any]]) -> None:
    """Draw the first score against the ratio, a style a stage, a colour a method."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("drawing takes an extra: pip install 'diba-np[plot]'") from None
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    (metric, (level, _)), *_ = dense.items()
    axes.axhline(level, color="0.6", lw=3, label="dense")
    styles = dict(zip(STAGES, (":^", "-.v", "--s", "-o"), strict=True))
    for (at, method), (stage, style) in itertools.product(enumerate(METHODS), styles.items()):
        points = [
            (float(Fraction(row["ratio"])), *row["scores"][metric])
            for row in rows
            if (row["variant"], row["method"], row["stage"]) == ("all", method, stage)
        ]
        if points:
            x, y, error = zip(*sorted(points), strict=True)
            name = f"{LABELS[method]}, {stage}"
            how = {"fmt": style, "color": f"C{at}", "label": name, "capsize": 2, "ms": 4}
            axes.errorbar(x, y, yerr=error, **how)
    axes.set_xscale("log", base=2)
    axes.set_xticks([float(Fraction(r)) for r in RATIOS], RATIOS)
    axes.set_xlabel("stored bits as a share of float32")
    axes.set_ylabel(metric)
    axes.set_title(title)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=90)


def run_side_by_side(study: Study, make: Callable[[], Task], chains: Sequence[Chain]) -> None:
    """Make what is missing of the chains, some at a time, each process with a task of its own."""
    missing = [
        chain
        for chain in chains
        if any(
            key_of(cell) not in study.results.rows for cell in cells_of(chain, study.args.stages)
        )
    ]
    with Runner(study.args.jobs, 1) as runner:
        ends = runner.run(
            _run_chain, missing, lambda chain: (make, study.folder, study.args, chain)
        )
        if not all([done for _, done in ends]):
            raise SystemExit("not all could be run; what was finished is kept")


_own: list[Study] = []  # of a process that `run_side_by_side` started


def _run_chain(
    make: Callable[[], Task], folder: Path, args: argparse.Namespace, chain: Chain
) -> bool:
    """Make the stages of a chain; return whether all could be made."""
    try:
        if not _own:
            _own.append(Study(make(), folder, args))
        _own[0].rows(chain)
    except Exception:  # the other chains go on
        traceback.print_exc()
        return False
    return True


def parser_of(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """Return the options of a study."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--ratios", nargs="+", default=list(RATIOS))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(OWN))
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--effort", default="balanced", help="of the searches for bits")
    parser.add_argument("--calibration", type=int, default=300, help="rows read layer by layer")
    parser.add_argument("--rows", type=int, default=1000, help="trained on end to end")
    parser.add_argument(
        "--taper",
        type=float,
        default=1.0,
        metavar="T",
        help="--rows are of one stored bit a weight and less; at b bits 1 / b^T as many",
    )
    parser.add_argument("--mixed", type=int, default=0, help="rows made of others, beside them")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rate", type=float, default=2e-3, help="of Adam, end to end")
    parser.add_argument("--threads", type=int, default=1, help="of the searches")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--folder", type=Path, help="where finished stages are kept")
    parser.add_argument(
        "--only-finished", action="store_true", help="run nothing, show what is kept"
    )
    parser.add_argument("--plot", type=Path, help="draw the figure to this file")
    parser.add_argument("--smoke", action="store_true", help="a made network; downloads nothing")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(**defaults)
    return parser


def run(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    real: Callable[[], Task],
    made: Callable[[], Task],
) -> tuple[Study, Scores, list[dict[str, Any]]]:
    """Return a study, the dense network's scores, and the rows that are kept or can be made."""
    if args.smoke:
        args.ratios, args.variants, args.calibration = ["1/8"], ["all"], 40
        args.rows, args.epochs, args.rate, args.taper = 40, 5, 5e-4, 0.0
        if args.folder is None:
            parser.error("--smoke needs --folder")
    if args.mixed < 0 or args.taper < 0:
        parser.error("--mixed and --taper must be at least 0")
    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
    make = made if args.smoke else real
    task = make()
    study = Study(task, args.folder or cache_folder() / "studies" / task.name, args)
    dense = study.dense()
    chains = chains_of(args)
    if args.jobs > 1 and not args.only_finished:
        run_side_by_side(study, make, chains)
        study.results.reread()
    rows = [row for chain in chains for row in study.rows(chain)]
    if not args.only_finished:
        shutil.rmtree(study.dense_folder, ignore_errors=True)
    return study, dense, rows


def main(
    description: str, real: Callable[[], Task], made: Callable[[], Task], **defaults: Any
) -> int:
    """Run a study from the command line.

    Parameters
    ----------
    description : str
    real, made : callable
        Give the task, and a small one that needs no download.
    defaults
        Of the options.
    """
    parser = parser_of(description, **defaults)
    args = parser.parse_args()
    study, dense, rows = run(parser, args, real, made)
    task = study.task
    if args.json:
        print(json.dumps({"dense": dense, "rows": rows}))
    else:
        print(f"{task.name}, dense: {text_of(dense)}, {len(task.judge)} rows\n")
        print("\n".join(table(rows)))
    if args.plot:
        draw(args.plot, task.title, dense, rows)
    return 0
