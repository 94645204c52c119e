"""Training from the bottom: what each stage gives, what stays, what is refused."""

from itertools import pairwise

import numpy as np
import pytest

import diba_np as dn
from diba_np.layers.chain import Chain
from diba_np.layers.progressive import train_progressively
from diba_np.layers.registry import as_layer
from diba_np.methods.binary_bitat import BinaryBiTAT
from diba_np.methods.bitat import BiTAT
from diba_np.methods.qswd import QSWD


@pytest.fixture
def problem(rng):
    sizes = [30, 40, 40, 5]
    weights = {
        f"l{i}": rng.normal(size=(m, n)) * np.sqrt(2 / n)
        for i, (n, m) in enumerate(pairwise(sizes))
    }
    biases = {name: 0.3 * rng.normal(size=len(A)) for name, A in weights.items()}
    X = rng.normal(size=(1200, 30)) @ (rng.normal(size=(30, 30)) / np.arange(1, 31)[:, None])
    return Chain.of_dense(weights, biases, np.float32), X.astype(np.float32)


def bitat(name, A, gram):
    return BiTAT.fit(A, 32.0, np.linalg.cholesky(gram).T)


def error(dense, chain, X):
    return float(np.mean((dense(X) - chain(X)) ** 2))


def test_targets_across_layers_and_training_each_help(problem):
    dense, X = problem
    fitted, fresh = X[:1000], X[1000:]
    names = ["l0", "l1"]
    reads = {"l0": fitted, "l1": dense.outputs(fitted)[0]}
    alone = dense.with_layers(
        {n: as_layer(BiTAT.fit(dense.layers[n].weight, 32.0, reads[n]),
                     dense.layers[n].parameters["bias"]) for n in names}
    )  # fmt: skip
    fits = train_progressively(
        dense, fitted, bitat, names=names, loss="mse", epochs=0, last_epochs=0
    )
    told = []
    trained = train_progressively(
        dense, fitted, bitat, names=names, loss="mse", epochs=3, last_epochs=12,
        learning_rate=0.01, callback=told.append,
    )  # fmt: skip
    errors = [error(dense, chain, fresh) for chain in (alone, fits, trained)]
    assert errors[2] < 0.8 * errors[1] and errors[1] < errors[0]
    assert [one["name"] for one in told] == ["l0", "l1", "all"]
    assert all(one["loss_after"] <= one["loss_before"] for one in told)
    # the layer that is not named is the dense one itself; the others give back their matrices
    assert trained.layers["l2"] is dense.layers["l2"]
    for name in names:
        matrix = trained.layers[name].to_matrix()
        assert type(matrix) is BiTAT
        m, n = matrix.shape
        assert matrix.storage_bits() == m * n + 16 * m


def test_training_that_is_ended_by_a_loss_that_is_not_finite_is_told(problem):
    dense, X = problem
    calls = []

    def loss(y, wanted):
        calls.append(len(y))
        value = float(np.mean((y - wanted) ** 2))
        return (np.inf if len(calls) == 3 else value), 2 * (y - wanted) / y.size

    with pytest.warns(UserWarning, match=r"'l0': the training ended early, .*the loss is inf"):
        chain = train_progressively(
            dense, X[:300], bitat, names=["l0"], loss=loss, epochs=1, last_epochs=0
        )
    assert np.isfinite(chain(X[:3])).all()


def test_layers_that_read_signs(problem, tmp_path):
    dense, X = problem
    chain = train_progressively(
        dense, X, bitat, names=["l0", "l1"], one_bit=["l1"], loss="mse", epochs=2, last_epochs=8
    )
    assert not chain.layers["l0"].reads_signs and chain.layers["l1"].reads_signs
    matrix = chain.layers["l1"].to_matrix()
    assert type(matrix) is BinaryBiTAT
    # by hand: no ReLU before the signs, one after
    hidden = chain.layers["l0"](X)
    b = matrix.input_scale * np.where(hidden >= matrix.thresholds, 1, -1)
    second = b @ matrix.to_dense().T + chain.layers["l1"].parameters["bias"]
    expected = dense.layers["l2"](np.maximum(second, 0))
    for y in (chain(X), chain.forward(X), chain.frozen()(X)):
        np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-3)
    spread = np.mean((dense(X) - dense(X).mean(axis=0)) ** 2)
    assert error(dense, chain, X) < 0.5 * spread


def test_units_that_are_never_on_have_the_sign_that_they_are_read_with(problem):
    dense, X = problem
    dead = Chain.of_dense(
        {name: layer.weight.copy() for name, layer in dense.layers.items()},
        {name: layer.parameters["bias"].copy() for name, layer in dense.layers.items()},
    )
    dead.layers["l0"].parameters["bias"][::2] = -1e3
    chain = train_progressively(
        dead, X, bitat, names=["l1"], one_bit=["l1"], loss="mse", epochs=0, last_epochs=0
    )
    before = dead.layers["l0"](X)
    layer = chain.layers["l1"]
    # what the chain hands over, its ReLU left out, and what was fitted to
    np.testing.assert_array_equal(layer(before), layer(np.maximum(before, 0.0)))


