"""The command line: each subcommand is a thin call of one public function.

Results go to standard output, progress and warnings to standard error. Exit status: 0 done,
1 failed, 2 used wrongly.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diba_np._version import __version__

if TYPE_CHECKING:
    from diba_np.baselines.base import CompressedMatrix
    from diba_np.factors import DiBAFactors

DONE, FAILED = 0, 1

# a larger .npy is mapped and read in row blocks instead of being held in memory
_MAP_BYTES = 1 << 30

Report = dict[str, Any]


class CommandError(Exception):
    """A sentence for the user; the command fails with it and writes nothing."""


# -- arrays and reports ----------------------------------------------------------------------------


def _load_array(path: str) -> Any:
    """Read a .npy file; refuse objects, archives and files shorter than they claim to be."""
    import numpy as np

    if not Path(path).is_file():
        raise CommandError(f"{path}: no such file")
    mode = "r" if Path(path).stat().st_size > _MAP_BYTES else None
    try:
        array = np.load(path, mmap_mode=mode, allow_pickle=False)  # type: ignore[arg-type]
    except (ValueError, EOFError, OSError) as error:
        raise CommandError(f"{path}: not readable as .npy ({error})") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise CommandError(f"{path}: found an archive of arrays, expected one array (.npy)")
    return array


def _check_output(path: Path, force: bool) -> None:
    if path.is_dir():
        raise CommandError(f"{path}: is a folder")
    if path.exists() and not force:
        raise CommandError(f"{path}: exists; pass --force to replace it")
    if not path.parent.is_dir():
        raise CommandError(f"{path.parent}: no such folder")


def _finite(value: Any) -> Any:
    """Replace infinities, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _emit(report: Report, as_json: bool, lines: Sequence[tuple[str, str]]) -> None:
    if as_json:
        print(json.dumps(_finite(report)))
        return
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        print(f"{name:<{width}}  {text}")


def _decibels(value: float | None) -> str:
    return "exact" if value is None or value == math.inf else f"{value:.3f} dB"


def _size_report(made: DiBAFactors | CompressedMatrix) -> Report:
    m, n = made.shape
    report = {"m": m, "n": n, "method": made.method}
    if made.method == "diba":
        report |= {"k": made.k, "shift": made.shift, "scale_bits": made.scale_bits}
    return report | {
        "storage_bits": made.storage_bits(),
        "storage_breakdown": made.storage_breakdown(),
        "bits_per_weight": made.bits_per_weight,
        "storage_ratio": made.storage_ratio(),
    }


def _widths(scale_bits: Any) -> str:
    return "/".join(map(str, scale_bits)) if isinstance(scale_bits, tuple) else str(scale_bits)


def _size_lines(report: Report) -> list[tuple[str, str]]:
    lines = [("shape", f"{report['m']} x {report['n']}")]
    counted = f"{report['storage_bits']} bits"
    if report["method"] == "diba":
        shift = f" (shift {report['shift']:g})" if report["shift"] else ""
        lines.append(("k", f"{report['k']}{shift}"))
        counted += f", {_widths(report['scale_bits'])}-bit diagonals"
    else:
        lines.append(("method", report["method"]))
    return [
        *lines,
        ("bits per weight", f"{report['bits_per_weight']:.4f} ({counted})"),
        (
            "storage ratio",
            f"{report['storage_ratio']:.5f} of float32 (1/{1 / report['storage_ratio']:.1f})",
        ),
    ]


# -- subcommands -----------------------------------------------------------------------------------


def _factorize(args: argparse.Namespace) -> int:
    output = Path(args.output) if args.output else Path(args.matrix).with_suffix(".h5")
    _check_output(output, args.force)
    matrix = _load_array(args.matrix)
    inputs = _load_array(args.inputs) if args.inputs else None
    output_weight = _load_array(args.output_weight) if args.output_weight else None
    from diba_np.factorize import factorize

    factors = factorize(
        matrix,
        k=args.k,
        bits=args.bits,
        ratio=args.ratio,
        snr=args.snr,
        shift=args.shift,
        scale_bits=args.scale_bits,
        solver=args.solver,
        effort=args.effort,
        inputs=inputs,
        output_weight=output_weight,
        seed=args.seed,
        max_sweeps=args.max_sweeps,
        tol=args.tol,
        time_limit=args.time_limit,
        threads=args.threads,
        progress=not args.quiet,
    )
    file_bytes = factors.save(output)
    report = {
        "output": str(output),
        **_size_report(factors),
        "solver": args.solver,
        "seed": args.seed,
        "snr_db": factors.record["snr_db"],
        **({"output_snr_db": factors.record["output_snr_db"]} if args.inputs else {}),
        "converged": factors.record["converged"],
        "improving_flips_left": factors.record["improving_flips_left"],
        "seconds": factors.record["seconds"],
        "file_bytes": file_bytes,
    }
    lines = [
        *_size_lines(report),
        ("SNR", _decibels(report["snr_db"])),
        *([("output SNR", _decibels(report["output_snr_db"]))] if args.inputs else []),
        ("seconds", f"{report['seconds']:.2f}"),
        ("file", f"{output} ({file_bytes} bytes)"),
    ]
    _emit(report, args.json, lines)
    return DONE


