"""The subcommands that draw rate against quality: compare and sweep."""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diba_np.cli.options import (
    MATRIX,
    SWEPT,
    add_search_options,
    positive,
    search_options,
    within,
)
from diba_np.cli.output import (
    DONE,
    FAILED,
    CommandError,
    Report,
    check_drawing,
    check_output,
    finite,
    load_array,
    size_report,
)
from diba_np.cli.parser import Parents
from diba_np.machine.display import shown
from diba_np.methods import LABELS

if TYPE_CHECKING:
    from diba_np.methods.comparison import Row

EXAMPLES = {
    "compare": (
        "diba-np compare A.npy --bits 1 2 4",
        "diba-np compare A.npy --bits 1 --methods diba dbf rtn --plot out.png",
        "diba-np compare A.npy --bits 1 2 3 --recommend",
    ),
    "sweep": (
        "diba-np sweep A.npy --bits 0.5 1 2 4",
        "diba-np sweep A.npy --plot curve.png -o curve.h5",
    ),
}


def add_compare(subcommands: Any, given: Parents) -> None:
    """Add the command that compares methods."""
    command = subcommands.add_parser(
        "compare",
        parents=[given.common, given.writes],
        help="every method on one .npy matrix at equal bits",
    )
    command.add_argument("matrix", metavar="A.npy", help=MATRIX)
    command.add_argument(
        "--bits",
        type=positive(float),
        nargs="+",
        required=True,
        metavar="R",
        help="stored bits per weight, all counted",
    )
    command.add_argument(
        "--methods",
        choices=("all", *LABELS),
        nargs="+",
        default=["all"],
        metavar="NAME",
        help=f"among {', '.join(LABELS)}; default: all",
    )
    command.add_argument(
        "--inputs", metavar="X.npy", help="cached inputs, one a row; a quarter judges the outputs"
    )
    command.add_argument("--jobs", type=positive(int), default=1, metavar="N", help="processes")
    command.add_argument("--seed", type=within(int, 0), default=0, help="of all that is drawn")
    command.add_argument("--plot", metavar="OUT.png", help="draw SNR against bits (matplotlib)")
    command.add_argument(
        "--recommend",
        action="store_true",
        help="only one line a rate: the best method, its lead, whether it has to decode",
    )
    command.add_argument("--quiet", action="store_true", help="no progress on standard error")
    command.set_defaults(run=run_compare)


def add_sweep(subcommands: Any, given: Parents) -> None:
    """Add the command of the rate-distortion curve."""
    command = subcommands.add_parser(
        "sweep",
        parents=[given.common, given.writes],
        help="the rate-distortion curve of a .npy matrix",
    )
    command.add_argument("matrix", metavar="A.npy", help=MATRIX)
    command.add_argument(
        "--bits",
        type=positive(float),
        nargs="+",
        default=[0.5, 1.0, 2.0, 4.0],
        metavar="R",
        help="stored bits per weight, all counted; default: 0.5 1 2 4",
    )
    command.add_argument(
        "-o", "--output", metavar="A.h5", help="keep each factorization, in a group a rate"
    )
    command.add_argument("--plot", metavar="OUT.png", help="draw SNR against bits (matplotlib)")
    command.add_argument(
        "--inputs", metavar="X.npy", help="(N, n), one sample a row: fit the outputs for these"
    )
    add_search_options(command, *SWEPT, effort="fast", scale_bits="auto")
    command.add_argument("--quiet", action="store_true", help="no progress on standard error")
    command.set_defaults(run=run_sweep)


def _check_plot(name: str | None, force: bool, inputs: Sequence[str | None]) -> Path | None:
    """Return the path of a picture that can be drawn and written, or None if none is wanted."""
    if not name:
        return None
    check_output(Path(name), force, streams=False, inputs=inputs)
    check_drawing(Path(name))
    return Path(name)


def _draw_rates(plot: Path, rows: Sequence[Row], matrix: str, with_inputs: bool) -> None:
    """Draw rate against quality into a picture, atomically, if there is any to draw."""
    from diba_np.files.atomic import atomic_path
    from diba_np.report.curves import plot_comparison

    quality = "output_snr" if with_inputs else "snr"
    if not any(math.isfinite(getattr(row, quality)) for row in rows):
        warnings.warn(f"{plot}: not drawn, no fit has a finite SNR", UserWarning, stacklevel=2)
        return
    with atomic_path(plot) as temporary:
        kind = plot.suffix.lstrip(".") or "png"
        plot_comparison(rows, temporary, quality, matrix, kind)


def _tell_progress(line: str, quiet: bool) -> None:
    """Show somebody who waits that there is progress, and what an interruption would lose."""
    if not quiet and sys.stderr.isatty():
        sys.stderr.write(f"{line}\n")


