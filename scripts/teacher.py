"""What the dense network makes of training rows, kept on disk: it teaches many networks."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from bert import Array, Bert


class Teacher:
    """Hidden states of a dense network, computed when they are first asked for.

    Parameters
    ----------
    net : Bert
    folder : Path, optional
        Where they are kept, a file a row of ``2 layers width`` bytes a token; several processes may
        share it. Without one everything is computed each time.

    Notes
    -----
    States are rounded to half precision whether they were kept or not.
    """

    def __init__(self, net: Bert, folder: Path | None = None) -> None:
        self.net, self.folder = net, folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def states(self, rows: Array, ids: Array, mask: Array) -> list[Array]:
        """Return the hidden states (S T, width) of a batch: embeddings, and after each layer.

        Parameters
        ----------
        rows : (S,) int
            By which they are kept.
        ids : (S, T) int
        mask : (S, T) bool
            False for padding, whose states are zeros, as are all embeddings: nothing learns them.
        """
        lengths = mask.sum(axis=1)
        parts = [self._read(row) for row in rows]
        if any(part is None for part in parts):
            hidden, _ = self.net.encode(ids, mask)
            made = np.stack(hidden[1:]).reshape(self.net.layers, *mask.shape, -1).astype(np.float16)
            parts = [made[:, i, :length] for i, length in enumerate(lengths)]
            for row, part in zip(rows, parts, strict=True):
                self._write(row, part)
        width = len(self.net.own["embeddings.LayerNorm.bias"])
        wide = np.zeros((1 + self.net.layers, *mask.shape, width), self.net.dtype)
        for i, (part, length) in enumerate(zip(parts, lengths, strict=True)):
            wide[1:, i, :length] = part
        return list(wide.reshape(len(wide), -1, width))

    def _read(self, row: int) -> Array | None:
        if self.folder is None:
            return None
        try:
            found: Array = np.load(self.folder / f"{row}.npy", allow_pickle=False)
        except (FileNotFoundError, EOFError, ValueError):  # cut short where the machine went down
            return None
        return found

    def _write(self, row: int, states: Array) -> None:
        if self.folder is None:
            return
        path = self.folder / f"{row}.npy"
        part = path.with_suffix(f".{os.getpid()}.part")
        with open(part, "wb") as file:
            np.save(file, states, allow_pickle=False)
        part.replace(path)
