"""DiBARD on a network that tells 50 classes of reactions apart (rxnfp's, fine-tuned).

python scripts/study_classes.py                     # goes on where it was interrupted
python scripts/study_classes.py --only-finished     # the table of what has run
python scripts/study_classes.py --smoke --folder F  # a small made network; downloads nothing

Rows are Schneider's patent reactions. Training rows are the file's own; none comes again among the
rows that judge. Labels are not used: the dense network teaches.
"""

from __future__ import annotations

import sys

from made_networks import LAYERS, random_network, random_rows
from network_study import Task, main

from diba_np.networks.inputs import padded

FIT, JUDGE = 6000, 1000  # rows
LONGEST = 128  # tokens of a training row; those that judge have up to 256


class Classes(Task):
    """The class of a row, by the network's own head."""

    name, title = "classes", "50 classes of reactions"


def real() -> Classes:
    import reactions

    texts, labels = reactions.tokenized(FIT, JUDGE, LONGEST)
    net = reactions.load("bert_ft_10k_25s")
    return Classes(net, texts["fit"], texts["judge"], labels["judge"])


def made(layers: int = LAYERS) -> Classes:
    """Return a small random network whose own answers are the labels, each class as likely."""
    net = random_network("classes", layers=layers)
    judge = random_rows(60, seed=1)
    logits = net.logits(*padded(judge))
    centre = logits.mean(axis=0)
    net.layers["classifier"].parameters["bias"] -= centre
    return Classes(net, random_rows(40), judge, (logits - centre).argmax(axis=1))


if __name__ == "__main__":
    sys.exit(main(__doc__, real, made))
