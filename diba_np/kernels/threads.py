"""How many threads Numba may use, asked for in a tenth of the time that `numba` takes."""

from __future__ import annotations

import numba
from numba.extending import intrinsic

from diba_np.environment import absent_layer
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


def load_threading_layer() -> None:
    """Load the library behind Numba's parallel kernels.

    Raises
    ------
    ValueError
        There is none of the name that ``NUMBA_THREADING_LAYER`` asks for, or none at all.
    """
    try:
        numba.get_num_threads()
    except ValueError as error:
        raise absent_layer(error) from None


def layer_in_use() -> str:
    """Return the name of Numba's threading layer here, loaded if it was not."""
    load_threading_layer()
    name: str = numba.threading_layer()
    return name


def number_of_threads() -> int:
    """Return what `numba.get_num_threads` returns.

    Notes
    -----
    That takes a lock of the system, 1.5 µs, and as much again where a product has just emptied the
    caches: a product of 0.1 ms would notice.
    """
    global _count  # noqa: PLW0603
    if _count is None:
        load_threading_layer()  # which defines the function
        _count = _ask
    return int(_count())
