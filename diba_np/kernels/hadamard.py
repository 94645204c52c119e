"""The fast Walsh-Hadamard transform."""

from diba_np.kernels._jit import njit


@njit(fastmath=False)
def hadamard(x, columns):
    """Multiply with the Hadamard matrix of order P, entries 1 and -1 (Sylvester's), in place.

    Parameters
    ----------
    x : (P N,) float32 or float64, modified in place
        A (P, N) matrix, row after row; P is a power of two.
    columns : int
        N.

    Notes
    -----
    ``N P log2 P`` additions.
    """
    size = x.size
    span = columns
    if columns == 1 and size >= 8:
        for at in range(0, size, 8):  # three rounds at once, in registers
            a0 = x[at] + x[at + 1]
            a1 = x[at] - x[at + 1]
            a2 = x[at + 2] + x[at + 3]
            a3 = x[at + 2] - x[at + 3]
            a4 = x[at + 4] + x[at + 5]
            a5 = x[at + 4] - x[at + 5]
            a6 = x[at + 6] + x[at + 7]
            a7 = x[at + 6] - x[at + 7]
            b0, b2 = a0 + a2, a0 - a2
            b1, b3 = a1 + a3, a1 - a3
            b4, b6 = a4 + a6, a4 - a6
            b5, b7 = a5 + a7, a5 - a7
            x[at], x[at + 4] = b0 + b4, b0 - b4
            x[at + 1], x[at + 5] = b1 + b5, b1 - b5
            x[at + 2], x[at + 6] = b2 + b6, b2 - b6
            x[at + 3], x[at + 7] = b3 + b7, b3 - b7
        span = 8
    while span < size:
        for start in range(0, size, 2 * span):
            upper = x[start : start + span]
            lower = x[start + span : start + 2 * span]
            for i in range(span):
                a = upper[i]
                b = lower[i]
                upper[i] = a + b
                lower[i] = a - b
        span *= 2
