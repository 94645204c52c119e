"""Subcommands of networks: ``model --texts``, ``evaluate``, ``generate``, ``embed``, ``export``."""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from diba_np.cli.options import positive, within
from diba_np.cli.output import (
    DONE,
    STANDARD_OUTPUT,
    CommandError,
    check_output,
    decibels_text,
    emit,
    finite,
    load_array,
    write_file,
)
from diba_np.cli.parser import Parents
from diba_np.search.options import SHARED

EXAMPLES = {
    "evaluate": (
        "diba-np evaluate small.h5 --texts held_out.txt",
        "diba-np evaluate small.h5 --texts held_out.txt --against folder",
        "diba-np evaluate ast.h5 --inputs spectrograms.npy --labels labels.npy",
    ),
    "generate": (
        'diba-np generate small.h5 "The capital of France is"',
        'diba-np generate small.h5 "Once" --tokens 200 --temperature 0.8 --seed 1',
    ),
    "embed": ("diba-np embed small.h5 texts.txt -o E.npy",),
}

_NETWORK = "a network: a folder with config.json, a .gguf, or a file of model --texts"

# of `model`, without meaning for matrices alone; None stands for what `networks.compress` does
_OF_NETWORKS: dict[str, dict[str, Any]] = {
    "--no-embeddings": {
        "dest": "embeddings",
        "action": "store_const",
        "const": False,
        "help": "leave the table of tokens and the head dense",
    },
    "--no-feedback": {
        "dest": "feedback",
        "action": "store_const",
        "const": False,
        "help": "fit layers to what they read in the dense network: --jobs of them at once",
    },
    "--length": {"type": positive(int), "metavar": "N", "help": "tokens of a row; default: 128"},
    "--calibrate": {
        "type": positive(int),
        "metavar": "N",
        "help": "tokens that layers are fitted to; default: 32768",
    },
    "--epochs": {
        "type": within(int, 0),
        "metavar": "N",
        "help": "passes of training end to end; 0: none; default: 1",
    },
    "--taught": {
        "type": positive(int),
        "metavar": "N",
        "help": "tokens that each of them reads; default: all",
    },
    "--rate": {"type": positive(float), "metavar": "X", "help": "of learning; default: 0.002"},
    "--codes": {
        "action": "store_const",
        "const": True,
        "help": "train codes too, of qswd, bitat and mesa",
    },
    "--dense-folder": {
        "metavar": "FOLDER",
        "help": "keep here what the dense network gives of the texts, for runs with other bits or "
        "methods; nothing removes it",
    },
}


def add_commands(subcommands: Any, given: Parents) -> None:
    """Add the commands of networks: evaluate, generate, embed."""
    command = subcommands.add_parser(
        "evaluate", parents=[given.common], help="judge a network, alone or against another"
    )
    command.add_argument("network", metavar="NETWORK", help=_NETWORK)
    command.add_argument(
        "--texts",
        metavar="T.txt",
        help="UTF-8, one text where next tokens are told, else one a line; or token ids, .npy",
    )
    command.add_argument(
        "--inputs", metavar="X.npy", help="instead: token ids, images or spectrograms"
    )
    command.add_argument(
        "--labels", metavar="Y.npy", help="classes, scores or labels of these or the texts"
    )
    command.add_argument("--against", metavar="NETWORK", help="usually the dense network")
    command.add_argument(
        "--length",
        type=within(int, 2),
        metavar="N",
        help="tokens of a row; default: 128, of vectors as many as embed reads",
    )
    command.add_argument("--seed", type=within(int, 0), default=0, help="of what is masked")
    command.set_defaults(run=run_evaluate)

    command = subcommands.add_parser("generate", parents=[given.common], help="go on with a text")
    command.add_argument("network", metavar="NETWORK", help=_NETWORK)
    command.add_argument("text", metavar="TEXT", help="- reads it from standard input")
    command.add_argument("--tokens", type=positive(int), default=40, metavar="N", help="at most")
    command.add_argument(
        "--temperature",
        type=within(float, 0),
        default=0.0,
        help="0: the most probable token; above 0 tokens are drawn",
    )
    command.add_argument(
        "--top-k",
        type=positive(int),
        metavar="N",
        help="draw among so many, at a temperature above 0",
    )
    command.add_argument(
        "--top-p",
        type=positive(float, 1),
        default=1.0,
        help="draw within this share, up to 1, at a temperature above 0",
    )
    command.add_argument(
        "--seed",
        type=within(int, 0),
        default=0,
        help="of what is drawn, at a temperature above 0",
    )
    command.set_defaults(run=run_generate)

    command = subcommands.add_parser(
        "embed", parents=[given.common, given.writes], help="unit vectors of texts, one a line"
    )
    command.add_argument("network", metavar="NETWORK", help=_NETWORK)
    command.add_argument(
        "texts", metavar="T.txt", help="UTF-8, one text a line, none blank; or token ids, .npy"
    )
    command.add_argument("-o", "--output", metavar="E.npy", required=True, help="float32 (S, n)")
    command.set_defaults(run=run_embed)


