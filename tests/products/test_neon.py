"""The NEON kernels' building blocks, lowered on any machine for the systems that run them."""

import ctypes
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from llvmlite import binding, ir

from diba_np import DiBAFactors, PackedBits
from diba_np.kernels import _ir, _neon, _words
from diba_np.products import Stack, cpu
from diba_np.products.plan import KERNELS
from diba_np.products.product import _VECTOR_KERNELS

SCRIPTS = Path(__file__).parents[2] / "scripts"


def load(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


estimate = load("estimate_arm")


@pytest.mark.parametrize("system", estimate.TRIPLES)
@pytest.mark.parametrize("name", estimate.emitters())
@pytest.mark.parametrize("core", ["", "apple-m1"])
def test_every_building_block_is_lowered_as_meant(system, name, core):
    text = estimate.assembly(name, estimate.TRIPLES[system], core)
    loop = estimate.inner_loop(text, len)
    names = [line.split()[0] for line in loop]
    assert not {"bl", "blr", "br", "ret"} & set(names)
    assert not [line for line in loop if re.search(r"\bsp\b", line)]  # nothing is spilled
    if name == "mix_float_tile":  # a look-up of each byte of 16 sums, of three groups
        assert names.count("tbl") + names.count("tbl.16b") == 12
        assert sum(n.startswith("fadd") for n in names) == 12
    elif name == "mix_word_tile":  # two halves, four groups, two bytes
        assert names.count("tbl") + names.count("tbl.16b") == 16
        assert sum(n.startswith(("uaddw", "saddw")) for n in names) == 16
    else:
        assert any(n.startswith(("st", "fadd")) for n in names)


def emulated(builder, table, indices):
    """Do what `tbl` does, a lane at a time."""
    found, whole = indices, _words.joined(builder, table)
    for lane in range(16):
        at = ir.Constant(_ir.I32, lane)
        entry = builder.extract_element(whole, builder.extract_element(indices, at))
        found = builder.insert_element(found, entry, at)
    return found


def compiled(names):
    """Compile building blocks for this machine; return the functions, and what holds them."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    module = ir.Module()
    signatures = [estimate.emitters()[name][0] for name in names]
    for name, kinds in zip(names, signatures, strict=True):
        arguments = [{"i": _ir.I64, "f": _ir.F32}[kind] for kind in kinds]
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), name=name)
        builder = ir.IRBuilder(function.append_basic_block("entry"))
        getattr(_neon, name)(builder, *function.args)
        builder.ret_void()
    machine = binding.Target.from_default_triple().create_target_machine()
    engine = binding.create_mcjit_compiler(binding.parse_assembly(str(module)), machine)
    engine.finalize_object()
    functions = []
    for name, kinds in zip(names, signatures, strict=True):
        arguments = [{"i": ctypes.c_int64, "f": ctypes.c_float}[kind] for kind in kinds]
        functions.append(ctypes.CFUNCTYPE(None, *arguments)(engine.get_function_address(name)))
    return functions, engine


def test_sums_of_look_ups_are_right_with_an_emulated_tbl(monkeypatch, rng):
    monkeypatch.setattr(_neon, "_look_up", emulated)
    names = ("build_float_tables", "mix_float_tile", "build_word_tables", "mix_word_tile")
    (build, mix, build_words, mix_words), engine = compiled(names)
    units = 128
    bits = rng.integers(0, 2, (32, 15 * units))
    tiles = PackedBits(bits).tiles
    tile = tiles.ctypes.data
    x = rng.normal(size=15 * units).astype(np.float32)
    tables, before = np.empty(96 * units, np.float32), rng.integers(0, 1000, 32)
    sums = before.astype(np.float32)
    build(x.ctypes.data, units, tables.ctypes.data)
    mix(tile, tile, tables.ctypes.data, units, sums.ctypes.data)
    np.testing.assert_allclose(sums, before + bits @ x, atol=1e-3)
    # the largest sums that there can be, beside others
    bits[:2] = [[0], [1]]
    tiles = PackedBits(bits).tiles
    tile = tiles.ctypes.data
    outlier = np.where(np.arange(x.size) % 15 == 3, 1000, 0.1).astype(np.float32)
    for values in (x, np.ones_like(x), outlier, -outlier):
        pairs = np.add.reduceat(np.abs(values.reshape(-1, 15)), [0, 8], axis=1)
        inverse = 2 * _words.LARGEST_SUM / pairs.max()
        sums = before.astype(np.int32)
        build_words(values.ctypes.data, units, inverse / 2, tables.ctypes.data)
        mix_words(tile, tile, tables.ctypes.data, units, sums.ctypes.data)
        exact = before + inverse * ((bits - 0.5) @ values)
        assert np.abs(sums - exact).max() <= 4 * units * 0.51
    del engine


@pytest.mark.parametrize("triple", ["aarch64-unknown-linux-gnu", "arm64-apple-darwin23.1.0"])
def test_neon_is_the_path_of_arm(monkeypatch, triple):
    monkeypatch.setattr(binding, "get_process_triple", lambda: triple)
    assert cpu.available_paths() == ("portable", "neon")
    cpu.kernel_path.cache_clear()
    cpu.has_rounded.cache_clear()
    try:
        assert cpu.kernel_path() == "neon"
        assert cpu.has_rounded()
    finally:
        cpu.kernel_path.cache_clear()
        cpu.has_rounded.cache_clear()


@pytest.mark.parametrize(
    ("core", "forced", "expected"),
    [("apple-m1", "", "neon"), ("neoverse-n1", "", "neon"), ("cortex-a76", "", "neon"),
     ("cortex-a72", "", "portable"), ("cortex-a53", "", "portable"),
     ("cortex-a72", "neon", "neon"), ("apple-m1", "portable", "portable")],
)  # fmt: skip
def test_floats_are_looked_up_in_memory_where_that_is_faster(monkeypatch, core, forced, expected):
    monkeypatch.setattr(binding, "get_process_triple", lambda: "aarch64-unknown-linux-gnu")
    monkeypatch.setattr(binding, "get_host_cpu_name", lambda: core)
    monkeypatch.setenv("DIBA_NP_KERNEL", forced)
    choices = cpu.kernel_path, cpu.has_rounded, cpu.vector_path
    for choice in choices:
        choice.cache_clear()
    try:
        assert cpu.vector_path() == expected
        assert cpu.has_rounded() == (forced != "portable")
        factors = [
            DiBAFactors(np.ones(3), np.ones((3, 2)), np.ones(2), np.ones((2, 4)), np.ones(4))
        ]
        product, stack = factors[0]._product, Stack(factors)
        assert product._vector_kernels(np.dtype(np.float32)) is _VECTOR_KERNELS[expected]
        assert product._planned is stack._kernel is KERNELS.get(expected)
    finally:
        for choice in choices:
            choice.cache_clear()


@pytest.mark.skipif(not shutil.which("llvm-mca-19"), reason="needs llvm-mca-19")
def test_the_estimate_runs():
    command = [sys.executable, str(SCRIPTS / "estimate_arm.py"), "--json", "--mca", "llvm-mca-19"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    table = json.loads(done.stdout)
    assert set(table) == set(estimate.CORES)
    assert all(value > 1 for row in table.values() for value in row.values())
    # what the documentation says of Apple's M1
    assert table["apple-m1"]["16-bit tables"] >= 3 * table["apple-m1"]["portable"]
