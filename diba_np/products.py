"""Products of packed matrices: which kernel runs for which operand."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from diba_np.bits import PackedBits
from diba_np.kernels.mix import mix_vector, mix_vector_par

# rows of a packed matrix that are unpacked at a time for a product with a matrix
_UNPACK_ENTRIES = 1 << 21

# bits under which a second thread costs more than it saves
_PARALLEL_BITS = 1 << 21


def mix(bits: PackedBits, x: NDArray[Any]) -> NDArray[Any]:
    """Return ``B x`` or ``B X``: the binary mixing step.

    Parameters
    ----------
    bits : PackedBits, (m, n)
    x : (n,) or (n, b) float32 or float64

    Returns
    -------
    (m,) or (m, b), of x's dtype

    Notes
    -----
    A vector costs O(m n / 8) look-ups. A matrix is multiplied by blocks of unpacked rows of at
    most 8 MiB (float32), through BLAS. Sums do not depend on the number of threads.
    """
    m = bits.shape[0]
    if x.ndim == 1:
        out = np.empty(m, x.dtype)
        parallel = m * bits.shape[1] >= _PARALLEL_BITS and numba.get_num_threads() > 1
        kernel = mix_vector_par if parallel else mix_vector
        kernel(bits.words.astype("<u8", copy=False).view(np.uint8), np.ascontiguousarray(x), out)
        return out
    result = np.empty((m, x.shape[1]), x.dtype)
    step = max(1, _UNPACK_ENTRIES // bits.shape[1])
    for start in range(0, m, step):
        np.matmul(
            bits[start : start + step].to_dense().astype(x.dtype),
            x,
            out=result[start : start + step],
        )
    return result
