"""What the subcommands have in common: arrays in, files out, reports, complaints."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diba_np.machine.display import shown

if TYPE_CHECKING:
    from diba_np.matrix.base import CompressedMatrix

DONE, FAILED = 0, 1

STANDARD_OUTPUT = Path("-")

# a larger .npy is mapped and read in row blocks instead of being held in memory
_MAP_BYTES = 1 << 30

Report = dict[str, Any]

# names of arguments in messages of the library, which are options here
_ARGUMENT = re.compile(
    r"(?<![\w./\\'-])"  # within a path, or quoted, it is a name of the user's
    r"(texts|labels|against|group|include|exclude|grams|inputs|gram|output_weight|weights|bits|"
    r"ratio|snr|min_size|allocation|threads|jobs|scale_bits|shift|seed|effort|checkpoint|restart|"
    r"block_rows|solver|method|loss|validation|terms|max_sweeps|time_limit|tol|patience|stay|clip)="
    r'("[a-z]+"|\d+(?:\.\d+)?)?(?![\w/\\-]|\.\w)'
)


class CommandError(Exception):
    """A sentence for the user; the command fails with it and writes nothing."""


def has_standard_output() -> bool:
    """Tell whether there is a standard output at all."""
    return sys.stdout is not None and not getattr(sys.stdout, "closed", False)


def sentence(error: BaseException) -> str:
    """Return what an error says, in the words of the command line."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{os.fsdecode(error.filename)}: {error.strerror}"
    return in_options(text)


def in_options(text: str) -> str:
    """Return a message with arguments of Python as options.

    >>> in_options('name one with group=; allocation="relative" counts (exclude), scale_bits=32')
    'name one with --group; --allocation relative counts (--exclude), --scale-bits 32'
    >>> in_options("runs/seed=0/bits=2.h5: no such file")
    'runs/seed=0/bits=2.h5: no such file'
    """

    def option(match: re.Match[str]) -> str:
        name, value = match.groups()
        return f"--{name.replace('_', '-')}" + (" " + value.strip('"') if value else "")

    text = _ARGUMENT.sub(option, text).replace("(exclude)", "(--exclude)")
    text = text.replace(" to begin anew", ", or pass --restart")
    return text.replace("ask for a restart", "pass --restart")


def check_dense(path: str) -> None:
    """Complain about what is given for a .npy: nothing, a folder, a file of HDF5."""
    if not Path(path).exists():
        raise CommandError(f"{path}: no such file")
    if Path(path).is_dir():
        raise CommandError(f"{path}: is a folder, expected one .npy")
    from diba_np.files.signatures import kind_of

    if not Path(path).is_file() or kind_of(Path(path)) != "hdf5":
        return
    from diba_np.files.container import groups

    if groups(path):
        raise CommandError(
            f"{path}: is compressed already, expected one dense array (.npy), as "
            "`diba-np reconstruct` writes it; `diba-np info` tells what it holds"
        )
    raise CommandError(
        f"{path}: is an HDF5 file, expected one array (.npy); `diba-np model` takes its arrays"
    )


def load_array(path: str, mapped: bool = False) -> Any:
    """Read a .npy file; refuse objects, archives and files shorter than they claim to be."""
    import numpy as np

    check_dense(path)
    if not Path(path).is_file():  # a pipe; it can be read once
        from diba_np.sources.numpy_files import npy_of_bytes

        return npy_of_bytes(Path(path).read_bytes(), path)
    try:
        # a map checks the size that the header claims against the file's; no memory is taken
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(array, np.ndarray) and array.nbytes <= _MAP_BYTES and not mapped:
            array = np.array(array)
    except PermissionError:
        raise
    except Exception as error:  # a header can be anything
        lines = str(error).splitlines() or [type(error).__name__]
        if "allow_pickle" in lines[0]:  # what NumPy says of anything that it does not know
            lines = ["no array's header, or one of Python objects; numpy.save writes a .npy"]
        raise CommandError(f"{path}: not readable as .npy ({lines[0]})") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise CommandError(f"{path}: found an archive of arrays, expected one array (.npy)")
    return array


def shape_in_model(file: str, group: str | None) -> tuple[int, ...] | None:
    """Return the shape of the array that a matrix was in a model: that of a convolution, say."""
    from diba_np.models.file import is_model, open_model

    if group and is_model(file):
        with open_model(file) as model:
            if group in model:
                return model.array_shape(group)
    return None


def load_original(path: str, matrix: CompressedMatrix, shape: tuple[int, ...] | None) -> Any:
    """Read the .npy that a stored matrix stands for, as a matrix.

    `shape` is that of the array that it was in a model.
    """
    array = load_array(path)
    if array.shape == shape:
        return array.reshape(matrix.shape) if array.size else array
    if array.shape != matrix.shape:
        raise CommandError(f"{path}: found shape {array.shape}, expected {shape or matrix.shape}")
    return array


def same_entries(a: Any, b: Any) -> bool:
    """Tell whether two arrays are equal; what is no number is equal to itself."""
    import numpy as np

    return bool(np.array_equal(a, b, equal_nan=a.dtype.kind == "f"))


