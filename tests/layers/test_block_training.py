"""MESA's steps on a chain of layers: penalty, codes, retraining, what is refused."""

import numpy as np
import pytest

from diba_np.layers.block_training import train_blocks
from diba_np.layers.dense_linear import DenseLinear
from diba_np.layers.mesa_linear import MESALinear
from diba_np.training.losses import cross_entropy


class Chain:
    """Two block layers and a dense head on ten noisy patterns, ReLU between."""

    def __init__(self, rng):
        patterns = rng.normal(size=(10, 40))
        self.y = np.arange(400) % 10
        self.x = (patterns[self.y] + 0.3 * rng.normal(size=(400, 40))).astype(np.float32)
        self.blocks = {
            "one": MESALinear.cut(rng.normal(size=(32, 40)) / 3, 0.25, order="stride"),
            "two": MESALinear.cut(rng.normal(size=(24, 32)) / 3, 0.25, order="stride"),
        }
        self.head = DenseLinear(rng.normal(size=(10, 24)) / 5, trained=True)

    def scores(self, x):
        for layer in self.blocks.values():
            x = np.maximum(layer(x), 0)
        return self.head(x)

    def loss(self, rows):
        x, passed = self.x[rows], []
        for layer in self.blocks.values():
            x = np.maximum(layer.forward(x), 0)
            passed.append(x > 0)
        value, g = cross_entropy(self.head.forward(x), self.y[rows])
        g = self.head.backward(g)
        for layer, active in zip(reversed(self.blocks.values()), reversed(passed), strict=True):
            g = layer.backward(g * active)
        return value

    def batches(self, epoch):
        return np.array_split(np.random.default_rng(epoch).permutation(400), 10)

    def train(self, **how):
        how = {"alpha": 0.0, "levels": 16, "epochs": 8, "retrain": 3, **how}
        if how.get("bits") is not None:
            del how["levels"]
        return train_blocks(
            self.blocks,
            self.loss,
            self.batches,
            steps_per_epoch=10,
            others={"head": self.head},
            **how,
        )


def stored(chain):
    return sum(layer.matrix.storage_bits() for layer in chain.blocks.values())


def test_a_chain_is_trained_coded_and_retrained():
    chain, seen = Chain(np.random.default_rng(0)), []
    start = np.mean(chain.scores(chain.x).argmax(axis=1) == chain.y)
    history = chain.train(ended=lambda epoch, loss: seen.append((epoch, loss)))
    assert [epoch for epoch, _ in seen] == list(range(11))
    assert [loss for _, loss in seen] == history
    reached = np.mean(chain.scores(chain.x).argmax(axis=1) == chain.y)
    assert reached > 0.95 > start + 0.3
    assert history[7] < 0.5 * history[0] and history[-1] < history[8]
    for layer in chain.blocks.values():
        assert layer.coded and len(layer.matrix.centroids) == 16
        # as stored: sixteen bits a centroid, and the matrix gives what the layer gives
        np.testing.assert_array_equal(
            layer.parameters["centroids"],
            layer.matrix.centroids.astype(np.float32) * np.float32(layer.matrix.scale),
        )
        x = np.eye(layer.shape[1], dtype=np.float32)
        np.testing.assert_allclose(
            layer(x) - layer.parameters["bias"], layer.matrix.to_dense().T, atol=1e-6
        )


def test_the_more_the_penalty_weighs_the_fewer_bits():
    sizes = []
    for alpha in (0.0, 0.1, 10.0):
        chain = Chain(np.random.default_rng(0))
        chain.train(alpha=alpha)
        sizes.append(stored(chain))
    assert sizes[0] > sizes[1] > sizes[2]


def test_a_budget_is_kept_and_coded_blocks_go_on_as_numbers():
    chain = Chain(np.random.default_rng(0))
    chain.train(bits={"one": 1.2, "two": 0.9}, epochs=2, retrain=1)
    assert chain.blocks["one"].to_matrix().bits_per_weight <= 1.25
    assert chain.blocks["two"].to_matrix().bits_per_weight <= 0.95
    before = chain.blocks["one"].values()
    chain.train(levels=4, epochs=1, retrain=0)
    assert len(np.unique(chain.blocks["one"].values())) == 4
    assert not np.array_equal(chain.blocks["one"].values(), before)


def test_decay_shrinks_the_blocks_alone():
    sizes = []
    for decay in (0.0, 3.0):
        chain = Chain(np.random.default_rng(0))
        chain.train(decay=decay, retrain=0, epochs=3)
        sizes.append(float(np.abs(chain.blocks["one"].values()).mean()))
    assert sizes[1] < 0.9 * sizes[0]


@pytest.mark.parametrize(
    ("how", "kind", "text"),
    [
        ({"levels": None}, TypeError, "exactly one of levels and bits"),
        ({"alpha": "x"}, TypeError, "alpha must be a number"),
        ({"epochs": -1}, ValueError, "epochs must be at least 0"),
        ({"retrain": 1.5}, TypeError, "retrain must be an int"),
        ({"bits": 1e-4, "epochs": 0}, ValueError, "bits must be at least"),
    ],
)
def test_bad_settings_are_named(how, kind, text):
    with pytest.raises(kind, match=text):
        Chain(np.random.default_rng(0)).train(**how)
