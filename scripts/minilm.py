"""all-MiniLM-L6-v2, and texts with their valence.

python scripts/minilm.py "a sentence" "another one"    # their cosine similarities
"""

from __future__ import annotations

import sys
import tarfile
from collections.abc import Sequence
from io import BytesIO

import numpy as np
from sources import MINILM, VADER, member_folder, read_member

from diba_np import networks
from diba_np.networks.inputs import batches, padded
from diba_np.networks.network import Network

TOKENS = 48  # longer sentences are cut
BATCH = 2048  # tokens

SENTENCES = (
    "tweets",
    "amazonReviewSnippets",
    "movieReviewSnippets",
    "nytEditorialSnippets",
)


def load() -> Network:
    """Return the network with its tokenizer."""
    names = ("config.json", "model.safetensors", "tokenizer.json")
    return networks.load(member_folder(MINILM, "model", names))


def inputs_of(
    net: Network, rows: Sequence[Sequence[int]], names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Return what each named linear layer reads when the network reads rows of tokens: (N, n)."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for places in batches(rows, BATCH):
        ids, mask = padded([rows[i] for i in places])

        def linear(name: str, x: np.ndarray, at: np.ndarray = mask, **how: object) -> object:
            if name in found:
                found[name].append(x[at])
            return net.plain(name, x, **how)

        net.last_hidden(ids, mask, linear)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def sentences(kind: str = "tweets") -> tuple[list[str], np.ndarray]:
    """Return texts and their mean human valence in [-4, 4]; `kind` is one of `SENTENCES`."""
    archive = read_member(VADER, "additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        file = tar.extractfile(f"hutto_ICWSM_2014/{kind}_GroundTruth.txt")
        if file is None:
            raise SystemExit(f"{kind}: not a file of the archive")
        rows = [line.split("\t", 2) for line in file.read().decode("utf-8", "replace").splitlines()]
    return [row[2] for row in rows], np.array([float(row[1]) for row in rows])


if __name__ == "__main__":
    vectors = load().embed(sys.argv[1:], TOKENS)
    print(np.round(vectors @ vectors.T, 3))
