"""MESA and its five comparisons on MNIST digits: accuracy, average bits, compression rate.

python scripts/study_mesa.py             # the table, several seeds
python scripts/study_mesa.py --select    # the validation runs behind the settings used here
python scripts/study_mesa.py --alphas    # entropy of codes and deltas as alpha grows
python scripts/study_mesa.py --smoke     # a few seconds on drawn digits, no download

The digits are those of `digits.py`, cut by class into 6,000 to fit,
2,000 to validate and 2,000 to test. Settings are chosen on the validation digits alone, by one
rule: the best mean accuracy among those that compress at least 110 times. For the table, networks
are trained on fit and validation digits together and judged on the test digits. Each stream takes
the shorter of Huffman and arithmetic coding (rANS); the rate with Huffman alone stands beside it.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from typing import Any

import numpy as np
from digits import Digits, drawn_digits, load_digits, shift, split
from mesa_pipelines import PIPELINES, Outcome, delta_entropy, run_pipeline

LEAST_RATE = 110.0  # compression that a setting must reach to be chosen

# tried by --select: pipeline, q (2^q values are shared), first step size of Adam, weight of the
# block differences, decay
SETTINGS = [
    *(("FC", 5, 1e-3, 0.0, decay) for decay in (0.0, 0.1, 0.5)),
    *(("MESA", 5, 1e-2, 0.002, decay) for decay in (0.0, 0.03, 0.1)),
    *(("MESA", 5, 1e-2, 0.004, decay) for decay in (0.03, 0.06)),
    *(("MESA", 4, 1e-2, alpha, 0.06) for alpha in (0.001, 0.002, 0.003)),
]

# what it chose: step size and decay of the dense networks, and of those that train blocks
DENSE = {"rate": 1e-3, "decay": 0.5}
BLOCK = {"rate": 1e-2, "decay": 0.06}
ALPHA, Q = 0.002, 4  # 0.003 ties with it on 3 seeds
OTHERS_Q = 5  # of the pipelines beside it


def huffman_rate(made: Outcome) -> float:
    """Return the compression rate with Huffman codes only."""
    if not made.layers:
        return made.compression
    for layer in made.layers:
        layer.coder = "huffman"
    stored = sum(layer.storage_bits() for layer in made.layers)
    return made.compression * made.bits / stored


def select(parts: dict[str, Digits], options: dict[str, Any], seeds: int) -> None:
    """Print what each setting reaches on the validation digits, and the one that the rule takes."""
    data = (*parts["fit"], *parts["validation"])
    print(f"Validation, {seeds} seed(s)")
    print("| pipeline | q | rate | alpha | decay | accuracy % | compression | Huffman alone |")
    print("|---|---|---|---|---|---|---|---|")
    best: dict[str, tuple[float, tuple[float, ...]]] = {"FC": (0.0, ()), "MESA": (0.0, ())}
    for name, q, rate, alpha, decay in SETTINGS:
        made = [
            run_pipeline(name, data, q=q, rate=rate, alpha=alpha, decay=decay, seed=seed, **options)
            for seed in range(seeds)
        ]
        accuracy = 100 * np.array([one.accuracy for one in made])
        rates = np.array([one.compression for one in made])
        plain = np.array([huffman_rate(one) for one in made])
        cells = " | ".join(spread(v, d) for v, d in ((accuracy, 2), (rates, 1), (plain, 1)))
        setting = f"{name} | {q} | {rate:g} | {alpha:g} | {decay:g}"
        print(f"| {setting} | {cells} |", flush=True)
        if name == "FC" or rates.mean() >= LEAST_RATE:
            best[name] = max(best[name], (float(accuracy.mean()), (q, rate, alpha, decay)))
    for name, (accuracy_reached, setting) in best.items():
        print(f"{name}: chosen (q, rate, alpha, decay) = {setting}, {accuracy_reached:.2f} %")


def table(
    parts: dict[str, Digits],
    options: dict[str, Any],
    seeds: int,
    names: list[str],
    q: int,
    alpha: float,
) -> None:
    """Print accuracy, drop from the dense network of the same seed, bits and compression."""
    both = zip(parts["fit"], parts["validation"], strict=True)
    data = (*(np.concatenate(pair) for pair in both), *parts["test"])
    print(
        f"LeNet-300-100, p = (.1, .1, .2), q = {OTHERS_Q}, MESA {q}, alpha = {alpha}; mean ± "
        f"standard error of {seeds} seed(s), {len(data[1])} digits to train, {len(data[3])} to test"
    )
    print(
        "| pipeline | accuracy % | points lost | bits a kept weight | compression "
        "| Huffman alone | processor s |"
    )
    print("|---|---|---|---|---|---|---|")
    dense = [None] * seeds
    reference = None  # nothing is lost against a dense network that was not asked for
    for name in names:
        steps = DENSE if name in ("FC", "FC+Q+H", "DeepC") else BLOCK
        made, started = [], time.process_time()
        for seed in range(seeds):
            how = {"q": q if name == "MESA" else OTHERS_Q, "alpha": alpha, **steps, **options}
            one = run_pipeline(name, data, seed=seed, dense=dense[seed], **how)
            if name == "FC":
                dense[seed] = one.network
            made.append(one)
        accuracy = 100 * np.array([one.accuracy for one in made])
        reference = accuracy if name == "FC" else reference
        seconds = (time.process_time() - started) / seeds
        lost = "" if reference is None else spread(reference - accuracy, 2)
        columns = [np.array([one.average_bits for one in made])]
        columns += [np.array([one.compression for one in made])]
        columns += [np.array([huffman_rate(one) for one in made])]
        digits = (2, 1, 1)
        cells = " | ".join(spread(c, d) for c, d in zip(columns, digits, strict=True))
        print(f"| {name} | {spread(accuracy, 2)} | {lost} | {cells} | {seconds:.0f} |", flush=True)


def spread(values: np.ndarray, digits: int) -> str:
    """Return mean and standard error of the mean."""
    mean = f"{values.mean():.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {values.std(ddof=1) / np.sqrt(len(values)):.{digits}f}"


def alphas(parts: dict[str, Digits], options: dict[str, Any], tried: tuple[float, ...]) -> None:
    """Print the entropy of the codes and of their deltas, bits a symbol, layer by layer."""
    data = (*parts["fit"], *parts["validation"])
    print("| alpha | validation accuracy % | compression | codes -> deltas, layer by layer |")
    print("|---|---|---|---|")
    for alpha in tried:
        made = run_pipeline("MESA", data, q=OTHERS_Q, alpha=alpha, **BLOCK, **options)
        pairs = (delta_entropy(layer) for layer in made.layers)
        text = ", ".join(f"{codes:.2f} -> {deltas:.2f}" for codes, deltas in pairs)
        print(
            f"| {alpha:g} | {100 * made.accuracy:.2f} | {made.compression:.1f} | {text} |",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pipelines", nargs="+", choices=PIPELINES, help="of the table")
    parser.add_argument("--epochs", type=int, default=100, help="of training")
    parser.add_argument("--retrain", type=int, default=15, help="epochs with shared weights")
    parser.add_argument("--q", type=int, help=f"of the table's MESA: 2^q values, by default {Q}")
    parser.add_argument("--alpha", type=float, help=f"of its block differences, {ALPHA} by default")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--select", action="store_true", help="the validation runs")
    instead.add_argument("--alphas", action="store_true", help="the entropies")
    parser.add_argument("--smoke", action="store_true", help="drawn digits, two epochs")
    args = parser.parse_args()
    given = [name for name in ("pipelines", "q", "alpha") if getattr(args, name) is not None]
    if given and (args.select or args.alphas):
        parser.error(f"--{given[0]} is of the table; leave it out, or --select and --alphas")
    of_table = (
        args.pipelines or list(PIPELINES),
        Q if args.q is None else args.q,
        ALPHA if args.alpha is None else args.alpha,
    )
    parts = split(drawn_digits(400) if args.smoke else load_digits())
    options: dict[str, Any] = {"epochs": args.epochs, "retrain": args.retrain, "coder": "auto"}
    if args.smoke:
        options |= {"epochs": 1, "retrain": 1}
        table(parts, options, 2, *of_table)
        alphas(parts, options, (1.0,))
        return 0
    options["augment"] = functools.partial(shift, share=1.0)  # the same for every pipeline
    if args.select:
        select(parts, options, args.seeds)
    elif args.alphas:
        alphas(parts, options, (0.0, 0.01, 0.1, 1.0))
    else:
        table(parts, options, args.seeds, *of_table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
