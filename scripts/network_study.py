"""What the studies of whole networks share: stages, the store of what ran, tables, figures.

A study compresses a pretrained network at several storage ratios (float32 = 1, 16-bit diagonals
counted) and judges it after each stage on rows that nothing was fitted to:

- dense: the network as it is;
- replaced: every weight on its own, bits fitted to the weights alone;
- layer-wise: these bits stay; diagonals (or scales) and biases are refitted layer by layer to what
  the compressed layers before give (DiBARD);
- activations: bits too are fitted to that, layer by layer;
- end to end: from there, all diagonals, layer norms and biases are trained at once, taught by the
  dense network (DiBARD through the whole network).

The integer codes and the random bits at the same stored bits go through the same stages but the
fourth. Each finished stage lies in the cache folder, in between finished layers and the state of
training: a study that was interrupted goes on where it was. Until all stages are there the dense
network's hidden states lie there too, those that layers are fitted to and those that training is
taught by (6 GB of masked tokens). With `--jobs` methods
and ratios run side by side, in as many processes.
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
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import network_fit as nf
import numpy as np
from bert import LINEAR, Array, Bert
from network_train import train
from sources import cache_folder

from diba_np.layers.block_training import RETRAINING
from diba_np.layers.mesa_linear import penalise
from diba_np.layers.registry import LATENT, as_layer
from diba_np.machine.processors import processors
from diba_np.models.executors import Runner
from diba_np.networks.inputs import batches

Chain = tuple[str, str, str]  # variant, method, ratio

RATIOS = ("1/64", "1/32", "1/16", "1/8")
VARIANTS = {"all": LINEAR, "attention": LINEAR[:4]}
STAGES = ("replaced", "layer-wise", "activations", "end to end")
METHODS: dict[str, Callable[..., nf.Form]] = {
    "diba": nf.by_weights,
    "codes": nf.by_label("rtn"),
    "random": nf.at_random,
    "qswd": nf.by_label("qswd"),
    "mesa": nf.by_label("mesa"),
    "bitat": nf.by_label("bitat"),
}
FITTED = ("diba", "qswd", "mesa", "bitat")  # also to activations
MOST_BITS = {"bitat": Fraction(9, 8)}  # stored bits a weight that a method can use
OWN = ("diba", "codes", "random")  # methods of the studies of one task
EVEN = [1.0] * len(LINEAR)
LABELS = {
    "diba": "DiBA",
    "codes": "integer codes",
    "random": "random bits",
    "qswd": "QSWD",
    "mesa": "MESA",
    "bitat": "BiTAT",
}
MESA_ALPHA = 1e-3  # weight of its block differences


class Study:
    """One task with what has been made for it.

    Parameters
    ----------
    task : nf.Task
    folder : Path
        Where finished stages are kept.
    args : argparse.Namespace
        What `main` parsed.
    """

    def __init__(self, task: nf.Task, folder: Path, args: argparse.Namespace) -> None:
        self.task, self.folder, self.args = task, folder, args
        self.how = {"effort": args.effort, "shift": args.shift, "threads": args.threads}
        self._check_settings()
        self.dense = task.network()
        rows = np.random.default_rng(0).permutation(len(task.fit))
        # training rows that no layer was fitted to tell more, as far as there are such
        self.read_rows, self.train_rows = rows[: args.calibration], rows[-args.rows :]
        if args.mixed:
            more = task.mix(args.mixed)
            self.read_rows, self.train_rows = (
                np.concatenate([some, more]) for some in (self.read_rows, self.train_rows)
            )

    def rows_trained_on(self, ratio: str) -> Array:
        """Return the rows to train on: above a bit a weight there is less to regain."""
        share = min(1.0, 1 / (32 * float(Fraction(ratio)))) ** self.args.taper
        whole = len(self.train_rows)
        return self.train_rows[
            np.linspace(0, whole, round(share * whole), endpoint=False, dtype=int)
        ]

    def _check_settings(self) -> None:
        """Keep what the results depend on, or compare it with what was kept."""
        names = "effort shift shares tilt together calibration rows taper mixed epochs rate tokens"
        mine = {name: getattr(self.args, name) for name in names.split()}
        mine["texts"] = {part: sum(map(len, rows)) for part, rows in self.task.texts.items()}
        path = self.folder / "settings.json"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(mine))
        earlier = {
            "shift": 0.0,
            "shares": EVEN,
            "tilt": 0.0,
            "together": 0.0,
            "taper": 0.0,
            "mixed": 0,
        }  # they hold none of these
        kept = earlier | json.loads(path.read_text())
        if kept != mine:
            raise SystemExit(f"{self.folder} holds results of {kept}; give another --folder")

    def bits(self, names: Sequence[str], ratio: str, method: str) -> dict[str, float]:
        """Return stored bits a weight of each matrix, whose mean over all weights is the ratio's.

        DiBA's follow `shares` and `tilt`; codes of few levels cannot.
        """
        shares, tilt = (self.args.shares, self.args.tilt) if method == "diba" else (EVEN, 0.0)
        last = max(1, self.dense.layers - 1)
        share, size = {}, {}
        for name in names:
            _, _, layer, kind = name.split(".", 3)
            share[name] = shares[LINEAR.index(kind)] * (1 + tilt * (2 * int(layer) / last - 1))
            size[name] = self.dense.matrices[name].size
        mean = sum(share[name] * size[name] for name in names) / sum(size.values())
        return {name: 32 * float(Fraction(ratio)) * share[name] / mean for name in names}

    def scored(self, key: str, make: Callable[[], Bert]) -> dict[str, Any]:
        """Return the scores kept under `key`, or make the network and judge it."""
        path = self.folder / f"{key}.json"
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text())
            return found
        started = time.process_time()
        net = make()
        seconds = time.process_time() - started
        scores = self.task.score(nf.evaluate(net, self.task))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        found = {"scores": scores, "cpu_seconds": seconds, "peak_mib": round(peak)}
        self.tell(f"{key}: {cells(found['scores'])}, {seconds:.0f} s")
        part = path.with_suffix(".part")
        part.write_text(json.dumps(found))
        part.replace(path)
        return found

    def rows(self, chain: Chain) -> list[dict[str, Any]]:
        """Return what the stages of a chain came to; those that are not kept are run."""
        made = []
        for stage in stages_of(chain[1], self.args.stages):
            what = (*chain, stage)
            if self.args.only_finished and not (self.folder / f"{key_of(*what)}.json").exists():
                continue
            found = self.scored(key_of(*what), lambda what=what: self.stage(*what))
            made.append(
                dict(zip(("variant", "method", "ratio", "stage"), what, strict=True)) | found
            )
        return made

    def tell(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def stage(self, variant: str, method: str, ratio: str, stage: str) -> Bert:
        """Return the network after a stage, from the store or made from the stage before."""
        net = self.task.network()
        names = net.encoder_names(VARIANTS[variant])
        path = self.folder / f"{key_of(variant, method, ratio, stage)}.h5"
        layers, training = path.with_suffix(".layers"), path.with_suffix(".state.npz")

        def tell(line: str) -> None:
            self.tell(f"{path.stem}: {line}")

        if path.exists():
            nf.load(path, net)
            return net
        bits = self.bits(names, ratio, method)
        if stage == "replaced":
            held = self.made_for_all(bits, method, ratio)
            for name in names:
                made = held.get(name)
                if made is None:
                    made = METHODS[method](net.matrices[name], bits[name], **self.how)
                net.replace({name: as_layer(made, net.own[f"{name}.bias"])})
        elif stage == "layer-wise":
            net = self.stage(variant, method, ratio, "replaced")

            def kept(name: str, A: Array, gram: Array, outputs: Array) -> nf.Form:
                return net.made[name].to_matrix()

            self.compress(net, names, kept, refit=True, folder=layers, tell=tell)
        elif stage == "activations":

            def fitted(name: str, A: Array, gram: Array, outputs: Array) -> nf.Form:
                how = {"gram": gram, "output_weight": outputs, **self.how}
                return METHODS[method](A, bits[name], **how)

            self.compress(net, names, fitted, refit=False, folder=layers, tell=tell)
        else:
            net = self.stage(variant, method, ratio, before(method))
            how = {
                "epochs": self.args.epochs,
                "tokens": self.args.tokens,
                "states": self.folder / "taught",
                "path": training,
                "tell": tell,
            }
            self.trained(net, method, bits, self.rows_trained_on(ratio), how)
        nf.save(path, net)
        training.unlink(missing_ok=True)
        shutil.rmtree(layers, ignore_errors=True)
        return net

    def trained(
        self, net: Bert, method: str, bits: Mapping[str, float], rows: Array, how: dict[str, Any]
    ) -> None:
        """Train what a method trains through the whole network, in place."""
        rate = self.args.rate

        def run(rate: float, **more: Any) -> None:
            train(net, self.dense, self.task, rows, rate=rate, **more, **how)

        if method in LATENT:
            for name, layer in net.made.items():
                again = {"latent": True, "weight": net.matrices[name]}
                matrix, bias = layer.to_matrix(), layer.parameters["bias"]
                net.replace({name: as_layer(matrix, bias, **again)})
        if method != "mesa":
            run(rate)
            return
        # numbers under the penalty, then the values that they share
        net.replace({name: layer.uncoded() for name, layer in net.made.items()})
        state: Path = how["path"]
        first = state.with_suffix(".blocks.npz")
        if not first.exists():
            run(rate, penalty=lambda: penalise(net.made.values(), MESA_ALPHA))
            nf.write(first, {name: layer.values() for name, layer in net.made.items()} | net.own)
        with np.load(first, allow_pickle=False) as held:
            for name, layer in net.made.items():
                layer.parameters["blocks"][...] = held[name]
            for name, value in net.own.items():
                value[...] = held[name]
        net.replace({n: layer.quantized(bits=bits[n]) for n, layer in net.made.items()})
        how["path"] = state.with_suffix(".shared.npz")
        run(RETRAINING * rate)
        how["path"].unlink(missing_ok=True)
        first.unlink()

    def made_for_all(
        self, bits: Mapping[str, float], method: str, ratio: str
    ) -> Mapping[str, nf.Form]:
        """Return what was made of all matrices by themselves, if of these bits, or nothing."""
        path = self.folder / f"{key_of('all', method, ratio, 'replaced')}.h5"
        same = bits.items() <= self.bits(self.dense.encoder_names(), ratio, method).items()
        return nf.load_matrices(path) if same and path.exists() else {}

    def tidy(self) -> None:
        """Remove the dense network's hidden states once every stage of the study is there."""
        chains = itertools.product(VARIANTS, OWN, RATIOS)
        keys = (key_of(*what, stage) for what in chains for stage in stages_of(what[1], STAGES))
        if all((self.folder / f"{key}.json").exists() for key in keys):
            for held in ("states", "taught"):
                shutil.rmtree(self.folder / held, ignore_errors=True)

    def matters(self) -> dict[str, nf.Importance]:
        """Return how much tokens and outputs matter in the dense network, found out once."""
        path = self.folder / "importance.npz"
        if not path.exists():
            places = list(batches(self.task.fit, nf.TOKENS, self.read_rows))
            nf.save_importance(path, nf.importance(self.dense, self.task, places))
        return nf.load_importance(path)

    def compress(self, net: Bert, names: Sequence[str], fit: nf.Fit, **how: Any) -> None:
        how |= {"together": self.args.together, "matters": self.matters()}
        if self.args.several:
            how["states"] = self.folder / "states"
        nf.compress(net, self.dense, self.task, self.read_rows, names, fit, **how)


