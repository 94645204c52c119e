"""A scikit-learn style transformer whose linear map is compressed; no scikit-learn needed.

`fit`, `transform`, `inverse_transform`, `get_params` and `set_params` are all that a Pipeline and
a grid search ask for.

    python scripts/examples/transformer.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import diba_np as dn

try:  # a Pipeline asks for scikit-learn's own base from its version 1.7 on
    from sklearn.base import BaseEstimator
except ImportError:
    BaseEstimator = object

DATA = Path(__file__).resolve().parents[2] / "data"


class DiBATransformer(BaseEstimator):
    """Principal components whose matrix is a factorization of `bits` stored bits an entry.

    Parameters
    ----------
    n_components : int
    bits : float
    effort : {"fast", "balanced", "best"}
    seed : int
    """

    def __init__(self, n_components=64, bits=2.0, effort="fast", seed=0):
        self.n_components, self.bits = n_components, bits
        self.effort, self.seed = effort, seed

    def fit(self, X, y=None):
        """Find the components of X (N, n), compress them; return self."""
        self.mean_ = X.mean(axis=0)
        _, _, v = np.linalg.svd(X - self.mean_, full_matrices=False)
        self.components_ = dn.factorize(
            v[: self.n_components],
            bits=self.bits,
            effort=self.effort,
            inputs=X - self.mean_,
            seed=self.seed,
        )
        return self

    def transform(self, X):
        """Return (N, n_components)."""
        return self.components_.matvec(X - self.mean_)

    def fit_transform(self, X, y=None):
        """Return ``fit(X).transform(X)``."""
        return self.fit(X, y).transform(X)

    def inverse_transform(self, Z):
        """Return (N, n), from the transpose of the compressed map."""
        return self.components_.T.matvec(Z) + self.mean_

    def get_params(self, deep=True):
        """Return the parameters by name, as scikit-learn's clone asks for."""
        return {name: getattr(self, name) for name in ("n_components", "bits", "effort", "seed")}

    def set_params(self, **parameters):
        """Set parameters by name; return self."""
        for name, value in parameters.items():
            setattr(self, name, value)
        return self


def nearest_centre(train, labels, test):
    """Return the label of the nearest class centre for each row of `test`."""
    centres = np.stack([train[labels == c].mean(axis=0) for c in np.unique(labels)])
    return np.argmin(((test[:, None] - centres) ** 2).sum(axis=2), axis=1)


def main() -> None:
    rng = np.random.default_rng(0)
    weights = np.load(DATA / "minilm_attention_384x384.npy")
    classes = 12
    centres = rng.normal(size=(classes, 384)) @ weights
    labels = rng.integers(0, classes, 900)
    X = centres[labels] + 4.0 * rng.normal(size=(900, 384)) @ weights
    train, test = slice(0, 600), slice(600, None)

    model = DiBATransformer(n_components=48)
    Z = model.fit(X[train]).transform(X)
    exact = np.linalg.svd(X[train] - model.mean_, full_matrices=False)[2][:48]
    V = (X - model.mean_) @ exact.T
    print(f"principal components, compressed: {model.components_}")
    for name, values in (("all 384 numbers", X), ("48 components, dense", V), ("compressed", Z)):
        found = nearest_centre(values[train], labels[train], values[test])
        print(f"  accuracy of the nearest centre, {name:<22} {np.mean(found == labels[test]):.3f}")
    try:
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import Normalizer
    except ImportError:
        print("scikit-learn is not installed; the pipeline is left out")
        return
    piped = make_pipeline(Normalizer(), DiBATransformer(n_components=8)).fit(X[train])
    print(f"in a scikit-learn pipeline: {piped.transform(X[test]).shape}")


if __name__ == "__main__":
    main()
