"""The transpose of a matrix, by blocks of one cache line each way."""

from __future__ import annotations

from numba import types
from numba.extending import intrinsic

from diba_np.kernels import _ir  # _ir.py c7dde7ed34db
from diba_np.kernels._jit import njit


@intrinsic
def _transpose_block(typingctx, source, source_step, target, target_step, zero):
    """Write the transpose of 16 x 16 float32 or 8 x 8 float64, as `zero` is; steps in bytes."""
    signature = types.void(*[types.intp] * 4, zero)
    element, lanes = (_ir.F32, 16) if zero == types.float32 else (_ir.F64, 8)
    vector = _ir.vector(element, lanes)

    def codegen(context, builder, signature, args):
        source, source_step, target, target_step, _ = args

        def lines(start, step):
            return [builder.add(start, builder.mul(step, _ir.index(i))) for i in range(lanes)]

        rows = [_ir.load(builder, address, vector, 4) for address in lines(source, source_step)]
        for row, address in zip(
            _ir.transposed(builder, rows), lines(target, target_step), strict=True
        ):
            _ir.store(builder, row, address, 4)
        return context.get_dummy_value()

    return signature, codegen


@njit(fastmath=False)
def transpose(a, out):
    """Write the transpose of a matrix.

    Parameters
    ----------
    a : (m, n) float32 or float64, C-order
    out : (n, m) of the same type, C-order, overwritten

    Notes
    -----
    Time O(m n), bound by memory: a quarter to a half of what NumPy's copy of a transposed array
    takes.
    naive: ``tests/naive.py::transpose``.
    """
    m, n = a.shape
    lanes = 64 // a.itemsize
    zero = a.dtype.type(0)
    source_step, target_step = a.itemsize * n, a.itemsize * m
    for i in range(0, m - m % lanes, lanes):
        for j in range(0, n - n % lanes, lanes):
            source = a.ctypes.data + a.itemsize * (n * i + j)
            target = out.ctypes.data + a.itemsize * (m * j + i)
            _transpose_block(source, source_step, target, target_step, zero)
    for i in range(m):
        for j in range(0 if i >= m - m % lanes else n - n % lanes, n):
            out[j, i] = a[i, j]
