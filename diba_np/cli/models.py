"""The subcommands ``model`` and ``export``; what ``info`` says of a model's file."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import Any

from diba_np.cli import networks
from diba_np.cli.options import add_search_options, positive, search_options
from diba_np.cli.output import (
    DONE,
    CommandError,
    check_not_read,
    check_output,
    decibels_text,
    emit,
    shape_text,
    size_report,
)
from diba_np.cli.parser import Parents
from diba_np.layers.registry import LAYERS
from diba_np.search.options import SHARED

_MOST_SHOWN = 3  # of the arrays that are kept as they are

# what factorizes a model's matrices; beside these the methods that a layer of a network can hold
_OF_MATRICES = ("diba", "linear-trellis", "best")
_OF_LAYERS = sorted({*LAYERS, "random"} - {*_OF_MATRICES})

EXAMPLES = {
    "model": (
        "diba-np model weights.npz --bits 1.0 -o model.h5",
        "diba-np model folder --bits 2 --include '*.attention.*' --jobs 2 -o model.h5",
        "diba-np model folder --texts T.txt --bits 1.0 -o small.h5",
    ),
    "export": (
        "diba-np export model.h5 -o model.safetensors",
        "diba-np export small.h5 -o folder",
    ),
}


def add_model(subcommands: Any, given: Parents) -> None:
    """Add the command that factorizes a model or compresses a network."""
    command = subcommands.add_parser(
        "model",
        parents=[given.common, given.writes],
        help="factorize every matrix of a model within one budget",
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
        choices=(*_OF_MATRICES, *_OF_LAYERS),
        default="diba",
        help="what matrices are compressed by; best: the better of diba and linear-trellis for "
        "each, by short fits; the others with --texts only",
    )
    command.add_argument(
        "--include", action="append", default=[], metavar="GLOB", help="only these names"
    )
    command.add_argument(
        "--exclude", action="append", default=[], metavar="GLOB", help="not these names"
    )
    command.add_argument(
        "--min-size",
        type=positive(int),
        default=16,
        metavar="N",
        help="fewest rows and columns; smaller ones are kept",
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
        "train diagonals end to end; one text where next tokens are told, else one a line; or "
        "token ids, images or spectrograms, .npy; options of matrices alone, of the above and of "
        "the search, are then refused",
    )
    add_search_options(command, *SHARED)
    command.add_argument(
        "--jobs",
        type=positive(int),
        metavar="N",
        help="processes; default: one a processor, 1 with --texts",
    )
    command.add_argument("--threads", type=positive(int), metavar="N", help="of each process")
    command.add_argument("--scheduler", metavar="tcp://HOST:PORT", help="run on a Dask cluster")
    command.add_argument("--restart", action="store_true", help="drop parts of another run")
    command.add_argument("--json-log", metavar="FILE", help="append each event, one a line")
    command.add_argument("--quiet", action="store_true", help="no progress on standard error")
    networks.add_compress_options(command)
    command.options()["--effort"].help = "how long to search; default: balanced, fast with --texts"
    command.set_defaults(run=run_model, effort=None)


def add_export(subcommands: Any, given: Parents) -> None:
    """Add the command that writes a model or network dense."""
    command = subcommands.add_parser(
        "export",
        parents=[given.common, given.writes],
        help="write a model or network dense, for other software",
    )
    command.add_argument(
        "file", metavar="MODEL.h5", help="what `diba-np model` wrote, or a network"
    )
    command.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        required=True,
        help="a folder; of a model's file also a name that ends with .safetensors or .npz",
    )
    command.set_defaults(run=run_export)


def run_model(args: argparse.Namespace) -> int:
    """Factorize every matrix of a model, or compress a network, into one file."""
    output = Path(args.output)
    read = [args.source, args.weights, args.grams, args.texts]
    check_output(output, args.force, streams=False, inputs=read)
    if output.exists() and not output.is_file():
        raise CommandError(f"{output}: is no file; a model is written to one")
    if args.json_log:
        if Path(args.json_log).resolve() == output.resolve():
            raise CommandError(f"{output}: --json-log and --output must be two files")
        check_not_read(Path(args.json_log), read)
    if "dense_folder" in networks.compress_options(args):
        for path in (args.output, args.source, args.texts):
            if Path(args.dense_folder).resolve() == Path(path).resolve():
                raise CommandError(f"{path}: --dense-folder must be a folder of its own")
    args.effort = args.effort or ("balanced" if args.texts is None else "fast")
    try:
        return _factorize(args) if args.texts is None else networks.run_compress(args)
    except KeyboardInterrupt:
        from diba_np.files.atomic import beside

        parts = beside(output, ".parts")
        if not parts.is_dir():
            raise
        count = len(list(parts.rglob("*.h5")))
        if args.texts is None:
            what = f"{count} finished searches are" if count else "the plan is"
        else:
            measured = "what was measured of the network is"
            what = f"{count} finished layers are" if count else measured
        raise CommandError(
            f"interrupted; {what} kept in {parts}, the same command goes on"
        ) from None


def _factorize(args: argparse.Namespace) -> int:
    """Factorize every matrix of a model and report the totals."""
    networks.clear_parts(args, with_texts=True)
    from diba_np.models.factorization import factorize_model
    from diba_np.sources.entry import read_json

    weights = read_json(Path(args.weights)) if args.weights else None
    model = factorize_model(
        args.source,
        bits=args.bits,
        method=args.method,
        output=args.output,
        include=args.include,
        exclude=args.exclude,
        min_size=args.min_size,
        allocation=args.allocation,
        weights=weights,
        grams=args.grams,
        jobs=args.jobs,
        threads=args.threads,
        scheduler=args.scheduler,
        restart=args.restart,
        progress=not args.quiet,
        json_log=args.json_log,
        **search_options(args, *SHARED),
    )
    with model:
        report, lines = _totals(args.output, model)
    emit(report, args.json, lines)
    return DONE


# beside the suffixes of sources: a folder is rarely named like a file on purpose
_FILES = (".mat", ".json", ".zip")


def run_export(args: argparse.Namespace) -> int:
    """Write every array of a model's file, or a network, dense."""
    from diba_np.models.file import open_model
    from diba_np.networks.file import is_network
    from diba_np.sources.opening import FORMATS

    path, output = Path(args.file), Path(args.output)
    of_network = path.is_dir() or path.suffix.lower() == ".gguf" or is_network(path)
    files = [] if of_network else [".safetensors", ".npz"]
    suffix = output.suffix.lower()
    of_file = bool(difflib.get_close_matches(suffix, (*FORMATS, *_FILES), 1, 0.8))
    if of_file and suffix not in files and not output.exists():
        expected = "a folder" + (f", or a name with {' or '.join(files)}" if files else "")
        raise CommandError(
            f"{output}: expected {expected}; a folder named like a file has to be there already"
        )
    if of_network:
        return networks.run_export(args)
    check_output(output, args.force, streams=False, inputs=[args.file], folder=True)
    with open_model(args.file) as model:
        written = model.export(output)
        report = {"output": str(output), "arrays": len(model), "bytes": written}
        lines = [("arrays", str(len(model))), ("written", f"{output} ({written} bytes)")]
    emit(report, args.json, lines)
    return DONE


