"""all-MiniLM-L6-v2 in NumPy: sentences to tokens, tokens to embeddings, and what each layer reads.

python scripts/minilm.py "a sentence" "another one"    # their cosine similarities
"""

from __future__ import annotations

import sys
import tarfile
import unicodedata
from collections.abc import Mapping, Sequence
from io import BytesIO

import numpy as np
from bert import Array, Back, Bert
from sources import MINILM, VADER, read_arrays, read_member

from diba_np.networks.inputs import batches, padded

HEADS = 12
TOKENS = 48  # longer sentences are cut
BATCH = 2048  # tokens

SENTENCES = (
    "tweets",
    "amazonReviewSnippets",
    "movieReviewSnippets",
    "nytEditorialSnippets",
)


# -- tokens ----------------------------------------------------------------------------------------


def vocabulary() -> dict[str, int]:
    """Return token -> id."""
    lines = read_member(MINILM, "model/vocab.txt").decode().split("\n")
    return {token: i for i, token in enumerate(lines) if token}


def _stands_alone(char: str) -> bool:
    """Whether a character is a word by itself: punctuation, ASCII symbols, Chinese characters."""
    ascii_symbol = char.isascii() and char.isprintable() and not char.isalnum() and char != " "
    return ascii_symbol or unicodedata.category(char)[0] == "P" or "\u4e00" <= char <= "\u9fff"


def words(text: str) -> list[str]:
    """Split a text into lower-case words without accents."""
    out = []
    for char in unicodedata.normalize("NFD", text.lower()):
        kind = unicodedata.category(char)
        if char.isspace():
            out.append(" ")
        elif kind == "Mn" or kind[0] == "C" or char == "\ufffd":
            continue
        else:
            out.append(f" {char} " if _stands_alone(char) else char)
    return "".join(out).split()


def word_pieces(word: str, vocab: Mapping[str, int]) -> list[int]:
    """Cut a word into the longest known pieces from the left; [UNK] if that fails."""
    pieces, start = [], 0
    while start < len(word):
        prefix = "##" if start else ""
        for end in range(len(word), start, -1):
            if prefix + word[start:end] in vocab:
                pieces.append(vocab[prefix + word[start:end]])
                start = end
                break
        else:
            return [vocab["[UNK]"]]
    return pieces


def tokenize(text: str, vocab: Mapping[str, int], most: int = TOKENS) -> list[int]:
    """Return the ids of [CLS], at most ``most - 2`` pieces, [SEP]."""
    pieces = [i for word in words(text) for i in word_pieces(word, vocab)]
    return [vocab["[CLS]"], *pieces[: most - 2], vocab["[SEP]"]]


# -- the network -----------------------------------------------------------------------------------


def tensors() -> dict[str, Array]:
    """Return the network's tensors by name."""
    return read_arrays(MINILM, "model/model.safetensors")


def load() -> Bert:
    """Return the network."""
    return Bert(tensors(), HEADS)


def embed(net: Bert, texts: Sequence[Sequence[int]]) -> Array:
    """Return (S, width) unit vectors of texts in tokens: the mean of the last hidden states."""
    found = []
    for rows in batches(texts, BATCH):
        ids, mask = padded([texts[i] for i in rows])
        found.append((rows, net.mean(net.encode(ids, mask)[0][-1], mask)[0]))
    out = np.empty((len(texts), found[0][1].shape[1]), np.float32)
    for rows, vectors in found:
        out[rows] = vectors
    return out


def inputs_of(
    net: Bert, texts: Sequence[Sequence[int]], names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Return, for each named linear layer, what it reads when the network reads `texts`: (N, n)."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    layers = 1 + max(int(name.split(".")[2]) for name in names)
    for rows in batches(texts, BATCH):
        ids, mask = padded([texts[i] for i in rows])

        def linear(
            name: str, x: Array, added: Array | None, at: Array = mask
        ) -> tuple[Array, Back]:
            if name in found:
                found[name].append(x[at.ravel()])
            return net.linear(name, x, added)

        x, _ = net.embed(ids)
        for i in range(layers):
            x, _ = net.layer(i, x, mask, linear)
    return {name: np.concatenate(parts) for name, parts in found.items()}


# -- sentences -------------------------------------------------------------------------------------


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
    vocab = vocabulary()
    vectors = embed(load(), [tokenize(text, vocab) for text in sys.argv[1:]])
    print(np.round(vectors @ vectors.T, 3))
