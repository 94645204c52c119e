"""Matrix x vector for packed 0/1 matrices with look-ups in the registers of 64-bit Arm (NEON).

How the look-ups work: ``kernels/_neon.py``; 16-bit tables: ``kernels/_words.py``. Every row adds
its groups in the same order, whatever the number of threads. Layout of the tiles:
``kernels/layout.py``. Compiled on Arm alone: LLVM for another CPU knows no `tbl`.
"""

from __future__ import annotations

import numba

from diba_np.kernels._jit import njit
from diba_np.kernels._lookup import zero_if_finite  # _lookup.py baa33a2a7297
from diba_np.kernels._neon import (  # _neon.py e34cfe472e47
    build_float_tables_neon,
    build_word_tables_neon,
    mix_neon,
    mix_word_tile_neon,
)
from diba_np.kernels._stages import (  # _stages.py 2ab30e42ec6b
    make_mix_part,
    make_rounded_stages,
    make_stages,
    make_term_stages,
    start_pieces,
    start_term_pieces,
)
from diba_np.kernels._words import (  # _words.py 81254ded4302
    make_mix_part_words,
    measured_words,
)

_mix_part = make_mix_part(build_float_tables_neon, mix_neon, 96)
_product, _piece = make_stages(_mix_part)
_terms, _terms_piece = make_term_stages(_mix_part)


@njit(fastmath=False)
def product_neon(x, d3, tiles2, d2, tiles1, d1, shift, n_parts, out):
    """Do what ``lookup_simd.product_avx512`` does, with NEON and 5 inputs a look-up.

    Notes
    -----
    Time k (m + n) / 13 cycles (estimated for Apple's M1), extra memory O(k) and 12 KiB a thread.
    The `_par` twin is bitwise equal. naive: ``tests/naive.py::product_neon``.
    """
    return _product(x, d3, tiles2, d2, tiles1, d1, shift, out)


@njit(fastmath=False, parallel=True)
def product_neon_par(x, d3, tiles2, d2, tiles1, d1, shift, n_parts, out):
    """Do what `product_neon` does, the output rows cut into `n_parts` pieces for the threads."""
    shared = start_pieces(x, d3, tiles2, d2, tiles1, n_parts, out)
    for p in numba.prange(n_parts):
        _piece(p, shared, tiles2, d2, tiles1, d1, shift, n_parts, out)
    totals = shared[2]
    return totals[0] + zero_if_finite(totals)


@njit(fastmath=False)
def product_terms_neon(x, d3, tiles2, d2, tiles1, d1, starts, shift, n_parts, out):
    """Do what ``lookup_simd.product_terms_avx512`` does, with NEON.

    naive: ``tests/naive.py::product_terms_neon``.
    """
    return _terms(x, d3, tiles2, d2, tiles1, d1, starts, shift, out)


@njit(fastmath=False, parallel=True)
def product_terms_neon_par(x, d3, tiles2, d2, tiles1, d1, starts, shift, n_parts, out):
    """Do what `product_terms_neon` does, the output rows cut into `n_parts` pieces."""
    shared = start_term_pieces(x, d3, tiles2, starts, n_parts)
    for p in numba.prange(n_parts):
        _terms_piece(p, shared, tiles2, d2, tiles1, d1, starts, shift, n_parts, out)
    totals = shared[2]
    return totals[0] + zero_if_finite(totals)


_product_rounded, _start_rounded, _piece_rounded, _end_rounded = make_rounded_stages(
    measured_words, make_mix_part_words(build_word_tables_neon, mix_word_tile_neon), 1
)


@njit(fastmath=False)
def product_neon_rounded(x, d3, tiles2, d2, tiles1, d1, shift, mixed_d2, n_parts, out):
    """Do what ``lookup_int16.product_int16`` does, in tables of bytes for 4 inputs.

    At most 980 000 columns a stage (32-bit sums).

    Notes
    -----
    Time k (m + n) / 28 cycles (estimated for Apple's M1), extra memory O(k) and 9 KiB a thread. The
    `_par` twin is bitwise equal. naive: ``tests/naive.py::product_neon_rounded``.
    """
    return _product_rounded(x, d3, tiles2, d2, tiles1, d1, shift, mixed_d2, out)


@njit(fastmath=False, parallel=True)
def product_neon_rounded_par(x, d3, tiles2, d2, tiles1, d1, shift, mixed_d2, n_parts, out):
    """Do what `product_neon_rounded` does, the output rows cut into `n_parts` pieces."""
    shared = _start_rounded(x, d3, tiles2, d2, tiles1, out)
    for p in numba.prange(n_parts):
        _piece_rounded(p, shared, tiles2, d2, tiles1, d1, shift, mixed_d2, n_parts, out)
    return _end_rounded(shared, tiles1)
