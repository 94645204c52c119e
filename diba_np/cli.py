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


def _size_report(factors: DiBAFactors) -> Report:
    m, n = factors.shape
    return {
        "m": m,
        "n": n,
        "k": factors.k,
        "shift": factors.shift,
        "scale_bits": factors.scale_bits,
        "storage_bits": factors.storage_bits(),
        "bits_per_weight": factors.bits_per_weight,
        "storage_ratio": factors.storage_ratio(),
    }


def _size_lines(report: Report) -> list[tuple[str, str]]:
    return [
        ("shape", f"{report['m']} x {report['n']}"),
        ("k", str(report["k"]) + (f" (shift {report['shift']:g})" if report["shift"] else "")),
        (
            "bits per weight",
            f"{report['bits_per_weight']:.4f} "
            f"({report['storage_bits']} bits, {report['scale_bits']}-bit diagonals)",
        ),
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
    from diba_np.factorize import factorize

    factors = factorize(
        matrix,
        k=args.k,
        bits=args.bits,
        ratio=args.ratio,
        snr=args.snr,
        shift=args.shift,
        solver=args.solver,
        effort=args.effort,
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
        "converged": factors.record["converged"],
        "improving_flips_left": factors.record["improving_flips_left"],
        "seconds": factors.record["seconds"],
        "file_bytes": file_bytes,
    }
    lines = [
        *_size_lines(report),
        ("SNR", _decibels(report["snr_db"])),
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
