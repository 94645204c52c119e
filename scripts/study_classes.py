"""DiBARD on a network that tells 50 classes of reactions apart (rxnfp's, fine-tuned).

python scripts/study_classes.py                     # goes on where it was interrupted
python scripts/study_classes.py --only-finished     # the table of what has run
python scripts/study_classes.py --smoke --folder F  # a small made network; downloads nothing

Rows are Schneider's patent reactions. Training rows are the file's own; none comes again among the
rows that judge. Labels are not used: the dense network teaches.
"""

from __future__ import annotations

import sys
from typing import Any

import network_fit as nf
import numpy as np
from bert import Array, Back, Bert, random_tensors
from network_study import main

FIT, JUDGE = 6000, 1000  # rows
LONGEST = 128  # tokens of a training row; those that judge have up to 256


class Classes(nf.Task):
    """The class of a text, by the network's own head."""

    name, title = "classes", "50 classes of reactions"

    def head(self, net: Bert, x: Array, mask: Array, known: Any) -> tuple[Array, Back]:
        return net.classify(x, mask)

    def loss(self, y: Array, taught: Array, known: Any) -> tuple[float, Array]:
        """Return the relative squared error of the logits; the softmax is 0 or 1 on these rows.

        Relative to their spread over the classes, which a batch of one row has too.
        """
        apart = taught - taught.mean(axis=1, keepdims=True)
        unit = max(float(np.vdot(apart, apart)), np.finfo(np.float32).tiny)
        gap = y - taught
        return float(np.vdot(gap, gap)) / unit, gap * np.float32(2.0 / unit)

    def score(self, found: list[tuple[Array, Array, Any]]) -> dict[str, tuple[float, float]]:
        return {
            "accuracy": nf.accuracy(np.concatenate([y.argmax(axis=1) == k for _, y, k in found]))
        }


def real() -> Classes:
    import reactions

    texts, labels = reactions.tokenized(FIT, JUDGE, LONGEST)
    return Classes(texts, labels, lambda: reactions.load("bert_ft_10k_25s"))


def made() -> Classes:
    """Return a small random network whose own answers are the labels, each class as likely."""
    tensors = random_tensors(0, width=32, inner=48, words=40)

    def network() -> Bert:
        return Bert(tensors, heads=4)

    rng = np.random.default_rng(0)
    texts = {
        part: [rng.integers(0, 40, rng.integers(4, 12)).tolist() for _ in range(count)]
        for part, count in (("fit", 40), ("judge", 60))
    }
    task = Classes(texts, {part: np.zeros(len(rows), int) for part, rows in texts.items()}, network)
    found = nf.evaluate(network(), task)
    centre = np.concatenate([y for _, y, _ in found]).mean(axis=0)
    tensors["classifier.bias"] -= centre
    for rows, y, _ in found:
        task.labels["judge"][rows] = (y - centre).argmax(axis=1)
    return task


if __name__ == "__main__":
    sys.exit(main(__doc__, real, made))
