"""The command line: each subcommand is a thin call of one public function.

Results go to standard output, progress and warnings to standard error. Exit status: 0 done,
1 failed, 2 used wrongly.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diba_np._version import __version__
from diba_np.cli import factorizations, networks, rates, views
from diba_np.cli.options import (
    SHARED,
    SWEPT,
    add_search_options,
    positive,
    share,
    within,
)
from diba_np.cli.output import FAILED, CommandError, in_options, sentence
from diba_np.cli.parser import SHELLS, Parser, examples
from diba_np.cli.signals import Terminated, interruptible
from diba_np.cli.streams import BROKEN_PIPE, any_text, complain, drop, flushed

OUTPUT = "file to write; - for standard output (the report then goes to standard error)"

# subcommand -> commands that its help page shows; "" is the page of the program
EXAMPLES = {
    "": (
        "diba-np factorize A.npy --bits 1.0 -o A.h5",
        "diba-np verify A.h5 A.npy",
        "diba-np report A.h5 A.npy -o A.html",
        "diba-np factorize --help",
    ),
    "factorize": (
        "diba-np factorize A.npy --bits 1.0 -o A.h5",
        "diba-np factorize A.npy --snr 10 --scale-bits auto --effort best",
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
    "verify": ("diba-np verify A.h5", "diba-np verify A.h5 A.npy"),
    "compare": (
        "diba-np compare A.npy --bits 1 2 4",
        "diba-np compare A.npy --bits 1 --methods diba dbf rtn --plot out.png",
        "diba-np compare A.npy --bits 1 2 3 --recommend",
    ),
    "sweep": (
        "diba-np sweep A.npy --bits 0.5 1 2 4",
        "diba-np sweep A.npy --plot curve.png -o curve.h5",
    ),
    "model": (
        "diba-np model weights.npz --bits 1.0 -o model.h5",
        "diba-np model folder --bits 2 --include '*.attention.*' --jobs 2 -o model.h5",
        "diba-np model folder --texts T.txt --bits 1.0 -o small.h5",
    ),
    **networks.EXAMPLES,
    "export": (
        "diba-np export model.h5 -o model.safetensors",
        "diba-np export small.h5 -o folder",
    ),
    "plot": ("diba-np plot A.h5 A.npy -o A.png", "diba-np plot A.h5 -o - > A.png"),
    "report": ("diba-np report A.h5 A.npy -o A.html",),
    "completion": (
        "diba-np completion bash > ~/.local/share/bash-completion/completions/diba-np",
        "diba-np completion fish > ~/.config/fish/completions/diba-np.fish",
    ),
    "warmup": ("diba-np warmup",),
    "doctor": ("diba-np doctor", "diba-np doctor --json"),
}

# -- parser ----------------------------------------------------------------------------------------


def _add_model(subcommands: Any, parents: list[Parser]) -> None:
    command = subcommands.add_parser(
        "model", parents=parents, help="factorize every matrix of a model within one budget"
    )
    command.add_argument(
        "source",
        metavar="SOURCE",
        help="a folder of .npy or of a Hugging Face model; a NumPy, safetensors, HDF5, GGUF, ONNX "
        "or torch file; the index of shards",
    )
    command.add_argument("-o", "--output", metavar="OUT.h5", required=True, help="the model file")
    command.add_argument(
        "--bits",
        type=positive(float),
        required=True,
        help="stored bits per weight of the whole model, all counted",
    )
    command.add_argument(
        "--method",
        choices=("diba", "linear-trellis", "best"),
        default="diba",
        help="what matrices are compressed by; best: the better for each, by short fits",
    )
    command.add_argument(
        "--include", action="append", default=[], metavar="GLOB", help="only these names"
    )
    command.add_argument(
        "--exclude", action="append", default=[], metavar="GLOB", help="not these names"
    )
    command.add_argument(
        "--min-size", type=positive(int), default=16, metavar="N", help="smaller ones are kept"
    )
    command.add_argument(
        "--allocation",
        choices=("shared", "relative", "uniform"),
        default="shared",
        help="the least total error, of the matrices as they are or each relative to its size; "
        "or the same rate everywhere",
    )
    command.add_argument("--weights", metavar="W.json", help="sensitivities: {GLOB: number}")
    command.add_argument("--grams", metavar="SOURCE", help="X^T X / N by name, from such a source")
    command.add_argument(
        "--texts",
        metavar="T.txt",
        help="SOURCE is a network of a known kind: fit its layers to what they read there, then "
        "train diagonals end to end (effort: fast)",
    )
    add_search_options(command, *SHARED)
    command.add_argument(
        "--jobs", type=positive(int), metavar="N", help="processes; default: one a processor"
    )
    command.add_argument("--threads", type=positive(int), metavar="N", help="of each process")
    command.add_argument("--scheduler", metavar="tcp://HOST:PORT", help="run on a Dask cluster")
    command.add_argument("--restart", action="store_true", help="drop parts of another run")
    command.add_argument("--json-log", metavar="FILE", help="append each event, one a line")
    command.add_argument("--quiet", action="store_true", help="no progress on standard error")
    command.set_defaults(run=_run_model, effort=None)


def _run_model(args: argparse.Namespace) -> int:
    from diba_np.cli.models import run_model

    args.effort = args.effort or ("balanced" if args.texts is None else "fast")
    return run_model(args) if args.texts is None else networks.run_compress(args)


def _add_export(subcommands: Any, parents: list[Parser]) -> None:
    command = subcommands.add_parser(
        "export", parents=parents, help="write a model or network dense, for other software"
    )
    command.add_argument(
        "file", metavar="MODEL.h5", help="what `diba-np model` wrote, or a network"
    )
    command.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        required=True,
        help="a folder, or a name that ends with .safetensors or .npz",
    )
    command.set_defaults(run=_run_export)


def _run_export(args: argparse.Namespace) -> int:
    from diba_np.cli.models import run_export

    return run_export(args)


def build_parser() -> Parser:
    """Return the parser of ``diba-np``; importing nothing heavy."""
    parser = Parser(
        prog="diba-np",
        description="Factorize a dense matrix into three diagonals and two 0/1 matrices, "
        "A ~ D1 B1 D2 B2 D3, and use the result.",
    )
    parser.add_argument("--version", action="version", version=f"diba-np {__version__}")
    subcommands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object")
    writes = Parser(add_help=False)
    writes.add_argument("--force", action="store_true", help="replace an existing output")
    reads = Parser(add_help=False)
    reads.add_argument("file", metavar="A.h5", help="a stored factorization")
    reads.add_argument("--group", help="the group that holds it, in a file of many")

    command = subcommands.add_parser(
        "factorize", parents=[common, writes], help="factorize a .npy matrix"
    )
    command.add_argument("matrix", metavar="A.npy")
    command.add_argument("-o", "--output", metavar="A.h5", help="default: beside the matrix")
    size = command.add_mutually_exclusive_group(required=True)
    size.add_argument("--k", type=positive(int), help="intermediate dimension")
    size.add_argument("--bits", type=positive(float), help="stored bits per weight, all counted")
    size.add_argument("--ratio", type=share, help="share of the dense float32 size")
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
        "--checkpoint-every", type=positive(float), default=60.0, metavar="SECONDS"
    )
    command.add_argument("--quiet", action="store_true", help="no progress on standard error")
    command.set_defaults(run=factorizations.run_factorize)

    _add_model(subcommands, [common, writes])
    networks.add_commands(subcommands, common, writes)
    _add_export(subcommands, [common, writes])

    command = subcommands.add_parser("info", parents=[common, reads], help="what a file holds")
    command.set_defaults(run=factorizations.run_info)

    command = subcommands.add_parser(
        "retune", parents=[common, writes, reads], help="refit the diagonals to data; bits stay"
    )
    command.add_argument("--inputs", metavar="X.npy", required=True, help="(N, n), one a row")
    command.add_argument("--targets", metavar="Y.npy", required=True, help="(N, m), or (N,) labels")
    command.add_argument("-o", "--output", metavar="B.h5", required=True)
    command.add_argument("--loss", choices=("mse", "cross_entropy"), default="mse")
    command.add_argument("--method", choices=("als", "lbfgs", "adam"))
    command.add_argument("--no-bias", action="store_true", help="fit no bias")
    command.add_argument("--steps", type=positive(int), metavar="N")
    command.add_argument("--batch-size", type=positive(int), default=256, metavar="N")
    command.add_argument("--learning-rate", type=positive(float), default=5e-3, help="of adam")
    command.add_argument("--schedule", choices=("cosine", "constant"), default="cosine")
    command.add_argument("--clip", type=positive(float), help="largest norm of adam's gradient")
    command.add_argument("--patience", type=positive(int), default=5, metavar="STEPS")
    command.add_argument(
        "--stay", type=within(float, 0), default=0.0, help="weight on staying near the start"
    )
    command.add_argument(
        "--validation", type=float, default=0.1, help="share of samples that judge"
    )
    command.add_argument("--seed", type=within(int, 0), default=0)
    command.add_argument("--threads", type=positive(int), metavar="N")
    command.set_defaults(run=factorizations.run_retune)

    command = subcommands.add_parser(
        "reconstruct", parents=[common, writes, reads], help="expand to a dense .npy"
    )
    command.add_argument("-o", "--output", metavar="A_hat.npy", required=True, help=OUTPUT)
    command.set_defaults(run=factorizations.run_reconstruct)

    command = subcommands.add_parser(
        "apply",
        parents=[common, writes, reads],
        help="multiply vectors, one a row: Y = X A^T, plus the bias if there is one",
    )
    command.add_argument("inputs", metavar="X.npy", help="(n,) or (..., n)")
    command.add_argument("-o", "--output", metavar="Y.npy", required=True, help=OUTPUT)
    command.add_argument("--transpose", action="store_true", help="Y = X A instead")
    command.set_defaults(run=factorizations.run_apply)

    command = subcommands.add_parser(
        "verify", parents=[common, reads], help="check a file, and against its matrix"
    )
    command.add_argument("matrix", metavar="A.npy", nargs="?")
    command.set_defaults(run=factorizations.run_verify)

    command = subcommands.add_parser(
        "compare", parents=[common, writes], help="every method on one .npy matrix at equal bits"
    )
    command.add_argument("matrix", metavar="A.npy")
    command.add_argument(
        "--bits",
        type=positive(float),
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
    command.add_argument("--jobs", type=positive(int), default=1, metavar="N", help="processes")
    command.add_argument("--seed", type=within(int, 0), default=0)
    command.add_argument("--plot", metavar="OUT.png", help="draw SNR against bits (matplotlib)")
    command.add_argument(
        "--recommend",
        action="store_true",
        help="only one line a rate: the best method, its lead, whether it has to decode",
    )
    command.set_defaults(run=rates.run_compare)

    for name, what in (
        ("plot", "one page of pictures"),
        ("report", "an HTML page for any browser"),
    ):
        command = subcommands.add_parser(
            name, parents=[common, writes, reads], help=f"{what} of a stored matrix (matplotlib)"
        )
        command.add_argument("matrix", metavar="A.npy", nargs="?", help="what it stands for")
        command.add_argument("-o", "--output", help="default: beside A.h5; - for standard output")
        command.set_defaults(run=views.run_plot if name == "plot" else views.run_report)

    command = subcommands.add_parser("completion", help="print a script for tab completion")
    command.add_argument("shell", choices=SHELLS)
    command.set_defaults(run=lambda args: views.run_completion(args, parser))

    command = subcommands.add_parser(
        "sweep", parents=[common, writes], help="the rate-distortion curve of a .npy matrix"
    )
    command.add_argument("matrix", metavar="A.npy")
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
    command.set_defaults(run=rates.run_sweep)

    command = subcommands.add_parser(
        "warmup", parents=[common], help="compile now what the first use would wait for"
    )
    command.set_defaults(run=factorizations.run_warmup)

    command = subcommands.add_parser(
        "doctor",
        parents=[common],
        help="versions, CPU, kernels, threads and cache, for a bug report",
    )
    command.set_defaults(run=factorizations.run_doctor)
    for name, command in parser.subparsers().items():
        command.epilog = examples(*EXAMPLES.get(name, ()))
    parser.epilog = examples(*EXAMPLES[""])
    return parser


def _left(args: argparse.Namespace) -> str:
    """Return what a signal has left of the work."""
    checkpoint = getattr(args, "checkpoint", None)
    if checkpoint and Path(checkpoint).is_file():
        return f"the same command goes on from {checkpoint}"
    return "nothing written"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    with any_text():
        try:
            return int(flushed(_run(argv)))
        except SystemExit as end:  # of --help, --version and wrong use
            raise SystemExit(flushed(end.code)) from None


def _error(error: BaseException) -> str:
    return f"error: {sentence(error)}"


def _run(argv: Sequence[str] | None) -> int:
    args = build_parser().parse_args(argv)

    def note(message: Any, *_: Any, **__: Any) -> None:
        complain(f"note: {in_options(str(message))}")

    try:
        with interruptible(), warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = note
            return int(args.run(args))
    except KeyboardInterrupt as signalled:
        how = "terminated" if isinstance(signalled, Terminated) else "interrupted"
        complain(f"{how}, {_left(args)}")
    except BrokenPipeError:
        drop(sys.stdout)
        return BROKEN_PIPE
    except OSError as error:
        of_stream = error.filename is None and error.strerror  # files of ours have names
        complain(f"error: standard output: {error.strerror}" if of_stream else _error(error))
        if of_stream:
            drop(sys.stdout)
    except (CommandError, ValueError, TypeError, MemoryError, ImportError) as error:
        complain(_error(error))
    return FAILED
