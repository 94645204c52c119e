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

import numpy as np
from made_networks import random_network, random_rows
from network_study import Scores, Task, main
from scipy.optimize import minimize

from diba_np.networks.network import Network

Array = np.ndarray

JUDGE = 1000  # tweets of a valence beyond 0.5 either way
PENALTIES = (0.03, 0.1, 0.3, 1.0)  # on the head's squared weights, halved; the best is taken
LEAST = 3  # words of a text made of two others
FOLDS = 5  # of the rows that the head is fitted to, for that choice


class Sentences(Task):
    """The unit vectors of texts; labels are polarities, a frozen head tells them."""

    name, title = "sentences", "Sentences by MiniLM"

    def set_head(self, vectors: Array, labels: Array) -> None:
        """Fit the head to dense vectors (N, width)."""
        self.weights = logistic(vectors, labels, best_penalty(vectors, labels))
        self.dense = self.net.embed(self.judge)

    def set_words(self, words: list[list[Any]], tokens: Callable[[list[Any]], list[int]]) -> None:
        """Take the words of texts of the kind that judges, and what makes tokens of words."""
        self.words, self.tokens = words, tokens

    def mix(self, count: int) -> None:
        """Make texts of the first part of one and the other part of another of `words`."""
        rng, whole = np.random.default_rng(0), len(self.fit) + count
        while len(self.fit) < whole:
            one, other = (self.words[i] for i in rng.integers(len(self.words), size=2))
            cut = rng.random()
            words = one[: round(cut * len(one))] + other[round(cut * len(other)) :]
            if len(words) >= LEAST:
                self.fit.append(self.tokens(words))

    def scores(self, net: Network) -> Scores:
        vectors = net.embed(self.judge)
        cosines = np.einsum("ij,ij->i", vectors, self.dense, dtype=np.float64)
        positive = vectors @ self.weights[:-1] + self.weights[-1] > 0
        right = float((positive == self.labels).mean())
        root = np.sqrt(len(cosines))
        return {
            "cosine": (float(cosines.mean()), float(cosines.std() / root)),
            "accuracy": (right, float(np.sqrt(right * (1 - right)) / root)),
        }


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

    net = minilm.load()
    tweets, valence = minilm.sentences("tweets")
    clear = np.random.default_rng(0).permutation(np.flatnonzero(np.abs(valence) > 0.5))
    judge, taught = clear[:JUDGE], clear[JUDGE:]
    judged = {tweets[i] for i in judge}
    others = [text for kind in minilm.SENTENCES for text in minilm.sentences(kind)[0]]

    def rows(texts: list[str]) -> list[list[int]]:
        return net.rows_of(texts, minilm.TOKENS)

    fit = rows([text for text in others if text not in judged])
    task = Sentences(net, fit, rows([tweets[i] for i in judge]), valence[judge] > 0)
    task.set_words(
        [text.split() for text in tweets if text not in judged],
        lambda words: rows([" ".join(words)])[0],
    )
    task.set_head(net.embed(rows([tweets[i] for i in taught])), valence[taught] > 0)
    return task


def made() -> Sentences:
    """Return a small random network whose own halves of the space are the polarities."""
    net = random_network()
    fit, judge = random_rows(40), random_rows(60, seed=1)
    vectors = net.embed(judge)
    apart = vectors - vectors.mean(axis=0)
    positive = apart @ np.linalg.svd(apart, full_matrices=False)[2][0] > 0
    task = Sentences(net, fit, judge, positive)
    task.set_words(list(fit), list)
    task.set_head(vectors, positive)
    return task


if __name__ == "__main__":
    sys.exit(main(__doc__, real, made, calibration=5000, rows=10000, rate=5e-3))