def _info(args: argparse.Namespace) -> int:
    from diba_np.store import groups, load

    file_bytes = Path(args.file).stat().st_size if Path(args.file).is_file() else 0
    names = [args.group or ""] if args.group else groups(args.file)
    if not names:
        raise CommandError(f"{args.file}: holds no factorization")
    reports, lines = [], []
    for name in names:
        factors = load(args.file, group=name or None)
        report = {"group": name, **_size_report(factors), "record": factors.record}
        reports.append(report)
        if name:
            lines.append(("group", name))
        lines += _size_lines(report)
        record = factors.record
        if "snr_db" in record:
            lines.append(("SNR when made", _decibels(record["snr_db"])))
        if "output_snr_db" in record:
            lines.append(("output SNR when made", _decibels(record["output_snr_db"])))
        if "solver" in record:
            lines.append(
                (
                    "made by",
                    f"solver {record['solver']}, seed {record.get('seed')}, "
                    f"{record.get('sweeps')} sweeps, {record.get('seconds')} s",
                )
            )
    lines.append(("file", f"{args.file} ({file_bytes} bytes)"))
    _emit(
        {"file": args.file, "file_bytes": file_bytes, "groups": reports}
        if len(reports) > 1
        else {"file": args.file, "file_bytes": file_bytes, **reports[0]},
        args.json,
        lines,
    )
    return DONE


def _write_rows(
    output: Path, shape: tuple[int, ...], dtype: Any, fill: Callable[[Any], None]
) -> int:
    """Write a .npy of that shape through a map that `fill` fills; atomically. Returns its bytes."""
    import numpy as np

    from diba_np.store import atomic_path

    with atomic_path(output) as temporary:
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)
        fill(array)
        array.flush()
        del array
    return output.stat().st_size


def _reconstruct(args: argparse.Namespace) -> int:
    output = Path(args.output)
    _check_output(output, args.force)
    import numpy as np

    from diba_np.metrics import row_blocks
    from diba_np.store import load

    factors = load(args.file, group=args.group)

    def fill(array: Any) -> None:
        expand = factors.row_expander()
        for rows in row_blocks(factors.shape):
            array[rows] = expand(rows)

    file_bytes = _write_rows(output, factors.shape, np.float32, fill)
    report = {
        "output": str(output),
        "shape": list(factors.shape),
        "dtype": "float32",
        "file_bytes": file_bytes,
    }
    m, n = factors.shape
    _emit(report, args.json, [("shape", f"{m} x {n}"), ("file", f"{output} ({file_bytes} bytes)")])
    return DONE


def _apply(args: argparse.Namespace) -> int:
    output = Path(args.output)
    _check_output(output, args.force)
    inputs = _load_array(args.inputs)
    from diba_np.metrics import row_blocks
    from diba_np.store import load

    factors = load(args.file, group=args.group)
    operator = factors.T if args.transpose else factors
    width = operator.shape[1]
    if inputs.dtype.kind not in "buif":
        raise CommandError(f"{args.inputs}: found dtype {inputs.dtype}, expected real numbers")
    if inputs.ndim == 0 or inputs.shape[-1] != width:
        raise CommandError(
            f"{args.inputs}: found shape {inputs.shape}, expected ({width},) or (..., {width}), "
            "one vector a row"
        )
    rows_of = inputs.reshape(-1, width)
    shape = (*inputs.shape[:-1], operator.shape[0])

    def fill(array: Any) -> None:
        flat = array.reshape(-1, operator.shape[0])
        for rows in row_blocks(rows_of.shape):
            flat[rows] = operator.matmat(rows_of[rows].T).T

    import numpy as np

    file_bytes = _write_rows(output, shape, np.result_type(np.float32, inputs.dtype), fill)
    report = {"output": str(output), "shape": list(shape), "file_bytes": file_bytes}
    _emit(
        report,
        args.json,
        [("shape", " x ".join(map(str, shape))), ("file", f"{output} ({file_bytes} bytes)")],
    )
    return DONE


