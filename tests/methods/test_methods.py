"""What every method promises: products, counted bits, files, bad input."""

import copy
import functools
import os
import pickle
import re

import h5py
import numpy as np
import pytest
from scipy.sparse.linalg import aslinearoperator, svds

from diba_np import DiBAFactors, FormatError, PackedBits, factorize, load, methods
from diba_np.methods.fitting import check_problem, gram

LABELS = list(methods.METHODS)

HEADER_BYTES = 16 * 1024  # what a file may hold beyond the counted arrays


@pytest.fixture(scope="module")
def matrix():
    rng = np.random.default_rng(7)
    low = rng.standard_normal((48, 6)) @ rng.standard_normal((6, 40))
    return (low + 0.7 * rng.standard_normal((48, 40))).astype(np.float32)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(8)
    return rng.standard_normal((300, 40)) @ rng.standard_normal((40, 40))


@pytest.fixture(scope="module")
def fitted(matrix):
    """Give the fit of the matrix by a method at a rate, each made once."""
    return functools.cache(lambda label, bits: methods.fit(label, matrix, bits))


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("bits", [1.0, 2.0, 4.3])
def test_budget_holds_and_bits_are_the_files_bytes(label, bits, matrix, fitted, tmp_path):
    made = fitted(label, bits)
    assert made.storage_bits() <= bits * matrix.size
    assert set(made.storage_breakdown()) == {"payload", "scales", "index", "codebook"}
    path = tmp_path / "a.h5"
    assert made.save(path) == os.path.getsize(path)
    with h5py.File(path) as file:
        stored = sum(8 * file[name].nbytes for name in file)
    assert stored == made.storage_bits()
    assert 0 <= os.path.getsize(path) - made.storage_bits() // 8 <= HEADER_BYTES


@pytest.mark.parametrize("bits", [1.7, 3.0, 6.0])
@pytest.mark.parametrize("label", LABELS)
def test_save_and_load_give_the_same_matrix(label, bits, matrix, inputs, tmp_path):
    made = methods.fit(label, matrix, bits, inputs=inputs)
    path = tmp_path / "a.h5"
    made.save(path)
    for again in (load(path), type(made).load(path)):
        assert type(again) is type(made)
        np.testing.assert_array_equal(again.to_dense(), made.to_dense())
        assert again.storage_breakdown() == made.storage_breakdown()
        assert again.record == made.record
    assert not [name for name in os.listdir(tmp_path) if "part" in name]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("label", LABELS)
def test_what_is_not_finite_reaches_every_output(label, value, matrix):
    sparse = matrix.copy()
    sparse[:, :30] = 0
    made = methods.fit(label, sparse, 1.0)
    for operator, dense in ((made, made.to_dense()), (made.T, made.to_dense().T)):
        x = np.ones(operator.shape[1])
        x[0] = value
        with np.errstate(invalid="ignore"):
            found, expected = operator @ x, dense.astype(np.float64) @ x
        size = np.abs(dense).max()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * size)


@pytest.mark.parametrize("label", LABELS)
def test_sums_that_leave_the_range_on_the_way_are_no_part_of_a_result(label, matrix, fitted):
    made = fitted(label, 2.0)
    dense = made.to_dense().astype(np.float64)
    for operator, exact in ((made, dense), (made.T, dense.T)):
        row = exact[np.abs(exact).sum(axis=1).argmax()]
        x = (3e38 * np.sign(row) / np.abs(row).sum()).astype(np.float32)
        np.testing.assert_allclose(operator @ x, exact @ x, rtol=1e-3, atol=1e35)


@pytest.mark.parametrize("bits", [0.7, 1.5, 3.0])
@pytest.mark.parametrize("label", ["trellis", "linear-trellis"])
@pytest.mark.parametrize("shape", [(1, 33), (3, 64), (7, 31), (16, 31), (31, 16), (16, 64)])
def test_short_columns_keep_to_the_budget(label, shape, bits, rng):
    try:
        made = methods.fit(label, rng.normal(size=shape), bits)
    except ValueError as error:
        assert "bits" in str(error)
    else:
        assert made.storage_bits() <= bits * shape[0] * shape[1]