def add_compress_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `model` that need ``--texts``."""
    group = command.add_argument_group("of networks, with --texts")
    for option, how in _OF_NETWORKS.items():
        group.add_argument(option, **how)


def compress_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return those that were given, as `networks.compress` takes them; CommandError of matrices."""
    given = {}
    for option, how in _OF_NETWORKS.items():
        name = how.get("dest", option.removeprefix("--").replace("-", "_"))
        value = getattr(args, name)
        if value is None:
            continue
        if args.texts is None:
            raise CommandError(f"{option} is of networks alone; give --texts too, or leave it out")
        given[name] = value
    return given


def load_network(path: str) -> Any:
    """Return the network at a path."""
    from diba_np.networks.reading import load

    return load(path)


def _lines(path: str) -> list[str]:
    """Return the lines of a text file; a newline ends one, no other character."""
    return [line.strip() for line in _text(path).removesuffix("\n").split("\n")]


def _standard_input() -> bytes:
    if sys.stdin is None:
        raise CommandError("standard input is closed; name a file, or pipe a text in")
    return sys.stdin.buffer.read()


def _text(path: str) -> str:
    try:
        # as text, standard input has the terminal's encoding and another handling of errors
        text = (_standard_input() if path == "-" else Path(path).read_bytes()).decode("utf-8")
    except FileNotFoundError as error:
        raise CommandError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise CommandError(f"{path}: not readable as UTF-8 ({error.reason})") from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")  # as Python reads text
    text = text.removeprefix("\ufeff")  # a byte order mark is no text
    if not text.strip():
        raise CommandError(f"{path}: holds no text")
    return text


def _texts(path: str, net: Any) -> Any:
    """Return what a file holds for a network: ids, one text, or one a line that is not blank."""
    if path.endswith(".npy"):
        return load_array(path)
    return [_text(path)] if net.joins_texts else [line for line in _lines(path) if line]


def _rows(path: str) -> Any:
    """Return what a file holds, one a row: ids, or the texts of its lines, none of them blank."""
    if path.endswith(".npy"):
        return load_array(path)
    lines = _lines(path)
    if "" in lines:
        number = lines.index("") + 1
        raise CommandError(f"{path}: line {number} is blank; each line is one text")
    return lines


def _size(path: str) -> int:
    """Return the bytes of a file, or of a network's folder: one form of its weights, and texts."""
    from diba_np.sources.entry import read_json
    from diba_np.sources.gguf import split_parts
    from diba_np.sources.opening import weight_files

    place = Path(path)
    if not place.is_dir():
        parts = split_parts(place) if place.suffix.lower() == ".gguf" else [place]
        return sum(part.stat().st_size for part in parts)
    files = set(weight_files(place))
    for index in [file for file in files if file.suffix == ".json"]:
        files |= {place / name for name in read_json(index)["weight_map"].values()}
    texts = (".json", ".txt") if files else None  # else all that there is
    files |= {file for file in place.iterdir() if texts is None or file.suffix in texts}
    return sum(file.stat().st_size for file in files if file.is_file())


def run_evaluate(args: argparse.Namespace) -> int:
    """Judge a network and print what came out."""
    from diba_np.networks.evaluation import evaluate

    net = load_network(args.network)
    other = load_network(args.against) if args.against else None
    figures = evaluate(
        net,
        None if args.texts is None else _texts(args.texts, net),
        against=other,
        inputs=None if args.inputs is None else load_array(args.inputs),
        labels=None if args.labels is None else load_array(args.labels),
        length=args.length,
        seed=args.seed,
    )
    report = {"network": args.network, "bytes": _size(args.network), **figures}
    if "against" in figures:
        other_facts = {"network": args.against, "bytes": _size(args.against)}
        report["against"] = other_facts | figures["against"]
    emit(report, args.json, _judged_lines(report))
    return DONE


