"""Reactions as tokens, their classes, and the two reaction networks of rxnfp.

Rows are Schneider's 50,000 patent reactions of 50 classes as drfp ships them. Many stand in both of
its parts or twice in one; here no reaction of the test rows is a training row or comes again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from sources import DRFP, RXNFP, member_folder, read_member

from diba_np import networks
from diba_np.networks.network import Network

TOKENS = 256  # longer reactions are cut

_SMILES = re.compile(
    r"(\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?|>>?|\*|\$|"
    r"%[0-9]{2}|[0-9])"
)
_PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")


@dataclass(frozen=True)
class Reactions:
    """Some rows of the file.

    Attributes
    ----------
    smiles : list of str
    labels : (N,) int
        Rank of the class among the sorted names of classes.
    """

    smiles: list[str]
    labels: np.ndarray


def load(name: str) -> Network:
    """Return the network "bert_pretrained" or "bert_ft_10k_25s"."""
    names = ("config.json", "pytorch_model.bin", "vocab.txt")
    return networks.load(member_folder(RXNFP, f"/{name}", names), kind="bert")


def vocabulary() -> dict[str, int]:
    """Return token -> id; both networks have the same."""
    lines = read_member(RXNFP, "/bert_pretrained/vocab.txt").decode().split("\n")
    return {token: i for i, token in enumerate(lines) if token}


def tokenize(smiles: str, vocab: dict[str, int], split: bool = False) -> list[int]:
    """Return the ids of [CLS], the tokens of a reaction, [SEP].

    Parameters
    ----------
    smiles : str
    vocab : dict of str to int
    split : bool
        Whether tokens are split at each ASCII punctuation character, as "bert_pretrained" takes
        them.
    """
    tokens = _SMILES.findall(smiles)
    if split:
        tokens = [part for token in tokens for part in _PUNCTUATION.split(token) if part]
    unknown = vocab["[UNK]"]
    ids = [vocab.get(token, unknown) for token in tokens[: TOKENS - 2]]
    return [vocab["[CLS]"], *ids, vocab["[SEP]"]]


def clean(rows: list[list[str]]) -> dict[str, Reactions]:
    """Return the parts "train" and "test" of rows (reaction, class, part), none twice."""
    ranks = {name: rank for rank, name in enumerate(sorted({row[1] for row in rows}))}
    seen: set[str] = set()
    parts = {}
    for part in ("train", "test"):
        chosen = []
        for row in rows:
            if row[2] == part and row[0] not in seen:
                seen.add(row[0])
                chosen.append(row)
        labels = np.array([ranks[row[1]] for row in chosen], np.int64)
        parts[part] = Reactions([row[0] for row in chosen], labels)
    return parts


def reactions() -> dict[str, Reactions]:
    """Return the parts "train" and "test" of the file, in its order, none twice."""
    lines = read_member(DRFP, "data/schneider50k.tsv").decode().splitlines()
    head = lines[0].split("\t")
    columns = [len(head) - name for name in map(head[::-1].index, ("rxn", "rxn_class", "split"))]
    rows = []
    for line in lines[1:]:
        cells = line.split("\t")
        if len(cells) == len(head):
            rows.append([cells[at - 1] for at in columns])
    return clean(rows)


def tokenized(
    fit: int, judge: int, longest: int, split: bool = False
) -> tuple[dict[str, list[list[int]]], dict[str, np.ndarray]]:
    """Return tokens and labels of rows drawn from both parts, under "fit" and "judge".

    Parameters
    ----------
    fit, judge : int
        Rows of the training part and of the test part.
    longest : int
        Tokens of a training row; longer ones are left out.
    split : bool
        See `tokenize`.
    """
    vocab, parts = vocabulary(), reactions()
    rng = np.random.default_rng(0)
    texts: dict[str, list[list[int]]] = {}
    labels = {}
    for name, part, count in (("fit", parts["train"], fit), ("judge", parts["test"], judge)):
        texts[name], kept = [], []
        for i in rng.permutation(len(part.smiles)):
            tokens = tokenize(part.smiles[i], vocab, split)
            if name == "judge" or len(tokens) <= longest:
                texts[name].append(tokens)
                kept.append(part.labels[i])
            if len(kept) == count:
                break
        labels[name] = np.array(kept)
    return texts, labels
