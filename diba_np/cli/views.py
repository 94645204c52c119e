"""The subcommands that show: pictures, an HTML page, a completion script."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from diba_np.cli.output import (
    DONE,
    CommandError,
    check_drawing,
    check_output,
    emit,
    load_original,
    shape_in_model,
    write_file,
)
from diba_np.cli.parser import SHELLS, Parents, completion
from diba_np.machine.display import shown

EXAMPLES = {
    "plot": ("diba-np plot A.h5 A.npy -o A.png", "diba-np plot A.h5 -o - > A.png"),
    "report": ("diba-np report A.h5 A.npy -o A.html",),
    "completion": (
        "diba-np completion bash > ~/.local/share/bash-completion/completions/diba-np",
        "diba-np completion fish > ~/.config/fish/completions/diba-np.fish",
    ),
}


def add_commands(subcommands: Any, given: Parents) -> None:
    """Add the commands that show: plot, report, completion."""
    for name, what in (
        ("plot", "one page of pictures"),
        ("report", "an HTML page for any browser"),
    ):
        command = subcommands.add_parser(
            name, parents=[*given], help=f"{what} of a stored matrix (matplotlib)"
        )
        command.add_argument("matrix", metavar="A.npy", nargs="?", help="what it stands for")
        command.add_argument("-o", "--output", help="default: beside A.h5; - for standard output")
        command.set_defaults(run=run_plot if name == "plot" else run_report)

    command = subcommands.add_parser("completion", help="print a script for tab completion")
    command.add_argument("shell", choices=SHELLS, help="that reads the script")
    command.set_defaults(run=run_completion)


def _inputs_of(args: argparse.Namespace, suffix: str) -> tuple[Path, Any, Any, str]:
    """Check where the output goes, then read: (output, stored matrix, A or None, title)."""
    output = Path(args.output) if args.output else Path(args.file).with_suffix(suffix)
    check_output(output, args.force, inputs=[args.file, args.matrix])
    if suffix == ".html" and output.suffix.lower() not in ("", ".html", ".htm"):
        raise CommandError(f"{output}: expected an HTML page's name, one of .html, .htm")
    check_drawing(output if suffix == ".png" else None)
    from diba_np.matrix.files import load

    compressed = load(args.file, group=args.group)
    matrix = None
    if args.matrix:
        shape = shape_in_model(args.file, args.group)
        matrix = load_original(args.matrix, compressed, shape)
    title = Path(args.file).name + (f", {args.group}" if args.group else "")
    return output, compressed, matrix, shown(title)


def _tell(args: argparse.Namespace, output: Path, file_bytes: int, panels: Any) -> int:
    pictures = [{"name": p.name, "title": p.title, "text": p.text} for p in panels]
    report = {"output": str(output), "file_bytes": file_bytes, "pictures": pictures}
    lines = [(p.name, p.text) for p in panels]
    lines.append(("file", f"{output} ({file_bytes} bytes)"))
    emit(report, args.json, lines, output)
    return DONE


def run_plot(args: argparse.Namespace) -> int:
    """Draw a stored matrix on one page."""
    output, compressed, matrix, title = _inputs_of(args, ".png")
    from diba_np.report.pictures import headline, plot_factors

    panels: list[Any] = []
    kind = output.suffix.lstrip(".") or "png"
    heading = f"{title}: {headline(compressed, matrix)}"

    def draw(path: Path) -> None:
        panels.extend(plot_factors(compressed, path, matrix, heading, kind))

    file_bytes = write_file(output, draw)
    return _tell(args, output, file_bytes, panels)


def run_report(args: argparse.Namespace) -> int:
    """Write an HTML page about a stored matrix."""
    output, compressed, matrix, title = _inputs_of(args, ".html")
    from diba_np.report.page import html_report
    from diba_np.report.pictures import panels_of

    panels = panels_of(compressed, matrix)
    page = html_report(compressed, matrix, title, panels)
    file_bytes = write_file(output, lambda path: path.write_text(page, encoding="utf-8"))
    return _tell(args, output, file_bytes, panels)


def run_completion(args: argparse.Namespace) -> int:
    """Print a completion script."""
    sys.stdout.write(completion(args.parser, args.shell))
    return DONE
