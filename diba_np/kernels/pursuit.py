"""Exact one-entry searches on integer grids: sparse columns, and whole rows."""

import numpy as np

from diba_np.kernels._jit import njit

_ROUNDING = np.float32(1e-6)  # of what an entry gains
_LEAST = np.float32(1e-30)  # squared norm of an atom whose best value is asked for


@njit(fastmath=False)
def _largest(scores):
    """Return where the first of the largest float32 scores stands.

    Bits as integers, those of negative numbers turned around, are in the order of the numbers:
    the largest of integers is found by vector instructions, that of floats is not.
    """
    bits = scores.view(np.int32)
    most = np.int32(2**31 - 1)
    top = np.int32(-(2**31))
    for j in range(bits.size):
        top = max(top, bits[j] ^ ((bits[j] >> 31) & most))
    top ^= (top >> 31) & most
    at = most
    for j in range(bits.size):
        at = min(at, np.int32(j) if bits[j] == top else most)
    return at


@njit(fastmath=False)
def _value(x, inverse, max_value):
    """Return the magnitude in [1, max_value] that is best at a correlation of magnitude x."""
    return min(max(np.rint(x * inverse), np.float32(1.0)), np.float32(max_value))


@njit(fastmath=False)
def pursue_columns(G, B, max_value, passes, fresh, sets, values):
    """Choose support and integer values of sparse columns, one slot at a time, exactly.

    Column t minimises ``z^T G z - 2 b_t^T z`` over z with s nonzero integers of magnitude
    1 ... max_value (``max_value = 0``: every nonzero is +1). A slot is emptied and refilled
    with the best (row, value) of all: the objective never rises.

    Parameters
    ----------
    G : (r, r) float32, C-order
        Gram matrix ``C^T C``.
    B : (p, r) float32, C-order, overwritten
        Rows ``C^T w_t``.
    max_value : int
    passes : int
        Rounds over the slots of each column; a column stops when no slot would change.
    fresh : bool
        True: fill empty slots greedily first. False: start from `sets`, `values`.
    sets : (p, s) int64, modified in place
    values : (p, s) int64, modified in place

    Notes
    -----
    O(p s r) a pass.
    """
    p, s = sets.shape
    r = G.shape[0]
    zero, one, two = np.float32(0.0), np.float32(1.0), np.float32(2.0)
    own = np.diag(G).copy()
    inverse = np.zeros(r, np.float32)
    for j in range(r):
        if own[j] > _LEAST:
            inverse[j] = one / own[j]
    open_own = own.copy()  # infinite where a row is taken: it scores least of all
    scores = np.empty(r, np.float32)
    for t in range(p):
        b = B[t]
        # what the slot filled last takes from b, and the one emptied next gives back
        taken, z_taken = 0, zero
        for i in range(s):
            if not fresh and i > 0:
                a, z = sets[t, i], np.float32(values[t, i])
                open_own[a] = np.inf
                for j in range(r):
                    b[j] -= z * G[a, j]
        still = 0  # slots in a row that are the best of all
        for turn in range(passes * s):
            i = turn % s
            filled = not fresh or turn >= s
            old, z_old = 0, zero
            if filled:
                old, z_old = sets[t, i], np.float32(values[t, i])
                open_own[old] = own[old]
            if turn > 0:
                for j in range(r):
                    b[j] += z_old * G[old, j] - z_taken * G[taken, j]
            if max_value == 0:
                for j in range(r):
                    scores[j] = two * b[j] - open_own[j]
            elif max_value == 1:
                for j in range(r):
                    scores[j] = two * abs(b[j]) - open_own[j]
            else:
                for j in range(r):
                    x = abs(b[j])
                    q = _value(x, inverse[j], max_value)
                    scores[j] = q * (two * x - q * open_own[j])
            best = _largest(scores)
            z = _value(abs(b[best]), inverse[best], max(max_value, 1))
            if max_value > 0 and b[best] < zero:
                z = -z
            # the old entry stays unless the new one is better beyond rounding
            now = z_old * (two * b[old] - z_old * own[old])
            if filled and scores[best] - now <= _ROUNDING * abs(now):
                best, z = old, z_old
            same = filled and best == old and z == z_old
            still = still + 1 if same else 1
            sets[t, i], values[t, i] = best, int(z)
            open_own[best] = np.inf
            taken, z_taken = best, z
            if still == s and turn >= s - 1:
                break
        for i in range(s):
            open_own[sets[t, i]] = own[sets[t, i]]


@njit(fastmath=False)
def descend_grid(G, B, steps, max_code, passes, codes):
    """Lower ``x^T G x - 2 b^T x`` a row, ``x_j = steps_j * code_j``, one entry at a time.

    Parameters
    ----------
    G : (r, r) float64, C-order
    B : (N, r) float64, C-order, overwritten
    steps : (r,) float64
    max_code : int
        Codes stay in [-max_code, max_code].
    passes : int
    codes : (N, r) int64, modified in place

    Notes
    -----
    O(N r) a pass, and O(r) more for every entry that changes.
    """
    N, r = codes.shape
    for t in range(N):
        b = B[t]
        for a in range(r):
            z = steps[a] * codes[t, a]
            if z != 0.0:
                for j in range(r):
                    b[j] -= z * G[a, j]
        for _ in range(passes):
            moved = False
            for a in range(r):
                unit = steps[a]
                g = G[a, a]
                if unit <= 0.0 or g <= 0.0:
                    continue
                x = codes[t, a] + b[a] / (g * unit)
                q = int(min(max(np.rint(x), -float(max_code)), float(max_code)))
                if q != codes[t, a]:
                    z = unit * (q - codes[t, a])
                    codes[t, a] = q
                    moved = True
                    for j in range(r):
                        b[j] -= z * G[a, j]
            if not moved:
                break


@njit(fastmath=False)
def descend_bits(G, B, passes, bits):
    """Lower ``y^T G y - 2 b^T y`` a row over zeros and ones, one entry at a time.

    Parameters
    ----------
    G : (k, k) float64, C-order, symmetric
    B : (N, k) float64, C-order, overwritten
    passes : int
        Rounds over the entries of each row; a row stops when a round changes nothing.
    bits : (N, k) uint8, zeros and ones, modified in place

    Returns
    -------
    int
        Entries changed.

    Notes
    -----
    O(N k) a pass, and O(k) more for every entry that is one or changes.
    """
    N, k = bits.shape
    changed = 0
    for t in range(N):
        b = B[t]
        for a in range(k):
            if bits[t, a] == 1:
                for j in range(k):
                    b[j] -= G[a, j]
        for _ in range(passes):
            moved = False
            for a in range(k):
                step = 1.0 - 2.0 * bits[t, a]
                if G[a, a] - 2.0 * step * b[a] < -1e-12 * G[a, a]:
                    bits[t, a] = 1 - bits[t, a]
                    changed += 1
                    moved = True
                    for j in range(k):
                        b[j] -= step * G[a, j]
            if not moved:
                break
    return changed