def _totals(path: str, model: Any) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    record = model.record
    file_bytes = Path(path).stat().st_size
    rate = record["counted_bits"] / max(1, record["counted_weights"])
    report = {
        "output": str(path),
        "arrays": len(model),
        **{name: record[name] for name in ("factorized", "kept", "snr_db", "weighted_error")},
        **{name: record.get(name, []) for name in ("kept_arrays", "omitted")},
        "shared": model.aliases,
        "bits_per_weight": rate,
        "bits_per_weight_of_all": model.bits_per_weight,
        "storage_bits": model.storage_bits(),
        "storage_ratio": model.storage_ratio(),
        **{name: record[name] for name in ("search_seconds", "wall_seconds")},
        "file_bytes": file_bytes,
    }
    dense = 4 * model.size / file_bytes
    lines = [
        ("arrays", f"{record['factorized']} factorized, {record['kept']} kept as they are"),
        *(
            ("kept", f"{name}: {shape_text(shape)}, {why}, {bits} bits")
            for name, shape, why, bits in record.get("kept_arrays", ())[:_MOST_SHOWN]
        ),
        *(("not in the file", f"{name}: {why}") for name, why in record.get("omitted", ())),
        ("weights", f"{model.size}"),
        ("bits per weight", f"{rate:.4f} of {record['bits']:g}; all: {model.bits_per_weight:.4f}"),
        ("SNR", decibels_text(record["snr_db"])),
        ("seconds", f"{record['wall_seconds']:.1f} ({record['search_seconds']:.1f} of searches)"),
        ("file", f"{path} ({file_bytes} bytes, 1/{dense:.1f} of float32)"),
    ]
    return report, lines


def info_model(args: argparse.Namespace) -> int:
    """Report what a model's file holds, one line an array."""
    from diba_np.models.file import open_model

    with open_model(args.file) as model:
        groups, arrays = [], []
        for name in model:
            matrix = model.read(name)
            shape = model.array_shape(name)
            record = {key: value for key, value in matrix.record.items() if key != "versions"}
            groups.append(
                {
                    "group": name,
                    "array_shape": list(shape),
                    **size_report(matrix),
                    "record": record,
                }
            )
            text = shape_text(shape)
            if name in model.aliases:
                arrays.append((name, f"{text}, the same as {model.aliases[name]}"))
                continue
            text += f", {matrix.bits_per_weight:.3f} bits"
            if matrix.is_array:
                text += f", kept ({record.get('kept')})"
            elif "snr_db" in record:
                text += f", {decibels_text(record['snr_db'])}"
            arrays.append((name, text))
        report, lines = _totals(args.file, model)  # whose bits were counted above
    whole = report | {"record": model.record, "groups": groups}
    emit(whole, args.json, [*lines, *arrays])
    return DONE