@pytest.mark.parametrize("label", LABELS)
def test_products_equal_the_dense_matrix(label, matrix, fitted, rng):
    made = fitted(label, 2.0)
    dense = made.to_dense()
    assert dense.dtype == np.float32 and dense.shape == matrix.shape
    m, n = matrix.shape
    close = {"rtol": 1e-4, "atol": 1e-4 * np.abs(dense).max()}
    x, X, y, Y = (rng.standard_normal(shape) for shape in (n, (n, 3), m, (m, 2)))
    np.testing.assert_allclose(made @ x, dense @ x, **close)
    np.testing.assert_allclose(made @ X, dense @ X, **close)
    np.testing.assert_allclose(made.T @ y, dense.T @ y, **close)
    np.testing.assert_allclose(made.rmatvec(y), dense.T @ y, **close)
    np.testing.assert_allclose(made.H @ Y, dense.T @ Y, **close)
    np.testing.assert_allclose(made.matmat(x[:, None]), dense @ x[:, None], **close)
    np.testing.assert_allclose(made._matvec(rng.standard_normal((2, 3, n))).shape, (2, 3, m))
    # matrices along leading axes, as newer versions of scipy hand them on
    for operator, exact, size in ((made, dense, n), (made.T, dense.T, m)):
        stack = rng.standard_normal((2, size, 3))
        np.testing.assert_allclose(operator._matmat(stack), exact @ stack, **close)
    assert (made @ x.astype(np.float32)).dtype == np.float32
    # adjointness: <y, A x> = <A^T y, x>
    assert np.isclose(y @ (made @ x), (made.T @ y) @ x, rtol=1e-4, atol=1e-3)
    top = svds(aslinearoperator(made), k=1, return_singular_vectors=False, rng=0)
    assert np.isclose(top[0], np.linalg.norm(dense, 2), rtol=1e-3)


@pytest.mark.parametrize("label", LABELS)
def test_a_pickle_holds_what_is_stored_and_nothing_that_products_made(label, fitted):
    made = fitted(label, 2.0)
    dense, x = made.to_dense(), np.ones(made.shape[1])
    y = made @ x
    made.T @ np.ones((made.shape[0], 3))
    pickled = pickle.dumps(made)
    assert len(pickled) <= made.storage_bits() // 8 + 1024
    for again in (pickle.loads(pickled), copy.deepcopy(made), copy.copy(made)):
        assert type(again) is type(made)
        assert again.record == made.record
        np.testing.assert_array_equal(again.to_dense(), dense)
        np.testing.assert_array_equal(again @ x, y)


