"""Bit streams, Huffman and rANS: every code decodes to what went in."""

from math import comb, log2

import naive
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diba_np.kernels.entropy import decode_huffman, decode_rans, encode_rans
from diba_np.methods import entropy_coding
from diba_np.methods import streams as codes

SYMBOLS = st.integers(1, 40).flatmap(
    lambda r: st.tuples(st.just(r), st.lists(st.integers(0, r - 1), min_size=0, max_size=200))
)


@given(st.integers(1, 300), st.integers(0, 200), st.integers(0, 1000))
def test_codes_round_trip(levels, count, seed):
    values = np.random.default_rng(seed).integers(0, levels, count)
    stream = codes.pack_digits(values, levels)
    assert stream.dtype == np.uint8 and stream.size == codes.packed_bytes(count, levels)
    np.testing.assert_array_equal(codes.unpack_digits(stream, count, levels), values)


def test_three_levels_cost_1_6_bits():
    assert codes.packed_bytes(4000, 3) * 8 == 6400
    assert codes.packed_bytes(8, 2) == 1
    assert codes.packed_bytes(9, 1) == 0


@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 100), st.integers(0, 1000))
def test_sets_round_trip(r, s, count, seed):
    s = min(s, r)
    rng = np.random.default_rng(seed)
    sets = np.sort(
        np.array([rng.choice(r, s, replace=False) for _ in range(count)], int).reshape(count, s),
        axis=1,
    )
    stream = codes.pack_sets(sets, r)
    assert stream.size == codes.sets_bytes(count, r, s)
    assert 8 * stream.size <= count * log2(comb(r, s)) + count / 16 + 16
    np.testing.assert_array_equal(codes.unpack_sets(stream, count, r, s), sets)


def test_bad_streams_are_refused():
    with pytest.raises(ValueError, match="codes must lie in"):
        codes.pack_digits([4], 4)
    with pytest.raises(ValueError, match="stream must have 1 bytes"):
        codes.unpack_digits(np.zeros(2, np.uint8), 3, 4)
    for count, levels in ((-1, 4), (3, 0), (3, -1), (3, codes.MOST_LEVELS + 1), (3, 10**300)):
        with pytest.raises(ValueError, match="codes must be 0 or more of 1 to 65536 levels"):
            codes.unpack_digits(np.zeros(2, np.uint8), count, levels)
    with pytest.raises(ValueError, match="out of range"):
        codes.unpack_sets(np.full(codes.sets_bytes(1, 5, 2), 255, np.uint8), 1, 5, 2)


@given(SYMBOLS, st.sampled_from(["i8", "u1"]), st.sampled_from([0, 3]))
def test_the_entropy_of_symbols(drawn, dtype, least):
    symbols = (np.array(drawn[1]) % 200 + (least if dtype == "u1" else -least)).astype(dtype)
    counts = np.unique(symbols, return_counts=True)[1]
    expected = -np.sum(counts / symbols.size * np.log2(counts / symbols.size))
    assert entropy_coding.entropy(symbols) == pytest.approx(expected, abs=1e-12)


@given(SYMBOLS, st.sampled_from(["huffman", "rans"]))
def test_coders_round_trip(drawn, coder):
    r, symbols = drawn
    symbols = np.array(symbols, np.int64)
    stream, book = entropy_coding.encode(symbols, r, coder)
    np.testing.assert_array_equal(
        entropy_coding.decode(stream, book, len(symbols), r, coder), symbols
    )
    assert 8 * stream.size >= entropy_coding.at_least(symbols)


@given(SYMBOLS)
def test_huffman_lies_within_a_bit_of_the_entropy_and_the_book_is_prefix_free(drawn):
    r, symbols = drawn
    symbols = np.array(symbols, np.int64)
    counts = np.bincount(symbols, minlength=r)
    lengths = entropy_coding.code_lengths(counts)
    used = np.flatnonzero(counts)
    assert (lengths[counts == 0] == 0).all() and (lengths[used] > 0).all()
    assert np.sum(2.0 ** -lengths[used].astype(float)) <= 1
    words = [
        format(c, f"0{n}b")
        for c, n in zip(entropy_coding.canonical_codes(lengths)[used], lengths[used], strict=True)
    ]
    for a in words:
        assert sum(b.startswith(a) for b in words) == 1
    if len(used) > 1:
        mean = np.sum(counts * lengths) / counts.sum()
        assert entropy_coding.entropy(symbols) - 1e-9 <= mean < entropy_coding.entropy(symbols) + 1