def stages_of(method: str, wanted: Sequence[str]) -> list[str]:
    """Return those of the stages that a method has."""
    return [stage for stage in wanted if stage != "activations" or method in FITTED]


def before(method: str) -> str:
    """Return the stage that end-to-end training starts from."""
    return "activations" if method in FITTED else "layer-wise"


def key_of(variant: str, method: str, ratio: str, stage: str) -> str:
    return f"{variant}-{method}-{ratio.replace('/', '_')}-{stage.replace(' ', '_')}"


def cells(scores: dict[str, Any]) -> str:
    """Return scores as text: percent for accuracies, three digits for cosines."""
    parts = []
    for name, (mean, error) in scores.items():
        if name == "cosine":
            parts.append(f"{mean:.3f} ± {error:.3f}")
        else:
            parts.append(f"{100 * mean:.1f} ± {100 * error:.1f} %")
    return " / ".join(parts)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the table: a row for each variant, method and ratio.

    Seconds are of making the stages shown; memory is the most that the process had until then.
    """
    lines = [
        "| matrices | method | ratio | " + " | ".join(STAGES) + " | CPU s | MiB |",
        "|---|---|---|" + "---|" * (len(STAGES) + 2),
    ]
    seen: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        seen.setdefault((row["variant"], row["method"], row["ratio"]), {})[row["stage"]] = row
    for (variant, method, ratio), stages in seen.items():
        made = [cells(stages[s]["scores"]) if s in stages else "" for s in STAGES]
        seconds = sum(row["cpu_seconds"] for row in stages.values())
        most = max(row["peak_mib"] for row in stages.values())
        told = [variant, LABELS[method], ratio, *made, f"{seconds:.0f}", str(most)]
        lines.append(f"| {' | '.join(told)} |")
    return lines


def draw(path: Path, title: str, dense: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Draw the first score against the ratio: end to end solid, replaced dotted."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("drawing takes an extra: pip install 'diba-np[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    (metric, (level, _)), *_ = dense.items()
    axes.axhline(level, color="0.6", lw=3, label="dense")
    styles = {"end to end": "-o", "activations": "--s", "layer-wise": "-.v", "replaced": ":^"}
    colours = {method: f"C{i}" for i, method in enumerate(METHODS)}
    for (method, colour), (stage, style) in (
        (m, s) for m in colours.items() for s in styles.items()
    ):
        points = [
            (float(Fraction(row["ratio"])), *row["scores"][metric])
            for row in rows
            if (row["variant"], row["method"], row["stage"]) == ("all", method, stage)
        ]
        if points:
            x, y, error = zip(*sorted(points), strict=True)
            name = f"{LABELS[method]}, {stage}"
            axes.errorbar(x, y, yerr=error, fmt=style, color=colour, label=name, capsize=2, ms=4)
    axes.set_xscale("log", base=2)
    axes.set_xticks([float(Fraction(r)) for r in RATIOS], RATIOS)
    axes.set_xlabel("stored bits as a share of float32")
    axes.set_ylabel(metric)
    axes.set_title(title)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def run_side_by_side(study: Study, make: Callable[[], nf.Task], chains: Sequence[Chain]) -> None:
    """Run what is missing of the chains, some at a time, each process with a study of its own."""

    def missing(chain: Chain) -> list[str]:
        stages = stages_of(chain[1], study.args.stages)
        return [s for s in stages if not (study.folder / f"{key_of(*chain, s)}.json").exists()]

    chains = [chain for chain in chains if missing(chain)]
    if any(set(missing(chain)) - {"replaced"} for chain in chains):
        study.matters()  # once, not by each of them
    share = max(1, processors() // study.args.jobs)
    args = argparse.Namespace(**vars(study.args) | {"threads": share})
    with Runner(study.args.jobs, share) as runner:
        found = runner.run(_run_chain, chains, lambda chain: (make, study.folder, args, chain))
        if not all([done for _, done in found]):
            raise SystemExit("not all could be run; what was finished is kept")


_own: list[Study] = []  # of a process that `run_side_by_side` started


def _run_chain(
    make: Callable[[], nf.Task], folder: Path, args: argparse.Namespace, chain: Chain
) -> bool:
    """Run the stages of a chain; return whether all could be run."""
    try:
        if not _own:
            _own.append(Study(make(), folder, args))
        _own[0].rows(chain)
    except Exception:  # the other chains go on
        traceback.print_exc()
        return False
    return True


def chains_of(args: argparse.Namespace) -> list[Chain]:
    """Return what is asked for, without rates that a method cannot use."""
    return [
        chain
        for chain in itertools.product(args.variants, args.methods, args.ratios)
        if 32 * Fraction(chain[2]) <= MOST_BITS.get(chain[1], 32)
    ]


def parser_of(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """Return the options of a study."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--ratios", nargs="+", default=list(RATIOS))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(OWN))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--effort", default="balanced", help="of the searches for bits")
    parser.add_argument("--shift", type=float, default=0.0, help="of DiBA's bits; 0.5: +-1")
    parser.add_argument(
        "--shares",
        type=float,
        nargs=len(LINEAR),
        default=EVEN,
        metavar="S",
        help=f"of DiBA's bits a weight, relative to each other: {', '.join(LINEAR)}",
    )
    parser.add_argument(
        "--tilt", type=float, default=0.0, help="0.2: 0.8 of DiBA's bits at first, 1.2 at last"
    )
    parser.add_argument(
        "--together", type=float, default=0.0, help="0 to 1: errors of a text's tokens add up"
    )
    parser.add_argument("--calibration", type=int, default=300, help="rows read layer by layer")
    parser.add_argument("--rows", type=int, default=1000, help="trained on end to end")
    parser.add_argument(
        "--taper",
        type=float,
        default=1.0,
        metavar="T",
        help="--rows are of one stored bit a weight and less; at b bits 1 / b^T as many",
    )
    parser.add_argument("--mixed", type=int, default=0, help="rows made of others, beside both")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rate", type=float, default=2e-3, help="of Adam, end to end")
    parser.add_argument("--tokens", type=int, default=2048, help="of a step, end to end")
    parser.add_argument("--threads", type=int, help="of the searches; default: all processors")
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
    real: Callable[[], nf.Task],
    made: Callable[[], nf.Task],
) -> tuple[Study, dict[str, Any], list[dict[str, Any]]]:
    """Return a study, the dense network's scores, and the rows that are kept or can be made."""
    if min(args.shares) <= 0 or abs(args.tilt) >= 1:
        parser.error("--shares must be above 0 and --tilt between -1 and 1")
    if not 0 <= args.together <= 1:
        parser.error("--together must be between 0 and 1")
    if args.smoke:
        args.ratios, args.variants, args.calibration = ["1/8"], ["all"], 40
        args.rows, args.epochs, args.tokens, args.rate, args.taper = 40, 10, 100, 5e-4, 0.0
        if args.folder is None:
            parser.error("--smoke needs --folder")
    if args.mixed < 0 or args.taper < 0:
        parser.error("--mixed and --taper must be at least 0")
    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
    chains = chains_of(args)
    args.several = len(chains) > 1
    make = made if args.smoke else real
    task = make()
    study = Study(task, args.folder or cache_folder() / "studies" / task.name, args)
    dense = study.scored("dense", lambda: study.dense)["scores"]
    if args.jobs > 1 and not args.only_finished:
        run_side_by_side(study, make, chains)
    rows = [row for chain in chains for row in study.rows(chain)]
    study.tidy()
    return study, dense, rows


def main(
    description: str, real: Callable[[], nf.Task], made: Callable[[], nf.Task], **defaults: Any
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
        print(f"{task.name}, dense: {cells(dense)}, {len(task.judge)} rows\n")
        print("\n".join(table(rows)))
    if args.plot:
        draw(args.plot, task.title, dense, rows)
    return 0
