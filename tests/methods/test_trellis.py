"""Both trellises: what is stored decodes to the matrix, rates, feedback, products from the bits."""

import copy
import itertools
from pathlib import Path

import h5py
import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diba_np import FormatError, load, methods
from diba_np.methods import linear_trellis
from diba_np.methods.feedback import output_error
from diba_np.methods.fitting import gram
from diba_np.methods.linear_trellis import LinearTrellis
from diba_np.methods.seeded import Rotation, normals, uniforms
from diba_np.methods.trellis import Trellis
from diba_np.methods.trellis_fit import ROTATIONS, Coded
from diba_np.methods.trellis_modes import (
    LINEAR_MODES,
    LOOKUP_MODES,
    allocate,
    index_bits,
    least_bits,
)
from diba_np.methods.trellis_paths import Coder, closing_state

DATA = Path(__file__).parents[2] / "data"
CLASSES = {"trellis": Trellis, "linear-trellis": LinearTrellis}
both = pytest.mark.parametrize("label", list(CLASSES))


def bits_of(stream, width, count):
    text = "".join(format(int(byte), "08b")[::-1] for byte in stream)
    return [int(text[at * width : (at + 1) * width][::-1], 2) for at in range(count)]


def decoded(path, modes):
    """The matrix, from the bytes of a file and the definition alone."""
    with h5py.File(path) as file:
        attrs, arrays = dict(file.attrs), {name: file[name][:] for name in file}
    m, n = int(attrs["m"]), int(attrs["n"])
    by_number = {16 * mode.bits + mode.weights: mode for mode in modes}
    used = [by_number.get(int(number)) for number in arrays["used"]]
    levels = len(used)
    if levels & (levels - 1):  # words of 64 bits, base-`levels` digits, the last one short
        digits = next(d for d in range(64, 0, -1) if levels**d <= 2**64)
        chosen = []
        for at in range(0, n, digits):
            word = int.from_bytes(arrays["chosen"][at // digits * 8 :][:8].tobytes(), "little")
            for _ in range(min(digits, n - at)):
                word, digit = divmod(word, levels)
                chosen.append(digit)
    else:
        chosen = bits_of(arrays["chosen"], levels.bit_length() - 1, n) if levels > 1 else [0] * n
    values, at = np.zeros((m, n)), 0
    for position, mode in enumerate(used):
        if mode is None:
            continue
        steps = -(-m // mode.weights)
        columns = [j for j in range(n) if chosen[j] == position]
        size = -(-len(columns) * steps * mode.bits // 8)
        codes = bits_of(arrays["codes"][at : at + size], mode.bits, len(columns) * steps)
        at += size
        for i, j in enumerate(columns):
            path_of = codes[i * steps : (i + 1) * steps]
            values[:, j] = naive.trellis_column(path_of, mode.bits, mode.table, m)
    grids = list(arrays["grids"].astype(float))
    scales = []
    for name, size in (("d1", m), ("d3", n)):
        width = int(attrs[f"{name}_bits"])
        if not width:
            scales.append(np.ones(size))
            continue
        low, ratio = grids[:2]
        del grids[:2]
        steps = [abs(low) * abs(ratio) ** c for c in range(2**width)]
        steps = [0.0, *steps[:-1]] if ratio < 0 else steps
        scales.append(np.array([steps[code] for code in bits_of(arrays[name], width, size)]))
    low = 0.0
    if "low" in arrays:  # u diag(steps) v^T
        rank = arrays["low"].size // (m + n)
        factors = arrays["low"].astype(float).reshape(m + n, rank)
        low = float(attrs["low_scale"]) * (factors[:m] * grids) @ factors[m:].T
    dense = float(attrs["scale"]) * scales[0][:, None] * values * scales[1]
    inputs, outputs = ROTATIONS[attrs["rotation"]]
    seed = int(attrs["seed"])
    if outputs:
        dense = Rotation(m, 2 * seed + 1).apply(np.eye(m)).T @ dense
    if inputs:
        dense = dense @ Rotation(n, 2 * seed).apply(np.eye(n))
    return dense + low


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(11)
    X = rng.normal(size=(400, 36)) @ (rng.normal(size=(36, 36)) / np.arange(1, 37)[:, None])
    A = rng.normal(size=(50, 36)) * np.exp(rng.normal(size=(50, 1)))
    A[7] = 0.0
    return A, X


@pytest.fixture(scope="module")
def fitted(problem):
    """Give the fit of the matrix by a method, a rate and a rotation, each made once."""
    made = {}

    def fit(label, bits, rotation, inputs=None, **more):
        key = label, bits, rotation, inputs is None, *more.items()
        if key not in made:
            how = {"seed": 3, "rotation": rotation, "threads": 1, **more}
            made[key] = CLASSES[label].fit(problem[0], bits, inputs, **how)
        return copy.copy(made[key])

    return fit


@both
@pytest.mark.parametrize("rotation", list(ROTATIONS))
@pytest.mark.parametrize("with_inputs", [False, True])
@pytest.mark.parametrize("bits", [1.3, 2.9])
def test_the_files_bytes_decode_to_the_matrix(
    label, rotation, with_inputs, bits, problem, fitted, tmp_path
):
    made = fitted(label, bits, rotation, problem[1] if with_inputs else None)
    path = tmp_path / "a.h5"
    made.save(path)
    dense = decoded(path, made.modes)
    np.testing.assert_allclose(made.to_dense(), dense, rtol=1e-5, atol=1e-5 * np.abs(dense).max())
    assert made.record["rotation"] == rotation


@both
@pytest.mark.parametrize("with_inputs", [False, True])
def test_what_is_of_low_rank_is_stored_apart_where_it_pays(label, with_inputs, problem, tmp_path):
    A, X = problem
    inputs, how = X if with_inputs else None, {"seed": 3, "rotation": "inputs", "threads": 1}
    plain = CLASSES[label].fit(A, 3.0, inputs, **how)
    assert plain.coded.low is None and "low" not in plain.to_datasets()[1]
    size = np.abs(A).max()
    raised = A + 10.0 * size * (1.0 + np.arange(36) / 36)
    made = CLASSES[label].fit(raised, 3.0, inputs, **how)
    assert made.coded.low.steps.size >= 1 and made.bits_per_weight <= 3.0
    assert made.snr(raised) > 35.0  # a path alone has 17 dB at 3 bits
    path = tmp_path / "a.h5"
    made.save(path)
    dense = decoded(path, made.modes)
    again = load(path)
    np.testing.assert_allclose(made.to_dense(), dense, rtol=1e-5, atol=1e-5 * np.abs(dense).max())
    np.testing.assert_array_equal(again.to_dense(), made.to_dense())
    dense = made.to_dense().astype(float)
    for x, y in ((np.eye(36), np.eye(50)), (X[0], A[:, 0])):
        np.testing.assert_allclose(again @ x, dense @ x, rtol=1e-4, atol=1e-4 * size)
        np.testing.assert_allclose(again.T @ y, dense.T @ y, rtol=1e-4, atol=1e-4 * size)
    np.testing.assert_allclose(again.rows([3, 49]), dense[[3, 49]], rtol=1e-5)
    attrs, arrays = made.to_datasets()
    attrs |= {"m": 50, "n": 36, "scale": 1.0}
    with pytest.raises(FormatError, match="grids"):
        made.from_datasets(attrs, arrays | {"low": arrays["low"][:-1]})
    del arrays["low"]  # as one that knows no such part would read it
    with pytest.raises(FormatError, match="grids"):
        made.from_datasets(attrs, arrays)


@both
def test_a_constant_matrix_is_exact_but_for_its_bytes(label):
    for A in (np.full((40, 30), -3.5), np.outer(np.arange(-20.0, 20.0), np.ones(30))):
        made = CLASSES[label].fit(A, 2.0, rotation=("none", "both"), threads=1)
        np.testing.assert_allclose(made.to_dense(), A, atol=2e-2 * np.abs(A).max())


@both
def test_more_bits_lose_less_whatever_the_matrix(label):
    rng = np.random.default_rng(0)
    i, j = np.arange(60)[:, None] / 60, np.arange(30) / 30
    image = 128 + 60 * np.sin(6 * i + 3 * j) + 30 * np.cos(33 * i * j)
    for A, floor in ((image, 16.0), (10 + rng.normal(size=(60, 30)), 22.0)):
        how = {"rotation": ("none", "both"), "threads": 1}
        snrs = [CLASSES[label].fit(A, bits, **how).snr(A) for bits in (1.5, 2.5)]
        assert snrs[1] > snrs[0] + 3.0 and snrs[0] > floor


@both
def test_golden_files(label):
    path = DATA / f"golden_{label.replace('-', '_')}.h5"
    made = load(path)
    dense = decoded(path, made.modes)
    np.testing.assert_allclose(made.to_dense(), dense, rtol=1e-5, atol=1e-5)
    assert made.coded.rotation == "both" and len(made.coded.used) > 1
    # the tables, the taps and the rotations must stay what they are
    expected = {
        "trellis": [0.009146137, -0.0029738452, 0.06118581],
        "linear-trellis": [0.0057282159, -0.010113353, 0.043735087],
    }[label]
    np.testing.assert_allclose(made.to_dense()[0, :3], expected, rtol=1e-4)


def test_seeded_numbers_stay_what_they_are():
    np.testing.assert_allclose(uniforms(0, 3), [0.431528, 0.02643377, 0.97088198], atol=1e-7)
    many = normals(7, 1 << 16)
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.01
    assert abs(np.corrcoef(many[1:], many[:-1])[0, 1]) < 0.02
    assert len(np.unique(np.concatenate([uniforms(seed, 100) for seed in range(50)]))) == 5000


@pytest.mark.parametrize("size", [1, 2, 3, 8, 12, 96, 97])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_a_rotation_is_orthogonal(size, kind):
    turn, x = Rotation(size, 5), np.random.default_rng(0).normal(size=(size, 4)).astype(kind)
    R = turn.apply(np.eye(size))
    np.testing.assert_allclose(R @ R.T, np.eye(size), atol=1e-12)
    for columns in (1, 4):
        part = x[:, :columns]
        np.testing.assert_allclose(turn.apply(part), R @ part, atol=1e-5)
        np.testing.assert_allclose(turn.apply_transposed(part), R.T @ part, atol=1e-5)
    assert turn.apply(x).dtype == kind


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.integers(2, 4), st.floats(0.1, 4.5))
def test_rates_go_where_they_lower_the_error_most(seed, n, rate):
    importance = np.random.default_rng(seed).exponential(size=n) ** 2
    modes, m = LINEAR_MODES[1:4], 12  # 4/3, 3/2 and 2 bits
    budget = int(rate * m * n) + index_bits(n, 1)
    costs = [0] + [mode.column_bits(m) for mode in modes]
    errors = [1.0] + [mode.distortion for mode in modes]
    best = min(
        (
            sum(w * errors[q] for w, q in zip(importance, choice, strict=True))
            for choice in itertools.product(range(4), repeat=n)
            if sum(costs[q] for q in choice)
            + index_bits(n, max(choice) - min(choice) + 1) <= budget
        ),
        default=np.inf,
    )  # fmt: skip
    found = allocate(modes, m, importance, budget)
    if found is None:
        assert budget < least_bits(modes, (m, n)) or best >= importance.sum()
        return
    chosen, used = found
    numbers = [used[q] for q in chosen]
    assert sum(costs[q] for q in numbers) + index_bits(n, len(used)) <= budget
    # greedy, so within the last step of the best there is
    loss = sum(w * errors[q] for w, q in zip(importance, numbers, strict=True))
    assert loss <= best + importance.max() * (errors[0] - errors[1])


@pytest.mark.parametrize(
    ("label", "floors"),
    [("trellis", (5.2, 8.0, 10.9, 16.5, 22.2)), ("linear-trellis", (4.0, 7.5, 10.6, 16.6, 22.3))],
)
def test_normal_samples(label, floors):
    A = np.random.default_rng(1).normal(size=(256, 128))
    for bits, floor in zip((1, 1.5, 2, 3, 4), floors, strict=True):
        made = CLASSES[label].fit(A, bits, rotation="both")
        assert bits - 0.01 < made.bits_per_weight <= bits
        assert made.snr(A) > floor


@both
def test_inputs_are_used(label, problem):
    A, X = problem
    H = gram(X, 36, ridge=0.0)
    made = {
        "without": CLASSES[label].fit(A, 2.0, threads=1),
        "with": CLASSES[label].fit(A, 2.0, inputs=X, threads=1),
        "gptq": methods.fit("gptq", A, 2.0, inputs=X),
    }
    error = {name: output_error(A - one.to_dense(), H) for name, one in made.items()}
    assert error["with"] < 0.6 * error["without"]
    assert error["with"] < 0.5 * error["gptq"]
    rotation = made["with"].record["rotation"]
    same = CLASSES[label].fit(A, 2.0, gram=X.T @ X / len(X), rotation=rotation)
    np.testing.assert_allclose(output_error(A - same.to_dense(), H), error["with"], rtol=0.2)


@both
def test_sides_that_turn_at_a_dense_matrixs_price_are_left_as_they_are(label):
    # heavy tails, which "auto" rotates where it may
    A = np.random.default_rng(3).standard_t(2, size=(131, 131))
    assert CLASSES[label].fit(A, 2.0).record["rotation"] == "none"
    assert CLASSES[label].fit(A[:40], 2.0).record["rotation"] in ("none", "outputs")
    assert CLASSES[label].fit(A, 2.0, rotation="both").record["rotation"] == "both"


@both
def test_any_number_of_threads_gives_the_same(label, problem):
    A = problem[0][:36]
    one, two = (CLASSES[label].fit(A, 1.7, threads=threads) for threads in (1, 2))
    np.testing.assert_array_equal(one.to_dense(), two.to_dense())


@both
def test_rows_of_unlike_size_are_worth_more(label):
    # paths spend their bits on the large rows: what a code of single entries cannot do
    rng = np.random.default_rng(2)
    even = rng.normal(size=(256, 64))
    uneven = even * np.exp(rng.normal(size=(256, 1)))
    snr = [CLASSES[label].fit(A, 2.0, rotation="none").snr(A) for A in (even, uneven)]
    assert snr[1] > snr[0] + 1.5


@pytest.mark.parametrize("rotation", list(ROTATIONS))
@pytest.mark.parametrize("bits", [0.9, 1.5, 2.4, 3.3])
def test_products_come_from_the_bits(rotation, bits, fitted, monkeypatch):
    made = fitted("linear-trellis", bits, rotation)
    dense = made.to_dense().astype(np.float64)
    monkeypatch.setattr(made, "to_dense", None)  # nothing is decoded
    rng = np.random.default_rng(0)
    size = np.abs(dense).max()
    for kind, close in ((np.float32, 3e-6), (np.float64, 3e-7)):
        for columns in (1, 2, 16, 40):
            x, y = (rng.normal(size=(side, columns)).astype(kind) for side in (36, 50))
            product, transposed = made @ x, made.T @ y
            assert product.dtype == transposed.dtype == kind
            np.testing.assert_allclose(product, dense @ x, atol=close * 40 * size)
            np.testing.assert_allclose(transposed, dense.T @ y, atol=close * 40 * size)
        np.testing.assert_allclose(made @ x[:, 0], dense @ x[:, 0], atol=close * 40 * size)
    z = x[:, 0] + 1j * x[:, 1]
    np.testing.assert_allclose(made @ z, dense @ z, atol=1e-5 * size * 40)
    whole = rng.integers(-3, 4, 36)
    np.testing.assert_allclose(made @ whole, dense @ whole, atol=1e-5 * size * 40)


@pytest.mark.parametrize("decoded", [0, 1 << 16])
@pytest.mark.parametrize("share", [3, 20])
def test_columns_of_rare_modes(decoded, share, monkeypatch):
    """Of 40 columns a third each of three modes, or 36, 2 and 2; one of the modes has no bits."""
    monkeypatch.setattr(linear_trellis, "_FEW_ENTRIES", decoded)
    rng = np.random.default_rng(0)
    m, n = 31, 40
    chosen = rng.permutation(np.resize([0, 1, 2] + [0] * (share - 3), n)).astype(np.uint8)
    kinds = [(mode.bits, mode.weights) for mode in LINEAR_MODES]
    used, codes = [], []
    for at, (bits, weights) in enumerate([(2, 1), (0, 0), (3, 2)]):
        used.append(kinds.index((bits, weights)) + 1 if bits else 0)
        steps = -(-m // weights) if bits else 0
        codes.append(rng.integers(0, 1 << bits, ((chosen == at).sum(), steps)).astype(np.uint8))
    made = LinearTrellis((m, n), Coded("none", used, chosen, codes), 0)
    dense = made.to_dense().astype(np.float64)
    monkeypatch.setattr(made, "to_dense", None)
    for columns in (1, 5):
        x, y = rng.normal(size=(n, columns)), rng.normal(size=(m, columns))
        np.testing.assert_allclose(made @ x, dense @ x, atol=1e-4)
        np.testing.assert_allclose(made.T @ y, dense.T @ y, atol=1e-4)
    monkeypatch.undo()
    x[:, 0] = 0.0
    x[np.flatnonzero(chosen == 1)[0], 0] = np.nan  # also where no bits are
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(made @ x, dense @ x, atol=1e-4)


def test_operands_that_are_not_finite_give_what_the_dense_matrix_gives(fitted):
    made = fitted("linear-trellis", 2.4, "none")
    dense = made.to_dense()
    x = np.random.default_rng(0).normal(size=(36, 3)).astype(np.float32)
    x[3, 0], x[5, 1] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(made @ x, dense @ x, rtol=1e-4, atol=1e-4)
    assert (made @ np.zeros((36, 0))).shape == (50, 0)
    with pytest.raises(TypeError, match="real numbers"):
        made._apply(np.array([["a"]] * 36))


@both
@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"rotation": "all"}, ValueError, "rotation must be one of auto, none, inputs, .* 'all'"),
        ({"rotation": ("none", "all")}, ValueError, "rotation must be one of .* got 'all'"),
        ({"rotation": ()}, ValueError, r"rotation must be one of .* got \(\)"),
        ({"gram": np.eye(3)}, ValueError, r"gram must have shape \(4, 4\)"),
        ({"gram": np.triu(np.ones((4, 4)))}, ValueError, "gram must be symmetric"),
        ({"gram": -np.eye(4)}, ValueError, "gram must be positive semidefinite"),
        ({"gram": np.eye(4), "inputs": np.eye(4)}, TypeError, "got both"),
        ({"gram": "no"}, TypeError, "gram must be an array"),
        ({"output_weight": np.ones(3)}, ValueError, r"output_weight must have shape \(4,\)"),
        ({"output_weight": -np.ones(4)}, ValueError, "output_weight must be finite and not neg"),
        ({"output_weight": np.eye(4)}, ValueError, "output_weight must be one weight an output"),
        ({"scale_bits": 9}, ValueError, r"scale_bits must lie in \[2, 8\], got 9"),
        ({"bits": 0.01}, ValueError, "bits must be at least"),
        ({"bits": 0.01, "rotation": "none"}, ValueError, "bits must be at least"),
    ],
)
def test_bad_arguments(label, kwargs, error, text):
    with pytest.raises(error, match=text):
        CLASSES[label].fit(**{"A": np.eye(4), "bits": 32.0, **kwargs})


