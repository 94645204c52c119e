"""Sign matrices: exact one-flip descent under a Gram matrix, and XNOR-popcount products."""

import numpy as np

from diba_np.kernels._jit import njit


@njit(fastmath=False)
def flip_signs(H, C, order, passes, pairs, S, gain):
    """Flip signs of each row, one or two at once, while ``(s^T c)^2 / (s^T H s)`` grows, exactly.

    The best scale is taken after every flip (joint test), so this lowers
    ``(w - a s)^T H (w - a s)`` over a and the signs.

    Parameters
    ----------
    H : (n, n) float64, C-order, symmetric positive definite
    C : (m, n) float64, C-order
        Rows ``H w_i``.
    order : (n,) int64
        Order in which signs are tried.
    passes : int
    pairs : bool
        Where a sign does not flip alone, try it with its best partner.
    S : (m, n) float64, entries -1 and 1 (0 = column not stored, never tried), in place
    gain : (m,) float64, overwritten
        Increase of the quotient; >= 0.

    Returns
    -------
    int
        Flips made.

    Notes
    -----
    O(m n) tests a pass (O(m n^2) with pairs), O(n) more a flip.
    """
    m, n = S.shape
    flips = 0
    h = np.empty(n)
    for i in range(m):
        s = S[i]
        for j in range(n):
            total = 0.0
            for l in range(n):
                total += H[j, l] * s[l]
            h[j] = total
        q = 0.0
        p = 0.0
        for j in range(n):
            q += s[j] * h[j]
            p += s[j] * C[i, j]
        start = p * p / q if q > 0.0 else 0.0
        for _ in range(passes):
            moved = 0
            for t in range(n):
                j = order[t]
                if s[j] == 0.0:
                    continue
                delta = -2.0 * s[j]
                q_new = q + 2.0 * delta * h[j] + 4.0 * H[j, j]
                p_new = p + delta * C[i, j]
                partner = -1
                if not (p_new > 0.0 and p_new * p_new * q > p * p * q_new * (1.0 + 1e-12)):
                    if not pairs:
                        continue
                    best = (p * p / q) * (1.0 + 1e-12) if q > 0.0 else 0.0
                    for l in range(n):
                        other = -2.0 * s[l]
                        p_two = p_new + other * C[i, l]
                        q_two = q_new + 2.0 * other * (h[l] + delta * H[j, l]) + 4.0 * H[l, l]
                        if (
                            other != 0.0
                            and l != j
                            and p_two > 0.0
                            and q_two > 0.0
                            and p_two * p_two > best * q_two
                        ):
                            best = p_two * p_two / q_two
                            partner = l
                    if partner < 0:
                        continue
                    other = -2.0 * s[partner]
                    p_new += other * C[i, partner]
                    q_new += (
                        2.0 * other * (h[partner] + delta * H[j, partner])
                        + 4.0 * H[partner, partner]
                    )
                    s[partner] = -s[partner]
                    for l in range(n):
                        h[l] += other * H[partner, l]
                s[j] = -s[j]
                for l in range(n):
                    h[l] += delta * H[j, l]
                q = q_new
                p = p_new
                moved += 1
            flips += moved
            if moved == 0:
                break
        gain[i] = (p * p / q if q > 0.0 else 0.0) - start
    return flips


@njit(fastmath=False)
def pack_sides(x, thresholds, words):
    """Pack on which side of its threshold each number lies, 1 where it is not below.

    Parameters
    ----------
    x : (N, n) float32, C-order
    thresholds : (n,) float32
    words : (N, ceil(n / 64)) uint64, overwritten
        Bit j of a row at ``words[i, j // 64] >> (j % 64)``; zeros behind the last. NaN is below.

    Notes
    -----
    O(N n). naive: ``tests/naive.py::pack_sides``.
    """
    n = x.shape[1]
    for i in range(x.shape[0]):
        for w in range(words.shape[1]):
            start = 64 * w
            word = np.uint64(0)
            for j in range(min(64, n - start)):
                above = np.uint64(x[i, start + j] >= thresholds[start + j])
                word |= above << np.uint64(j)
            words[i, w] = word


@njit(fastmath=False)
def multiply_signs(sides, tiles, n, scales, bias, out):
    """Multiply matrices of signs by XNOR and popcount: ``out = scales * (a^T b) + bias``.

    A bit of 1 is +1 and one of 0 is -1: ``a^T b = n - 2 popcount(a xor b)``.

    Parameters
    ----------
    sides : (N, n_words) uint64, C-order
        Rows a; bits behind the last of n are zero.
    tiles : (ceil(m / width), n_words, width) uint64, C-order
        Rows b, `width` of them a tile, turned: the words of ``b_i`` at
        ``tiles[i // width, :, i % width]``; zero behind n. What stands behind the last row counts
        for nothing. A tile that stays in the first cache is read once for all samples.
    n : int
    scales, bias : (m,) float32, C-order
    out : (N, m) float32, C-order, overwritten

    Notes
    -----
    ``N m n_words`` steps of three instructions, eight at once where there is a vector popcount
    (AVX-512 VPOPCNTDQ; NEON two): LLVM sees it in the plain formula below. Counts are exact.
    naive: ``tests/naive.py::multiply_signs``.
    """
    n_tiles, n_words, width = tiles.shape
    m = scales.size
    counts = np.empty(width, np.uint64)
    for t in range(n_tiles):
        start, stop = t * width, min((t + 1) * width, m)
        scale, shift = scales[start:stop], bias[start:stop]
        for i in range(sides.shape[0]):
            counts[:] = np.uint64(0)
            for w in range(n_words):
                a = sides[i, w]
                for j in range(width):
                    v = a ^ tiles[t, w, j]
                    v -= (v >> np.uint64(1)) & np.uint64(0x5555555555555555)
                    v = (v & np.uint64(0x3333333333333333)) + (
                        (v >> np.uint64(2)) & np.uint64(0x3333333333333333)
                    )
                    v = (v + (v >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
                    counts[j] += (v * np.uint64(0x0101010101010101)) >> np.uint64(56)
            row = out[i, start:stop]
            for j in range(stop - start):
                row[j] = scale[j] * np.float32(n - 2 * np.int64(counts[j])) + shift[j]
