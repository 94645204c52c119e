"""Several DiBA factorizations times one vector in one call, on 64-bit Arm (NEON).

As ``lookup_neon.product_neon`` does one, to the last bit; the rest as in ``stack_simd``.
"""

from __future__ import annotations

from diba_np.kernels._jit import njit
from diba_np.kernels._neon import build_float_tables_neon, mix_neon  # _neon.py e34cfe472e47
from diba_np.kernels._stack import make_stack  # _stack.py 9979c583529a

_stack = make_stack(build_float_tables_neon, mix_neon)


@njit(fastmath=False)
def stack_neon(x, plan, constants, room, added, out):
    """Do what ``stack_simd.stack_avx512`` does, with NEON.

    naive: ``tests/naive.py::stack_neon``.
    """
    return _stack(x, plan, constants, room, added, out)