@pytest.mark.parametrize("label", LABELS)
def test_same_seed_same_bits_and_global_state_untouched(label, matrix):
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = (methods.fit(label, matrix[:30, :20], 2.0, seed=5) for _ in range(2))
    np.testing.assert_array_equal(first.to_dense(), second.to_dense())
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize(
    "A",
    [
        np.zeros((12, 14)),
        np.ones((12, 14), np.int8),
        np.outer(np.arange(1, 13), np.arange(1, 15)).astype(float),
        1e-30 * np.random.default_rng(0).standard_normal((12, 14)),
        1e30 * np.random.default_rng(0).standard_normal((12, 14)),
        np.asfortranarray(np.random.default_rng(1).standard_normal((12, 14)).astype(np.float16)),
        np.random.default_rng(2).standard_normal((12, 14))[::-1, ::-1],
        np.random.default_rng(3).standard_normal((1, 120)),
        np.random.default_rng(3).standard_normal((120, 1)),
    ],
    ids=["zero", "ones", "rank1", "tiny", "huge", "fortran16", "reversed", "row", "column"],
)
def test_odd_matrices_work_or_say_why(label, A):
    bits = 16.0
    try:
        made = methods.fit(label, A, bits)
    except ValueError as error:
        assert str(error).startswith(("bits must be at least", "bits must be larger"))
        return
    dense = made.to_dense().astype(float)
    assert np.isfinite(dense).all()
    assert made.storage_bits() <= bits * A.size
    assert (
        np.sum((dense / np.abs(A).max(initial=1e-300) - A / np.abs(A).max(initial=1e-300)) ** 2)
        <= 1.001 * np.sum((A / np.abs(A).max(initial=1e-300)) ** 2) + 1e-12
    )


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"A": "no"}, TypeError, "A must be an array of real numbers"),
        ({"A": np.zeros((2, 2), complex)}, TypeError, "A must be an array of real numbers"),
        ({"A": np.zeros(3)}, ValueError, "A must (be 2-D|have rows and columns)"),
        ({"A": np.zeros((0, 3))}, ValueError, "A must (be 2-D|have rows and columns)"),
        (
            {"A": np.array([[1.0, np.nan], [0.0, 1.0]])},
            ValueError,
            r"1 non-finite entry; first at \(0, 1\)",
        ),
        ({"bits": "1"}, TypeError, "bits must be a number"),
        ({"bits": True}, TypeError, "bits must be a number"),
        ({"bits": 0}, ValueError, "bits must be finite and above 0"),
        ({"bits": np.inf}, ValueError, "bits must be finite and above 0"),
        ({"inputs": np.zeros((4, 3))}, ValueError, r"inputs must have shape \(N, 2\)"),
        ({"inputs": np.full((4, 2), np.inf)}, ValueError, "inputs contains 8 non-finite"),
        ({"seed": "x"}, TypeError, "seed must be an int"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
    ],
)
@pytest.mark.parametrize("label", LABELS)
def test_bad_arguments_are_named(label, kwargs, error, text):
    arguments = {"A": np.eye(2), "bits": 32.0, **kwargs}
    with pytest.raises(error, match=text):
        methods.fit(label, **arguments)


@pytest.mark.parametrize("label", LABELS)
def test_a_budget_too_small_says_what_is_needed(label):
    with pytest.raises(ValueError, match=r"bits must be (at least|larger) .* got 0\.001"):
        methods.fit(label, np.random.default_rng(0).standard_normal((12, 9)), 0.001)


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("shape", [(8, 8), (12, 9), (1, 2)])
def test_a_least_budget_that_is_told_is_enough(label, shape):
    A = np.random.default_rng(0).standard_normal(shape)
    for bits in (0.2, 0.48, 2.0):
        try:
            methods.fit(label, A, bits)
        except ValueError as error:
            told = re.search(r"at least ([\d.]+) for", str(error))
            if told:
                assert float(told[1]) > bits
                # four digits are told
                assert methods.fit(label, A, float(told[1]) * 1.001).shape == shape
            else:
                assert label in ("deepc", "fcqh", "mesa")


def test_unknown_method():
    with pytest.raises(ValueError, match="method must be one of"):
        methods.fit("nothing", np.eye(3), 1)


def test_the_toolkits_own_method_satisfies_the_interface(matrix, tmp_path):
    own, other = factorize(matrix, bits=2.0, max_sweeps=20), methods.fit("rtn", matrix, 2.0)
    for name in ("shape", "dtype", "record", "bits_per_weight"):
        assert type(getattr(own, name)) is type(getattr(other, name))
    for made in (own, other):
        parts = made.storage_breakdown()
        assert list(parts) == ["payload", "scales", "index", "codebook"]
        assert sum(parts.values()) == made.storage_bits()
        assert made.storage_ratio() == made.storage_bits() / (32 * matrix.size)
        part = made.row_expander()(slice(3, 9))
        np.testing.assert_allclose(part, made.to_dense()[3:9], rtol=1e-5, atol=1e-5)
        assert 5 < made.snr(matrix) < 14
        assert 0 <= made.save(tmp_path / "a.h5") - made.storage_bits() // 8 <= HEADER_BYTES
    assert own.storage_breakdown()["payload"] == own.k * (48 + 40)


