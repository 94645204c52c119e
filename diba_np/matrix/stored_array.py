"""What a model's file holds beside factorizations: arrays as they are, and stacks of row blocks."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from diba_np.matrix.base import CompressedMatrix
from diba_np.matrix.small_floats import SMALL_FLOATS, decode, encode, word_type

Array = NDArray[Any]


class StoredArray(CompressedMatrix):
    """An array of any shape, stored as it is.

    As an operator it is the matrix (first axis, all others), or one row where it has no two axes.

    Parameters
    ----------
    values : (size,) array
        The entries in row order; types that NumPy has not (bfloat16, 8 bits) as their words.
    array_shape : tuple of int
    array_dtype : str
        NumPy's name of the type, or one of `SMALL_FLOATS`, as "bfloat16".
    record : dict, optional

    Attributes
    ----------
    array : ndarray
        The array in its own shape and type; float32 for types that NumPy has not.
    """

    method = "stored"
    is_array = True
    dataset_kinds: ClassVar[dict[str, str]] = {"values": "payload"}

    def __init__(
        self,
        values: Array,
        array_shape: Sequence[int],
        array_dtype: str,
        record: dict[str, Any] | None = None,
    ) -> None:
        self.array_shape, self.array_dtype = tuple(int(s) for s in array_shape), array_dtype
        kind = word_type(array_dtype)
        stored = np.dtype("u1") if kind.kind == "b" else kind
        if values.dtype != stored or values.shape != (math.prod(self.array_shape),):
            raise ValueError(
                f"values must be {stored} of length {math.prod(self.array_shape)}, "
                f"got {values.dtype} {values.shape}"
            )
        if min(self.array_shape, default=1) < 0 or kind.kind not in "buif":
            raise ValueError(f"array of {array_dtype} {self.array_shape} is not real")
        self.values = values
        rows = self.array_shape[0] if len(self.array_shape) > 1 and values.size else 1
        super().__init__((rows, max(1, values.size // rows)), record=record)

    @classmethod
    def of(
        cls, array: Array, array_dtype: str = "", record: dict[str, Any] | None = None
    ) -> StoredArray:
        """Return an array as this; `array_dtype` says for what type float32 stands, if it does."""
        if array_dtype in SMALL_FLOATS:
            words = encode(array, array_dtype).reshape(-1)
            return cls(words, array.shape, array_dtype, record)
        little = array.dtype.newbyteorder("<")
        flat = np.ascontiguousarray(array, little).reshape(-1)
        return cls(
            flat.view(np.uint8) if little.kind == "b" else flat, array.shape, little.str, record
        )

    @property
    def array(self) -> Array:
        """The array in its own shape and type; float32 for types that NumPy has not."""
        values = self.values
        if self.array_dtype in SMALL_FLOATS:
            values = decode(values, self.array_dtype)
        elif np.dtype(self.array_dtype).kind == "b":
            values = values.astype(bool)
        return values.reshape(self.array_shape)

    def to_dense(self) -> Array:
        """Return the matrix as (m, n) float32."""
        if not self.values.size:
            return np.zeros(self.shape, np.float32)
        return self.array.reshape(self.shape).astype(np.float32)

    def stands_for(self, shape: tuple[int, ...], dtype: str, matrix: tuple[int, int]) -> bool:
        """Tell whether this is an array of that shape and type."""
        return (self.array_shape, self.array_dtype) == (shape, dtype)

    def array_form(self) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Return shape and dtype of the array."""
        return self.array_shape, self.array.dtype

    def fill(self, out: Array) -> None:
        """Write the entries into an array of the same shape."""
        out[...] = self.array

    def to_array(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return the array, whose shape and type are its own."""
        return self.array

    def to_datasets(self) -> tuple[dict[str, Any], dict[str, Array]]:
        """Return ``(attrs, arrays)``."""
        attrs = {"array_shape": json.dumps(self.array_shape), "array_dtype": self.array_dtype}
        return attrs, {"values": self.values}

    @classmethod
    def from_datasets(cls, attrs: dict[str, Any], arrays: dict[str, Array]) -> StoredArray:
        """Build the object again from what `to_datasets` gave."""
        return cls(arrays["values"], json.loads(attrs["array_shape"]), str(attrs["array_dtype"]))
