"""`ModelFactors`: the factorizations of a whole model, by name, in memory or in one file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from diba_np.checks import check_count
from diba_np.errors import FormatError
from diba_np.files.atomic import PathLike
from diba_np.files.container import group_key, read_container, read_groups, read_root
from diba_np.files.container_writer import write_groups
from diba_np.matrix.base import CompressedMatrix
from diba_np.matrix.budgets import DENSE_BITS
from diba_np.matrix.factors_format import layout
from diba_np.matrix.files import rebuild
from diba_np.matrix.small_floats import value_type
from diba_np.models.export import export_model
from diba_np.models.shapes import matrix_shape

CONTENTS = "model"

SHARD_BYTES = 5 * 10**9  # what other software cuts its shards at

ALIAS = "alias"  # in the place of a method, of a group that holds no more than a name


@dataclass(frozen=True)
class Alias:
    """Stands for an array that is stored under another name.

    Attributes
    ----------
    name : str
        The other name.
    """

    name: str


# (name, array shape, array dtype, what stands for it)
Item = tuple[str, tuple[int, ...], str, CompressedMatrix | Alias]


class ModelFactors(Mapping[str, CompressedMatrix]):
    """What stands for each array of a model, by the array's name; read when first asked for.

    A mapping of name to `DiBAFactors`, to a stack of row blocks (`RowBlocks`, of large tall
    matrices) or, for arrays kept as they are, to a `StoredArray`. All three multiply as SciPy's
    linear operators do. `open_model` opens a file; no file stays open between two calls. What
    ``model[name]`` reads is kept until `close`, all else reads one array after another.

    Attributes
    ----------
    record : dict
        How the model was made: budget, settings, totals, versions.
    path : Path or None
        Of the file; None in memory.
    aliases : dict
        Names whose array is stored under another name, and that name.

    Notes
    -----
    A convolution (O, I, h, w) is kept as the matrix (O, I h w): the product with it is that with
    the unfolded patches. Experts (e, m, n) lie one under the other in the matrix (e m, n), each
    with factors of its own (`RowBlocks.blocks`). `dense` gives the array's own shape back.
    """

    def __init__(
        self,
        record: dict[str, Any],
        arrays: dict[str, tuple[tuple[int, ...], str]],
        made: dict[str, CompressedMatrix],
        path: Path | None = None,
        aliases: dict[str, str] | None = None,
        digests: dict[str, str] | None = None,
    ) -> None:
        self.record, self.path = record, path
        self.aliases = aliases or {}
        self._digests = digests or {}  # of a file's groups, when it was opened
        self._arrays, self._made = arrays, made
        self._closed = False
        self._bits: dict[str, int] = {}  # of arrays of a file, counted when read

    @classmethod
    def of(cls, items: Iterable[Item], record: dict[str, Any]) -> ModelFactors:
        """Return a model in memory."""
        arrays, contents, aliases = {}, dict[str, CompressedMatrix](), {}
        for name, shape, dtype, thing in items:
            arrays[name] = (shape, dtype)
            if isinstance(thing, Alias):
                aliases[name] = thing.name
            else:
                contents[name] = thing
        return cls(record, arrays, contents, aliases=aliases)

    # -- mapping -----------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> CompressedMatrix:
        made = self.read(name)
        self._made[self.aliases.get(name, name)] = made
        return made

    def read(self, name: str) -> CompressedMatrix:
        """Return what stands for an array, as ``model[name]``, but keep nothing that is read.

        Raises
        ------
        KeyError
            There is no array of that name.
        ValueError
            The model is closed.
        FormatError
            The file does not hold what it should, or other arrays than when it was opened.
        """
        if self._closed:
            raise ValueError("the model is closed")
        if name not in self._arrays:
            raise KeyError(name)
        name = self.aliases.get(name, name)
        return self._made[name] if name in self._made else self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __repr__(self) -> str:
        where = "" if self.path is None else f", {str(self.path)!r}"
        return f"ModelFactors({len(self)} arrays, {self.size} weights{where})"

    def _read(self, name: str) -> CompressedMatrix:
        contents = read_container(self.path or "", layout, group=name)
        if contents.digest != self._digests[name]:
            raise FormatError(f"{self.path}: array {name}: was changed since the file was opened")
        stored = rebuild(contents)
        shape, dtype = self._arrays[name]
        matrix = matrix_shape(shape) if len(shape) > 1 else (0, 0)
        if not stored.stands_for(shape, dtype, matrix):
            raise FormatError(f"{self.path}: array {name}: found {stored.shape}, expected {shape}")
        self._bits[name] = stored.storage_bits()
        return stored

    def close(self) -> None:
        """Forget what was read; using the mapping afterwards is a ValueError."""
        self._made, self._closed = {}, True

    def __enter__(self) -> ModelFactors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- arrays ------------------------------------------------------------------------------------

    def array_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that the array has in the model."""
        return self._arrays[name][0]

    def dense(self, name: str) -> NDArray[Any]:
        """Return the array as the model has it: its own shape and type.

        float32 for types that NumPy has not, such as bfloat16.
        """
        shape, dtype = self._arrays[name]
        return self.read(name).to_array(shape, value_type(dtype))

    def array_dtype(self, name: str) -> str:
        """Return NumPy's name of the type that the array has in the model, or "bfloat16" and so."""
        return self._arrays[name][1]

    def _stored(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the arrays that are stored, those under two names once."""
        return {name: s for name, (s, _) in self._arrays.items() if name not in self.aliases}

    @property
    def size(self) -> int:
        """Number of weights of all arrays; an array under two names counts once."""
        return sum(math.prod(shape) for shape in self._stored().values())

    def storage_bits(self) -> int:
        """Return the stored bits of all arrays, those kept as they are included."""
        return sum(
            self._bits[name] if name in self._bits else self.read(name).storage_bits()
            for name, shape in self._stored().items()
            if math.prod(shape)
        )

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of all arrays over their number of weights."""
        return self.storage_bits() / max(1, self.size)

    def storage_ratio(self) -> float:
        """Return the stored bits as a share of all arrays in float32."""
        return self.bits_per_weight / DENSE_BITS

    def save(self, path: PathLike) -> int:
        """Write everything to one file, atomically; return its bytes."""
        items = (
            (name, *self._arrays[name], Alias(self.aliases[name]))
            if name in self.aliases
            else (name, *self._arrays[name], self.read(name))
            for name in self
        )
        return write_model(path, items, self.record)

    def export(self, path: PathLike, *, shard_bytes: int = SHARD_BYTES) -> int:
        """Write every array dense, for other software; return the bytes written.

        Parameters
        ----------
        path : path-like
            A name that ends with .safetensors or .npz, or a folder: model.safetensors there, or
            shards and their index as Hugging Face names them. A file is replaced whole; so is a
            folder that is not there yet, in others the files of the same names.
        shard_bytes : int, default 5e9
            The most that one file of a folder holds, of more than one array.

        Returns
        -------
        int

        Raises
        ------
        ValueError
            A name that the format cannot hold; `shard_bytes` below 1.
        OSError
            It cannot be written.

        Notes
        -----
        Each array has the name, shape and type that it had in the source, bfloat16 and 8-bit
        floats rounded to the nearest; .npz has neither and gets float32. Arrays under two names
        are written twice. The memory is that of one array's factors and of a block of its rows.
        """
        return export_model(self, path, check_count(shard_bytes, "shard_bytes"))


def write_model(path: PathLike, items: Iterable[Item], record: dict[str, Any]) -> int:
    """Write a model to one file, atomically, one array after another; return its bytes.

    Each array is a group as `diba_np.matrix.files` describes, with the attributes ``name`` (JSON),
    ``order``, ``array_shape`` (JSON) and ``array_dtype`` beside its own; the root has
    ``contents="model"`` and ``record`` (JSON). An array that is stored under another name has a
    group without datasets, with ``method="alias"`` and ``alias_of`` (JSON).
    """

    def groups() -> Iterator[tuple[str, dict[str, Any], dict[str, NDArray[Any]], dict[str, Any]]]:
        for order, (name, shape, dtype, content) in enumerate(items):
            own, arrays, notes = _contents(content, shape)
            entry = {
                "name": json.dumps(name),
                "order": order,
                "array_shape": json.dumps(shape),
                "array_dtype": dtype,
            }
            yield group_key(name), own | entry, arrays, notes

    root = {"contents": CONTENTS, "record": json.dumps(record)}
    return write_groups(path, groups(), root)


def _contents(
    content: CompressedMatrix | Alias, shape: tuple[int, ...]
) -> tuple[dict[str, Any], dict[str, NDArray[Any]], dict[str, Any]]:
    """Return attributes, arrays and record of a group; that of an alias holds a name alone."""
    if not isinstance(content, Alias):
        return *content.contents(), content.record
    m, n = matrix_shape(shape)
    name = json.dumps(content.name)
    return {"format_version": 1, "method": ALIAS, "m": m, "n": n, "alias_of": name}, {}, {}


def is_model(path: PathLike) -> bool:
    """Return whether a file says that it holds a model; False if it cannot be read."""
    try:
        return read_root(path).get("contents") == CONTENTS
    except (OSError, FormatError):
        return False


def open_model(path: PathLike) -> ModelFactors:
    """Open a model's file; arrays are read, and checked, when they are asked for.

    Parameters
    ----------
    path : path-like

    Returns
    -------
    ModelFactors

    Raises
    ------
    FileNotFoundError
    FormatError
        Not a model's file, or an array is missing, changed or added.
    """
    root, groups = read_groups(path)
    entries, aliases, digests = {}, {}, {}
    try:
        if root["contents"] != CONTENTS:
            raise ValueError(f"contents {root['contents']!r}")
        for key, attributes in groups.items():
            name = json.loads(attributes["name"])
            shape = tuple(int(side) for side in json.loads(attributes["array_shape"]))
            if group_key(name) != key or min(shape, default=1) < 0:
                raise ValueError(f"group {key} of array {name!r}")
            entries[name] = (int(attributes["order"]), (shape, str(attributes["array_dtype"])))
            digests[name] = str(attributes["digest"])
            if attributes.get("method") == ALIAS:
                aliases[name] = str(json.loads(attributes["alias_of"]))
        for name, other in aliases.items():
            if other in aliases or entries.get(other, (0, None))[1] != entries[name][1]:
                raise ValueError(f"array {name!r} as an alias of {other!r}")
        record = json.loads(root["record"])
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise FormatError(f"{path}: found {error}, expected a model") from error
    arrays = {
        name: form for name, (_, form) in sorted(entries.items(), key=lambda item: item[1][0])
    }
    place = Path(path).absolute()  # arrays are read later, maybe from another working folder
    return ModelFactors(record, arrays, {}, place, aliases, digests)
