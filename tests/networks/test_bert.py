"""The scripts' network: its gradients against central differences, and what padding may not do."""

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm

import diba_np as dn
from diba_np.layers.coded_linear import CodedLinear
from diba_np.methods.scalar import ScalarQuantized
from diba_np.networks.inputs import batches, padded

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import bert

WIDTH = 8


def factors(rng, m, n, k=5):
    bits = (rng.integers(0, 2, shape, np.uint8) for shape in ((m, k), (k, n)))
    b1, b2 = bits
    return dn.DiBAFactors(rng.normal(size=m), b1, rng.normal(size=k), b2, rng.normal(size=n))


@pytest.fixture
def net(rng):
    made = bert.Bert(bert.random_tensors(0), heads=2, dtype=np.float64)
    for name in made.encoder_names():
        form, bias = factors(rng, *made.matrices[name].shape), made.own[f"{name}.bias"]
        made.replace({name: dn.DiBALinear(form, bias, np.float64)})
    name = "encoder.layer.1.attention.output.dense"
    codes, scales = rng.integers(0, 5, (WIDTH, WIDTH), np.uint8), rng.normal(size=(WIDTH, 2))
    kept, table = np.ones(WIDTH, bool), np.arange(-2.0, 3.0)
    form = ScalarQuantized((WIDTH, WIDTH), codes, 5, WIDTH // 2, scales, kept, table, 1.0, {})
    made.replace({name: CodedLinear(form, made.own[f"{name}.bias"], np.float64)})
    name = "encoder.layer.0.intermediate.dense"  # one stays dense
    del made.made[name]
    return made


IDS, MASK = padded([[1, 5, 3, 2], [4, 2], [7, 8, 6]])


def outputs(net, head):
    """Outputs of a head beside a look at every hidden state, and the step back."""
    hidden, back = net.encode(IDS, MASK)
    places = np.array([1, 4, 9])
    y, back_head = {
        "classify": lambda x: net.classify(x, MASK),
        "predict": lambda x: net.predict(x, places),
        "mean": lambda x: net.mean(x, MASK),
    }[head](hidden[-1])
    return y, hidden, lambda gy, gh: back({1: gh, -1: back_head(gy)})


@pytest.mark.parametrize("head", ["classify", "predict", "mean"])
def test_gradients_are_central_differences(net, rng, head):
    y, hidden, back = outputs(net, head)
    gy, gh = rng.normal(size=y.shape), rng.normal(size=hidden[1].shape)
    net.zero_grad()
    back(gy, gh)
    gradients = net.gradients
    assert set(gradients) == set(net.parameters)

    def value():
        y, hidden, _ = outputs(net, head)
        return np.vdot(y, gy) + np.vdot(hidden[1], gh)

    for name, parameter in net.parameters.items():
        at = tuple(rng.integers(parameter.shape))
        start, step = parameter[at], 1e-5
        parameter[at] = start + step
        above = value()
        parameter[at] = start - step
        slope = (above - value()) / (2 * step)
        parameter[at] = start
        assert gradients[name][at] == pytest.approx(slope, rel=1e-5, abs=1e-7), name


def test_gradients_add_up_over_batches(net, rng):
    gradient = {}
    for times in (1, 2):
        net.zero_grad()
        for _ in range(times):
            y, hidden, back = outputs(net, "classify")
            back(np.ones_like(y), np.zeros_like(hidden[1]))
        gradient[times] = {name: value.copy() for name, value in net.gradients.items()}
    for name, value in gradient[1].items():
        np.testing.assert_allclose(gradient[2][name], 2 * value, rtol=1e-9, atol=1e-12)


def test_padding_changes_nothing(net):
    together = outputs(net, "classify")[0]
    for row, length in enumerate(MASK.sum(axis=1)):
        ids, mask = IDS[row : row + 1, :length], MASK[row : row + 1, :length]
        hidden, _ = net.encode(ids, mask)
        np.testing.assert_allclose(net.classify(hidden[-1], mask)[0][0], together[row], atol=1e-10)


def test_gelu_in_both_precisions():
    x = np.linspace(-9, 9, 2001).reshape(3, -1)
    exact = x * norm.cdf(x), norm.cdf(x) + x * norm.pdf(x)
    for kind, near in ((np.float64, 1e-14), (np.float32, 2e-6)):
        y, back = bert.gelu(x.astype(kind).T)  # not in order of memory
        found = y, back(np.ones_like(y))
        assert y.dtype == found[1].dtype == kind
        for one, aim in zip(found, exact, strict=True):
            np.testing.assert_allclose(one, aim.T, atol=near)


def test_steps_in_single_precision_are_those_in_double():
    found = []
    for kind in (np.float64, np.float32):
        net = bert.Bert(bert.random_tensors(0), heads=2, dtype=kind)
        y, hidden, back = outputs(net, "classify")
        back(np.ones_like(y), np.zeros_like(hidden[1]))
        found.append({"y": y, **net.gradients})
    exact, single = found
    for name, value in exact.items():
        assert single[name].dtype == np.float32
        np.testing.assert_allclose(single[name], value, atol=1e-5 * (1 + np.abs(value).max()))


def test_batches_hold_like_lengths_and_every_row_once():
    texts = [[0] * length for length in (3, 9, 1, 4, 9, 2)]
    made = list(batches(texts, 12))
    assert sorted(np.concatenate(made)) == list(range(6))
    assert all(len(rows) * max(len(texts[i]) for i in rows) <= 12 for rows in made)
    assert [len(texts[i]) for rows in made for i in rows] == [1, 2, 3, 4, 9, 9]
