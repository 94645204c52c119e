"""What a compressed matrix is: an operator, counted bits, one HDF5 container.

A method derives from `CompressedMatrix` and writes four things: `fit`, `to_dense`, `to_datasets`
and `from_datasets`. Storage is counted on the very arrays that the file holds, so the count cannot
drift away from the bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diba_np.arrays import row_blocks
from diba_np.errors import FormatError
from diba_np.files.atomic import PathLike
from diba_np.files.container import Container, plain_attributes
from diba_np.files.container_writer import write_container
from diba_np.matrix.budgets import DENSE_BITS
from diba_np.matrix.factors_format import PLAIN_VERSION
from diba_np.matrix.files import load
from diba_np.matrix.operator import Operator
from diba_np.matrix.quality import retuned
from diba_np.matrix.small_floats import narrowed

if TYPE_CHECKING:
    from typing_extensions import Self

Array = NDArray[Any]

# where a stored bit can belong
KINDS = ("payload", "scales", "index", "codebook")


class CompressedMatrix(Operator):
    """A matrix kept in few bits; a scipy ``LinearOperator`` of dtype float32.

    Attributes
    ----------
    method : str
        Name of the method, as written into files.
    scale : float
        Overall factor (float64): the stored parts describe ``A / scale``.
    record : dict
        How the matrix was made: settings, seed, seconds.

    Notes
    -----
    A pickle or a copy holds what a file would, and the record.

    Results have dtype ``np.result_type(np.float32, x.dtype)``, at most float64 (complex128). A
    product of a subclass that overrides neither `_apply` nor `_apply_transposed` decodes the matrix
    once and keeps the dense copy (4 m n bytes).
    """

    method: ClassVar[str] = ""
    # dataset name -> one of KINDS; every dataset of the class must be listed
    dataset_kinds: ClassVar[dict[str, str]] = {}
    # those of them that a file may be without
    optional_datasets: ClassVar[frozenset[str]] = frozenset()

    # whether `fit` heeds the inputs that it is given, or only checks them
    uses_inputs: ClassVar[bool] = False

    # whether this is an array kept as it is
    is_array: ClassVar[bool] = False

    @property
    def terms(self) -> tuple[Any, ...]:
        """The one-term factorizations of a `DiBAFactors`; none of any other method."""
        return ()

    def __init__(
        self, shape: tuple[int, int], scale: float = 1.0, record: dict[str, Any] | None = None
    ) -> None:
        super().__init__(np.dtype(np.float32), tuple(int(v) for v in shape))
        self.scale = float(scale)
        self.record = dict(record or {})
        self._decoded = None

    # ---- to be written by a method -------------------------------------------------
    @classmethod
    def fit(cls, A: ArrayLike, bits: float, inputs: ArrayLike | None = None, seed: int = 0) -> Self:
        """Return the best setting of the method within ``bits * m * n`` stored bits."""
        raise NotImplementedError

    @classmethod
    def least_bits(cls, shape: tuple[int, int]) -> int:
        """Return the stored bits under which `fit` has nothing; 0 where the entries decide."""
        return 0

    def to_datasets(self) -> tuple[dict[str, Any], dict[str, Array]]:
        """Return ``(attrs, arrays)``: scalars, and 1-D arrays by dataset name."""
        raise NotImplementedError

    @classmethod
    def from_datasets(cls, attrs: dict[str, Any], arrays: dict[str, Array]) -> Self:
        """Build the object again from what `to_datasets` gave."""
        raise NotImplementedError

    # ---- bits and quality ------------------------------------------------------------
    def storage_breakdown(self) -> dict[str, int]:
        """Return the stored bits as ``{"payload", "scales", "index", "codebook"}``.

        Counted on the arrays of `to_datasets`, the padding of their last bytes included;
        the scalars of the header (sizes, `scale`, the record) are not in it.
        """
        counts = dict.fromkeys(KINDS, 0)
        for name, array in self.to_datasets()[1].items():
            counts[self.dataset_kinds[name]] += 8 * array.nbytes
        return counts

    def storage_bits(self) -> int:
        """Return the sum of `storage_breakdown`, in bits."""
        return sum(self.storage_breakdown().values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits divided by m n."""
        return float(self.storage_bits() / (self.shape[0] * self.shape[1]))

    def storage_ratio(self) -> float:
        """Return `storage_bits` as a share of the dense float32 matrix."""
        return float(self.storage_bits() / (DENSE_BITS * self.shape[0] * self.shape[1]))

    # ---- the array that it stands for -------------------------------------------------
    def stands_for(self, shape: tuple[int, ...], dtype: str, matrix: tuple[int, int]) -> bool:
        """Tell whether this can be an array of that shape and type, seen as such a matrix."""
        return bool(self.shape == matrix)

    def array_form(self) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Return shape and dtype of the dense array, the matrix in float32."""
        return self.shape, np.dtype(np.float32)

    def fill(self, out: Array) -> None:
        """Write the matrix into an array of m n entries, in row order, block by block."""
        expand, flat = self.row_expander(), out.reshape(self.shape)
        for rows in row_blocks(self.shape):
            flat[rows] = expand(rows)

    def to_array(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return the matrix as an array of another shape and type of floats."""
        return narrowed(self.to_dense().reshape(shape), np.dtype(dtype))

    # ---- file and copies ---------------------------------------------------------------
    def contents(self) -> tuple[dict[str, Any], dict[str, Array]]:
        """Return the ``(attributes, arrays)`` that stand for the matrix in a file."""
        own, arrays = self.to_datasets()
        m, n = self.shape
        attributes = {
            "format_version": PLAIN_VERSION,
            "method": self.method,
            "m": m,
            "n": n,
            "scale": self.scale,
            **own,
        }
        return attributes, arrays

    def save(self, path: PathLike, *, group: str | None = None) -> int:
        """Write to an HDF5 file, atomically; see `diba_np.files.container_writer.write_container`.

        Returns the file's bytes.
        """
        return write_container(path, *self.contents(), self.record, group=group)

    @classmethod
    def load(cls, path: PathLike, *, group: str | None = None) -> Self:
        """Read a matrix of this method from `path`; `FormatError` if it is another's."""
        matrix = load(path, group=group)
        if not isinstance(matrix, cls):
            raise FormatError(
                f"{path}: attribute method: found {matrix.method}, expected {cls.method}"
            )
        return matrix

    @classmethod
    def rebuild(cls, contents: Container) -> Self:
        """Build the object from what a file holds.

        Raises
        ------
        FormatError
            A dataset is missing, or attributes and datasets contradict each other.
        """
        needed = [name for name in cls.dataset_kinds if name not in cls.optional_datasets]
        missing = [name for name in needed if name not in contents.arrays]
        if missing:
            raise FormatError(f"{contents.label}: dataset {missing[0]}: found none, expected it")
        scale = contents.attributes.get("scale")
        if not isinstance(scale, float) or not np.isfinite(scale):
            raise FormatError(f"{contents.label}: attribute scale: found {scale}, expected a float")
        try:
            result = cls.from_datasets(contents.attributes, contents.arrays)
        except (LookupError, ValueError, TypeError, ArithmeticError, MemoryError) as error:
            raise FormatError(f"{contents.label}: inconsistent contents: {error}") from error
        # earlier states kept the figures of what a layer had changed
        trained = "retuned" in contents.record
        result.record = retuned(contents.record) if trained else contents.record
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        # what a file holds: nothing that products decode, and codes in as many bits as they have
        attributes, arrays = self.contents()
        return _copied, (type(self), plain_attributes(attributes), arrays, self.record)


def _copied(
    cls: type[CompressedMatrix],
    attributes: dict[str, Any],
    arrays: dict[str, Array],
    record: dict[str, Any],
) -> CompressedMatrix:
    """Make the matrix that a pickle or a copy holds."""
    return cls.rebuild(Container(f"a copy of a {cls.__name__}", attributes, arrays, record))


# ---- for `from_datasets` ----------------------------------------------------------------------


def take(arrays: dict[str, Array], name: str, dtype: str, size: int) -> Array:
    """Return ``arrays[name]`` after checking its dtype and length (for `from_datasets`)."""
    array = arrays[name]
    if array.dtype != np.dtype(dtype) or array.shape != (size,):
        raise FormatError(
            f"dataset {name!r} must be {np.dtype(dtype).str} of length {size}, "
            f"found {array.dtype.str} {array.shape}"
        )
    return array