def run_sweep(args: argparse.Namespace) -> int:
    """Factorize a .npy matrix at several rates: its rate-distortion curve."""
    plot = _check_plot(args.plot, args.force, [args.matrix, args.inputs])
    output = Path(args.output) if args.output else None
    if output is not None:
        check_output(output, args.force, streams=False, inputs=[args.matrix, args.inputs])
        if plot is not None and plot.resolve() == output.resolve():
            raise CommandError(f"{output}: --plot and --output must be two files")
    matrix = load_array(args.matrix)
    inputs = load_array(args.inputs) if args.inputs else None
    from diba_np.methods.comparison import Row
    from diba_np.search.rates import sweep

    factors = sweep(
        matrix,
        args.bits,
        inputs=inputs,
        **search_options(args, *SWEPT),
        callback=lambda f: _tell_progress(
            f"{f.bits_per_weight:.4g} bits: {_short_decibels(f.record['snr_db']).strip()} dB, "
            f"{f.record['seconds']:.1f} s",
            args.quiet,
        ),
    )
    targets = sorted(set(args.bits))
    points = [
        {
            "target_bits": target,
            "bits_per_weight": f.bits_per_weight,
            "k": f.k,
            "scale_bits": size_report(f)["scale_bits"],
            "snr_db": f.record["snr_db"],
            **({} if inputs is None else {"output_snr_db": f.record["output_snr_db"]}),
            "seconds": f.record["seconds"],
        }
        for target, f in zip(targets, factors, strict=True)
    ]
    if output is not None:
        from diba_np.files.atomic import atomic_path

        with atomic_path(output) as temporary:
            temporary.unlink()  # `save` adds groups to a file that is there, and makes a new one
            for point, f in zip(points, factors, strict=True):
                point["group"] = _group_of(point["target_bits"])
                f.save(temporary, group=point["group"])
    report: Report = {"matrix": args.matrix, "m": matrix.shape[0], "n": matrix.shape[1]}
    report |= {"output": args.output, "rows": points}
    if args.json:
        print(json.dumps(finite(report)))
    else:
        _print_curve(points, inputs is not None)
    if plot is not None:  # after the figures, which a picture that fails must not cost
        rows = [
            Row(
                "diba",
                point["target_bits"],
                point["bits_per_weight"],
                snr=_number(point["snr_db"]),
                output_snr=_number(point.get("output_snr_db")),
            )
            for point in points
        ]
        _draw_rates(plot, rows, _title(args.matrix, matrix), inputs is not None)
    return DONE


def _number(decibels: float | None) -> float:
    return math.inf if decibels is None else decibels


def _print_curve(points: Sequence[dict[str, Any]], inputs: bool) -> None:
    """Print one line a rate."""
    head = f"{'target':>6} {'bits/w':>7} {'k':>6} {'SNR dB':>7}"
    print(head + (f" {'out dB':>7}" if inputs else "") + f" {'seconds':>8}")
    for point in points:
        line = f"{point['target_bits']:6.3g} {point['bits_per_weight']:7.4f} {point['k']:6d}"
        line += f" {_short_decibels(point['snr_db'])}"
        line += f" {_short_decibels(point['output_snr_db'])}" if inputs else ""
        print(f"{line} {point['seconds']:8.2f}")


def _group_of(target: float) -> str:
    """Return the group that keeps the factorization of a rate.

    >>> _group_of(2.0), _group_of(0.5), _group_of(2.0000001)
    ('bits_2', 'bits_0.5', 'bits_2.0000001')
    """
    return f"bits_{target!r}".removesuffix(".0")  # rounded, two rates could have one group


def _short_decibels(value: float | None) -> str:
    return f"{'exact':>7}" if value is None or value == math.inf else f"{value:7.2f}"


def _title(path: str, matrix: Any) -> str:
    return shown(f"{Path(path).name}, {matrix.shape[0]} × {matrix.shape[1]}")


def run_compare(args: argparse.Namespace) -> int:
    """Fit every method to a .npy matrix at equal bits."""
    plot = _check_plot(args.plot, args.force, [args.matrix, args.inputs])
    matrix = load_array(args.matrix)
    inputs = load_array(args.inputs) if args.inputs else None
    from dataclasses import asdict

    from diba_np.methods.comparison import compare, format_table, recommend

    methods = "all" if "all" in args.methods else list(dict.fromkeys(args.methods))

    def tell(row: Row) -> None:
        outcome = row.error or f"{row.snr:.2f} dB, {row.fit_seconds:.1f} s"
        _tell_progress(f"{row.method} at {row.target_bits:g} bits: {outcome}", args.quiet)

    options = {"inputs": inputs, "jobs": args.jobs, "seed": args.seed}
    rows = compare(matrix, list(dict.fromkeys(args.bits)), methods, callback=tell, **options)
    complete = [row for row in rows if not row.error]
    if args.json:
        m, n = matrix.shape
        report = {"matrix": args.matrix, "m": m, "n": n, "rows": [asdict(row) for row in rows]}
        if args.recommend:
            report["recommended"] = recommend(rows)
        print(json.dumps(finite(report)))
    elif args.recommend:
        print("\n".join(recommend(rows)))
    else:
        print(format_table(rows))
    if plot is not None and complete:  # after the figures, as in a sweep
        _draw_rates(plot, complete, _title(args.matrix, matrix), inputs is not None)
    return DONE if complete else FAILED
