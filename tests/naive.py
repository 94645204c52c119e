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


def mix(bits, shift, scale_in, scale_out, x):
    """``scale_out * ((B - shift) (scale_in * x))`` in float64, entry by entry."""
    out = np.zeros(len(bits))
    for i, row in enumerate(bits.tolist()):
        for bit, scale, value in zip(row, scale_in.tolist(), x.tolist(), strict=True):
            out[i] += float(scale_out[i]) * (bit - shift) * scale * value
    return out


def product(b1, b2, d1, d2, d3, shift, x):
    """``d1 * ((B1 - shift) (d2 * ((B2 - shift) (d3 * x))))`` in float64."""
    return mix(b1, shift, np.ones(len(d2)), d1, mix(b2, shift, d3, d2, x))


def stack(matrices, bias, added, x):
    """`product` of every (b1, b2, d1, d2, d3, shift), one below the other, plus what is added."""
    parts = [product(*chain, x) for chain in matrices]
    return np.concatenate(parts) + bias + added


stack_avx512 = stack_avx2 = stack_neon = stack
product_neon = product_neon_rounded = product
product_avx2_rounded = product
product_avx512 = product_avx2 = product_int16 = product_portable = product


def product_columns(b1, b2, d1, d2, d3, shift, X):
    """`product` of every column."""
    return np.stack([product(b1, b2, d1, d2, d3, shift, x) for x in X.T], axis=1)


product_columns_avx512 = product_columns


def product_terms(terms, shift, x):
    """The sum of `product` over terms (b1, b2, d1, d2, d3)."""
    return np.sum([product(*t, shift, x) for t in terms], axis=0)


product_terms_avx512 = product_terms_avx2 = product_terms_neon = product_terms_portable = (
    product_terms
)


def product_terms_columns(terms, shift, X):
    """`product_terms` of every column."""
    return np.stack([product_terms(terms, shift, x) for x in X.T], axis=1)


product_terms_columns_avx512 = product_terms_columns


def transpose(a):
    """Entry by entry."""
    return np.array([[a[i, j] for i in range(len(a))] for j in range(a.shape[1])])


def decode_huffman(stream, codes, lengths, count):
    """Read bits, most significant first, until they spell the code of a symbol; -1 if none does."""
    words = {f"{c:0{n}b}": s for s, (c, n) in enumerate(zip(codes, lengths, strict=True)) if n}
    bits = "".join(f"{byte:08b}" for byte in stream)
    symbols, at = [], 0
    for _ in range(count):
        end = at + 1
        while bits[at:end] not in words and end < len(bits):
            end += 1
        if bits[at:end] not in words:
            return -1
        symbols.append(words[bits[at:end]])
        at = end
    return symbols


def encode_rans(symbols, frequency):
    """The words of a 32-bit rANS coder on Python's integers, in the order written."""
    state, words = 1 << 16, []
    for symbol in reversed(list(symbols)):
        f, start = int(frequency[symbol]), int(sum(frequency[:symbol]))
        if state >= f << 20:
            words.append(state % (1 << 16))
            state >>= 16
        state = state // f * 4096 + state % f + start
    return [*words, state % (1 << 16), state >> 16]


