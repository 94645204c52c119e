"""DiBARD on MiniLM: cosine to the dense embeddings, and the polarity of tweets by a frozen head.

python scripts/study_sentences.py                     # goes on where it was interrupted
python scripts/study_sentences.py --only-finished     # the table of what has run
python scripts/study_sentences.py --smoke --folder F  # a small made network; downloads nothing

Fitted on tweets, and snippets of reviews and editorials, without labels: the dense network teaches.
Judged on 1,000 other tweets: the mean cosine to the dense embedding, and whether a logistic
regression, fitted once to dense embeddings of all other such tweets, still tells their polarity.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import network_fit as nf
import numpy as np
from bert import Array, Back, Bert, random_tensors
from network_study import main
from scipy.optimize import minimize

JUDGE = 1000  # tweets of a valence beyond 0.5 either way
PENALTIES = (0.03, 0.1, 0.3, 1.0)  # on the head's squared weights, halved; the best is taken
LEAST = 3  # words of a text made of two others
FOLDS = 5  # of the rows that the head is fitted to, for that choice


class Sentences(nf.Task):
    """The unit vectors of texts; ``labels["judge"]`` are polarities, a frozen head tells them."""

    name, title = "sentences", "Sentences by MiniLM"

    def set_head(self, vectors: Array, labels: Array) -> None:
        """Fit the head to dense vectors (N, width), and keep those of the rows that judge."""
        self.weights = logistic(vectors, labels, best_penalty(vectors, labels))
        self.dense: dict[int, Array] = {}
        for rows, y, _ in nf.evaluate(self.network(), self):
            self.dense |= dict(zip(rows.tolist(), y, strict=True))

    def set_words(self, words: list[list[Any]], tokens: Callable[[list[Any]], list[int]]) -> None:
        """Take the words of texts of the kind that judges, and what makes tokens of words."""
        self.words, self.tokens = words, tokens

    def mix(self, count: int) -> Array:
        """Make texts of the first part of one and the other part of another of `words`."""
        rng, first = np.random.default_rng(0), len(self.fit)
        while len(self.fit) < first + count:
            one, other = (self.words[i] for i in rng.integers(len(self.words), size=2))
            cut = rng.random()
            words = one[: round(cut * len(one))] + other[round(cut * len(other)) :]
            if len(words) >= LEAST:
                self.texts["fit"].append(self.tokens(words))
        self.labels["fit"] = np.zeros(len(self.fit))
        return np.arange(first, len(self.fit))

    def head(self, net: Bert, x: Array, mask: Array, known: Any) -> tuple[Array, Back]:
        return net.mean(x, mask)

    def loss(self, y: Array, taught: Array, known: Any) -> tuple[float, Array]:
        """Return one minus the mean cosine."""
        return 1.0 - float(np.vdot(y, taught)) / len(y), -taught / np.float32(len(y))

    def score(self, found: list[tuple[Array, Array, Any]]) -> dict[str, tuple[float, float]]:
        vectors = np.concatenate([y for _, y, _ in found])
        dense = np.stack([self.dense[i] for rows, _, _ in found for i in rows.tolist()])
        cosines = np.einsum("ij,ij->i", vectors, dense).astype(np.float64)
        positive = vectors @ self.weights[:-1] + self.weights[-1] > 0
        right = positive == np.concatenate([known for _, _, known in found])
        error = float(cosines.std() / np.sqrt(len(cosines)))
        return {"cosine": (float(cosines.mean()), error), "accuracy": nf.accuracy(right)}


def best_penalty(X: Array, positive: Array) -> float:
    """Return the penalty that tells most rows right by a head fitted to the other folds."""
    fold = np.arange(len(X)) % FOLDS

    def right(penalty: float) -> int:
        count = 0
        for held in range(FOLDS):
            w = logistic(X[fold != held], positive[fold != held], penalty)
            found = X[fold == held] @ w[:-1] + w[-1] > 0
            count += int((found == positive[fold == held]).sum())
        return count

    return max(PENALTIES, key=right)


def logistic(X: Array, positive: Array, penalty: float) -> Array:
    """Return weights and, last, the constant of a logistic regression with a penalty."""
    X = np.column_stack([X, np.ones(len(X))]).astype(np.float64)
    signs = np.where(positive, 1.0, -1.0)

    def objective(w: Array) -> tuple[float, Array]:
        margin = signs * (X @ w)
        gradient = -(signs / (1 + np.exp(margin))) @ X
        gradient[:-1] += penalty * w[:-1]
        return np.logaddexp(0, -margin).sum() + 0.5 * penalty * w[:-1] @ w[:-1], gradient

    made: Array = minimize(objective, np.zeros(X.shape[1]), jac=True, method="L-BFGS-B").x
    return made


def real() -> Sentences:
    import minilm

    vocab = minilm.vocabulary()
    tweets, valence = minilm.sentences("tweets")
    clear = np.random.default_rng(0).permutation(np.flatnonzero(np.abs(valence) > 0.5))
    judge, taught = clear[:JUDGE], clear[JUDGE:]
    judged = {tweets[i] for i in judge}
    others = [text for kind in minilm.SENTENCES for text in minilm.sentences(kind)[0]]
    parts = {"fit": [t for t in others if t not in judged], "judge": [tweets[i] for i in judge]}
    texts = {part: [minilm.tokenize(t, vocab) for t in rows] for part, rows in parts.items()}
    labels = {"fit": np.zeros(len(texts["fit"])), "judge": valence[judge] > 0}
    task = Sentences(texts, labels, minilm.load)
    task.set_words(
        [text.split() for text in tweets if text not in judged],
        lambda words: minilm.tokenize(" ".join(words), vocab),
    )
    known = [minilm.tokenize(tweets[i], vocab) for i in taught]
    task.set_head(minilm.embed(task.network(), known), valence[taught] > 0)
    return task


def made() -> Sentences:
    """Return a small random network whose own halves of the space are the polarities."""

    def network() -> Bert:
        return Bert(random_tensors(0, width=32, inner=48, words=40), heads=4)

    rng = np.random.default_rng(0)
    texts = {
        part: [rng.integers(0, 40, rng.integers(4, 12)).tolist() for _ in range(count)]
        for part, count in (("fit", 40), ("judge", 60))
    }
    task = Sentences(texts, {part: np.zeros(len(rows)) for part, rows in texts.items()}, network)
    task.set_words(list(texts["fit"]), list)
    found = nf.evaluate(network(), task)
    vectors = np.concatenate([y for _, y, _ in found])
    apart = vectors - vectors.mean(axis=0)
    positive = apart @ np.linalg.svd(apart, full_matrices=False)[2][0] > 0
    task.labels["judge"][np.concatenate([rows for rows, _, _ in found])] = positive
    task.set_head(vectors, positive)
    return task


if __name__ == "__main__":
    sys.exit(main(__doc__, real, made, calibration=5000, rows=10000, tokens=512, rate=5e-3))
