"""Circular filters between the sums of packed bits and the outputs that they stand for.

Bit r of a step has a plane of sums, flat over (T steps, N columns). Output v of step t is
``sum_jr taps[v, j * bits + r] * sums[r, t - j]``, steps counted modulo T.
"""

from diba_np.kernels._jit import njit

_SUMS = {"reassoc", "contract", "nsz"}

# entries worked on at a time: a few planes of them stay in the first cache
_CHUNK = 1024


@njit(fastmath=_SUMS)
def _add(target, tap, source):
    for p in range(target.size):
        target[p] += tap * source[p]


@njit(fastmath=_SUMS)
def filter_sums(sums, taps, columns, out):
    """Add the filtered sums to the outputs.

    Parameters
    ----------
    sums : (bits, T N) float32 or float64, C-order
    taps : (V, width) of the same type, C-order
        Newest step first, within it bit 0 first.
    columns : int
        N.
    out : (V, T N) of the same type, C-order, modified in place

    Notes
    -----
    ``2 T N V width`` flops.
    """
    bits, size = sums.shape
    V, width = taps.shape
    for start in range(0, size, _CHUNK):
        stop = min(start + _CHUNK, size)
        for i in range(width):
            plane = sums[i % bits]
            lag = (i // bits) * columns % size
            turn = min(max(lag, start), stop)
            for v in range(V):
                tap = taps[v, i]
                # slices, because an index that might be negative is not vectorised
                _add(out[v, start:turn], tap, plane[start + size - lag :])
                _add(out[v, turn:stop], tap, plane[turn - lag :])


@njit(fastmath=_SUMS)
def filter_back(y, taps, columns, sums):
    """Add to the sums what the transposed filter makes of outputs.

    Parameters
    ----------
    y : (V, T N) float32 or float64, C-order
    taps : (V, width) of the same type, C-order
    columns : int
        N.
    sums : (bits, T N) of the same type, C-order, modified in place

    Notes
    -----
    The adjoint of `filter_sums`; ``2 T N V width`` flops.
    """
    bits, size = sums.shape
    V, width = taps.shape
    for start in range(0, size, _CHUNK):
        stop = min(start + _CHUNK, size)
        for i in range(width):
            plane = sums[i % bits]
            lag = (i // bits) * columns % size
            turn = min(max(size - lag, start), stop)
            for v in range(V):
                tap = taps[v, i]
                _add(plane[start:turn], tap, y[v, start + lag :])
                _add(plane[turn:stop], tap, y[v, turn + lag - size :])