@both
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda attrs, arrays: attrs.update(rotation="left"), "rotation 'left'"),
        (lambda attrs, arrays: attrs.update(seed=-1), "seed -1"),
        (lambda attrs, arrays: arrays.update(used=np.array([255], "u1")), r"used .*\[255\]"),
        (lambda attrs, arrays: arrays.update(used=arrays["used"][::-1].copy()), "used must name"),
        (lambda attrs, arrays: arrays.update(codes=arrays["codes"][:-1]), "codes must hold"),
        (
            lambda attrs, arrays: arrays.update(codes=np.append(arrays["codes"], np.uint8(0))),
            "codes must",
        ),
        (lambda attrs, arrays: attrs.update(d1_bits=9), "length"),
    ],
)
def test_contents_that_contradict_each_other_are_refused(label, change, text, fitted):
    made = fitted(label, 1.3, "none")
    attrs, arrays = made.to_datasets()
    attrs |= {"m": 50, "n": 36, "scale": 1.0}
    assert len(arrays["used"]) > 1
    CLASSES[label].from_datasets(dict(attrs), dict(arrays))
    change(attrs, arrays)
    with pytest.raises((ValueError, FormatError), match=text):
        CLASSES[label].from_datasets(attrs, arrays)


def test_the_modes_lie_on_convex_curves():
    for modes in (LOOKUP_MODES, LINEAR_MODES):
        rates = np.array([0.0] + [mode.bits / mode.weights for mode in modes])
        errors = np.array([1.0] + [mode.distortion for mode in modes])
        slopes = np.diff(errors) / np.diff(rates)
        assert (np.diff(rates) > 0).all() and (np.diff(slopes) > 0).all()
        assert len({mode.number for mode in modes}) == len(modes)
        assert all(mode.table.shape == (mode.weights, 1 << mode.width) for mode in modes)