def test_many_methods_in_one_file(matrix, fitted, tmp_path):
    path = tmp_path / "many.h5"
    made = {label: fitted(label, 2.0) for label in ("rtn", "svd16", "mesa")}
    made["own"] = factorize(matrix, bits=2.0, max_sweeps=20)
    for name, one in made.items():
        one.save(path, group=f"layer.{name}")
    for name, one in made.items():
        again = load(path, group=f"layer.{name}")
        assert type(again) is type(one)
        np.testing.assert_array_equal(again.to_dense(), one.to_dense())
    again = methods.get("svd16")[0].load(path, group="layer.svd16")
    np.testing.assert_array_equal(again.to_dense(), made["svd16"].to_dense())
    # a matrix at the root beside groups
    made["rtn"].save(tmp_path / "b.h5")
    made["own"].save(tmp_path / "b.h5", group="own")
    np.testing.assert_array_equal(load(tmp_path / "b.h5").to_dense(), made["rtn"].to_dense())


def test_one_flipped_byte_is_found(matrix, tmp_path):
    path, bad = tmp_path / "a.h5", tmp_path / "b.h5"
    made = methods.fit("rtn", matrix, 2.0)
    made.save(path)
    raw = path.read_bytes()
    heap = raw.index(b"GCOL")
    found = 0
    for at in sorted({*range(0, len(raw), 37), *range(heap, heap + 160, 4)}):
        bad.write_bytes(raw[:at] + bytes([raw[at] ^ 0x10]) + raw[at + 1 :])
        try:
            again = load(bad)
        except FormatError:
            found += 1
        else:  # an unused byte of the container
            np.testing.assert_array_equal(again.to_dense(), made.to_dense())
    assert found > 0
    start = raw.index(made.to_datasets()[1]["scales"].tobytes())
    bad.write_bytes(raw[:start] + bytes([raw[start] ^ 1]) + raw[start + 1 :])
    with pytest.raises(FormatError):
        load(bad)


def edited(path, change):
    """Change a file and give it a digest that fits, as a careless or hostile writer would."""
    from diba_np.files.container import digest_of

    with h5py.File(path, "r+") as file:
        change(file)
        attributes = {
            name: value.item() if isinstance(value, np.generic) else value
            for name, value in file.attrs.items()
            if name != "digest"
        }
        file.attrs["digest"] = digest_of(attributes, {name: file[name][:] for name in file})


def put(name, value):
    return lambda file: file.attrs.__setitem__(name, value)


def big_endian(name):
    def change(file):
        values = file[name][:]
        del file[name]
        file.create_dataset(name, data=values.astype(">f4"))

    return change


@pytest.mark.parametrize(
    ("label", "change", "words"),
    [
        ("rtn", put("method", "zip"), "attribute method: found 'zip', expected one of diba, rows"),
        ("rtn", put("method", 3), "attribute method: found 3, expected str"),
        ("rtn", put("m", 0), "attribute m: found 0, expected a positive size"),
        ("rtn", put("m", 47), "inconsistent contents"),
        ("rtn", put("levels", -1), "inconsistent contents: codes must be 0 or more"),
        ("mesa", big_endian("deltas"), "dataset deltas: found .* of >f4, expected .* of <f4"),
        ("rtn", put("levels", 0), "inconsistent contents"),
        ("rtn", put("group", -1), "inconsistent contents"),
        ("rtn", put("scale", np.nan), "attribute scale: found nan, expected a float"),
        ("rtn", lambda f: f.__delitem__("scales"), "dataset scales: found none"),
        ("rtn", lambda f: f.attrs.__delitem__("levels"), "inconsistent contents: 'levels'"),
        ("svd16", put("rank", 2**40), "inconsistent contents"),
        ("qswd", put("r", 3), "inconsistent contents"),
        ("qswd", put("d", 0), "inconsistent contents"),
        ("fcqh", put("coder", "zip"), "inconsistent contents"),
        ("fcqh", put("m", 2**30), "stream of .* bytes cannot hold"),
        ("deepc", put("kept", 2**20), "inconsistent contents"),
        ("mesa", put("block_order", "random"), "inconsistent contents: order must be"),
        ("mesa", put("count", 99), "inconsistent contents"),
    ],
)
def test_contents_that_contradict_each_other_are_refused(label, change, words, fitted, tmp_path):
    path = tmp_path / "a.h5"
    fitted(label, 2.0).save(path)
    edited(path, change)
    with pytest.raises(FormatError, match=words) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_file_of_another_method_is_refused(matrix, tmp_path):
    path = tmp_path / "a.h5"
    methods.fit("rtn", matrix, 2.0).save(path)
    with pytest.raises(FormatError, match="attribute method: found rtn, expected svd"):
        methods.get("svd16")[0].load(path)
    DiBAFactors([1.0], PackedBits([[1]]), [1.0], PackedBits([[1]]), [1.0]).save(path)
    with pytest.raises(FormatError, match="found diba, expected svd"):
        methods.get("svd16")[0].load(path)