def test_the_gradient_passes_a_layer_that_reads_signs_without_a_relu(problem):
    dense, X = problem
    chain = train_progressively(
        dense, X[:200], bitat, names=["l1"], one_bit=["l1"], loss="mse", epochs=0, last_epochs=0
    )
    chain.zero_grad()
    y = chain.forward(X[:50])
    gx = chain.backward(np.ones_like(y))
    first, second, third = chain.layers.values()
    middle = first(X[:50])
    after = second.forward(middle)
    g = second.backward(third.backward(np.ones_like(y)) * (after > 0))
    np.testing.assert_allclose(gx, first.backward(g), rtol=1e-4, atol=1e-5)
    assert (middle[g != 0] < 0).any()


def test_the_unit_of_the_outputs_matters_to_no_training(problem):
    dense, X = problem
    weights = {name: layer.weight.copy() for name, layer in dense.layers.items()}
    biases = {name: layer.parameters["bias"].copy() for name, layer in dense.layers.items()}
    weights["l2"] *= 2.0**-12
    biases["l2"] *= 2.0**-12
    small = Chain.of_dense(weights, biases)
    options = {"names": ["l0"], "loss": "mse", "epochs": 3, "last_epochs": 0}
    made = [train_progressively(each, X[:400], bitat, **options) for each in (dense, small)]
    for name, values in made[0].layers["l0"].parameters.items():
        np.testing.assert_allclose(made[1].layers["l0"].parameters[name], values, rtol=1e-4)


def test_any_method_that_has_a_layer(problem):
    dense, X = problem
    chain = train_progressively(
        dense,
        X,
        lambda name, A, gram: QSWD.fit(A, 4.0, setting=(4, 24, 1, 6, 1)),
        names=["l1"],
        loss="mse",
        last_epochs=6,
        learning_rate=2e-3,
    )
    assert chain.layers["l1"].to_matrix().record["retuned"]
    scales_alone = train_progressively(
        dense,
        X,
        lambda name, A, gram: dn.factorize(A, bits=4.0, gram=gram, effort="fast", threads=1),
        names=["l1"],
        loss=lambda y, t: (float(np.mean((y - t) ** 2)), 2 * (y - t) / y.size),
        last_epochs=2,
        latent=False,
    )
    for made in (chain, scales_alone):
        assert error(dense, made, X) < 0.3 * np.mean(dense(X) ** 2)


def test_a_users_batches_and_samples_that_judge(problem):
    dense, X = problem
    seen = []

    def batches(epoch):
        seen.append(epoch)
        yield from np.split(X[:1000], 10)

    settings = {
        "names": ["l0"],
        "epochs": 1,
        "last_epochs": 2,
        "batches": batches,
        "validation": X[1000:],
    }
    one, other = (
        train_progressively(dense, X[:1000], bitat, steps_per_epoch=10, **settings)
        for _ in range(2)
    )
    assert seen == [0, 0, 1] * 2
    np.testing.assert_array_equal(one(X), other(X))
    with pytest.raises(ValueError, match="steps_per_epoch must be given with batches"):
        train_progressively(dense, X, bitat, **settings)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"names": ["x"]}, KeyError, "the chain has no layer 'x', it has l0, l1, l2"),
        ({"one_bit": ["x"]}, KeyError, "the chain has no layer 'x'"),
        ({"names": ["l0"], "one_bit": ["l1"]}, ValueError, "one_bit must name layers that are"),
        ({"loss": "l1"}, ValueError, "loss must be a callable or one of mse, cross_entropy"),
        ({"epochs": -1}, ValueError, "epochs must be"),
        ({"last_epochs": 1.5}, TypeError, "last_epochs must be"),
        ({"batch_size": 0}, ValueError, "batch_size must be"),
        ({"ridge": 0.0}, ValueError, "ridge must be"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate must be"),
        ({"validation": np.ones((3, 4))}, ValueError, r"validation must have shape"),
        ({"fit": lambda name, A, gram: A}, TypeError, "what fit returns must be a matrix of a"),
        ({"fit": lambda *_: BiTAT.fit(np.eye(3), 32.0)}, ValueError, "fit must return shape"),
        (
            {"fit": lambda name, A, gram: QSWD.fit(A, 8.0), "names": ["l1"], "one_bit": ["l1"]},
            TypeError,
            "matrix must be a BiTAT, got QSWD",
        ),
    ],
)
def test_bad_arguments_are_named(problem, arguments, error, message):
    dense, X = problem
    arguments = {"fit": bitat, "epochs": 0, "last_epochs": 0, **arguments}
    with pytest.raises(error, match=message):
        train_progressively(dense, X[:100], **arguments)


def test_samples_of_another_width_and_too_few(problem):
    dense, X = problem
    with pytest.raises(ValueError, match="X must have shape"):
        train_progressively(dense, X[:, :5], bitat)
    with pytest.raises(ValueError, match="X must hold two samples or more"):
        train_progressively(dense, X[:1], bitat)
