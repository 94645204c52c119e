"""PackedBits: the words are what the format says, and nothing but 0 and 1 gets in."""

import pickle

import naive
import numpy as np
import pytest
from hypothesis import given
from strategies import bit_arrays

from diba_np import PackedBits


@given(bit_arrays())
def test_words_stream_and_transpose_equal_the_bit_by_bit_reference(bits):
    packed = PackedBits(bits)
    np.testing.assert_array_equal(packed.words, naive.to_words(bits))
    np.testing.assert_array_equal(packed.to_stream(), naive.to_stream(bits))
    np.testing.assert_array_equal(packed.T.words, naive.to_words(bits.T))
    np.testing.assert_array_equal(packed.to_dense(), bits)
    assert packed.to_dense().dtype == np.uint8
    assert PackedBits.from_stream(packed.to_stream(), bits.shape) == packed
    assert PackedBits.from_words(packed.words, bits.shape[1]) == packed
    assert packed.count() == bits.sum()
    assert packed.T.T is packed


@pytest.mark.parametrize("shape", [(1025, 3), (2048, 7), (3, 1100), (1030, 1027)])
def test_matrices_longer_than_a_conversion_block(shape, rng):
    bits = rng.integers(0, 2, shape)
    packed = PackedBits(bits)
    np.testing.assert_array_equal(packed.to_dense(), bits)
    np.testing.assert_array_equal(packed.T.to_dense(), bits.T)
    assert PackedBits.from_stream(packed.to_stream(), shape) == packed


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint64, np.float16, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
def test_any_real_dtype_and_layout_of_zeros_and_ones(dtype, order, rng):
    bits = rng.integers(0, 2, (70, 9))
    taken = np.array(bits[::-1, ::2], dtype, order=order)
    np.testing.assert_array_equal(PackedBits(taken).to_dense(), bits[::-1, ::2])


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (np.array([[0, 2]]), ValueError, r"got 2 at \(0, 1\)"),
        (np.array([[0.0], [0.5]]), ValueError, r"got 0.5 at \(1, 0\)"),
        (np.array([[np.nan]]), ValueError, r"got nan at \(0, 0\)"),
        (np.array([[-1]]), ValueError, "got -1"),
        (np.array([0, 1]), ValueError, r"2-D, got shape \(2,\)"),
        (np.zeros((0, 3)), ValueError, r"got shape \(0, 3\)"),
        (np.array([["0"]]), TypeError, "dtype <U1"),
        (np.array([[1j]]), TypeError, "complex"),
        (np.array([[None]]), TypeError, "object"),
    ],
)
def test_refuses_anything_else_and_names_it(value, error, words):
    with pytest.raises(error, match=words):
        PackedBits(value)


def test_from_words_refuses_set_tail_bits_and_wrong_shapes():
    with pytest.raises(ValueError, match="past column 2 in row 1"):
        PackedBits.from_words(np.array([[7], [8]], np.uint64), 3)
    with pytest.raises(ValueError, match=r"shape \(rows, 2\) for 65 columns"):
        PackedBits.from_words(np.zeros((1, 1), np.uint64), 65)
    with pytest.raises(TypeError, match="uint64"):
        PackedBits.from_words(np.zeros((1, 1), np.int64), 3)


def test_from_stream_refuses_wrong_length_and_padding():
    with pytest.raises(ValueError, match="takes 2 bytes, got 1"):
        PackedBits.from_stream(np.zeros(1, np.uint8), (3, 3))
    with pytest.raises(ValueError, match="padding bit"):
        PackedBits.from_stream(np.array([0, 2], np.uint8), (3, 3))


def test_row_slices(rng):
    bits = rng.integers(0, 2, (20, 70))
    packed = PackedBits(bits)
    for rows in (
        slice(3, 7),
        slice(None),
        slice(None, None, 3),
        slice(-4, None),
        slice(None, 0, -1),
    ):
        np.testing.assert_array_equal(packed[rows].to_dense(), bits[rows])
    with pytest.raises(TypeError, match="slices or vectors of row indices, got int"):
        packed[3]
    with pytest.raises(ValueError, match="none of the 20 rows"):
        packed[5:5]


def test_immutable_equal_unhashable_and_picklable(rng):
    bits = rng.integers(0, 2, (5, 66))
    packed = PackedBits(bits)
    with pytest.raises(ValueError, match="read-only"):
        packed.words[0, 0] = 1
    assert packed == PackedBits(bits)
    assert packed != PackedBits(1 - bits)
    assert packed != PackedBits(bits[:, :65])
    assert packed != 3
    with pytest.raises(TypeError, match="unhashable"):
        hash(packed)
    assert pickle.loads(pickle.dumps(packed)) == packed
    mine = np.zeros((2, 1), np.uint64)
    PackedBits.from_words(mine, 5)
    mine[0, 0] = 1  # the caller's array stays the caller's
