"""Compressed row blocks, one under the other."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from diba_np.arrays import RowIndex
from diba_np.files.container import Container, plain_attributes
from diba_np.matrix import quality
from diba_np.matrix.base import CompressedMatrix
from diba_np.matrix.files import rebuild
from diba_np.matrix.stored_array import Array

# blocks of which the record has figures: it is an attribute, which holds 64 KiB
_MOST_LISTED = 500


class RowBlocks(CompressedMatrix):
    """Compressed row blocks, factorizations as a rule, one under the other.

    Parameters
    ----------
    blocks : sequence of CompressedMatrix
        All with the same number of columns.
    record : dict, optional

    Attributes
    ----------
    blocks : tuple of CompressedMatrix
    """

    method = "rows"

    def __init__(
        self, blocks: Sequence[CompressedMatrix], record: dict[str, Any] | None = None
    ) -> None:
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

    def row_expander(self, columns: RowIndex = slice(None)) -> Callable[[RowIndex], Array]:
        """Return a function from a slice or vector of rows to those of the matrix, float32."""
        starts = self.starts
        width = len(np.arange(self.shape[1])[columns])
        held: dict[int, Callable[[RowIndex], Array]] = {}  # of the blocks of the last rows

        def rows(wanted: RowIndex) -> Array:
            index = np.arange(self.shape[0])[wanted]
            block_of = np.searchsorted(starts, index, side="right") - 1
            needed = np.unique(block_of).tolist()
            for i in held.keys() - set(needed):
                del held[i]
            out = np.empty((len(index), width), np.float32)
            for i in needed:
                if i not in held:
                    held[i] = self.blocks[i].row_expander(columns)
                mine = np.flatnonzero(block_of == i)
                out[mine] = held[i](index[mine] - starts[i])
            return out

        return rows

    def _apply(self, X: Array) -> Array:
        return np.concatenate([block @ X for block in self.blocks])

    def _apply_transposed(self, Y: Array) -> Array:
        starts = self.starts
        total = self.blocks[0].T @ Y[: starts[1]]
        for block, start, stop in zip(self.blocks[1:], starts[1:-1], starts[2:], strict=True):
            total += block.T @ Y[start:stop]
        result: Array = total
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
            own, datasets = block.contents()
            attrs[f"block{i}"] = json.dumps(plain_attributes(own))
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


def stack(
    blocks: Sequence[CompressedMatrix], squares: Sequence[float], energies: Sequence[float]
) -> RowBlocks:
    """Return row blocks with a record made of theirs.

    Parameters
    ----------
    blocks : sequence of CompressedMatrix
    squares, energies : sequence of float
        Sums of the squares of the matrices that they stand for, and of their outputs, each times
        any constant; the second count where the records tell of outputs.
    """
    records = [block.record for block in blocks]
    figures: dict[str, Any] = {}
    for name, sizes in (("snr_db", squares), ("output_snr_db", energies)):
        if not any(name in record for record in records):
            continue
        # of a block whose inputs are not known, that of the weights
        own = [record.get(name, record["snr_db"]) for record in records]
        noise = sum(
            0.0 if snr is None else energy / 10 ** (snr / 10)
            for snr, energy in zip(own, sizes, strict=True)
        )
        reached = quality.decibels(sum(sizes), noise)
        figures[name] = reached if math.isfinite(reached) else None
    shared = {name: records[0].get(name) for name in ("solver", "effort", "seed", "versions")}
    figures |= {
        "seconds": round(sum(record["seconds"] for record in records), 3),
        "sweeps": sum(record.get("sweeps", 0) for record in records),
        "converged": all(record.get("converged", True) for record in records),
    }
    if len(blocks) <= _MOST_LISTED:
        figures["blocks"] = [
            {
                "rows": block.shape[0],
                "k": sum(term.k for term in block.terms),
                "snr_db": block.record["snr_db"],
            }
            for block in blocks
        ]
    return RowBlocks(blocks, shared | figures)
