"""The NEON kernels' building blocks, lowered on any machine for the systems that run them."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from diba_np import DiBAFactors
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


@pytest.mark.parametrize("triple", ["aarch64-unknown-linux-gnu", "arm64-apple-darwin23.1.0"])
def test_neon_is_the_path_of_arm(monkeypatch, triple):
    from llvmlite import binding

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
    from llvmlite import binding

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
