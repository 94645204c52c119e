"""The subcommand ``verify``: a file by itself, and against what it was made from.

That is a matrix, a model's arrays, or a network.
"""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from diba_np.cli.networks import load_network
from diba_np.cli.output import (
    DONE,
    FAILED,
    CommandError,
    Report,
    decibels_text,
    emit,
    load_original,
    same_entries,
    shape_in_model,
)
from diba_np.cli.parser import Parents

if TYPE_CHECKING:
    from diba_np.matrix.base import CompressedMatrix

EXAMPLES = {
    "verify": ("diba-np verify A.h5", "diba-np verify A.h5 A.npy"),
}


def add_verify(subcommands: Any, given: Parents) -> None:
    """Add the command that checks a file."""
    command = subcommands.add_parser(
        "verify", parents=[given.common, given.reads], help="check a file, and against its matrix"
    )
    command.add_argument("matrix", metavar="A.npy", nargs="?", help="what it stands for")
    command.set_defaults(run=run_verify)


def run_verify(args: argparse.Namespace) -> int:
    """Check a file, and against the matrix that it was made from."""
    from diba_np.files.container import groups
    from diba_np.matrix.files import load
    from diba_np.models.file import is_model

    if not args.group and is_model(args.file):
        return _verify_model(args)
    names = [args.group] if args.group else groups(args.file)
    if not names:
        raise CommandError(f"{args.file}: holds no factorization")
    if args.matrix and len(names) > 1:
        raise CommandError(f"{args.file}: holds {len(names)} factorizations; name one with --group")
    loaded = [load(args.file, group=name or None) for name in names]
    report: Report = {"file": args.file, "ok": True, "checked": names}
    lines = [("file", f"{args.file}: intact, {len(names)} factorization(s) checked")]
    if args.matrix:
        factors = loaded[0]
        shape = shape_in_model(args.file, args.group)
        matrix = load_original(args.matrix, factors, shape)
        same, snr = _compared(factors, matrix)
        report |= {"same_source": same, "snr_db": snr, "ok": same is not False}
        verdicts = {
            None: "not recorded",
            True: "the matrix it was made from",
            False: "NOT the matrix it was made from",
        }
        unlike = same is False and snr is None  # of what is not finite
        lines += [("source", verdicts[same]), ("SNR", "none" if unlike else decibels_text(snr))]
    emit(report, args.json, lines)
    return DONE if report["ok"] else FAILED


def _compared(stored: CompressedMatrix, array: Any) -> tuple[bool | None, float | None]:
    """Tell whether a stored matrix was made from this one, and its SNR.

    None where that is not recorded, and where an array that was kept differs and is not finite.
    """
    import numpy as np

    from diba_np.checks import as_matrix, as_real, digest

    if stored.is_array:
        array = as_real(array, "A")
        own = stored.to_array(array.shape, array.dtype).ravel()
        if same_entries(own, array.ravel()):
            return True, math.inf
        if not (np.isfinite(own).all() and np.isfinite(array).all()):
            return False, None
    matrix = as_matrix(array)
    snr = stored.snr(matrix)
    if stored.is_array:
        return False, snr
    source = stored.record.get("source", {}).get("sha256")
    return None if source is None else source == digest(matrix), snr