def _verify(args: argparse.Namespace) -> int:
    from diba_np.store import groups, load

    names = [args.group] if args.group else groups(args.file)
    if not names:
        raise CommandError(f"{args.file}: holds no factorization")
    if args.matrix and len(names) > 1:
        raise CommandError(f"{args.file}: holds {len(names)} factorizations; name one with --group")
    loaded = [load(args.file, group=name or None) for name in names]
    report: Report = {"file": args.file, "ok": True, "checked": names}
    lines = [("file", f"{args.file}: intact, {len(names)} factorization(s) checked")]
    if args.matrix:
        from diba_np.search.target import as_matrix, digest

        factors = loaded[0]
        matrix = as_matrix(_load_array(args.matrix))
        if matrix.shape != factors.shape:
            raise CommandError(
                f"{args.matrix}: found shape {matrix.shape}, expected {factors.shape}"
            )
        source = factors.record.get("source", {}).get("sha256")
        same = None if source is None else source == digest(matrix)
        snr = factors.snr(matrix)
        report |= {"same_source": same, "snr_db": snr, "ok": same is not False}
        told = {None: "not recorded", True: "the matrix it was made from"}.get(
            same, "NOT the matrix it was made from"
        )
        lines += [("source", told), ("SNR", _decibels(snr))]
    _emit(report, args.json, lines)
    return DONE if report["ok"] else FAILED


def _compare(args: argparse.Namespace) -> int:
    plot = Path(args.plot) if args.plot else None
    if plot is not None:
        _check_output(plot, args.force)
        from diba_np.report import check_matplotlib

        try:
            check_matplotlib()
        except ImportError as error:
            raise CommandError(str(error)) from error
    matrix = _load_array(args.matrix)
    inputs = _load_array(args.inputs) if args.inputs else None
    from dataclasses import asdict

    from diba_np.compare import compare, format_table

    methods = "all" if args.methods == ["all"] else args.methods
    rows = compare(matrix, args.bits, methods, inputs=inputs, jobs=args.jobs, seed=args.seed)
    made = [row for row in rows if not row.error]
    if plot is not None and made:
        from diba_np.report import plot_comparison
        from diba_np.store import atomic_path

        with atomic_path(plot) as temporary:
            title = f"{Path(args.matrix).name}, {matrix.shape[0]} × {matrix.shape[1]}"
            quality = "snr" if inputs is None else "output_snr"
            kind = plot.suffix.lstrip(".") or "png"
            plot_comparison(made, temporary, quality, title, kind)
    if args.json:
        m, n = matrix.shape
        report = {"matrix": args.matrix, "m": m, "n": n, "rows": [asdict(row) for row in rows]}
        print(json.dumps(_finite(report)))
    else:
        print(format_table(rows))
    return DONE if made else FAILED


def _warmup(args: argparse.Namespace) -> int:
    from diba_np.warmup import warm_up

    report = warm_up()
    kept = report["cache"] or "nothing is kept (no cache, or no folder that can be written)"
    lines = [
        ("kernel path", report["path"]),
        ("16-bit tables", "yes" if report["rounded"] else "no (needs AVX-512 BW and VNNI)"),
        ("seconds", f"{report['seconds']:.2f}"),
        ("cache", kept),
    ]
    _emit(report, args.json, lines)
    return DONE


# -- parser ----------------------------------------------------------------------------------------


