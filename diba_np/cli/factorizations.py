"""Subcommands of one matrix: ``factorize``, ``info``, ``retune``, ``reconstruct``, ``apply``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diba_np.cli.options import (
    MATRIX,
    add_search_options,
    positive,
    search_options,
    share,
    within,
)
from diba_np.cli.output import (
    DONE,
    CommandError,
    check_dense,
    check_not_read,
    check_output,
    decibels_text,
    emit,
    load_array,
    shape_in_model,
    shape_text,
    size_lines,
    size_report,
    write_file,
)
from diba_np.cli.parser import Parents

OUTPUT = "file to write; - for standard output (the report then goes to standard error)"

EXAMPLES = {
    "factorize": (
        "diba-np factorize A.npy --bits 1.0 -o A.h5",
        "diba-np factorize A.npy --snr 10 --effort best",
        "diba-np factorize A.npy --bits 2 --inputs X.npy --json",
    ),
    "info": ("diba-np info A.h5", "diba-np info model.h5 --group layer.0 --json"),
    "retune": ("diba-np retune A.h5 --inputs X.npy --targets Y.npy -o B.h5",),
    "reconstruct": (
        "diba-np reconstruct A.h5 -o A_hat.npy",
        "diba-np reconstruct A.h5 -o - > A_hat.npy",
    ),
    "apply": (
        "diba-np apply A.h5 X.npy -o Y.npy",
        "diba-np apply A.h5 X.npy --transpose -o - > Y.npy",
    ),
}


def add_factorize(subcommands: Any, given: Parents) -> None:
    """Add the command that makes a factorization."""
    command = subcommands.add_parser(
        "factorize", parents=[given.common, given.writes], help="factorize a .npy matrix"
    )
    command.add_argument("matrix", metavar="A.npy", help=MATRIX)
    command.add_argument("-o", "--output", metavar="A.h5", help="default: beside the matrix")
    size = command.add_mutually_exclusive_group(required=True)
    size.add_argument("--k", type=positive(int), help="intermediate dimension")
    size.add_argument("--bits", type=positive(float), help="stored bits per weight, all counted")
    size.add_argument("--ratio", type=share, help="share of the dense float32 size, as 1/16")
    size.add_argument(
        "--snr",
        type=within(float, -sys.float_info.max),
        help="smallest k that reaches this many dB",
    )
    command.add_argument(
        "--inputs", metavar="X.npy", help="(N, n), one sample a row: fit the outputs for these"
    )
    command.add_argument(
        "--output-weight",
        metavar="w.npy",
        help="(m,) weights of the outputs' squared errors, or (m, m) of their products",
    )
    add_search_options(command)
    command.add_argument(
        "--checkpoint", metavar="PATH", help="keep the state here; go on from it if it is there"
    )
    command.add_argument(
        "--checkpoint-every",
        type=positive(float),
        metavar="SECONDS",
        help="between two states kept; default: 60",
    )
    command.add_argument("--quiet", action="store_true", help="no progress on standard error")
    command.set_defaults(run=run_factorize)


def add_stored(subcommands: Any, given: Parents) -> None:
    """Add the commands of what is stored: info, retune, reconstruct, apply."""
    command = subcommands.add_parser(
        "info", parents=[given.common, given.reads], help="what a file holds"
    )
    command.set_defaults(run=run_info)

    command = subcommands.add_parser(
        "retune", parents=[*given], help="refit the diagonals to data; bits stay"
    )
    command.add_argument("--inputs", metavar="X.npy", required=True, help="(N, n), one a row")
    command.add_argument("--targets", metavar="Y.npy", required=True, help="(N, m), or (N,) labels")
    command.add_argument("-o", "--output", metavar="B.h5", required=True, help="file to write")
    command.add_argument(
        "--loss", choices=("mse", "cross_entropy"), default="mse", help="of outputs"
    )
    command.add_argument(
        "--method", choices=("als", "lbfgs", "adam"), help="default: als for mse, else adam"
    )
    command.add_argument("--no-bias", action="store_true", help="fit no bias")
    command.add_argument(
        "--steps",
        type=positive(int),
        metavar="N",
        help="most steps; default: 30 of als, 100 of lbfgs, 20 epochs of adam",
    )
    command.add_argument(
        "--batch-size", type=positive(int), default=256, metavar="N", help="samples"
    )
    command.add_argument("--learning-rate", type=positive(float), default=5e-3, help="of adam")
    command.add_argument(
        "--schedule", choices=("cosine", "constant"), default="cosine", help="of adam's rate"
    )
    command.add_argument("--clip", type=positive(float), help="largest norm of adam's gradient")
    command.add_argument(
        "--patience",
        type=positive(int),
        default=5,
        metavar="STEPS",
        help="end after so many without a gain",
    )
    command.add_argument(
        "--stay", type=within(float, 0), default=0.0, help="weight on staying near the start"
    )
    command.add_argument(
        "--validation", type=float, default=0.1, help="share of samples that judge"
    )
    command.add_argument("--seed", type=within(int, 0), default=0, help="of samples drawn")
    command.add_argument(
        "--threads", type=positive(int), metavar="N", help="default: all of Numba's"
    )
    command.set_defaults(run=run_retune)

    command = subcommands.add_parser("reconstruct", parents=[*given], help="expand to a dense .npy")
    command.add_argument("-o", "--output", metavar="A_hat.npy", required=True, help=OUTPUT)
    command.set_defaults(run=run_reconstruct)

    command = subcommands.add_parser(
        "apply",
        parents=[*given],
        help="multiply vectors, one a row: Y = X A^T, plus the bias if there is one",
    )
    command.add_argument("inputs", metavar="X.npy", help="(n,) or (..., n)")
    command.add_argument("-o", "--output", metavar="Y.npy", required=True, help=OUTPUT)
    command.add_argument("--transpose", action="store_true", help="Y = X A instead")
    command.set_defaults(run=run_apply)


def run_factorize(args: argparse.Namespace) -> int:
    """Factorize a .npy matrix, store it and report its sizes and quality."""
    check_dense(args.matrix)  # before the output, which may be the same file
    if not args.output and not Path(args.matrix).is_file():
        raise CommandError(f"{args.matrix}: is no file to write beside; name one with --output")
    output = Path(args.output) if args.output else Path(args.matrix).with_suffix(".h5")
    read = [args.matrix, args.inputs, args.output_weight]
    check_output(output, args.force, streams=False, inputs=read)
    if args.checkpoint_every is not None and not args.checkpoint:
        raise CommandError("--checkpoint-every needs a file; give --checkpoint too")
    if args.checkpoint:
        checkpoint = Path(args.checkpoint)
        if checkpoint.exists() and not checkpoint.is_file():
            raise CommandError(f"{checkpoint}: is no file; a checkpoint is kept in one")
        if checkpoint.resolve() == output.resolve():
            raise CommandError(f"{output}: --checkpoint and --output must be two files")
        check_not_read(checkpoint, read)
    matrix = load_array(args.matrix, mapped=args.block_rows is not None)
    inputs = load_array(args.inputs) if args.inputs else None
    output_weight = load_array(args.output_weight) if args.output_weight else None
    from diba_np.files.checkpoint import EVERY, Checkpoint
    from diba_np.search.factorization import factorize

    every = args.checkpoint_every or EVERY
    keeper = Checkpoint(args.checkpoint, every) if args.checkpoint else None
    args.keeper = keeper  # for what an interruption tells
    factors = factorize(
        matrix,
        k=args.k,
        bits=args.bits,
        ratio=args.ratio,
        snr=args.snr,
        inputs=inputs,
        output_weight=output_weight,
        progress=not args.quiet,
        checkpoint=keeper,
        **search_options(args),
    )
    file_bytes = factors.save(output)
    if keeper is not None:
        keeper.remove()
    report = {
        "output": str(output),
        **size_report(factors),
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
        *size_lines(report),
        ("SNR", decibels_text(report["snr_db"])),
        *([("output SNR", decibels_text(report["output_snr_db"]))] if args.inputs else []),
        ("seconds", f"{report['seconds']:.2f}"),
        ("file", f"{output} ({file_bytes} bytes)"),
    ]
    emit(report, args.json, lines)
    return DONE


def run_info(args: argparse.Namespace) -> int:
    """Report what a file holds."""
    from diba_np.files.container import groups
    from diba_np.matrix.files import load
    from diba_np.models.file import is_model

    if not args.group and is_model(args.file):
        from diba_np.cli.models import info_model
        from diba_np.networks.file import is_network

        if is_network(args.file):
            from diba_np.cli.networks import info_network

            return info_network(args)
        return info_model(args)
    file_bytes = Path(args.file).stat().st_size if Path(args.file).is_file() else 0
    names = [args.group] if args.group else groups(args.file)
    if not names:
        raise CommandError(f"{args.file}: holds no factorization")
    reports, lines = [], []
    for name in names:
        factors = load(args.file, group=name or None)
        report = {"group": name, **size_report(factors), "record": factors.record}
        reports.append(report)
        if name:
            lines.append(("group", name))
        lines += size_lines(report)
        record = factors.record
        if "snr_db" in record:
            lines.append(("SNR when made", decibels_text(record["snr_db"])))
        if "output_snr_db" in record:
            lines.append(("output SNR when made", decibels_text(record["output_snr_db"])))
        if "solver" in record:
            lines.append(
                (
                    "made by",
                    f"solver {record['solver']}, seed {record.get('seed')}, "
                    f"{record.get('sweeps')} sweeps, {record.get('seconds')} s",
                )
            )
    lines.append(("file", f"{args.file} ({file_bytes} bytes)"))
    emit(
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

    from diba_np.files.atomic import reserve

    def write(path: Path) -> None:
        array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        reserve(path, path.stat().st_size, path)
        fill(array)
        array.flush()

    return write_file(output, write)


def run_retune(args: argparse.Namespace) -> int:
    """Refit the diagonals of a stored factorization to data."""
    output = Path(args.output)
    check_output(output, args.force, streams=False, inputs=[args.inputs, args.targets])
    if output.exists() and output.samefile(args.file):
        from diba_np.files.container import groups

        if args.group or len(groups(args.file)) > 1:
            raise CommandError(
                f"{output}: would replace the file with all its groups; name another"
            )
    inputs, targets = load_array(args.inputs), load_array(args.targets)
    from diba_np.layers.dibard import retune
    from diba_np.matrix.factors import DiBAFactors

    result = retune(
        DiBAFactors.load(args.file, group=args.group),
        inputs,
        targets,
        loss=args.loss,
        bias=not args.no_bias,
        method=args.method,
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        schedule=args.schedule,
        clip=args.clip,
        stay=args.stay,
        validation=args.validation,
        patience=args.patience,
        seed=args.seed,
        threads=args.threads,
    )
    file_bytes = result.save(output)
    facts = result.record["retune"]
    figures = {("fitted_by" if name == "method" else name): value for name, value in facts.items()}
    report = {"output": str(output), **figures, **size_report(result), "file_bytes": file_bytes}
    lines = [
        ("loss", f"{facts['loss_before']:.6g} before, {facts['loss_after']:.6g} after"),
        ("method", f"{facts['method']}, {facts['steps']} steps"),
        ("samples", f"{facts['samples']}, of which {facts['held_out']} judge"),
        ("seconds", f"{facts['seconds']:.2f}"),
        ("file", f"{output} ({file_bytes} bytes)"),
    ]
    emit(report, args.json, lines)
    return DONE


def run_reconstruct(args: argparse.Namespace) -> int:
    """Expand a stored matrix to a dense .npy."""
    output = Path(args.output)
    check_output(output, args.force, inputs=[args.file])
    from diba_np.matrix.files import load

    matrix = load(args.file, group=args.group)
    own_shape, dtype = matrix.array_form()
    shape = shape_in_model(args.file, args.group) or own_shape
    file_bytes = _write_rows(output, shape, dtype, matrix.fill)
    report = {
        "output": str(output),
        "shape": list(shape),
        "dtype": str(dtype),
        "file_bytes": file_bytes,
    }
    lines = [
        ("shape", shape_text(shape)),
        ("file", f"{output} ({file_bytes} bytes)"),
    ]
    emit(report, args.json, lines, output)
    return DONE


def run_apply(args: argparse.Namespace) -> int:
    """Multiply the vectors of a .npy with a stored matrix."""
    output = Path(args.output)
    check_output(output, args.force, inputs=[args.file, args.inputs])
    from diba_np.arrays import row_blocks
    from diba_np.checks import as_real
    from diba_np.matrix.files import load

    inputs = as_real(load_array(args.inputs), args.inputs)

    factors = load(args.file, group=args.group)
    operator = factors.T if args.transpose else factors
    width = operator.shape[1]
    if inputs.ndim == 0 or inputs.shape[-1] != width:
        raise CommandError(
            f"{args.inputs}: found shape {inputs.shape}, expected ({width},) or (..., {width}), "
            "one vector a row"
        )
    rows_of = inputs.reshape(-1, width)
    bias = None if args.transpose else getattr(factors, "bias", None)
    shape = (*inputs.shape[:-1], operator.shape[0])

    def fill(array: Any) -> None:
        flat = array.reshape(-1, operator.shape[0])
        for rows in row_blocks(rows_of.shape):
            flat[rows] = operator.matmat(rows_of[rows].T).T
            if bias is not None:
                flat[rows] += bias

    import numpy as np

    file_bytes = _write_rows(output, shape, np.result_type(np.float32, inputs.dtype), fill)
    report = {"output": str(output), "shape": list(shape), "file_bytes": file_bytes}
    emit(
        report,
        args.json,
        [("shape", shape_text(shape)), ("file", f"{output} ({file_bytes} bytes)")],
        output,
    )
    return DONE
