"""Exact one-entry searches on integer grids: sparse columns, and whole rows."""

import numpy as np

from diba_np.kernels._jit import njit


@njit(fastmath=False)
def pursue_columns(G, B, max_value, passes, fresh, sets, values):
    """Choose support and integer values of sparse columns, one slot at a time, exactly.

    Column t minimises ``z^T G z - 2 b_t^T z`` over z with s nonzero integers of magnitude
    1 ... max_value (``max_value = 0``: every nonzero is +1). A slot is emptied and refilled
    with the best (row, value) of all: the objective never rises.

    Parameters
    ----------
    G : (r, r) float64, C-order
        Gram matrix ``C^T C``.
    B : (p, r) float64, C-order, overwritten
        Rows ``C^T w_t``; on return the correlations of the residual.
    max_value : int
    passes : int
        Rounds over the slots of each column; a column stops when a round changes nothing.
    fresh : bool
        True: fill empty slots greedily first. False: start from `sets`, `values`.
    sets : (p, s) int64, modified in place
    values : (p, s) int64, modified in place

    Returns
    -------
    int
        Slots changed in the last round that changed any.

    Notes
    -----
    O(p s r) a pass.
    """
    p, s = sets.shape
    r = G.shape[0]
    used = np.zeros(r, np.bool_)
    changed = 0
    for t in range(p):
        b = B[t]
        if not fresh:
            for i in range(s):
                a = sets[t, i]
                used[a] = True
                z = float(values[t, i])
                for j in range(r):
                    b[j] -= z * G[a, j]
        for turn in range(passes):
            moved = 0
            for i in range(s):
                filled = not (fresh and turn == 0)
                old = -1
                old_value = 0
                if filled:
                    old = sets[t, i]
                    old_value = values[t, i]
                    used[old] = False
                    z = float(old_value)
                    for j in range(r):
                        b[j] += z * G[old, j]
                best = -np.inf
                best_j = -1
                best_q = 0
                for j in range(r):
                    if used[j]:
                        continue
                    g = G[j, j]
                    if max_value == 0:
                        q = 1.0
                    else:
                        q = 1.0
                        if g > 0.0:
                            q = min(max(np.rint(abs(b[j]) / g), 1.0), float(max_value))
                        if b[j] < 0.0:
                            q = -q
                    gain = q * (2.0 * b[j] - q * g)
                    if gain > best:
                        best = gain
                        best_j = j
                        best_q = int(q)
                if filled:
                    # keep the old entry unless the new one is strictly better
                    z = float(old_value)
                    if best <= z * (2.0 * b[old] - z * G[old, old]) * (1.0 + 1e-12):
                        best_j = old
                        best_q = old_value
                if best_j != old or best_q != old_value:
                    moved += 1
                sets[t, i] = best_j
                values[t, i] = best_q
                used[best_j] = True
                z = float(best_q)
                for j in range(r):
                    b[j] -= z * G[best_j, j]
            changed += moved
            if moved == 0:
                break
        for i in range(s):
            used[sets[t, i]] = False
    return changed


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
