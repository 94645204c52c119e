"""Finished layers of a run that goes layer by layer, kept in a folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diba_np.checks import digest
from diba_np.files.atomic import atomic_path
from diba_np.layers.linear import Layer
from diba_np.layers.registry import as_layer
from diba_np.matrix.files import load
from diba_np.networks.stages import DenseWeights, file_name

Array = NDArray[Any]


class FinishedLayers:
    """Finished layers in a folder: the matrix as HDF5, then bias and report, which complete it."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def _paths(self, name: str) -> tuple[Path, Path]:
        base = Path(str(self.folder)) / file_name(name)
        return Path(f"{base}.h5"), Path(f"{base}.npz")

    def write(self, name: str, A: Array, layer: Layer, report: dict[str, Any]) -> None:
        """Keep a layer made of A (m, n), with what is reported of it."""
        if self.folder is None:
            return
        matrix, rest = self._paths(name)
        layer.to_matrix().save(matrix)
        with atomic_path(rest) as path, open(path, "wb") as file:
            text = json.dumps({**report, "sha256": digest(A)})
            np.savez(file, bias=layer.parameters["bias"], report=np.array(text))

    def finish(self, order: Sequence[str]) -> None:
        """Keep the order of the layers: all are there."""
        if self.folder is not None:
            with atomic_path(self.folder / "order.json") as path:
                path.write_text(json.dumps(list(order)), "utf-8")

    def whole(self, dense: DenseWeights) -> list[tuple[str, tuple[Layer, dict[str, Any]]]]:
        """Return all layers in their order, if they are there: no pass is needed then."""
        path = None if self.folder is None else self.folder / "order.json"
        if path is None or not path.is_file():
            return []
        layers = []
        for name in json.loads(path.read_text("utf-8")):
            part = self.read(name, dense[name]) if name in dense else None
            dense.release()
            if part is None:
                return []
            layers.append((name, part))
        return layers

    def has(self, name: str) -> bool:
        """Tell whether a layer is there."""
        return self.folder is not None and self._paths(name)[1].is_file()

    def read(self, name: str, A: Array) -> tuple[Layer, dict[str, Any]] | None:
        """Return a finished layer and its report; None if it is not there.

        Raises
        ------
        ValueError
            What is there was made of other weights than A.
        """
        if not self.has(name):
            return None
        matrix, rest = self._paths(name)
        with np.load(rest, allow_pickle=False) as file:
            bias, report = file["bias"], json.loads(str(file["report"]))
        if report.pop("sha256") != digest(A):
            raise ValueError(f"folder must belong to these weights, {rest} is of another {name!r}")
        return as_layer(load(matrix), bias), report
