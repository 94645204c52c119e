"""Sequential parts of the entropy coders: Huffman decoding, rANS both ways."""

import numpy as np

from diba_np.kernels._jit import njit


@njit(fastmath=False)
def decode_huffman(stream, n_bits, first_code, first_index, length_count, order, out):
    """Decode canonical Huffman codes, most significant bit first.

    Parameters
    ----------
    stream : (n_bytes,) uint8
        Bit t is ``stream[t // 8] >> (7 - t % 8)``.
    n_bits : int
        Bits of the stream that may be read.
    first_code, first_index, length_count : (limit + 1,) int64
        For each code length: the first code, where its symbols start in `order`, how many.
    order : (used,) int64
        Symbols by (length, value).
    out : (count,) int64, overwritten

    Returns
    -------
    int
        Bits read, or -1 if the stream ends early or holds no valid code.

    Notes
    -----
    Time O(bits of the stream).
    """
    limit = first_code.shape[0] - 1
    position = 0
    for t in range(out.shape[0]):
        code = 0
        length = 0
        while True:
            if position >= n_bits or length >= limit:
                return -1
            code = 2 * code + ((np.int64(stream[position >> 3]) >> (7 - (position & 7))) & 1)
            position += 1
            length += 1
            offset = code - first_code[length]
            if 0 <= offset < length_count[length]:
                out[t] = order[first_index[length] + offset]
                break
    return position


@njit(fastmath=False)
def encode_rans(symbols, frequency, cumulative, out):
    """Encode symbols backwards with a 32-bit rANS coder, 12-bit frequencies.

    Parameters
    ----------
    symbols : (count,) int64
    frequency, cumulative : (r,) int64
        Sum of `frequency` is 4096; every symbol in use has at least 1.
    out : (count + 2,) uint16, overwritten
        Words in the order written; a decoder reads them from the last one down.

    Returns
    -------
    int
        Words written (the two of the final state are the last).
    """
    state = np.uint64(65536)
    words = 0
    for t in range(symbols.shape[0] - 1, -1, -1):
        f = np.uint64(frequency[symbols[t]])
        if state >= (f << np.uint64(20)):
            out[words] = np.uint16(state & np.uint64(65535))
            words += 1
            state = state >> np.uint64(16)
        quotient = state // f
        rest = state - quotient * f
        state = (quotient << np.uint64(12)) + rest + np.uint64(cumulative[symbols[t]])
    out[words] = np.uint16(state & np.uint64(65535))
    out[words + 1] = np.uint16(state >> np.uint64(16))
    return words + 2


@njit(fastmath=False)
def decode_rans(words, frequency, cumulative, symbol_of_slot, out):
    """Decode what `encode_rans` wrote; `words` in the order written.

    Parameters
    ----------
    words : (n_words,) uint16
    frequency, cumulative : (r,) int64
    symbol_of_slot : (4096,) int64
    out : (count,) int64, overwritten

    Returns
    -------
    int
        Words left over, or -1 if the stream ends early or its end state is wrong.
    """
    position = words.shape[0] - 3
    if position < -1:
        return -1
    state = (np.uint64(words[position + 2]) << np.uint64(16)) + np.uint64(words[position + 1])
    for t in range(out.shape[0]):
        slot = state & np.uint64(4095)
        symbol = symbol_of_slot[np.int64(slot)]
        out[t] = symbol
        state = (
            np.uint64(frequency[symbol]) * (state >> np.uint64(12))
            + slot
            - np.uint64(cumulative[symbol])
        )
        if state < np.uint64(65536):
            if position < 0:
                return -1
            state = (state << np.uint64(16)) + np.uint64(words[position])
            position -= 1
    if state != np.uint64(65536):
        return -1
    return position + 1
