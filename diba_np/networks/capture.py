"""What each layer of a dense network reads: Gram matrices, means and samples, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diba_np.checks import as_matrix, check_count
from diba_np.files.atomic import naming, reserve
from diba_np.networks.stages import (
    Batches,
    StageLinear,
    StageState,
    check_finite,
    dense_linear,
    file_name,
    iterate,
    read_rows,
)

Array = NDArray[Any]


def capture(
    forward: Callable[[StageState, StageLinear], Any],
    weights: Mapping[str, ArrayLike],
    batches: Batches,
    *,
    biases: Mapping[str, ArrayLike] | None = None,
    rows: int = 0,
    folder: str | Path | None = None,
    seed: int = 0,
) -> dict[str, Captured]:
    """Record what each layer of a dense network reads, in one pass and bounded memory.

    Parameters
    ----------
    forward : callable
        ``forward(batch, linear)``: the whole network, as a stage of
        `diba_np.networks.layerwise.compress_layers`; rows that count for nothing are left out,
        all others count once.
    weights, biases, batches
        As there.
    rows : int, default 0
        Rows of every layer's inputs to keep, drawn evenly from all.
    folder : path, optional
        Where they are kept, as float32 ``.npy`` files by layer; needed for `rows`.
    seed : int
        Draws the rows.

    Returns
    -------
    dict of str to Captured
        Layers that were called, in order.

    Raises
    ------
    KeyError, TypeError, ValueError
        An argument is of the wrong kind, value or shape; a layer reads no row that counts.
    """
    dense = {name: as_matrix(A, f"weights[{name!r}]") for name, A in weights.items()}
    given = {name: np.asarray(b) for name, b in (biases or {}).items()}
    if check_count(rows, "rows", least=0) and folder is None:
        raise TypeError("rows= needs a folder= to keep them in")
    rng = np.random.default_rng(check_count(seed, "seed", least=0))
    captured: dict[str, Captured] = {}
    plain = dense_linear(dense, given)

    def linear(
        name: str, x: ArrayLike, keep: ArrayLike | None = None, added: ArrayLike | None = None
    ) -> Array:
        y = plain(name, x, keep, added)
        n = dense[name].shape[1]
        if name not in captured:
            memory = None
            if rows:
                path = Path(str(folder)) / f"{file_name(name)}.npy"
                path.parent.mkdir(parents=True, exist_ok=True)
                memory = np.lib.format.open_memmap(path, "w+", np.float32, (rows, n))
                reserve(path, path.stat().st_size, path)
            captured[name] = Captured(np.zeros((n, n)), np.zeros(n), 0, memory)
        read = read_rows(x, keep)
        check_finite(name, at, read, "dense")
        captured[name].add(read.x, rng)
        return y

    at = 0
    for at, batch in enumerate(iterate(batches)):  # noqa: B007  # `linear` names it
        forward(batch, linear)
    for name, each in captured.items():
        if not each.count:
            raise ValueError(f"{name!r} must read at least one row, got none")
        each.close()
    return captured


@dataclass
class Captured:
    """The inputs of one layer.

    Attributes
    ----------
    gram : (n, n) float64
        ``X^T X / count``.
    mean : (n,) float64
    count : int
        Rows seen.
    inputs : (rows, n) float32 memory map or None
        Some of them, every one with the same chance.
    """

    gram: Array
    mean: Array
    count: int
    inputs: np.memmap[Any, Any] | None

    def add(self, x: Array, rng: np.random.Generator) -> None:
        """Take in rows (N, n); `close` ends the sums."""
        wide = x.astype(np.float64)
        self.gram += wide.T @ wide
        self.mean += wide.sum(axis=0)
        if self.inputs is not None:
            most = len(self.inputs)
            # reservoir: row t takes a random place among the first t, and stays if that is kept
            at = np.arange(self.count, self.count + len(x))
            place = np.where(at < most, at, (rng.random(len(x)) * (at + 1)).astype(np.int64))
            chosen = place < most
            self.inputs[place[chosen]] = x[chosen]
        self.count += len(x)

    def close(self) -> None:
        """Divide the sums, cut off what was not filled."""
        self.gram /= self.count
        self.mean /= self.count
        if self.inputs is not None:
            path = str(self.inputs.filename)
            self.inputs.flush()
            if self.count < len(self.inputs):
                with naming(path):
                    np.save(path, np.array(self.inputs[: self.count]))
                self.inputs = np.load(path, mmap_mode="r+")