def _judged_lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what was measured, a column for each network."""
    columns = [report, *([report["against"]] if "against" in report else [])]

    def row(name: str, form: str) -> str:
        return "  ".join(f"{_known(one[name], form):>14}" for one in columns)

    lines = [
        ("judged on", f"{report['targets']} {report['task']}"),
        ("network", "  ".join(f"{Path(one['network']).name[-14:]:>14}" for one in columns)),
    ]
    if "cosine" in report:
        error = _known(report["cosine_error"], ".4f")
        lines.append(("cosine", f"{report['cosine']:.4f} ± {error} to the other network"))
    elif "squared_error" in report:
        lines += [
            ("squared error", row("squared_error", ".4g")),
            ("its error", row("squared_error_error", ".4g")),
        ]
    elif "accuracy" in report:
        lines += [
            ("perplexity", row("perplexity", ".2f")),
            ("accuracy", row("accuracy", ".4f")),
            ("its error", row("accuracy_error", ".4f")),
        ]
    lines += [("tokens a second", row("tokens_per_second", ".0f")), ("bytes", row("bytes", "d"))]
    if "squared_difference" in report:
        lines.append(("squared difference", f"{report['squared_difference']:.4g}"))
    if "agreement" in report:
        lines += [("agreement", f"{report['agreement']:.4f}"), ("KL", f"{report['kl']:.4f} nats")]
    return lines


def _known(value: float, form: str) -> str:
    """Return a number as text; the standard error of a single row is not known."""
    return "not known" if math.isnan(value) else format(value, form)


def run_generate(args: argparse.Namespace) -> int:
    """Print a text and what a network writes after it, piece by piece."""
    net = load_network(args.network)
    text = _text("-").rstrip("\n") if args.text == "-" else args.text
    prompt = [text]  # written with the first piece: a refusal should not come after it

    def stream(piece: str) -> None:
        sys.stdout.write("".join([*prompt, piece]))
        sys.stdout.flush()
        prompt.clear()

    started = time.process_time()
    written = net.generate(
        text,
        args.tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stream=None if args.json else stream,
    )
    if not args.json:
        sys.stdout.write("".join([*prompt, "\n"]))
        return DONE
    seconds = time.process_time() - started
    emit({"text": text, "generated": written, "cpu_seconds": seconds}, True, [])
    return DONE


def run_embed(args: argparse.Namespace) -> int:
    """Write the vectors of a file's texts as a .npy file."""
    import numpy as np

    output = Path(args.output)
    check_output(output, args.force, inputs=[args.network, args.texts])
    net = load_network(args.network)
    vectors = net.embed(_rows(args.texts))

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, vectors)

    size = write_file(output, write)
    emit(
        {"output": args.output, "texts": len(vectors), "width": vectors.shape[1], "bytes": size},
        args.json,
        [("vectors", f"{len(vectors)} x {vectors.shape[1]}"), ("file", f"{output} ({size} bytes)")],
        output,
    )
    return DONE


def run_export(args: argparse.Namespace) -> int:
    """Write a network's dense weights as a folder in the Hugging Face layout."""
    output = Path(args.output)
    if output == STANDARD_OUTPUT:
        raise CommandError("-: a network is written as a folder; name one")
    if args.force and output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise CommandError(
            f"{output}: is there already, and --force replaces no folder, which may hold other "
            "files; name one that is new or empty"
        )
    folder = load_network(args.file).export(output)
    size = _size(str(folder))
    lines = [("folder", f"{folder} ({size} bytes)")]
    emit({"output": str(folder), "bytes": size}, args.json, lines)
    return DONE


def _part_lines(net: Any) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return the bits of a network by kind of tensor, as a report and as lines."""
    from diba_np.networks.file import bits_by_part

    parts = bits_by_part(net)
    report = {name: {"bits": bits, "weights": size} for name, (bits, size) in parts.items()}
    lines = [
        (name, f"{bits / 8:.0f} bytes" + (f", {bits / size:.3f} bits a weight" if size else ""))
        for name, (bits, size) in parts.items()
        if bits
    ]
    bits = sum(bits for bits, _ in parts.values())
    size = sum(size for _, size in parts.values())
    report["all"] = {"bits": bits, "weights": size}
    lines.append(("all", f"{bits / 8:.0f} bytes, {bits / size:.3f} bits a weight of {size}"))
    return report, lines


def info_network(args: argparse.Namespace) -> int:
    """Report what a network's file holds: kind, sizes, bits by kind of tensor."""
    net = load_network(args.file)
    c = net.config
    report, lines = _part_lines(net)
    file_bytes = _size(args.file)
    first = [
        ("network", f"{c.kind}, {c.layers} layers, width {c.width}, {c.heads} heads"),
        ("compressed", f"{len(net.compressed)} of {len(net.layers)} linear layers"),
    ]
    whole = {
        "file": args.file,
        "file_bytes": file_bytes,
        "network": c.kind,
        "layers": c.layers,
        "width": c.width,
        "compressed": len(net.compressed),
        "bits": report,
        "record": net.record,
    }
    emit(whole, args.json, [*first, *lines, ("file", f"{args.file} ({file_bytes} bytes)")])
    return DONE