@both
def test_weights_of_outputs_are_used(label, problem):
    A, X = problem
    H = gram(X, 36, ridge=0.0)
    w = np.where(np.arange(50) % 5 == 0, 20.0, 0.1)
    for rotation in ("none", "inputs", "auto"):
        even, uneven = (
            A - CLASSES[label].fit(A, 2.0, X, output_weight=each, rotation=rotation).to_dense()
            for each in (None, w)
        )
        lost = [w @ np.einsum("ij,ij->i", E @ H, E) for E in (even, uneven)]
        assert lost[1] < 0.85 * lost[0]
    # no unit of theirs counts
    how = {"rotation": "inputs"}
    one, two = (CLASSES[label].fit(A, 2.0, output_weight=c * w, **how) for c in (1.0, 8.0))
    np.testing.assert_array_equal(one.to_dense(), two.to_dense())


@both
def test_scales_of_more_bits_and_a_choice_of_rotations(label, problem):
    A, X = problem
    made = CLASSES[label].fit(A, 2.5, X, scale_bits=8, rotation=("none", "inputs"))
    assert made.record["rotation"] in ("none", "inputs")
    assert made.coded.rows[0].bits == made.coded.columns[0].bits == 8
    assert made.bits_per_weight <= 2.5


@pytest.mark.parametrize("rotation", list(ROTATIONS))
def test_rows_come_from_the_bits(rotation, fitted, monkeypatch):
    for bits in (0.9, 1.5, 2.4):
        made = fitted("linear-trellis", bits, rotation)
        dense = made.to_dense()
        if rotation in ("none", "inputs"):
            monkeypatch.setattr(made, "to_dense", None)
        size = np.abs(dense).max()
        np.testing.assert_allclose(made.rows([3, 0, 49, 3]), dense[[3, 0, 49, 3]], atol=1e-5 * size)
        np.testing.assert_allclose(made[-2:, 1::3], dense[-2:, 1::3], atol=1e-5 * size)


