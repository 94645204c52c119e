"""Matrix x vector for packed 0/1 matrices with look-ups inside vector registers (AVX-512 and AVX2).

How the look-ups work: ``kernels/_permute.py``. float32 throughout; every row adds its groups in the
same order, whatever the number of threads.
Layout of the tiles: ``kernels/layout.py``.
"""

from __future__ import annotations

import numba

from diba_np.kernels._jit import njit
from diba_np.kernels._lookup import zero_if_finite  # _lookup.py baa33a2a7297
from diba_np.kernels._permute import (  # _permute.py 843d2749a41a
    build_avx2,
    build_avx512,
    mix_avx2,
    mix_avx512,
)
from diba_np.kernels._stages import (  # _stages.py 2ab30e42ec6b
    make_mix_part,
    make_stages,
    make_term_stages,
    start_pieces,
    start_term_pieces,
)

_mix_part_avx512 = make_mix_part(build_avx512, mix_avx512, 96)
_mix_part_avx2 = make_mix_part(build_avx2, mix_avx2, 40)
_product_avx512, _piece_avx512 = make_stages(_mix_part_avx512)
_product_avx2, _piece_avx2 = make_stages(_mix_part_avx2)
_terms_avx512, _terms_piece_avx512 = make_term_stages(_mix_part_avx512)
_terms_avx2, _terms_piece_avx2 = make_term_stages(_mix_part_avx2)


@njit(fastmath=False)
def product_avx512(x, d3, tiles2, d2, tiles1, d1, shift, n_parts, out):
    """Multiply a DiBA factorization, or one packed matrix, by a vector.

    ``z = d2 * ((B2 - shift) (d3 * x))``, then ``out = d1 * ((B1 - shift) z)``. With `tiles1`
    of no tiles only the first stage runs: ``out = d2 * ((B2 - shift) (d3 * x))``.

    Parameters
    ----------
    x, d3 : (n,) float32
    tiles2 : (ceil(k / 32), ceil(n / 15), 16) uint32, C-order
    d2 : (k,) float32
    tiles1 : (ceil(m / 32), ceil(k / 15), 16) uint32, C-order, or no tiles at all
    d1 : (m,) float32
    shift : float32
    n_parts : int
        Ignored here; in the parallel twin the number of pieces that the rows are cut into.
    out : (m,) or (k,) float32, overwritten

    Returns
    -------
    float32
        Sum of ``d3 * x`` and z; not finite if any term is not finite, or any row's sum.

    Notes
    -----
    Time k (m + n) / 44 cycles, extra memory O(k) and 12 KiB a thread. The `_par` twin is bitwise
    equal. naive: ``tests/naive.py::product_avx512``.
    """
    return _product_avx512(x, d3, tiles2, d2, tiles1, d1, shift, out)


@njit(fastmath=False, parallel=True)
def product_avx512_par(x, d3, tiles2, d2, tiles1, d1, shift, n_parts, out):
    """Do what `product_avx512` does, the output rows cut into `n_parts` pieces for the threads."""
    shared = start_pieces(x, d3, tiles2, d2, tiles1, n_parts, out)
    for p in numba.prange(n_parts):
        _piece_avx512(p, shared, tiles2, d2, tiles1, d1, shift, n_parts, out)
    totals = shared[2]
    return totals[0] + zero_if_finite(totals)


@njit(fastmath=False)
def product_avx2(x, d3, tiles2, d2, tiles1, d1, shift, n_parts, out):
    """Do what `product_avx512` does, with AVX2 alone and 3 inputs a look-up.

    naive: ``tests/naive.py::product_avx2``.
    """
    return _product_avx2(x, d3, tiles2, d2, tiles1, d1, shift, out)


@njit(fastmath=False, parallel=True)
def product_avx2_par(x, d3, tiles2, d2, tiles1, d1, shift, n_parts, out):
    """Do what `product_avx2` does, the output rows cut into `n_parts` pieces for the threads."""
    shared = start_pieces(x, d3, tiles2, d2, tiles1, n_parts, out)
    for p in numba.prange(n_parts):
        _piece_avx2(p, shared, tiles2, d2, tiles1, d1, shift, n_parts, out)
    totals = shared[2]
    return totals[0] + zero_if_finite(totals)


@njit(fastmath=False)
def product_terms_avx512(x, d3, tiles2, d2, tiles1, d1, starts, shift, n_parts, out):
    """Multiply a sum of several DiBA factorizations by a vector.

    ``out = sum_t d1_t * ((B1_t - shift) (d2_t * ((B2_t - shift) (d3_t * x))))``, the terms
    added in their order.

    Parameters
    ----------
    x : (n,) float32
    d3, tiles2, d2, tiles1, d1, starts
        Those of all terms, see ``kernels/_terms.py``.
    shift : float32
    n_parts : int
        Ignored here; in the parallel twin the number of pieces that the rows are cut into.
    out : (m,) float32, overwritten

    Returns
    -------
    float32
        Finite only if all ``d3_t * x``, all rows' sums of both stages, and `out` are.

    Notes
    -----
    Time as of `product_avx512` with k the sum of all terms, and the tables of x once for each. The
    `_par` twin is bitwise equal. naive: ``tests/naive.py::product_terms_avx512``.
    """
    return _terms_avx512(x, d3, tiles2, d2, tiles1, d1, starts, shift, out)


@njit(fastmath=False, parallel=True)
def product_terms_avx512_par(x, d3, tiles2, d2, tiles1, d1, starts, shift, n_parts, out):
    """Do what `product_terms_avx512` does, the output rows cut into `n_parts` pieces."""
    shared = start_term_pieces(x, d3, tiles2, starts, n_parts)
    for p in numba.prange(n_parts):
        _terms_piece_avx512(p, shared, tiles2, d2, tiles1, d1, starts, shift, n_parts, out)
    totals = shared[2]
    return totals[0] + zero_if_finite(totals)


@njit(fastmath=False)
def product_terms_avx2(x, d3, tiles2, d2, tiles1, d1, starts, shift, n_parts, out):
    """Do what ``lookup_simd.product_terms_avx512`` does, with AVX2 alone.

    naive: ``tests/naive.py::product_terms_avx2``.
    """
    return _terms_avx2(x, d3, tiles2, d2, tiles1, d1, starts, shift, out)


@njit(fastmath=False, parallel=True)
def product_terms_avx2_par(x, d3, tiles2, d2, tiles1, d1, starts, shift, n_parts, out):
    """Do what `product_terms_avx2` does, the output rows cut into `n_parts` pieces."""
    shared = start_term_pieces(x, d3, tiles2, starts, n_parts)
    for p in numba.prange(n_parts):
        _terms_piece_avx2(p, shared, tiles2, d2, tiles1, d1, starts, shift, n_parts, out)
    totals = shared[2]
    return totals[0] + zero_if_finite(totals)
