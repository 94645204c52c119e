"""The fast Walsh-Hadamard transform."""

from diba_np.kernels._jit import njit


@njit(fastmath=False)
def hadamard(x):
    """Multiply with the Hadamard matrix of order P, entries 1 and -1 (Sylvester's), in place.

    Parameters
    ----------
    x : (P, N) float32 or float64, C-order, modified in place
        P is a power of two.

    Notes
    -----
    ``N P log2 P`` additions.
    """
    P, N = x.shape
    half = 1
    while half < P:
        for start in range(0, P, 2 * half):
            for i in range(start, start + half):
                upper = x[i]
                lower = x[i + half]
                for j in range(N):
                    a = upper[j]
                    b = lower[j]
                    upper[j] = a + b
                    lower[j] = a - b
        half *= 2