@both
def test_of_rotations_that_are_near_the_better_is_kept(label, problem):
    rng = np.random.default_rng(5)
    A = rng.normal(size=(80, 24)) * np.exp(rng.normal(size=(80, 1)))
    H = gram(problem[1][:, :24], 24, ridge=0.0)

    def lost(rotation):
        return output_error(A - CLASSES[label].fit(A, 2.0, gram=H, rotation=rotation).to_dense(), H)

    each = {name: lost(name) for name in ROTATIONS}
    assert lost("auto") <= 1.01 * min(each.values())


@both
def test_rotations_are_fitted_side_by_side_with_equal_bits(label, problem):
    A, X = problem[0][:36], problem[1]
    one, two = (CLASSES[label].fit(A, 2.0, X, threads=threads).to_dense() for threads in (1, 2))
    np.testing.assert_array_equal(one, two)


@both
def test_few_bits_charged_for_what_they_say_lose_less(label, monkeypatch):
    from diba_np.methods import feedback

    rng = np.random.default_rng(3)
    X = rng.normal(size=(600, 48)) * np.exp(-0.1 * np.arange(48)) @ rng.normal(size=(48, 48))
    A = rng.normal(size=(128, 48))
    H = X.T @ X / len(X)

    def lost():
        made = CLASSES[label].fit(A, 1.5, gram=H, rotation="both")
        return output_error(A - made.to_dense(), H)

    charged = lost()
    monkeypatch.setattr(feedback, "_NOISE", 0.0)
    assert charged < 0.97 * lost()


