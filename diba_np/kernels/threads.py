"""How many threads Numba may use, asked for in a tenth of the time that `numba` takes."""

from __future__ import annotations

import numba
from numba.extending import intrinsic

from diba_np.kernels import _ir  # _ir.py c7dde7ed34db
from diba_np.kernels._jit import njit

_count = None


@intrinsic
def _get_num_threads(typingctx):
    """Call the function of the threading layer that every parallel kernel calls."""
    signature = numba.types.intp()

    def codegen(context, builder, signature, args):
        return builder.call(_ir.declare(builder, "get_num_threads", _ir.I64, []), [])

    return signature, codegen


@njit(fastmath=False)
def _ask():
    return _get_num_threads()


def number_of_threads() -> int:
    """Return what `numba.get_num_threads` returns.

    Notes
    -----
    That takes a lock of the system, 1.5 µs, and as much again where a product has just emptied the
    caches: a product of 0.1 ms would notice.
    """
    global _count  # noqa: PLW0603
    if _count is None:
        numba.get_num_threads()  # loads the threading layer, which defines the function
        _count = _ask
    return int(_count())