# of `model`, without meaning for a network
_ALONE = (
    "exclude",
    "min_size",
    "allocation",
    "weights",
    "grams",
    "scheduler",
    *(name for name in SHARED if name not in ("effort", "seed")),
)


def _remove(parts: Path, output: Path) -> None:
    """Remove what earlier runs keep of an output; CommandError while one writes there."""
    from diba_np.files.lock import FileLock

    with ExitStack() as held:
        try:
            for lock in parts.rglob("lock"):  # whatever runs there holds one of these
                held.enter_context(FileLock(lock))
        except BlockingIOError:
            raise CommandError(f"{output}: another run writes to it now") from None
        shutil.rmtree(parts, ignore_errors=True)
    if sys.platform == "win32":  # where an open file stays
        shutil.rmtree(parts, ignore_errors=True)


def clear_parts(args: argparse.Namespace, with_texts: bool) -> Path:
    """Return the folder of an output's parts; CommandError if they are of the other kind of run.

    `with_texts` tells of which kind they must not be. `--restart` removes these; those of its own
    kind are looked at by the run itself.
    """
    from diba_np.files.atomic import beside

    parts = beside(Path(args.output), ".parts")
    others: tuple[str, ...] = ("run.json",)
    if with_texts:
        from diba_np.networks.compression_run import STAGES

        others = ("network.parts", *STAGES)
    of_others = any(found for name in others for found in parts.glob(name))
    if of_others and not args.restart:
        raise CommandError(
            f"{parts} holds parts of a run {'with' if with_texts else 'without'} --texts; finish "
            "that one, delete the folder, or pass --restart"
        )
    if of_others:
        _remove(parts, Path(args.output))
    return parts


def run_compress(args: argparse.Namespace) -> int:
    """Compress a network with activations, and train it end to end, its output checked already."""
    usual = args.parser.subparsers()["model"].get_default
    given = [name for name in _ALONE if getattr(args, name) != usual(name)]
    if given:
        option = given[0].replace("_", "-")
        raise CommandError(f"--{option} is of matrices alone; leave it out with --texts")
    from diba_np import networks
    from diba_np.files.parts import OtherRunError
    from diba_np.models.executors import Events

    output = Path(args.output)
    net = load_network(args.source)
    if not net.config.vocabulary and not args.texts.endswith(".npy"):
        raise CommandError(
            f"{args.texts}: a {net.config.kind} reads no texts; give images or spectrograms, .npy"
        )
    texts = _texts(args.texts, net)
    parts = clear_parts(args, with_texts=False)
    log = Events(log=Path(args.json_log) if args.json_log else None)
    started = time.monotonic()
    reached: list[float] = []

    def tell(event: dict[str, Any]) -> None:
        log.tell(**finite(event))
        if event.get("output_snr_db") is not None:
            reached.append(event["output_snr_db"])

    def compressed() -> Any:
        return networks.compress(
            net,
            texts,
            bits=args.bits,
            method=args.method,
            effort=args.effort,
            include=args.include or (),
            jobs=args.jobs or 1,
            threads=args.threads or 1,
            seed=args.seed,
            folder=parts,
            progress=not args.quiet,
            callback=tell,
            **compress_options(args),
        )

    try:
        try:
            small = compressed()
        except OtherRunError:
            if not args.restart:
                raise
            _remove(parts, output)
            small = compressed()
        small.save(output)
        log.tell("done")
    except KeyboardInterrupt:
        log.tell("interrupted")
        raise
    except Exception as error:
        log.tell("failed", error=str(error))
        raise
    finally:
        log.close()
    with suppress(CommandError):  # the same run has begun once more
        _remove(parts, output)
    report, lines = _part_lines(small)
    seconds = time.monotonic() - started
    if reached:
        inexact = [decibels for decibels in reached if math.isfinite(decibels)] or [math.inf]
        lines.append(("outputs", decibels_text(sum(inexact) / len(inexact)) + " in the mean"))
    lines += [("seconds", f"{seconds:.1f}"), ("file", f"{output} ({_size(args.output)} bytes)")]
    whole = {"output": args.output, "bits": report, "wall_seconds": seconds}
    emit({**whole, "file_bytes": _size(args.output)}, args.json, lines)
    return DONE
