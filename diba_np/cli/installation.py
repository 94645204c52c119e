"""The subcommands of the installation: ``warmup`` and ``doctor``."""

from __future__ import annotations

import argparse
from typing import Any

from diba_np.cli.output import DONE, FAILED, emit
from diba_np.cli.parser import Parents

EXAMPLES = {
    "warmup": ("diba-np warmup",),
    "doctor": ("diba-np doctor", "diba-np doctor --json"),
}


def add_commands(subcommands: Any, given: Parents) -> None:
    """Add the commands of the installation: warmup, doctor."""
    command = subcommands.add_parser(
        "warmup", parents=[given.common], help="compile now what the first use would wait for"
    )
    command.set_defaults(run=run_warmup)

    command = subcommands.add_parser(
        "doctor",
        parents=[given.common],
        help="versions, CPU, kernels, threads and cache, for a bug report",
    )
    command.set_defaults(run=run_doctor)


def _tables(report: dict[str, Any]) -> str:
    """Return whether products with 16-bit tables have a kernel here."""
    return "yes" if report["rounded"] else "no (needs AVX2, NEON, or AVX-512 with VNNI)"


def run_warmup(args: argparse.Namespace) -> int:
    """Compile what the first use would wait for."""
    from diba_np.cli.warmup import warm_up

    report = warm_up()
    cache = report["cache"] or "nothing is kept (no cache, or no folder that can be written)"
    lines = [
        ("kernel path", report["path"]),
        ("16-bit tables", _tables(report)),
        ("seconds", f"{report['seconds']:.2f}"),
        ("cache", cache),
    ]
    emit(report, args.json, lines)
    return DONE


def run_doctor(args: argparse.Namespace) -> int:
    """Report what a bug report needs; fails if something is wrong."""
    from diba_np.cli.doctor import diagnose

    report = diagnose()
    cache = report["cache"] or "none"
    lines = [
        *report["versions"].items(),
        *report["optional"].items(),
        ("platform", report["platform"]),
        ("CPU features", " ".join(report["cpu_features"]) or "none that choose a kernel"),
        ("kernel paths", ", ".join(report["paths"])),
        ("kernel path in use", report["path"] or "none"),
        ("16-bit tables", _tables(report)),
        ("threads", str(report["threads"])),
        ("threading layer", report["threading_layer"] or "none"),
        ("cache", cache),
        *report["environment"].items(),
        *(("problem", problem) for problem in report["problems"]),
    ]
    emit(report, args.json, lines)
    return FAILED if report["problems"] else DONE
