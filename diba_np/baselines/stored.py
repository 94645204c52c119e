"""What a model's file holds beside factorizations: arrays as they are, and stacks of row blocks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from diba_np import metrics
from diba_np.baselines.base import CompressedMatrix
from diba_np.bfloat16 import BFLOAT16, from_bfloat16, to_bfloat16
from diba_np.container import Container
from diba_np.factors import DiBAFactors
from diba_np.store import payload, rebuild

Array = NDArray[Any]


class StoredArray(CompressedMatrix):
    """An array of any shape, stored as it is.

    As an operator it is the matrix (first axis, all others), or one row where it has no two axes.

    Parameters
    ----------
    values : (size,) array
        The entries in row order; bfloat16 as its 16-bit words.
    array_shape : tuple of int
    array_dtype : str
        NumPy's name of the type, or "bfloat16".
    record : dict, optional

    Attributes
    ----------
    array : ndarray
        The array in its own shape and type; float32 for bfloat16.
    """

    method = "stored"
    dataset_kinds: ClassVar[dict[str, str]] = {"values": "payload"}

    def __init__(
        self,
        values: Array,
        array_shape: Sequence[int],
        array_dtype: str,
        record: dict[str, Any] | None = None,
    ) -> None:
        self.array_shape, self.array_dtype = tuple(int(s) for s in array_shape), array_dtype
        wide = array_dtype == BFLOAT16
        kind = np.dtype("<u2" if wide else array_dtype)
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
        """Return an array as this; `array_dtype` is "bfloat16" where float32 stands for that."""
        if array_dtype == BFLOAT16:
            return cls(to_bfloat16(array).reshape(-1), array.shape, array_dtype, record)
        little = array.dtype.newbyteorder("<")
        flat = np.ascontiguousarray(array, little).reshape(-1)
        return cls(
            flat.view(np.uint8) if little.kind == "b" else flat, array.shape, little.str, record
        )

    @property
    def array(self) -> Array:
        """The array in its own shape and type; float32 for bfloat16."""
        values = self.values
        if self.array_dtype == BFLOAT16:
            values = from_bfloat16(values)
        elif np.dtype(self.array_dtype).kind == "b":
            values = values.astype(bool)
        return values.reshape(self.array_shape)

    def to_dense(self) -> Array:
        """Return the matrix as (m, n) float32."""
        if not self.values.size:
            return np.zeros(self.shape, np.float32)
        return self.array.reshape(self.shape).astype(np.float32)

    def to_datasets(self) -> tuple[dict[str, Any], dict[str, Array]]:
        """Return ``(attrs, arrays)``."""
        attrs = {"array_shape": json.dumps(self.array_shape), "array_dtype": self.array_dtype}
        return attrs, {"values": self.values}

    @classmethod
    def from_datasets(cls, attrs: dict[str, Any], arrays: dict[str, Array]) -> StoredArray:
        """Build the object again from what `to_datasets` gave."""
        return cls(arrays["values"], json.loads(attrs["array_shape"]), str(attrs["array_dtype"]))


class RowBlocks(CompressedMatrix):
    """Factorizations of row blocks, one under the other.

    Parameters
    ----------
    blocks : sequence of DiBAFactors
        All with the same number of columns.
    record : dict, optional

    Attributes
    ----------
    blocks : tuple of DiBAFactors
    """

    method = "rows"

    def __init__(self, blocks: Sequence[DiBAFactors], record: dict[str, Any] | None = None) -> None:
        self.blocks = tuple(blocks)
        widths = sorted({block.shape[1] for block in self.blocks})
        if len(widths) != 1:
            raise ValueError(f"blocks must have one number of columns, got {widths}")
        super().__init__((sum(block.shape[0] for block in self.blocks), widths[0]), record=record)

    @property
    def starts(self) -> list[int]:
        """First row of each block, and the number of rows."""
        return [0, *np.cumsum([block.shape[0] for block in self.blocks]).tolist()]

    def to_dense(self) -> Array:
        """Return the matrix as (m, n) float32."""
        return np.concatenate([block.to_dense() for block in self.blocks])

    def row_expander(self) -> Callable[[metrics.RowIndex], Array]:
        """Return a function from a slice or vector of rows to those of the matrix, float32."""
        starts, expanders = self.starts, [block.row_expander() for block in self.blocks]

        def rows(wanted: metrics.RowIndex) -> Array:
            index = np.arange(self.shape[0])[wanted]
            found = np.empty((len(index), self.shape[1]), np.float32)
            for expand, start, stop in zip(expanders, starts[:-1], starts[1:], strict=True):
                mine = np.flatnonzero((start <= index) & (index < stop))
                if mine.size:
                    found[mine] = expand(index[mine] - start)
            return found

        return rows

    def _apply(self, X: Array) -> Array:
        return np.concatenate([block.matmat(X) for block in self.blocks])

    def _apply_transposed(self, Y: Array) -> Array:
        starts = self.starts
        parts = [
            block.T.matmat(Y[start:stop])
            for block, start, stop in zip(self.blocks, starts[:-1], starts[1:], strict=True)
        ]
        result: Array = np.sum(parts, axis=0, dtype=parts[0].dtype)
        return result

    def storage_breakdown(self) -> dict[str, int]:
        """Return the stored bits by kind: the sum over the blocks."""
        counts: dict[str, int] = {}
        for block in self.blocks:
            for kind, count in block.storage_breakdown().items():
                counts[kind] = counts.get(kind, 0) + count
        return counts

    def to_datasets(self) -> tuple[dict[str, Any], dict[str, Array]]:
        """Return ``(attrs, arrays)``: those of each block after its number."""
        attrs: dict[str, Any] = {"blocks": len(self.blocks)}
        arrays: dict[str, Array] = {}
        for i, block in enumerate(self.blocks):
            own, datasets = payload(block)
            plain = {
                name: value.tolist() if isinstance(value, np.ndarray) else value
                for name, value in own.items()
            }
            attrs[f"block{i}"] = json.dumps(plain)
            arrays |= {f"block{i}.{name}": array for name, array in datasets.items()}
        return attrs, arrays

    @classmethod
    def from_datasets(cls, attrs: dict[str, Any], arrays: dict[str, Array]) -> RowBlocks:
        """Build the object again from what `to_datasets` gave."""
        blocks = []
        for i in range(int(attrs["blocks"])):
            own = json.loads(attrs[f"block{i}"])
            mine = f"block{i}."
            datasets = {
                name.removeprefix(mine): array
                for name, array in arrays.items()
                if name.startswith(mine)
            }
            blocks.append(rebuild(Container(f"block {i}", own, datasets, {})))
        return cls(blocks)


def stack(blocks: Sequence[DiBAFactors], energies: Sequence[float]) -> RowBlocks:
    """Return row blocks with a record made of theirs.

    Parameters
    ----------
    blocks : sequence of DiBAFactors
    energies : sequence of float
        Of the matrices that they stand for.
    """
    records = [block.record for block in blocks]
    names = ("snr_db", "output_snr_db")
    told: dict[str, Any] = {}
    for name in (name for name in names if name in records[0]):
        noise = sum(
            0.0 if record[name] is None else energy / 10 ** (record[name] / 10)
            for record, energy in zip(records, energies, strict=True)
        )
        reached = metrics.decibels(sum(energies), noise)
        told[name] = reached if math.isfinite(reached) else None
    shared = {name: records[0].get(name) for name in ("solver", "effort", "seed", "versions")}
    told |= {
        "seconds": round(sum(record["seconds"] for record in records), 3),
        "sweeps": sum(record["sweeps"] for record in records),
        "converged": all(record["converged"] for record in records),
        "blocks": [
            {"rows": block.shape[0], "k": block.k, "snr_db": block.record["snr_db"]}
            for block in blocks
        ],
    }
    return RowBlocks(blocks, shared | told)
