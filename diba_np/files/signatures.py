"""What a file is, by its first bytes; importing nothing heavy."""

from __future__ import annotations

from pathlib import Path

_STARTS = {
    b"\x93NUMPY": "npy",
    b"\x89HDF\r\n\x1a\n": "hdf5",
    b"GGUF": "gguf",
    b"PK\x03\x04": "zip",
}


def kind_of(path: Path) -> str:
    """Return "npy", "hdf5", "gguf", "zip", "safetensors", or "" for anything else."""
    with path.open("rb") as file:
        head = file.read(16)
    for start, kind in _STARTS.items():
        if head.startswith(start):
            return kind
    # a length of 8 bytes, then a header of JSON
    return "safetensors" if head[8:9] == b"{" else ""
