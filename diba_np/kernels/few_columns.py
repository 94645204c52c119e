"""Products with a few dense columns, for which threads of BLAS are not worth waking."""

from diba_np.kernels._jit import njit

_SUMS = {"reassoc", "contract", "nsz"}

# rows worked on at a time: they stay in the first cache while the columns pass
_CHUNK = 2048


@njit(fastmath=_SUMS)
def few_columns(weights, x, out):
    """Write the product of (m, c) with (c, N).

    Parameters
    ----------
    weights : (c, m) float32 or float64, C-order
        The transpose.
    x : (c, N) of the same type, C-order
    out : (m, N) of the same type, C-order, overwritten

    Notes
    -----
    ``2 c m N`` flops.
    """
    count, m = weights.shape
    N = x.shape[1]
    if N == 1:
        flat = out.reshape(-1)
        for start in range(0, m, _CHUNK):
            target = flat[start : start + _CHUNK]
            target[:] = 0
            for c in range(count):
                weight, factor = weights[c, start : start + _CHUNK], x[c, 0]
                for p in range(target.size):
                    target[p] += factor * weight[p]
        return
    for i in range(m):
        row = out[i]
        row[:] = 0
        c = 0
        while c + 3 <= count:  # three at once: the row is read and written less often
            a, b, d = weights[c, i], weights[c + 1, i], weights[c + 2, i]
            first, second, third = x[c], x[c + 1], x[c + 2]
            for j in range(N):
                row[j] += a * first[j] + b * second[j] + d * third[j]
            c += 3
        while c < count:
            weight, source = weights[c, i], x[c]
            for j in range(N):
                row[j] += weight * source[j]
            c += 1


@njit(fastmath=_SUMS)
def few_columns_back(weights, y, out):
    """Write the product of the transpose, (c, m), with (m, N).

    Parameters
    ----------
    weights : (c, m) float32 or float64, C-order
    y : (m, N) of the same type, C-order
    out : (c, N) of the same type, C-order, overwritten

    Notes
    -----
    ``2 c m N`` flops.
    """
    count, m = weights.shape
    N = y.shape[1]
    if N == 1:
        flat = y.reshape(-1)
        for c in range(count):
            weight = weights[c]
            total = weights.dtype.type(0)
            for p in range(m):
                total += weight[p] * flat[p]
            out[c, 0] = total
        return
    out[:] = 0
    for i in range(m):
        source = y[i]
        for c in range(count):
            weight, row = weights[c, i], out[c]
            for j in range(N):
                row[j] += weight * source[j]