def brute_force_length(counts, limit):
    """Least total length over all length tuples that satisfy Kraft."""
    best = np.inf
    for choice in np.ndindex(*([limit] * len(counts))):
        lengths = np.array(choice) + 1
        if np.sum(0.5**lengths) <= 1:
            best = min(best, int(np.sum(lengths * counts)))
    return best


@pytest.mark.parametrize(
    "counts", [[1, 1], [5, 1, 1], [1, 2, 4, 8], [8, 4, 2, 1, 1], [3, 3, 3, 3, 3], [100, 1, 1, 1, 1]]
)
@pytest.mark.parametrize("limit", [3, 4])
def test_lengths_are_optimal_under_their_limit(counts, limit):
    lengths = entropy_coding.code_lengths(np.array(counts), limit)
    assert lengths.max() <= limit
    assert int(np.sum(lengths * np.array(counts))) == brute_force_length(np.array(counts), limit)


def test_fibonacci_counts_stay_under_the_limit():
    counts = [1, 1]
    while len(counts) < 30:
        counts.append(counts[-1] + counts[-2])
    lengths = entropy_coding.code_lengths(np.array(counts))
    assert lengths.max() == entropy_coding.LIMIT
    assert np.sum(0.5 ** lengths.astype(float)) <= 1


def test_rans_goes_under_one_bit():
    symbols = (np.arange(5000) % 50 == 0).astype(int)
    sizes = {
        coder: 8 * entropy_coding.encode(symbols, 2, coder)[0].size / 5000
        for coder in ("huffman", "rans")
    }
    assert sizes["huffman"] == 1.0
    assert sizes["rans"] < 1.05 * entropy_coding.entropy(symbols) + 0.02


@pytest.mark.parametrize("coder", ["huffman", "rans"])
def test_damaged_streams_do_not_crash(coder, rng):
    symbols = rng.integers(0, 7, 400)
    stream, book = entropy_coding.encode(symbols, 7, coder)
    with pytest.raises(ValueError, match="book must have"):
        entropy_coding.decode(stream, book[:-1], 400, 7, coder)
    with pytest.raises(ValueError):
        entropy_coding.decode(stream[: stream.size // 4 * 2], book, 400, 7, coder)
    with pytest.raises(ValueError, match="cannot hold"):
        entropy_coding.decode(stream, book, 10**15, 7, coder)
    for _ in range(100):
        bad_stream, bad_book = stream.copy(), book.copy()
        target = bad_stream if rng.random() < 0.5 else bad_book
        target[rng.integers(target.size)] ^= np.uint8(1 << rng.integers(8))
        try:
            out = entropy_coding.decode(bad_stream, bad_book, 400, 7, coder)
        except ValueError:
            continue
        assert out.shape == (400,) and out.min() >= 0 and out.max() < 7


def test_unknown_coder():
    with pytest.raises(ValueError, match="coder must be"):
        entropy_coding.encode([0, 1], 2, "zip")


# -- kernels against the plain forms ---------------------------------------------------------------


@given(SYMBOLS)
def test_huffman_kernel_equals_the_plain_one(drawn):
    r, symbols = drawn
    symbols = np.array(symbols, np.int64)
    if r == 1 or not symbols.size:
        return
    stream, _ = entropy_coding.encode(symbols, r)
    lengths = entropy_coding.code_lengths(np.bincount(symbols, minlength=r))
    codes = entropy_coding.canonical_codes(lengths)
    assert naive.decode_huffman(stream, codes, lengths, len(symbols)) == list(symbols)
    order, *tables = entropy_coding._tables(lengths)
    out = np.empty(len(symbols), np.int64)
    read = decode_huffman(stream, 8 * len(stream), *tables, order, out)
    assert read == lengths[symbols].sum()
    assert decode_huffman(stream, read - 1, *tables, order, out) == -1


@given(SYMBOLS)
def test_rans_kernels_equal_the_plain_ones(drawn):
    r, symbols = drawn
    symbols = np.array(symbols, np.int64)
    if not symbols.size:
        return
    frequency = entropy_coding._frequencies(np.bincount(symbols, minlength=r + 1))
    cumulative = np.cumsum(frequency) - frequency
    words = np.empty(len(symbols) + 2, np.uint16)
    words = words[: encode_rans(symbols, frequency, cumulative, words)]
    assert list(words) == naive.encode_rans(symbols, frequency)
    told, state, left = naive.decode_rans(words, frequency, len(symbols))
    assert (told, state, left) == (list(symbols), 1 << 16, [])
    slots = np.repeat(np.arange(r + 1), frequency)
    out = np.empty(len(symbols), np.int64)
    assert decode_rans(words, frequency, cumulative, slots, out) == 0
    np.testing.assert_array_equal(out, symbols)