def _verify_model(args: argparse.Namespace) -> int:
    """Check every array of a model's file, and against the model that it was made from."""
    from diba_np.matrix.quality import decibels
    from diba_np.models.file import open_model

    with open_model(args.file) as model:
        network = "network" in model.record
        read = set[str]()  # and so checked
        if args.matrix and network:
            differ, sums, read = network_differences(args.file, args.matrix)
        elif args.matrix:
            differ, sums = _model_differences(model, args.matrix)
            read = set(model)
        for name in model:
            if name not in read:
                model.read(name)
        report: dict[str, Any] = {"file": args.file, "ok": True, "checked": list(model)}
        lines = [("file", f"{args.file}: intact, {len(model)} arrays checked")]
        if args.matrix:
            if network:
                same = None
                verdict = "compared by SNR alone: a network is trained, its layers follow what they"
                verdict += " read; `evaluate --against` tells how near it comes"
                what = "network"
            else:
                same, verdict = True, "the model it was made from"
                what = "model"
            if differ:
                same = False
                verdict = f"NOT the {what} it was made from: {len(differ)} differ, the first "
                verdict += differ[0]
            report |= {"same_source": same, "differ": differ, "ok": not differ}
            lines += [("source", verdict)]
            if sums is not None:
                report["snr_db"] = decibels(*sums)
                lines += [("SNR", decibels_text(report["snr_db"]))]
    emit(report, args.json, lines)
    return DONE if report["ok"] else FAILED


def _model_differences(model: Any, path: str) -> tuple[list[str], tuple[float, float] | None]:
    """Return the names in which a model and its source differ, and squared sums of the others.

    Each array of the model is read, and so checked. The sums are of the arrays and of the errors,
    None where no array could be compared.
    """
    from diba_np.checks import digest
    from diba_np.matrix.quality import squared_sums
    from diba_np.matrix.small_floats import value_type
    from diba_np.models.shapes import matrix_view
    from diba_np.sources.opening import open_source

    omitted = {name for name, _ in model.record.get("omitted", ())}
    # a record names some of them only; older ones do not tell how many there are
    unnamed = model.record.get("omitted_arrays", math.inf) - len(omitted)
    source = {
        entry.name: entry
        for entry in open_source(path)
        if not entry.unfit and entry.name not in omitted
    }
    if not any(name in source for name in model):
        raise CommandError(f"{path}: holds none of the model's arrays")
    differ = [name for name in model if name not in source]
    others = [name for name in source if name not in model]
    differ += others if len(others) > unnamed else []
    noise = signal = 0.0
    compared = False
    for name in model:
        stored = model.read(name)
        if name not in source:
            continue
        array, shape = source[name].read(), model.array_shape(name)
        if array.shape != shape:
            differ.append(name)
            continue
        if stored.is_array:
            if same_entries(array, stored.to_array(shape, value_type(model.array_dtype(name)))):
                compared = True
            else:
                differ.append(name)
            continue
        compared = True
        matrix = matrix_view(array)
        if stored.record.get("source", {}).get("sha256") != digest(matrix):
            differ.append(name)
        if name not in model.aliases:  # whose sums are those of the other name
            own = squared_sums(matrix, stored, unit=1.0)
            signal, noise = signal + own[0], noise + own[1]
    return differ, (signal, noise) if compared else None


def network_differences(
    path: str, source: str
) -> tuple[list[str], tuple[float, float] | None, set[str]]:
    """Return the linear layers that a compressed network and its source do not share, and sums.

    And the arrays of the compressed network that were read, and so checked. The squared sums are of
    the compressed layers' dense weights and of the errors, None where no layer could be compared.
    Norms and biases are trained, and are not compared.
    """
    from diba_np.layers.dense_linear import DenseLinear
    from diba_np.matrix.quality import squared_sums

    small, net = load_network(path), load_network(source)
    differ = []
    signal = noise = 0.0
    compared, read = False, set()
    for name in dict.fromkeys([*small.layers, *net.layers]):
        if not (name in small.layers and name in net.layers):
            differ.append(name)
            continue
        with small.released(), net.released():
            own, other = small.layers[name], net.layers[name]
            read.add(f"{name}.weight")
            if own.shape != other.shape:
                differ.append(name)
            elif not isinstance(own, DenseLinear):
                sums = squared_sums(other.to_matrix().to_dense(), own.to_matrix(), unit=1.0)
                signal, noise = signal + sums[0], noise + sums[1]
                compared = True
    return differ, (signal, noise) if compared else None, read
