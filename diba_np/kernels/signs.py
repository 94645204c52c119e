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