def test_snr_wants_the_same_shape():
    with pytest.raises(ValueError, match="shape"):
        methods.fit("rtn", np.eye(8), 8).snr(np.eye(3))


def test_gram_and_problem(rng):
    X = rng.standard_normal((50, 4))
    w = rng.random(50)
    expected = sum(w[i] * np.outer(X[i], X[i]) for i in range(50)) / w.sum()
    np.testing.assert_allclose(gram(X, 4, 0.0, w), expected)
    np.testing.assert_array_equal(gram(None, 3), np.eye(3))
    problem = check_problem(5 * np.ones((3, 4)), 2)
    assert problem.budget == 24 and problem.scale == 5.0


@pytest.mark.parametrize("heavy", [False, True])
def test_more_bits_than_an_even_grid_can_use_do_no_harm(heavy):
    rng = np.random.default_rng(1)
    A = rng.standard_t(2.5, (96, 96)) if heavy else rng.standard_normal((40, 33))
    reached = [methods.fit("fcqh", A, bits).snr(A) for bits in (6.0, 16.0, 20.0)]
    assert reached[1] > reached[0]
    assert reached[2] > reached[1] - 0.3


@pytest.mark.parametrize("label", ["svd8", "rtn"])
def test_numpy_takes_it_and_its_transpose_for_a_matrix(label, matrix):
    made = methods.fit(label, matrix, 4.0)
    dense = made.to_dense()
    for same, other in ((made, dense), (made.T, dense.T)):
        assert np.asarray(same).dtype == np.float32
        np.testing.assert_array_equal(np.asarray(same), other)
        np.testing.assert_array_equal(np.array(same, np.float64, copy=True), other)
        np.testing.assert_array_equal(same.rows([3, 1]), other[[3, 1]])
        np.testing.assert_array_equal(same[2:5, 3], other[2:5, 3])
    assert made.T.snr(matrix.T) == pytest.approx(made.snr(matrix))
    with pytest.raises(ValueError, match="cannot become an array without a copy"):
        np.asarray(made, copy=False)


@pytest.mark.parametrize("label", ["gptq", "mesa", "bitat"])
@pytest.mark.parametrize("power", [-600, 600])
def test_units_of_inputs_do_not_count(label, power, matrix, inputs):
    A, X = matrix[:12, :16], inputs[:60, :16]
    usual = methods.fit(label, A, 6.0, inputs=X)
    scaled = methods.fit(label, A, 6.0, inputs=X * 2.0**power)
    np.testing.assert_array_equal(usual.to_dense(), scaled.to_dense())


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("unit", [1e300, 1e-300])
def test_numbers_beyond_single_precision_are_refused(label, unit):
    A = np.random.default_rng(0).normal(size=(12, 10)) * unit
    with pytest.raises(ValueError, match=r"largest magnitude in A must lie in .* scale A first"):
        methods.fit(label, A, 8.0)
