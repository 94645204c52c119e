"""Estimate the look-up loops on Arm cores by LLVM's models of them: weights a cycle, as a table.

    python scripts/estimate_arm.py [--mca llvm-mca-19] [--json]

No Arm hardware is needed and none is measured. Every loop is lowered for the core by the LLVM that
Numba uses, and its inner block handed to ``llvm-mca`` (Debian: ``apt-get install llvm-19``), which
simulates 200 turns of it: issue width, ports, latencies, all loads from L1. Tables' making, calls,
and bits that come from further away are left out. LLVM has no models of M1, for which it takes an
Apple core of 2013 with three vector pipes, of Cortex-A72 and A73, for which it takes A57, and of
Cortex-A76 to A78, for which it takes A57 too, though Neoverse N1, the server's A76, has a model of
its own. The portable loop is given the better of the simulation and of its bound by ports, since
its turns for different rows overlap. "dense" is a product of float32 with a vector, from L1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir

TRIPLES = {
    "linux": "aarch64-unknown-linux-gnu",
    "macos": "arm64-apple-darwin",
    "windows": "aarch64-pc-windows-msvc",
}
CORES = ("apple-m1", "neoverse-v2", "neoverse-n1", "neoverse-n2", "cortex-a57", "cortex-a53")
TURNS = 200


def emitters() -> dict[str, tuple[str, int]]:
    """Return the NEON building blocks: types of their arguments, weights a turn of the loop."""
    return {
        "build_float_tables": ("iii", 0),
        "mix_float_tile": ("iiiii", 16 * 15),
        "build_word_tables": ("iifi", 0),
        "mix_word_tile": ("iiiii", 32 * 15),
    }


def assembly(name: str, triple: str, core: str = "") -> str:
    """Lower one of the building blocks, as a function of addresses, for a system and a core."""
    from diba_np.kernels import _ir, _neon

    module = ir.Module(name=name)
    module.triple = triple
    kinds = {"i": _ir.I64, "f": _ir.F32}
    arguments = [kinds[kind] for kind in emitters()[name][0]]
    result = _ir.F32 if name == "build_float_tables" else ir.VoidType()
    function = ir.Function(module, ir.FunctionType(result, arguments), name=name)
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    value = getattr(_neon, name)(builder, *function.args)
    if value is None:
        builder.ret_void()
    else:
        builder.ret(value)
    return lowered(str(module), triple, core)


def lowered(text: str, triple: str, core: str) -> str:
    """Optimize a module as Numba does and return its assembly."""
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    machine = binding.Target.from_triple(triple).create_target_machine(
        cpu=core, opt=3, reloc="pic", codemodel="default"
    )
    module = binding.parse_assembly(text)
    module.verify()
    tuning = binding.create_pipeline_tuning_options(speed_level=3)
    passes = binding.create_pass_builder(machine, tuning)
    passes.getModulePassManager().run(module, passes)
    return str(machine.emit_assembly(module))


def inner_loop(text: str, wanted: Callable[[list[str]], Any]) -> list[str]:
    """Return the instructions of the block that jumps to itself and has most of what is wanted."""
    blocks: dict[str, list[str]] = {}
    label = ""
    for written in text.splitlines():
        line = written.split("//")[0].split(";")[0].rstrip()
        head = re.match(r"^([.\w$]+):", line)
        if head:
            label = head[1]
        elif line.strip() and not line.strip().startswith("."):
            blocks.setdefault(label, []).append(line.strip())
            if re.match(r"(b|b\.\w+|cbn?z|tbn?z)\s", line.strip()):
                label += "'"  # what follows is another block
    loops = [block for name, block in blocks.items() if block[-1].split()[-1] == name]
    return max(loops, key=wanted)


def portable_loop(core: str) -> list[str]:
    """Return the loop of ``kernels/lookup_portable.py``, compiled by Numba, lowered for a core."""
    os.environ["DIBA_NP_CACHE"] = "0"  # what comes from a cache cannot be looked at
    import numpy as np

    from diba_np import PackedBits
    from diba_np.kernels import lookup_portable
    from diba_np.products.product import Product

    product = Product(PackedBits(np.ones((1, 1))), path="portable")
    product.vector(np.ones(1, np.float32))
    kernel = lookup_portable.product_portable
    text = next(iter(kernel.inspect_llvm().values()))
    text = re.sub(r"target (triple|datalayout) = .*", "", text)
    text = re.sub(r'"target-(cpu|features)"="[^"]*"', "", text)
    # counts of references, away from the loop
    text = re.sub(r"(tail )?call i8 @llvm\.x86\..*", "add i8 0, 0", text)
    text = re.sub(r"declare .*@llvm\.x86\..*", "", text)
    triple = TRIPLES["linux"]
    text = f'target triple = "{triple}"\n' + text
    return inner_loop(
        lowered(text, triple, core),
        lambda block: (sum("fadd" in i for i in block) == 4, -len(block)),
    )


DENSE = """
ldp q16, q17, [x0]
ldp q18, q19, [x0, #32]
fmla v0.4s, v16.4s, v24.4s
fmla v1.4s, v17.4s, v25.4s
fmla v2.4s, v18.4s, v26.4s
fmla v3.4s, v19.4s, v27.4s
ldp q16, q17, [x0, #64]
ldp q18, q19, [x0, #96]
fmla v4.4s, v16.4s, v28.4s
fmla v5.4s, v17.4s, v29.4s
fmla v6.4s, v18.4s, v30.4s
fmla v7.4s, v19.4s, v31.4s
add x0, x0, #128
"""


def cycles(mca: str, block: list[str], core: str) -> tuple[float, float]:
    """Return the simulated cycles of a turn of a loop, and the bound that its ports set."""
    command = [mca, "-mtriple=aarch64-linux-gnu", f"-mcpu={core}", f"-iterations={TURNS}"]
    done = subprocess.run(
        command, input="\n".join(block) + "\n", capture_output=True, text=True, check=True
    )
    total = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    bound = re.search(r"Block RThroughput:\s+([\d.]+)", done.stdout)
    assert total and bound
    return int(total[1]) / TURNS, float(bound[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    names = [name for name in ("llvm-mca", *(f"llvm-mca-{v}" for v in range(22, 15, -1)))]
    found = [name for name in reversed(names) if shutil.which(name)]
    parser.add_argument("--mca", default=found[0] if found else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if not args.mca:
        parser.error("llvm-mca is not installed (Debian: apt-get install llvm-19)")
    table: dict[str, dict[str, float]] = {}
    for core in CORES:
        row = table[core] = {}
        block = portable_loop(core)
        row["portable"] = 30 / min(cycles(args.mca, block, core))
        for label, name in (("float32", "mix_float_tile"), ("16-bit tables", "mix_word_tile")):
            block = inner_loop(
                assembly(name, TRIPLES["linux"], core), lambda b: sum("tbl" in i for i in b)
            )
            row[label] = emitters()[name][1] / cycles(args.mca, block, core)[0]
        row["dense"] = 32 / cycles(args.mca, DENSE.split("\n"), core)[0]
    if args.json:
        print(json.dumps(table))
        return
    print("| core | portable | float32 | 16-bit tables | dense float32 | x portable | 16 bit |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for core, row in table.items():
        ratios = [row[name] / row["portable"] for name in ("float32", "16-bit tables")]
        values = [*row.values(), *ratios]
        print(f"| {core} | {' | '.join(f'{value:.1f}' for value in values)} |")


if __name__ == "__main__":
    sys.exit(main())