@pytest.mark.parametrize("modes", [LINEAR_MODES, LOOKUP_MODES])
@pytest.mark.parametrize(("at", "size"), [(0, 5), (1, 3), (3, 6), (7, 3)])
def test_of_few_bits_the_closed_path_is_the_best_of_all(modes, at, size):
    mode = modes[at]
    rng = np.random.default_rng(at)
    x, scale = rng.normal(size=size), np.exp(rng.normal(size=size))
    codes, start = Coder(mode).encode(x, scale)
    assert start == closing_state(mode, codes)

    def error(path):
        return np.sum((x - scale * naive.trellis_column(path, mode.bits, mode.table, size)) ** 2)

    paths = itertools.product(range(2**mode.bits), repeat=mode.steps(size))
    assert error(codes) == pytest.approx(min(map(error, paths)), rel=1e-5)


@both
def test_short_columns_gain_from_more_bits(label):
    A = np.random.default_rng(0).normal(size=(3, 50))
    snrs = [CLASSES[label].fit(A, bits).snr(A) for bits in (2.0, 3.0, 4.0, 6.0)]
    assert np.all(np.diff(snrs) > 3.0) and snrs[-1] > 20.0


def test_few_uneven_rows_get_the_best_rotation():
    rng = np.random.default_rng(0)
    A = np.cumsum(rng.normal(size=(14, 48)), axis=1) * 10 ** rng.uniform(-2, 2, size=(14, 1))
    best = max(Trellis.fit(A, 3.0, rotation=name).snr(A) for name in ROTATIONS)
    assert Trellis.fit(A, 3.0).snr(A) == pytest.approx(best)
