"""Several packed matrices times one vector in one call (AVX-512 and AVX2): small products.

DiBA factorizations as ``lookup_simd`` does one, to the last bit; of linear trellises that is the
first stage, then comes a filter. How the look-ups work: ``kernels/_permute.py``; layout of the
tiles: ``kernels/layout.py``; plan, constants and room: ``kernels/_stack.py``. Nothing of a matrix's
size is allocated here. All first stages come before all second stages, and every sum before any
result, so that the result may take the place of an operand.
"""

from __future__ import annotations

from diba_np.kernels._jit import njit
from diba_np.kernels._permute import (  # _permute.py 843d2749a41a
    build_avx2,
    build_avx512,
    mix_avx2,
    mix_avx512,
)
from diba_np.kernels._stack import make_stack  # _stack.py 9979c583529a

_stack_avx512 = make_stack(build_avx512, mix_avx512)
_stack_avx2 = make_stack(build_avx2, mix_avx2)


@njit(fastmath=False)
def stack_avx512(x, plan, constants, room, added, out):
    """Multiply several packed matrices by one vector, and add to the results.

    Each factorization as ``lookup_simd.product_avx512``: ``out[rows] = d1 * ((B1 - shift) z) +
    bias + added`` with ``z = d2 * ((B2 - shift) (d3 * x))``; of a linear trellis what
    ``filters.filter_sums`` makes of z, with both sides rotated where they are.

    Parameters
    ----------
    x : (n,) float32
    plan : (chains, ``_stack.COLUMNS``) int64, C-order
        See ``kernels/_stack.py``. Neighbours with the same offset of d3 share their tables of x.
    constants : float32, from a cache line on
        What the plan's offsets lead to: diagonals, shifts, biases.
    room : float32, from a cache line on, overwritten
        What is in it does not matter.
    added : (rows,) or (0,) float32
        It may be `out`.
    out : (rows,) float32, overwritten only if the number returned is finite
        It may share memory with x.

    Returns
    -------
    float32
        Finite only if all inputs of both stages and all rows' sums are.

    Notes
    -----
    Time k (m + n) / 44 cycles each, no extra memory. naive: ``tests/naive.py::stack_avx512``.
    """
    return _stack_avx512(x, plan, constants, room, added, out)


@njit(fastmath=False)
def stack_avx2(x, plan, constants, room, added, out):
    """Do what `stack_avx512` does, with AVX2 alone.

    naive: ``tests/naive.py::stack_avx2``.
    """
    return _stack_avx2(x, plan, constants, room, added, out)
