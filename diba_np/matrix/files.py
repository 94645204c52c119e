"""Compressed matrices in HDF5 files, whichever method made them.

`diba_np.files.container` is the one way into a file and out of it; `diba_np.matrix.factors_format`
tells what the pieces of a DiBA factorization mean. The other methods carry a ``method`` attribute,
the attributes ``m``, ``n`` and ``scale``, and attributes and one-dimensional datasets of their
own. No ``method`` means DiBA.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from diba_np.errors import FormatError
from diba_np.files.atomic import PathLike
from diba_np.files.container import Container, read_container
from diba_np.matrix.factors_format import layout
from diba_np.matrix.registry import CLASSES, class_of

if TYPE_CHECKING:
    from diba_np.matrix.base import CompressedMatrix


def load(path: PathLike, *, group: str | None = None) -> CompressedMatrix:
    """Read a compressed matrix from an HDF5 file, whichever method made it.

    Everything is checked: version, sizes against the file's length, checksums, the digest, zero
    padding. A damaged file is an error, never a result.

    Parameters
    ----------
    path : path-like
    group : str, optional
        The group to read, for files with many.

    Returns
    -------
    CompressedMatrix
        A `DiBAFactors`, or the class of another method.

    Raises
    ------
    FileNotFoundError
    FormatError
        As `diba_np.files.container.read_container`, or the contents contradict each other. A whole
        model is opened by `diba_np.models.file.open_model`, a network by `diba_np.networks.load`.
    """
    contents = read_container(path, layout, group=group)
    if contents.attributes.get("method") == "alias":  # of a model's file: see `models.file`
        contents = read_container(path, layout, group=_other_name(contents))
    return rebuild(contents)


def _other_name(contents: Container) -> str:
    """Return the name under which an alias's array is stored."""
    alias = contents.attributes.get("alias_of")
    try:
        name = json.loads(str(alias))
    except ValueError:
        name = None
    if not isinstance(name, str):
        raise FormatError(f"{contents.label}: attribute alias_of: found {alias}, expected a name")
    return name


def rebuild(contents: Container) -> CompressedMatrix:
    """Build the compressed matrix that a file holds; `FormatError` of an unknown method."""
    method = contents.attributes.get("method", "diba")
    if method not in CLASSES:
        raise FormatError(
            f"{contents.label}: attribute method: found {method!r}, "
            f"expected one of {', '.join(CLASSES)}"
        )
    matrix: CompressedMatrix = class_of(method).rebuild(contents)
    return matrix