def check_output(
    path: Path,
    force: bool,
    streams: bool = True,
    inputs: Sequence[str | None] = (),
    folder: bool = False,
) -> None:
    """Complain before the work about an output that could not be written.

    `streams` tells whether the command can write to standard output, `inputs` are the files that
    it reads, and with `folder` the output may be a folder.
    """
    if path == STANDARD_OUTPUT:
        if not streams:
            raise CommandError("-: this command writes to a file only; name one")
        if not has_standard_output():
            raise CommandError("standard output is closed; name a file")
        if sys.stdout.isatty():
            raise CommandError("standard output is a terminal; redirect it, or name a file")
        return
    from diba_np.files.atomic import is_stream, target_of

    try:
        if is_stream(path):  # nothing is replaced
            return
        final = path if folder and path.is_dir() else target_of(path)
    except OSError as error:
        raise CommandError(sentence(error)) from error
    if not final.exists():
        return
    check_not_read(path, inputs)
    for name in filter(None, inputs):
        read = Path(name)
        if force and read.is_dir() and final.resolve().is_relative_to(read.resolve()):
            raise CommandError(
                f"{path}: is in the folder that is read ({name}) and may be a part of it; "
                "name another file, or delete this one"
            )
    if not force and not (final.is_dir() and not any(final.iterdir())):
        raise CommandError(f"{path}: exists; pass --force to replace it")


def check_not_read(path: Path, inputs: Sequence[str | None]) -> None:
    """Complain about a file that is written to and is one of those that are read."""
    for name in filter(None, inputs):
        if path.exists() and Path(name).exists() and Path(name).samefile(path):
            raise CommandError(f"{path}: is also what is read ({name}); name another file")


def check_drawing(picture: Path | None = None) -> None:
    """Complain before the work where nothing can be drawn, or not that kind of file."""
    from diba_np.report.curves import check_matplotlib

    check_matplotlib()
    if picture is None or picture == STANDARD_OUTPUT or not picture.suffix:
        return
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    kinds.pop("pgf", None)  # drawn by a TeX that is to be installed
    if picture.suffix[1:].lower() not in kinds:
        raise CommandError(f"{picture}: expected a picture's name, one of .{', .'.join(kinds)}")


def finite(value: Any) -> Any:
    """Replace infinities, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_standard_output(output: Path) -> bool:
    """Tell whether what is written there goes to standard output, under another name too."""
    if output == STANDARD_OUTPUT:
        return True
    try:
        return os.path.samestat(output.stat(), os.fstat(sys.stdout.fileno()))
    except (OSError, ValueError, AttributeError):  # there is none, or one without a file
        return False


def emit(
    report: Report, as_json: bool, lines: Sequence[tuple[str, str]], output: Path | None = None
) -> None:
    """Print a report; to standard error where `output` took standard output."""
    stream = sys.stderr if output is not None and _is_standard_output(output) else sys.stdout
    if as_json:
        print(json.dumps(finite(report)), file=stream)
        return
    lines = [(shown(name), shown(text)) for name, text in lines]
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        print(f"{name:<{width}}  {text}", file=stream)


def write_file(output: Path, write: Callable[[Path], Any]) -> int:
    """Write a file atomically, or its bytes to standard output; return their number."""
    from diba_np.files.atomic import atomic_path, naming_temporary, temporary_file

    if output != STANDARD_OUTPUT:
        with atomic_path(output) as temporary:
            write(temporary)
            size = temporary.stat().st_size
        return size
    import shutil

    with temporary_file() as temporary:
        with naming_temporary(temporary):
            write(temporary)
        sys.stdout.flush()
        with temporary.open("rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)
        sys.stdout.buffer.flush()
        return temporary.stat().st_size


def decibels_text(value: float | None) -> str:
    """Return decibels as text; None and infinity are those of an exact result."""
    return "exact" if value is None or value == math.inf else f"{value:.3f} dB"


def shape_text(shape: Sequence[int]) -> str:
    """Return the shape of an array as text."""
    return " x ".join(map(str, shape)) or "scalar"


def size_report(matrix: CompressedMatrix) -> Report:
    """Return the fields "sizes" of a report."""
    m, n = matrix.shape
    report = {"m": m, "n": n, "method": matrix.method}
    if matrix.terms:
        widths = [term.scale_bits for term in matrix.terms]
        report |= {"k": matrix.k, "shift": matrix.shift}
        if len(widths) == 1:
            report["scale_bits"] = widths[0]
        else:
            report |= {"scale_bits": widths, "terms": [term.k for term in matrix.terms]}
    return report | {
        "storage_bits": matrix.storage_bits(),
        "storage_breakdown": matrix.storage_breakdown(),
        "bits_per_weight": matrix.bits_per_weight,
        "storage_ratio": matrix.storage_ratio(),
    }


def _widths(scale_bits: Any) -> str:
    if isinstance(scale_bits, list):  # of each term
        return ", ".join(_widths(own) for own in scale_bits)
    return "/".join(map(str, scale_bits)) if isinstance(scale_bits, tuple) else str(scale_bits)


def size_lines(report: Report) -> list[tuple[str, str]]:
    """Return what `size_report` found as lines to read."""
    lines = [("shape", f"{report['m']} x {report['n']}")]
    counted = f"{report['storage_bits']} bits"
    if report["method"] == "diba":
        shift = f" (shift {report['shift']:g})" if report["shift"] else ""
        terms = f" in terms of {', '.join(map(str, report['terms']))}" if "terms" in report else ""
        lines.append(("k", f"{report['k']}{terms}{shift}"))
        counted += f", {_widths(report['scale_bits'])}-bit diagonals"
    else:
        lines.append(("method", report["method"]))
    ratio = report["storage_ratio"]
    share = f" (1/{1 / ratio:.1f})" if ratio else ""  # nothing is stored of an empty array
    return [
        *lines,
        ("bits per weight", f"{report['bits_per_weight']:.4f} ({counted})"),
        ("storage ratio", f"{ratio:.5f} of float32{share}"),
    ]
