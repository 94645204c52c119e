"""DiBARD on a masked-token network of reactions (rxnfp's, pretrained): Experiment 2-1's kind.

python scripts/study_masked_tokens.py                     # goes on where it was interrupted
python scripts/study_masked_tokens.py --only-finished     # the table of what has run
python scripts/study_masked_tokens.py --smoke --folder F  # a small made network; downloads nothing

15 % of the tokens of each reaction are replaced by [MASK]; the score is the share that the network
names, unknown tokens not asked for. Standard errors take the tokens of a reaction together.
"""

from __future__ import annotations

import sys

import numpy as np
from made_networks import WORDS, random_network, random_rows
from network_study import Task, main

FIT, JUDGE = 6000, 1000  # rows
LONGEST = 256  # tokens of a training row, as many as those that judge have


class MaskedTokens(Task):
    """The masked tokens of each row, the same ones every time."""

    name, title = "masked_tokens", "Masked tokens of reactions"


def real() -> MaskedTokens:
    import reactions

    texts, _ = reactions.tokenized(FIT, JUDGE, LONGEST, split=True)
    return MaskedTokens(reactions.load("bert_pretrained"), texts["fit"], texts["judge"])


def made() -> MaskedTokens:
    """Return a small random network whose rows are what it says itself, place by place."""
    net = random_network("masked")
    judge = random_rows(60, seed=1)
    for row in judge:
        for at in range(len(row)):
            hidden = np.array(row)
            hidden[at] = 0
            row[at] = 1 + int(net.logits(hidden[None])[0, at, 1:WORDS].argmax())
    return MaskedTokens(net, random_rows(40), judge)


if __name__ == "__main__":
    sys.exit(main(__doc__, real, made, calibration=1000, rows=2500, rate=5e-3))