def _positive(kind: type) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not (value > 0 and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return value

    parse.__name__ = kind.__name__  # what argparse calls it in "invalid int value"
    return parse


def _scale_bits(text: str) -> Any:
    """Parse 16, 32, a code width, three of them as in 4,3,4, or auto."""
    parts = text.split(",")
    if text == "auto":
        return text
    return int(text) if len(parts) == 1 else tuple(int(part) for part in parts)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of ``diba-np``; importing nothing heavy."""
    parser = argparse.ArgumentParser(
        prog="diba-np",
        description="Factorize a dense matrix into three diagonals and two 0/1 matrices, "
        "A ~ D1 B1 D2 B2 D3, and use the result.",
    )
    parser.add_argument("--version", action="version", version=f"diba-np {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object")
    writes = argparse.ArgumentParser(add_help=False)
    writes.add_argument("--force", action="store_true", help="replace an existing output")
    reads = argparse.ArgumentParser(add_help=False)
    reads.add_argument("file", metavar="A.h5", help="a stored factorization")
    reads.add_argument("--group", help="the group that holds it, in a file of many")

    command = commands.add_parser(
        "factorize", parents=[common, writes], help="factorize a .npy matrix"
    )
    command.add_argument("matrix", metavar="A.npy")
    command.add_argument("-o", "--output", metavar="A.h5", help="default: beside the matrix")
    size = command.add_mutually_exclusive_group(required=True)
    size.add_argument("--k", type=_positive(int), help="intermediate dimension")
    size.add_argument("--bits", type=_positive(float), help="stored bits per weight, all counted")
    size.add_argument("--ratio", type=_positive(float), help="share of the dense float32 size")
    size.add_argument("--snr", type=float, help="smallest k that reaches this many dB")
    command.add_argument("--shift", type=float, default=0.0, help="0: bits are 0/1; 0.5: +-1/2")
    command.add_argument(
        "--scale-bits",
        type=_scale_bits,
        default=16,
        metavar="BITS",
        help="bits of a diagonal's entry: 16, 32, a code of 2 to 8, three codes as 4,3,4, or auto",
    )
    command.add_argument(
        "--inputs", metavar="X.npy", help="(N, n), one sample a row: fit the outputs for these"
    )
    command.add_argument(
        "--output-weight", metavar="w.npy", help="(m,) weights of the outputs' squared errors"
    )
    command.add_argument("--solver", choices=("auto", "greedy"), default="auto")
    command.add_argument("--effort", choices=("fast", "balanced", "best"), default="balanced")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--max-sweeps", type=_positive(int), metavar="N")
    command.add_argument("--tol", type=float)
    command.add_argument("--time-limit", type=_positive(float), metavar="SECONDS")
    command.add_argument("--threads", type=_positive(int), metavar="N")
    command.add_argument("--quiet", action="store_true", help="no progress on standard error")
    command.set_defaults(run=_factorize)

    command = commands.add_parser("info", parents=[common, reads], help="what a file holds")
    command.set_defaults(run=_info)

    command = commands.add_parser(
        "reconstruct", parents=[common, writes, reads], help="expand to a dense .npy"
    )
    command.add_argument("-o", "--output", metavar="A_hat.npy", required=True)
    command.set_defaults(run=_reconstruct)

    command = commands.add_parser(
        "apply", parents=[common, writes, reads], help="multiply vectors, one a row: Y = X A^T"
    )
    command.add_argument("inputs", metavar="X.npy", help="(n,) or (..., n)")
    command.add_argument("-o", "--output", metavar="Y.npy", required=True)
    command.add_argument("--transpose", action="store_true", help="Y = X A instead")
    command.set_defaults(run=_apply)

    command = commands.add_parser(
        "verify", parents=[common, reads], help="check a file, and against its matrix"
    )
    command.add_argument("matrix", metavar="A.npy", nargs="?")
    command.set_defaults(run=_verify)

    command = commands.add_parser(
        "compare", parents=[common, writes], help="every method on one .npy matrix at equal bits"
    )
    command.add_argument("matrix", metavar="A.npy")
    command.add_argument(
        "--bits",
        type=_positive(float),
        nargs="+",
        required=True,
        metavar="R",
        help="stored bits per weight, all counted",
    )
    command.add_argument(
        "--methods", nargs="+", default=["all"], metavar="NAME", help="default: all of them"
    )
    command.add_argument(
        "--inputs", metavar="X.npy", help="cached inputs, one a row; a quarter judges the outputs"
    )
    command.add_argument("--jobs", type=_positive(int), default=1, metavar="N", help="processes")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--plot", metavar="OUT.png", help="draw SNR against bits (matplotlib)")
    command.set_defaults(run=_compare)

    command = commands.add_parser(
        "warmup", parents=[common], help="compile now what the first use would wait for"
    )
    command.set_defaults(run=_warmup)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    args = build_parser().parse_args(argv)

    def note(message: Any, *_: Any, **__: Any) -> None:
        sys.stderr.write(f"diba-np: note: {message}\n")

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = note
            return int(args.run(args))
    except KeyboardInterrupt:
        sys.stderr.write("diba-np: interrupted, nothing written\n")
    except (CommandError, ValueError, TypeError, OSError, MemoryError) as error:
        sys.stderr.write(f"diba-np: error: {error or type(error).__name__}\n")
    return FAILED
