"""The command line: each subcommand is a thin call of one public function.

Results go to standard output, progress and warnings to standard error. Exit status: 0 done,
1 failed, 2 used wrongly.
"""

from __future__ import annotations

import argparse
import errno
import functools
import warnings
from collections.abc import Sequence
from typing import Any

from diba_np._version import __version__
from diba_np.cli import factorizations, installation, models, networks, rates, verification, views
from diba_np.cli.output import FAILED, CommandError, in_options, sentence
from diba_np.cli.parser import Parents, Parser, examples
from diba_np.cli.signals import Terminated, interruptible
from diba_np.cli.streams import any_text, complain, flushed, lost

# subcommand -> commands that its help page shows; "" is the page of the program
EXAMPLES = {
    "": (
        "diba-np factorize A.npy --bits 1.0 -o A.h5",
        "diba-np verify A.h5 A.npy",
        "diba-np report A.h5 A.npy -o A.html",
        "diba-np factorize --help",
    ),
    **factorizations.EXAMPLES,
    **installation.EXAMPLES,
    **models.EXAMPLES,
    **networks.EXAMPLES,
    **rates.EXAMPLES,
    **verification.EXAMPLES,
    **views.EXAMPLES,
}

# errors without a file's name that are no fault of standard output
_OF_THE_SYSTEM = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)

# what adds commands, in the order of the help page
_COMMANDS = (
    factorizations.add_factorize,
    models.add_model,
    networks.add_commands,
    models.add_export,
    factorizations.add_stored,
    verification.add_verify,
    rates.add_compare,
    views.add_commands,
    rates.add_sweep,
    installation.add_commands,
)


@functools.cache  # for processes that run many commands
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
    reads.add_argument("file", metavar="A.h5", help="a file of this program")
    reads.add_argument("--group", help="the group that holds it, in a file of many")
    given = Parents(common, writes, reads)
    for add in _COMMANDS:
        add(subcommands, given)
    parser.set_defaults(parser=parser)  # for what is told of all commands
    # what the page of the program says of a command, as the first line of its own page
    told = {choice.dest: choice.help or "" for choice in subcommands._choices_actions}
    for name, command in parser.subparsers().items():
        command.description = f"{told[name][0].upper()}{told[name][1:]}."
        command.epilog = examples(*EXAMPLES.get(name, ()))
    parser.epilog = examples(*EXAMPLES[""])
    return parser


def _left(args: argparse.Namespace) -> str:
    """Return what a signal has left of the work."""
    keeper = getattr(args, "keeper", None)
    if keeper is not None and keeper.opened and keeper.path.is_file():
        return f"the same command goes on from {args.checkpoint}"
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
        # an exec of text that was interrupted would let ``python -m`` end by SIGINT after all
        exec("")
        how = "terminated" if isinstance(signalled, Terminated) else "interrupted"
        complain(f"{how}, {_left(args)}")
    except OSError as error:
        nameless = error.filename is None and error.strerror  # files of ours have names
        if nameless and error.errno not in _OF_THE_SYSTEM:
            return lost(error)
        complain(_error(error))
    except (
        CommandError,
        ValueError,
        TypeError,
        MemoryError,
        ImportError,
        FloatingPointError,  # a training that no longer has a loss
    ) as error:
        complain(_error(error))
    return FAILED
