"""Packed products: each kernel against its plain namesake, and nothing read past the end."""

import naive
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import bit_arrays

from diba_np import PackedBits
from diba_np.kernels import mix as kernels
from diba_np.products import mix
from diba_np.threads import workers


@given(bit_arrays(), st.sampled_from([np.float32, np.float64]), st.integers(0, 2**31))
@pytest.mark.parametrize("name", ["mix_vector", "mix_vector_par"])
def test_vector_kernel_equals_naive(name, bits, dtype, seed):
    x = np.random.default_rng(seed).normal(size=bits.shape[1]).astype(dtype)
    out = np.full(bits.shape[0], np.nan, dtype)
    getattr(kernels, name)(PackedBits(bits).words.view(np.uint8), x, out)
    np.testing.assert_allclose(out, naive.mix_vector(bits, x), atol=200 * np.finfo(dtype).eps)


@given(st.integers(1, 40), st.integers(0, 40), st.integers(1, 4))
def test_tables_equal_naive_and_inputs_past_the_end_are_zero(size, start, groups):
    x = np.random.default_rng(size).normal(size=size)
    tables = np.full((groups, 256), np.nan)
    kernels.tabulate_bytes(x, start, tables)
    np.testing.assert_allclose(tables, naive.tabulate_bytes(x, start, groups), atol=1e-12)


@pytest.mark.parametrize("shape", [(300, 1000), (1500, 1500)])
@pytest.mark.parametrize("columns", [None, 1, 7])
def test_mix_over_several_blocks_and_the_same_sums_for_any_threads(shape, columns, rng):
    bits = rng.integers(0, 2, shape)
    x = rng.normal(size=(shape[1],) if columns is None else (shape[1], columns))
    packed = PackedBits(bits)
    with workers(1):
        one = mix(packed, x)
    with workers(2):
        two = mix(packed, x)
    np.testing.assert_array_equal(one, two)
    np.testing.assert_allclose(one, bits @ x, atol=1e-9)