def decode_rans(words, frequency, count):
    """Undo `encode_rans`; the words are read from the last one down."""
    words = [int(w) for w in words]
    state = (words.pop() << 16) + words.pop()
    symbols = []
    for _ in range(count):
        slot = state % 4096
        symbol = next(s for s in range(len(frequency)) if slot < sum(frequency[: s + 1]))
        state = int(frequency[symbol]) * (state // 4096) + slot - int(sum(frequency[:symbol]))
        if state < 1 << 16:
            state = (state << 16) + words.pop()
        symbols.append(symbol)
    return symbols, state, words


def quadratic(G, b, z):
    """``z^T G z - 2 b^T z``."""
    return float(z @ G @ z - 2.0 * (b @ z))


def pursue_columns(G, B, max_value, passes, sets, values):
    """Empty and refill each slot with the best (row, value) of all."""
    allowed = [1] if max_value == 0 else [v for v in range(-max_value, max_value + 1) if v]
    sets, values, r = sets.copy(), values.copy(), B.shape[1]
    for t in range(len(B)):
        for _ in range(passes):
            moved = False
            for i in range(sets.shape[1]):
                now = quadratic(G, B[t], scattered(sets[t], values[t], r))
                best = (now - 1e-12 * abs(now), sets[t, i], values[t, i])
                for l, v in itertools.product(range(r), allowed):
                    if l in np.delete(sets[t], i):
                        continue
                    tried = sets[t].copy(), values[t].copy()
                    tried[0][i], tried[1][i] = l, v
                    best = min(best, (quadratic(G, B[t], scattered(*tried, r)), l, v))
                moved |= (best[1], best[2]) != (sets[t, i], values[t, i])
                sets[t, i], values[t, i] = best[1:]
            if not moved:
                break
    return sets, values


def scattered(places, values, size):
    """The vector of that size with `values` at `places`, zero elsewhere."""
    z = np.zeros(size)
    z[places] = values
    return z


def descend_grid(G, B, steps, max_code, passes, codes):
    """Set one entry after another to the best code of all."""
    codes = codes.copy()
    for t in range(len(codes)):
        for _ in range(passes):
            before = codes[t].copy()
            for a in range(codes.shape[1]):
                row = codes[t].astype(float)
                losses = {}
                for code in range(-max_code, max_code + 1):
                    row[a] = code
                    losses[code] = quadratic(G, B[t], row * steps)
                codes[t, a] = min(losses, key=losses.get)
            if np.array_equal(before, codes[t]):
                break
    return codes


def sign_quotient(H, c, s):
    """``(s^T c)^2 / s^T H s``: what the best scale takes off the error."""
    return float(s @ c) ** 2 / float(s @ H @ s)


def flip_signs(H, C, order, passes, pairs, S):
    """Try every sign; where its own flip does not help, the best pair that it belongs to."""
    S, flips = S.copy(), 0
    for i in range(len(S)):
        for _ in range(passes):
            moved = 0
            for j in order:
                now = sign_quotient(H, C[i], S[i])
                one = S[i].copy()
                one[j] = -one[j]
                if one @ C[i] > 0 and sign_quotient(H, C[i], one) > now * (1 + 1e-12):
                    S[i], moved = one, moved + 1
                    continue
                best, chosen = now * (1 + 1e-12), None
                for l in range(len(one)) if pairs else ():
                    two = one.copy()
                    two[l] = -two[l]
                    if l != j and two @ C[i] > 0 and sign_quotient(H, C[i], two) > best:
                        best, chosen = sign_quotient(H, C[i], two), two
                if chosen is not None:
                    S[i], moved = chosen, moved + 1
            flips += moved
            if not moved:
                break
    return S, flips


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


def update_forms(before, bits, G, C, shift):
    """Return p and q of every row from its bits as they are now."""
    Y = bits - shift
    return (Y * C).sum(axis=1), np.array([y @ G @ y for y in Y])


def round_each(values, vector):
    """Replace each entry by the nearest of the ascending values, the lesser of two as near."""
    return np.array([min(values, key=lambda v: (abs(v - entry), v)) for entry in vector])


def round_in_order(H, best, values):
    """Round the entries of the minimum in order; after each, the rest moves to its best place."""
    d = best.copy()
    for j in range(len(d)):
        at = int(np.argmin(np.abs(values - d[j])))
        moved = values[at] - d[j]
        d[j] = values[at]
        later = slice(j + 1, None)
        d[later] -= np.linalg.solve(H[later, later], H[later, j]) * moved
    return d


def descend_codes(H, r, d, values, sweeps):
    """Move entries to the value with the least ``d^T H d - 2 r^T d``, all others fixed."""
    d, moves = d.copy(), 0
    for _ in range(sweeps):
        found = 0
        for j in range(len(d)):
            tried = [np.where(np.arange(len(d)) == j, v, d) for v in (d[j], *values)]
            errors = [t @ H @ t - 2 * r @ t for t in tried]
            if H[j, j] > 0 and min(errors) < errors[0]:
                d, found = tried[int(np.argmin(errors))], found + 1
        moves += found
        if not found:
            break
    return d, moves


def weighed_error(A, A_hat, w, H):
    """``tr(W (A - A_hat) H (A - A_hat)^T)``, entry by entry of W; w is W or its diagonal."""
    E = A - A_hat
    W = np.diag(w) if np.ndim(w) == 1 else w
    places = zip(*np.nonzero(W), strict=True)
    return sum(float(W[i, j]) * float(E[i] @ H @ E[j]) for i, j in places)


def column_problem(A, U, B, d, shift, w, H):
    """Return (error, best): the whole objective for B (n, k) and d (n,), and d_j's best value."""

    def error(bits, scale):
        return weighed_error(A, U @ (bits - shift).T * scale, w, H)

    def best(j, bits, scale):
        # a parabola through three points
        def at(s):
            moved = scale.copy()
            moved[j] = s
            return error(bits, moved)

        low, mid, high = at(-1.0), at(0.0), at(1.0)
        curve = (high + low) / 2 - mid
        return (low - high) / (4 * curve) if curve > 1e-12 else scale[j]

    return error, best


def with_entry(vector, j, value):
    out = vector.copy()
    out[j] = value
    return out


def sweep_columns_fixed(A, U, B, d, shift, w, H, slack, passes):
    """Try every bit of every column in order, recomputing the whole objective each time."""
    B, flips = B.copy(), np.zeros(len(B), int)
    error, _ = column_problem(A, U, B, d, shift, w, H)
    for j in range(len(B)):
        for _ in range(passes):
            found = 0
            for l in range(B.shape[1]):
                trial = B.copy()
                trial[j] = flipped(B[j], l)
                if error(trial, d) - error(B, d) < -slack:
                    B = trial
                    found += 1
            flips[j] += found
            if not found:
                break
    return B, d, flips


def sweep_columns_joint(A, U, B, d, shift, w, H, slack, passes):
    """Try every bit of every column in order, its scale at the optimum before and after."""
    B, d, flips = B.copy(), d.copy(), np.zeros(len(B), int)
    error, best = column_problem(A, U, B, d, shift, w, H)

    def least(j, bits):
        return error(bits, with_entry(d, j, best(j, bits, with_entry(d, j, 0.0))))

    for j in range(len(B)):
        for _ in range(passes):
            found = 0
            for l in range(B.shape[1]):
                trial = B.copy()
                trial[j] = flipped(B[j], l)
                if least(j, trial) - least(j, B) < -slack:
                    B = trial
                    found += 1
            flips[j] += found
            if not found:
                break
        d[j] = best(j, B, d)
    return B, d, flips


def tabu_columns(A, U, B, d, shift, w, H, slack, moves, patience):
    """Tabu search of every column in order, its scale at the optimum before and after."""
    B, d, flips = B.copy(), d.copy(), np.zeros(len(B), int)
    error, best = column_problem(A, U, B, d, shift, w, H)
    for j in range(len(B)):
        d[j] = best(j, B, d)
        now, since, held = B, 0, {}
        for t in range(moves):
            if since == patience:
                break
            trials = {}
            for l in range(B.shape[1]):
                trial = now.copy()
                trial[j] = flipped(now[j], l)
                if held.get(l, 0) <= t or error(trial, d) < error(B, d) - slack:
                    trials[l] = trial
            if not trials:
                break
            pick = min(trials, key=lambda l: error(trials[l], d))
            now, since = trials[pick], since + 1
            held[pick] = t + 12 + (7 * (t + 1) + pick) % 5
            if error(now, d) < error(B, d) - slack:
                B, since, flips[j] = now, 0, t + 1
        d[j] = best(j, B, d)
    return B, d, flips


def improving_flips_weighed(A, d1, b1, d2, b2, d3, shift, w, H, relative):
    """Count the single bits whose flip lowers the weighed objective by that share of A's own."""

    def error():
        return weighed_error(A, dense_fast(d1, b1, d2, b2, d3, shift), w, H)

    total, least = error(), relative * weighed_error(A, 0.0, w, H)
    count = 0
    for bits in (b1, b2):
        for at in itertools.product(*map(range, bits.shape)):
            bits[at] = 1 - bits[at]
            count += error() < total - least
            bits[at] = 1 - bits[at]
    return count


def power_magnitudes(Q, q, block):
    """``p = |Q| q`` and ``|Q|^T p`` over each block of rows."""
    p = np.abs(Q) @ q
    starts = range(0, len(Q), block)
    return p, np.array([np.abs(Q[a : a + block]).T @ p[a : a + block] for a in starts])


def project_signs(Q, p, q):
    """``Z = sign(Q) * outer(p, q)`` and ``Q - Z``."""
    Z = np.where(np.signbit(Q), -1.0, 1.0) * np.outer(p, q)
    return Z, Q - Z


def regression_point(Q, p, q, rho, Y):
    """``rho (Z - U) + Y``."""
    Z, U = project_signs(Q, p, q)
    return rho * (Z - U) + Y


def blend_magnitudes(X, Q, theta, q, p, block):
    """``Q = theta X + (1 - theta) Z + U`` and a power step on it."""
    Z, U = project_signs(Q, p, q)
    Q = theta * X + (1 - theta) * Z + U
    return Q, *power_magnitudes(Q, q, block)


def soften(Q, p, q, c, X, block):
    """``N = (1 - c) Z + c X`` and its columns' squares over each block of rows."""
    N = (1 - c) * project_signs(Q, p, q)[0] + c * X
    return N, np.array([(N[a : a + block] ** 2).sum(0) for a in range(0, len(N), block)])


def explained(X, Y, Q, p, q, weight):
    """Each row's share of ``<X, Y - (Z - U) + weight X>``."""
    Z, U = project_signs(Q, p, q)
    return (X * (Y - (Z - U) + weight * X)).sum(1)


def bfloat16(A):
    """Float32 numbers rounded to 8 bits of mantissa, to nearest, ties to even, as words."""
    words = np.ascontiguousarray(A, np.float32).view(np.uint32).astype(np.int64)
    return (words + 0x7FFF + (words >> 16 & 1)) >> 16


def pack_bfloat16(B, width):
    """Panels of columns, of two rows a word, zeros where there are none."""
    n, k = B.shape
    whole = np.zeros((n + n % 2, k + -k % width), np.int64)
    whole[:n, :k] = bfloat16(B)
    words = whole[::2] | whole[1::2] << 16
    return np.moveaxis(words.reshape(len(words), -1, width), 1, 0)


def product_bfloat16(A, B):
    """``A @ B`` of operands rounded to bfloat16, in float64."""
    a, b = ((bfloat16(M) << 16).astype(np.uint32).view(np.float32) for M in (A, B))
    return a.astype(np.float64) @ b.astype(np.float64)


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


# ---- trellises ---------------------------------------------------------------------------


def viterbi(x, scale, table, bits, start, end):
    """(state before the path, codes): the path of least squared error, ties to lower states."""
    T, V = x.shape
    S = table.shape[1]
    width = S.bit_length() - 1
    single = np.float32
    cost = [single(0) if start in (-1, s) else single(np.inf) for s in range(S)]
    back = []
    for t in range(T):
        following, origin = [None] * S, [0] * S
        common = min(cost[h << (width - bits)] for h in range(1 << bits))
        common = common if common < np.inf else single(0)
        for s in range(S):
            before = [(h << (width - bits)) | (s >> bits) for h in range(1 << bits)]
            origin[s] = min(before, key=lambda p: cost[p])  # the first of equal ones
            total = cost[origin[s]] - common
            for v in range(V):
                error = x[t, v] - scale[t, v] * table[v, s]
                total = total + error * error
            following[s] = total
        cost = following
        back.append(origin)
    state = end if end >= 0 else min(range(S), key=lambda s: cost[s])
    codes = []
    for origin in reversed(back):
        codes.append(state & ((1 << bits) - 1))
        state = origin[state]
    return state, np.array(codes[::-1], np.uint8)


def trellis_states(codes, bits, start, width):
    """States after each step, from the string of all bits."""
    text = format(start, f"0{width}b")
    states = []
    for code in codes:
        text += format(int(code), f"0{bits}b")
        states.append(int(text[-width:], 2))
    return np.array(states)


def trellis_column(codes, bits, table, size):
    """Values of a closed path: every state is the last bits of the path repeated for ever."""
    width = table.shape[1].bit_length() - 1
    once = "".join(format(int(code), f"0{bits}b") for code in codes)
    values = []
    for t in range(len(codes)):
        seen = once[: (t + 1) * bits]
        while len(seen) < width:
            seen = once + seen
        values += [table[v, int(seen[-width:], 2)] for v in range(len(table))]
    return np.array(values[:size])


def filter_sums(sums, taps, scales, columns):
    """Outputs (T V, N) of the circular filter, by its definition, times the rows' scales."""
    bits, size = sums.shape
    V, width = taps.shape
    T = size // columns
    out = np.zeros((T, V, columns))
    planes = sums.reshape(bits, T, columns)
    for v in range(V):
        for t in range(T):
            for i in range(width):
                out[t, v] += scales[v, t] * taps[v, i] * planes[i % bits, (t - i // bits) % T]
    return out.reshape(T * V, columns)


def filter_back(y, taps, scales, columns, bits):
    """Its transpose: sums (bits, T N) of rows (m, N)."""
    V, width = taps.shape
    T = scales.shape[1]
    sums = np.zeros((bits, T, columns))
    for row, values in enumerate(y):
        t, v = divmod(row, V)
        for i in range(width):
            sums[i % bits, (t - i // bits) % T] += taps[v, i] * scales[v, t] * values
    return sums.reshape(bits, -1)


def few_columns(weights, x):
    """Product (m, N) of the transpose of weights (c, m) with x (c, N)."""
    return sum(np.outer(column, row) for column, row in zip(weights, x, strict=True))


def few_columns_back(weights, y):
    """Product (c, N) of weights (c, m) with y (m, N)."""
    return np.array([[np.sum(column * row) for row in y.T] for column in weights])


def hadamard(x, columns):
    """Product with the matrix whose entry (i, j) is -1 to the number of common bits of i and j."""
    P = x.size // columns
    H = np.array([[(-1.0) ** bin(i & j).count("1") for j in range(P)] for i in range(P)])
    return (H @ x.reshape(P, columns)).ravel()


def rotate_vector(x, signs, factor, back):
    """Product with the matrix ``(H x Q) diag(signs)`` written out, or with its transpose."""
    q = len(factor)
    H = hadamard(np.eye(x.size // q).ravel(), x.size // q).reshape(-1, x.size // q)
    R = np.kron(H, factor if back else factor.T) * signs
    return (R.T if back else R) @ x


# -- networks --------------------------------------------------------------------------------------


def layer_norm(x, factor, shift, epsilon):
    """(unit rows, one over their spread, the norm)."""
    mean = x.mean(axis=1, keepdims=True)
    inverse = 1 / np.sqrt(((x - mean) ** 2).mean(axis=1) + epsilon)
    unit = (x - mean) * inverse[:, None]
    return unit, inverse, unit * factor + shift


def layer_norm_back(gradient, factor, unit, inverse):
    """(gradient of the inputs, of the factor, of the shift): by the Jacobian of each row."""
    d = unit.shape[1]
    g = np.empty_like(unit)
    for i in range(len(unit)):
        jacobian = np.eye(d) - 1 / d - np.outer(unit[i], unit[i]) / d
        g[i] = jacobian @ (gradient[i] * factor) * inverse[i]
    return g, (gradient * unit).sum(axis=0), gradient.sum(axis=0)


def rms_norm(x, factor, epsilon):
    """(one over the root mean square of rows, the norm)."""
    inverse = 1 / np.sqrt((x**2).mean(axis=1) + epsilon)
    return inverse, x * inverse[:, None] * factor


def rms_norm_back(gradient, factor, x, inverse):
    """(gradient of the inputs, of the factor): by the Jacobian of each row."""
    d = x.shape[1]
    g = np.empty_like(x)
    for i in range(len(x)):
        jacobian = inverse[i] * (np.eye(d) - inverse[i] ** 2 / d * np.outer(x[i], x[i]))
        g[i] = jacobian @ (gradient[i] * factor)
    return g, (gradient * x * inverse[:, None]).sum(axis=0)


def below_the_most(scores, scale, keys, first, last, hidden):
    out = np.full_like(scores, hidden)
    texts, heads, rows, _ = scores.shape
    for s, h, i in itertools.product(range(texts), range(heads), range(rows)):
        seen = slice(first[i], last[i])
        row = scores[s, h, i, seen] * scale + keys[s, seen]
        out[s, h, i, seen] = row - row.max()
    return out


def to_unit_sum(p):
    return p / p.sum(axis=1, keepdims=True)


def softmax_back(p, scale, g):
    out = np.empty_like(g)
    for i in range(len(p)):
        out[i] = (np.diag(p[i]) - np.outer(p[i], p[i])) @ g[i] * scale
    return out


def gelu(x):
    """(x Phi(x), its slope), Phi by a sum of many small steps of the density."""
    y, slope = np.empty_like(x), np.empty_like(x)
    for i, v in enumerate(x):
        t = np.linspace(0, v, 20001)
        density = np.exp(-t * t / 2) / np.sqrt(2 * np.pi)
        below = 0.5 + (density[1:] + density[:-1]).sum() / 2 * (t[1] - t[0])
        y[i], slope[i] = v * below, below + v * density[-1]
    return y, slope


def descend_bits(G, B, passes, bits):
    """Flips of single entries, each judged by the objective itself."""

    def value(y, b):
        return y @ G @ y - 2.0 * b @ y

    bits, changed = bits.copy(), 0
    for t in range(len(bits)):
        for _ in range(passes):
            moved = False
            for a in range(bits.shape[1]):
                other = bits[t].copy()
                other[a] = 1 - other[a]
                now, then = (value(y.astype(float), B[t]) for y in (bits[t], other))
                if then - now < -1e-12 * G[a, a]:
                    bits[t], moved, changed = other, True, changed + 1
            if not moved:
                break
    return bits, changed


def attend_token(joined, cos, sin, keys, values, first, at, heads):
    """(mixed values; keys and values with those of the token)."""
    groups, _, d = keys.shape
    keys, values = keys.copy(), values.copy()
    parts = joined.reshape(heads + 2 * groups, d).copy()
    if cos.size:
        for part in parts[: heads + groups]:
            turned = (part[: d // 2] + 1j * part[d // 2 :]) * (cos + 1j * sin)
            part[:] = np.concatenate([turned.real, turned.imag])
    keys[:, at], values[:, at] = parts[heads : heads + groups], parts[heads + groups :]
    mixed = []
    for h, query in enumerate(parts[:heads]):
        g = h * groups // heads
        p = np.exp(keys[g, first : at + 1] @ query / np.sqrt(d))
        mixed.append(p @ values[g, first : at + 1] / p.sum())
    return np.concatenate(mixed), keys, values


def gate_token(both):
    gate, value = np.split(both, 2)
    return gate / (1 + np.exp(-gate)) * value


def pack_sides(x, thresholds):
    """Bits, 64 a word, of which numbers are not below their thresholds."""
    rows = []
    for row in x:
        bits = [int(v >= t) for v, t in zip(row, thresholds, strict=True)]
        rows.append([sum(b << j for j, b in enumerate(bits[s : s + 64]))
                     for s in range(0, len(bits), 64)])  # fmt: skip
    return np.array(rows, dtype=np.uint64).reshape(len(x), -1)


def multiply_signs(a, b, scales, bias):
    """Products of rows of signs +-1, scaled and with a bias."""
    return np.array(
        [
            [s * sum(u * v for u, v in zip(p, q, strict=True)) + c
             for q, s, c in zip(b, scales, bias, strict=True)]
            for p in a
        ]
    )  # fmt: skip
