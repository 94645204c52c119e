"""all-MiniLM-L6-v2 in NumPy: sentences to tokens, tokens to embeddings, and what each layer reads.

python scripts/minilm.py "a sentence" "another one"    # their cosine similarities
"""

from __future__ import annotations

import sys
import tarfile
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO

import numpy as np
from scipy.special import erf
from sources import MINILM, VADER, read_member, read_safetensors

LAYERS, HEADS, EPSILON = 6, 12, 1e-12
TOKENS = 48  # longer sentences are cut
BATCH = 64

Observer = Callable[[str, np.ndarray], None]


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


def load() -> dict[str, np.ndarray]:
    """Return the network's tensors by name."""
    return read_safetensors(read_member(MINILM, "model/model.safetensors"))


def _normed(x: np.ndarray, tensors: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    x = x - x.mean(axis=-1, keepdims=True)
    x /= np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPSILON)
    return x * tensors[f"{name}.LayerNorm.weight"] + tensors[f"{name}.LayerNorm.bias"]


def forward(
    tensors: Mapping[str, np.ndarray],
    ids: np.ndarray,
    mask: np.ndarray,
    observe: Observer | None = None,
    layers: int = LAYERS,
) -> np.ndarray:
    """Return the hidden states (S, T, 384) of a batch after so many layers.

    Parameters
    ----------
    tensors : mapping of str to array
        `load()`, or the same with some weights replaced.
    ids : (S, T) int
    mask : (S, T) bool
        False for padding.
    observe : callable, optional
        Called with the name of each weight and its inputs (N, n) without padding, one a row.
    """

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        if observe is not None:
            observe(f"{name}.weight", x[mask])
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def heads(x: np.ndarray) -> np.ndarray:
        return x.reshape(*x.shape[:2], HEADS, -1).transpose(0, 2, 1, 3)

    x = tensors["embeddings.word_embeddings.weight"][ids]
    x = x + tensors["embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = _normed(x + tensors["embeddings.token_type_embeddings.weight"][0], tensors, "embeddings")
    for i in range(layers):
        at = f"encoder.layer.{i}"
        q, key, v = (
            heads(linear(f"{at}.attention.self.{s}", x)) for s in ("query", "key", "value")
        )
        scores = q @ key.swapaxes(-1, -2) / np.float32(np.sqrt(q.shape[-1]))
        scores = np.where(mask[:, None, None], scores, np.float32(-1e9))
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        mixed = (scores @ v).transpose(0, 2, 1, 3).reshape(x.shape)
        x = _normed(
            x + linear(f"{at}.attention.output.dense", mixed), tensors, f"{at}.attention.output"
        )
        inner = linear(f"{at}.intermediate.dense", x)
        inner = inner * np.float32(0.5) * (1 + erf(inner / np.float32(np.sqrt(2.0))))
        x = _normed(x + linear(f"{at}.output.dense", inner), tensors, f"{at}.output")
    return x


def batches(
    texts: Sequence[str], vocab: Mapping[str, int]
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Yield (places in `texts`, ids, mask), sentences of like length together."""
    tokens = [tokenize(text, vocab) for text in texts]
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        ids = np.zeros((len(chosen), len(tokens[chosen[-1]])), np.int64)
        mask = np.zeros(ids.shape, bool)
        for row, i in enumerate(chosen):
            ids[row, : len(tokens[i])] = tokens[i]
            mask[row, : len(tokens[i])] = True
        yield chosen, ids, mask


def embed(
    tensors: Mapping[str, np.ndarray], texts: Sequence[str], vocab: Mapping[str, int]
) -> np.ndarray:
    """Return (S, 384) unit vectors: the mean of the last hidden states of each text."""
    out = np.empty((len(texts), 384), np.float32)
    for chosen, ids, mask in batches(texts, vocab):
        x = forward(tensors, ids, mask) * mask[..., None]
        x = x.sum(axis=1) / mask.sum(axis=1, keepdims=True)
        out[chosen] = x / np.linalg.norm(x, axis=1, keepdims=True)
    return out


def inputs_of(
    tensors: Mapping[str, np.ndarray],
    texts: Sequence[str],
    vocab: Mapping[str, int],
    names: Sequence[str],
) -> dict[str, np.ndarray]:
    """Return, for each named weight, what it reads when the network reads `texts`: (N, n)."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    layers = 1 + max(int(name.split(".")[2]) for name in names)
    for _, ids, mask in batches(texts, vocab):
        forward(
            tensors,
            ids,
            mask,
            lambda name, x: found[name].append(x) if name in found else None,
            layers,
        )
    return {name: np.concatenate(parts) for name, parts in found.items()}


# -- sentences -------------------------------------------------------------------------------------


def sentences(kind: str = "tweets") -> tuple[list[str], np.ndarray]:
    """Return texts and their mean human valence in [-4, 4].

    `kind` is "tweets", "amazonReviewSnippets", "movieReviewSnippets" or "nytEditorialSnippets".
    """
    archive = read_member(VADER, "additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        file = tar.extractfile(f"hutto_ICWSM_2014/{kind}_GroundTruth.txt")
        if file is None:
            raise SystemExit(f"{kind}: not a file of the archive")
        rows = [line.split("\t", 2) for line in file.read().decode("utf-8", "replace").splitlines()]
    return [row[2] for row in rows], np.array([float(row[1]) for row in rows])


if __name__ == "__main__":
    vectors = embed(load(), sys.argv[1:], vocabulary())
    print(np.round(vectors @ vectors.T, 3))
