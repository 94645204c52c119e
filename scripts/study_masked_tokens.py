"""DiBARD on a masked-token network of reactions (rxnfp's, pretrained): Experiment 2-1's kind.

python scripts/study_masked_tokens.py                     # goes on where it was interrupted
python scripts/study_masked_tokens.py --only-finished     # the table of what has run
python scripts/study_masked_tokens.py --smoke --folder F  # a small made network; downloads nothing

15 % of the tokens of each reaction are replaced by [MASK]; the score is the share that the network
names, unknown tokens not asked for. Standard errors take the tokens of a reaction together.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import network_fit as nf
import numpy as np
from bert import Array, Back, Bert, random_tensors
from network_study import main

from diba_np.networks.inputs import padded

FIT, JUDGE = 6000, 1000  # rows
LONGEST = 256  # tokens of a training row, as many as those that judge have
SHARE = 0.15


class MaskedTokens(nf.Task):
    """The masked tokens of each text, the same ones every time.

    Parameters
    ----------
    texts, network
        As in `nf.Task`.
    mask_id : int
        Of [MASK].
    left_out : sequence of int
        Tokens that are never masked.
    """

    name, title = "masked_tokens", "Masked tokens of reactions"

    def __init__(
        self,
        texts: dict[str, list[list[int]]],
        network: Any,
        mask_id: int,
        left_out: Sequence[int],
    ) -> None:
        super().__init__(texts, {}, network)
        rng = np.random.default_rng(0)
        self.mask_id = mask_id
        self.places: dict[str, list[Array]] = {}
        for part, rows in texts.items():
            self.places[part] = []
            for tokens in rows:
                free = np.flatnonzero(~np.isin(tokens, left_out))
                count = max(1, round(SHARE * len(free))) if len(free) else 0
                self.places[part].append(np.sort(rng.choice(free, count, replace=False)))

    def read(self, part: str, rows: Array) -> tuple[Array, Array, Any]:
        ids, mask = padded([self.texts[part][i] for i in rows])
        flat = ids.ravel()
        groups = [np.full(len(self.places[part][i]), at) for at, i in enumerate(rows)]
        group = np.concatenate(groups)
        places = np.concatenate([self.places[part][i] for i in rows]) + group * ids.shape[1]
        labels = flat[places]
        flat[places] = self.mask_id
        return ids, mask, (places, labels, group)

    def head(self, net: Bert, x: Array, mask: Array, known: Any) -> tuple[Array, Back]:
        return net.predict(x, known[0])

    def score(self, found: list[tuple[Array, Array, Any]]) -> dict[str, tuple[float, float]]:
        right = np.concatenate([y.argmax(axis=1) == known[1] for _, y, known in found])
        group = np.concatenate([rows[known[2]] for rows, _, known in found])
        return {"accuracy": nf.accuracy(right, group)}


def real() -> MaskedTokens:
    import reactions

    vocab = reactions.vocabulary()
    texts, _ = reactions.tokenized(FIT, JUDGE, LONGEST, split=True)
    left_out = [vocab[token] for token in ("[CLS]", "[SEP]", "[UNK]")]
    network = lambda: reactions.load("bert_pretrained")  # noqa: E731
    return MaskedTokens(texts, network, vocab["[MASK]"], left_out)


def made() -> MaskedTokens:
    """Return a small random network; the masked tokens become what it names itself."""

    def network() -> Bert:
        return Bert(random_tensors(0, width=32, inner=48, words=40), heads=4)

    rng = np.random.default_rng(0)
    texts = {
        part: [rng.integers(1, 40, rng.integers(4, 12)).tolist() for _ in range(count)]
        for part, count in (("fit", 40), ("judge", 60))
    }
    task = MaskedTokens(texts, network, 0, [])
    for rows, y, (_, _, group) in nf.evaluate(network(), task):
        for at, row in enumerate(rows):
            named = y[group == at].argmax(axis=1)
            for place, token in zip(task.places["judge"][row], named, strict=True):
                texts["judge"][row][place] = int(token)
    return task


if __name__ == "__main__":
    sys.exit(main(__doc__, real, made, calibration=1000, rows=2500, tokens=512, rate=5e-3))
