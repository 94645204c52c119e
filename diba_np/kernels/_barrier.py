"""Two stages in one parallel region: a barrier that can be passed but never waited at for good.

Each region costs 2 µs to enter, so the stages of a product share one. The pieces of the second
stage belong to no thread: whoever has seen the first stage complete takes the next piece. A thread
that has waited too long goes away and leaves them to the others; the last to arrive always finds
the stage complete. So it does not matter how many threads there are, when they come, or whether
one of them runs several parts one after the other.

Compiled into the kernels of other files, which carry a digest of this one, as of ``_ir.py``.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from diba_np.kernels import _ir  # _ir.py c7dde7ed34db
from diba_np.kernels._jit import njit

PATIENCE = 1 << 14  # looks at the counter, of 10 to 40 ns each


@intrinsic
def _fetch_add(typingctx, address):
    """Add 1 to the int64 at an address, atomically; return what it was."""
    signature = types.int64(types.intp)

    def codegen(context, builder, signature, args):
        counter = builder.inttoptr(args[0], _ir.I64.as_pointer())
        return builder.atomic_rmw("add", counter, _ir.index(1), "acq_rel")

    return signature, codegen


@intrinsic
def _look(typingctx, address):
    """Return the int64 at an address as other threads have left it now, after a pause."""
    signature = types.int64(types.intp)

    def codegen(context, builder, signature, args):
        counter = builder.inttoptr(args[0], _ir.I64.as_pointer())
        if builder.module.triple.startswith("x86_64"):
            builder.call(_ir.declare(builder, "llvm.x86.sse2.pause", ir.VoidType(), []), [])
        return builder.load_atomic(counter, "acquire", 8)

    return signature, codegen


@njit(fastmath=False)
def barrier():
    """Return the counters of one barrier: parts that have arrived, pieces taken; 128 bytes apart.

    A function of its own: in a parallel one Numba would start its threads just for the zeros.
    """
    return np.zeros(17, dtype=np.int64)


@njit(fastmath=False)
def _arrived(counters):
    return _look(counters.ctypes.data)


@njit(fastmath=False)
def arrive(counters, n_parts):
    """Tell that a part of the first stage is done, and wait for the others for up to 0.5 ms.

    Returns
    -------
    bool
        Whether all `n_parts` are done; then what they wrote can be read.
    """
    _fetch_add(counters.ctypes.data)
    for _ in range(PATIENCE):
        if _arrived(counters) >= n_parts:
            return True
    return False


@njit(fastmath=False)
def take(counters):
    """Return the number of a piece of the second stage that nobody else has taken: 0, 1, ..."""
    return _fetch_add(counters.ctypes.data + 128)
