"""Plain references: loops on unpacked arrays, no Numba, nothing from the package.

Every kernel has a namesake here that says in the slowest and most obvious way what it computes.
"""

import itertools

import numpy as np


def to_words(bits):
    """Pack 0/1 rows into 64-bit words, one bit at a time."""
    rows, columns = bits.shape
    words = [[0] * -(-columns // 64) for _ in range(rows)]
    for i, j in itertools.product(range(rows), range(columns)):
        if bits[i, j]:
            words[i][j // 64] |= 1 << (j % 64)
    return np.array(words, np.uint64)


def to_stream(bits):
    """Pack 0/1 entries row after row into bytes, least significant bit first."""
    flat = [int(b) for row in bits for b in row]
    stream = [0] * -(-len(flat) // 8)
    for at, bit in enumerate(flat):
        stream[at // 8] |= bit << (at % 8)
    return np.array(stream, np.uint8)


def dense(d1, b1, d2, b2, d3, shift):
    """``D1 (B1 - shift) D2 (B2 - shift) D3`` in float64."""
    m, n, k = len(d1), len(d3), len(d2)
    out = np.zeros((m, n))
    for i, j, l in itertools.product(range(m), range(n), range(k)):
        left = float(d1[i]) * (float(b1[i, l]) - shift)
        out[i, j] += left * float(d2[l]) * (float(b2[l, j]) - shift) * float(d3[j])
    return out


def tile_rows(bits):
    """Tiles of a 0/1 array, entry by entry."""
    rows, columns = bits.shape
    tiles = np.zeros((-(-rows // 32), -(-columns // 15), 16), np.uint32)
    for i, j in itertools.product(range(rows), range(columns)):
        if bits[i, j]:
            tiles[i // 32, j // 15, i % 16] |= np.uint32(1 << (j % 15 + i % 32 // 16 * 16))
    return tiles


def tile_columns(bits):
    """Tiles of the transpose."""
    return tile_rows(bits.T)


def mix(bits, alpha, scale_in, scale_out, bias, x):
    """``scale_out * ((B - alpha) (scale_in * x)) + bias`` in float64, entry by entry."""
    out = np.array(bias, float)
    for i, row in enumerate(bits.tolist()):
        for bit, scale, value in zip(row, scale_in.tolist(), x.tolist(), strict=True):
            out[i] += float(scale_out[i]) * (bit - alpha) * scale * value
    return out


def product(b1, b2, d1, d2, d3, alpha, bias, x):
    """``d1 * ((B1 - alpha) (d2 * ((B2 - alpha) (d3 * x)))) + bias`` in float64."""
    z = mix(b2, alpha, d3, d2, np.zeros(len(d2)), x)
    return mix(b1, alpha, np.ones(len(d2)), d1, bias, z)


product_avx512 = product_avx2 = product_int16 = product_portable = product


def product_columns(b1, b2, d1, d2, d3, alpha, bias, X):
    """`product` of every column."""
    return np.stack([product(b1, b2, d1, d2, d3, alpha, bias, x) for x in X.T], axis=1)


def row_error(a, b, s, M, shift):
    """Squared error of one row: ``|a - s (b - shift) M|^2``."""
    residual = a - s * ((b - shift) @ M)
    return float(residual @ residual)


def best_scale(a, b, s, M, shift):
    """The scale that minimises `row_error`; `s` where the row is empty."""
    direction = (b - shift) @ M
    energy = float(direction @ direction)
    return float(direction @ a) / energy if energy > 1e-12 else s


def flipped(b, *bits):
    out = b.copy()
    for j in bits:
        out[j] = 1 - out[j]
    return out


def sweep_fixed(A, B, s, M, shift, slack, passes):
    """Try every bit in order at a fixed scale, recomputing the error each time."""
    B, flips = B.copy(), np.zeros(len(B), int)
    for i in range(len(B)):
        for _ in range(passes):
            found = 0
            for j in range(B.shape[1]):
                now = row_error(A[i], B[i], s[i], M, shift)
                then = row_error(A[i], flipped(B[i], j), s[i], M, shift)
                if then - now < -slack:
                    B[i] = flipped(B[i], j)
                    found += 1
            flips[i] += found
            if not found:
                break
    return B, flips


def sweep_joint(A, B, s, M, shift, slack, passes):
    """Try every bit in order, the row's scale optimal before and after."""
    B, s, flips = B.copy(), s.copy(), np.zeros(len(B), int)

    def error(i, b):
        return row_error(A[i], b, best_scale(A[i], b, 0.0, M, shift), M, shift)

    for i in range(len(B)):
        for _ in range(passes):
            found = 0
            for j in range(B.shape[1]):
                if error(i, flipped(B[i], j)) - error(i, B[i]) < -slack:
                    B[i] = flipped(B[i], j)
                    found += 1
            flips[i] += found
            if not found:
                break
        s[i] = best_scale(A[i], B[i], s[i], M, shift)
    return B, s, flips


def sweep_tabu(A, B, s, M, shift, slack, moves, patience):
    """Walk by the best open flip, recomputing the error each time; keep the best bits met."""
    B, flips = B.copy(), np.zeros(len(B), int)
    for i in range(len(B)):
        if s[i] == 0:
            continue
        bits = B[i].copy()
        start = best = row_error(A[i], bits, s[i], M, shift)
        until = np.zeros(len(bits), int)
        made = 0
        while made < moves and made - flips[i] < patience:
            errors = [row_error(A[i], flipped(bits, j), s[i], M, shift) for j in range(len(bits))]
            open_ = [
                j
                for j, e in enumerate(errors)
                if until[j] <= made or e - start < best - start - slack
            ]
            if not open_:
                break
            pick = min(open_, key=lambda j: (errors[j], j))
            made += 1
            until[pick] = made + 11 + (7 * made + pick) % 5
            bits = flipped(bits, pick)
            if errors[pick] < best - slack:
                best, flips[i], B[i] = errors[pick], made, bits
    return B, flips


def power_magnitudes(Q, q, block):
    """``p = |Q| q`` and ``|Q|^T p`` over each block of rows."""
    p = np.abs(Q) @ q
    starts = range(0, len(Q), block)
    return p, np.array([np.abs(Q[a : a + block]).T @ p[a : a + block] for a in starts])


def blend_magnitudes(X, Z, theta, U, q, block):
    """``Q = theta X + (1 - theta) Z + U`` and a power step on it."""
    Q = theta * X + (1 - theta) * Z + U
    return Q, *power_magnitudes(Q, q, block)


def project_signs(Q, p, q):
    """``Z = sign(Q) * outer(p, q)`` and ``Q - Z``."""
    Z = np.where(np.signbit(Q), -1.0, 1.0) * np.outer(p, q)
    return Z, Q - Z


def soften(Z, X, c, block):
    """``N = (1 - c) Z + c X`` and its columns' squares over each block of rows."""
    N = (1 - c) * Z + c * X
    return N, np.array([(N[a : a + block] ** 2).sum(0) for a in range(0, len(N), block)])


def explained(X, Y, Z, U, weight):
    """Each row's share of ``<X, Y - (Z - U) + weight X>``."""
    return (X * (Y - (Z - U) + weight * X)).sum(1)


def improving_flips(A, d1, b1, d2, b2, d3, shift, relative):
    """Count the single bits of b1 and b2 whose flip lowers ``|A - A_hat|^2`` by that share."""
    total = float(np.sum((A - dense_fast(d1, b1, d2, b2, d3, shift)) ** 2))
    count = 0
    for bits in (b1, b2):
        for at in itertools.product(*map(range, bits.shape)):
            bits[at] = 1 - bits[at]
            error = float(np.sum((A - dense_fast(d1, b1, d2, b2, d3, shift)) ** 2))
            bits[at] = 1 - bits[at]
            count += error < total - relative * float(np.sum(A**2))
    return count


def dense_fast(d1, b1, d2, b2, d3, shift):
    """`dense` by matrix products, for brute force over many flips."""
    left = np.asarray(d1, float)[:, None] * (b1 - shift) * np.asarray(d2, float)
    return left @ ((b2 - shift) * np.asarray(d3, float))
