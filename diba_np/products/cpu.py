"""Which kernels this CPU runs, and which of them is in use."""

from __future__ import annotations

import functools
import os

import numba

from diba_np.kernels import lookup_portable

PATHS = ("portable", "avx2", "avx512", "neon")
VARIABLE = "DIBA_NP_KERNEL"


# CPUs, as LLVM names them, that permute whole registers as often as they load them: no batch is too
# large for look-ups in registers, if there are so many rows on the average to use a table
_PERMUTING_CPUS = frozenset({"znver5"})


# 64-bit Arm on which float32 look-ups in memory are faster than in registers (16-bit ones are
# not), by LLVM's models of them or of what it takes for them; see scripts/estimate_arm.py
_FLOATS_FROM_MEMORY = frozenset(
    {"cortex-a35", "cortex-a53", "cortex-a55", "cortex-a57", "cortex-a72", "cortex-a73"}
    | {"cortex-a75", "cortex-a510", "cortex-a710", "neoverse-n2"}
)


# those that choose a kernel
FEATURES = frozenset({"avx2", "avx512f", "avx512bw", "avx512vnni", "avx512bf16"})


def cpu_features() -> set[str]:
    """Return the CPU features that Numba compiles for, as LLVM names them."""
    from llvmlite import binding

    chosen = numba.config.CPU_FEATURES
    if chosen is not None:
        return {name[1:] for name in chosen.split(",") if name.startswith("+")}
    features = {name for name, present in binding.get_host_cpu_features().items() if present}
    return features if numba.config.ENABLE_AVX else {f for f in features if not f.startswith("avx")}


def is_arm() -> bool:
    """Tell whether Numba compiles for 64-bit Arm, all of which has NEON."""
    from llvmlite import binding

    triple: str = binding.get_process_triple()
    return triple.startswith(("aarch64", "arm64"))


def available_paths() -> tuple[str, ...]:
    """Return the kernel paths that this CPU can run, the fastest last."""
    if is_arm():
        return ("portable", "neon")
    features = cpu_features()
    paths = ["portable"]
    if "avx2" in features:
        paths.append("avx2")
    if {"avx512f", "avx512bw"} <= features:
        paths.append("avx512")
    return tuple(paths)


@functools.cache
def kernel_path() -> str:
    """Return the kernel path in use: the CPU's best, or what ``DIBA_NP_KERNEL`` says.

    Raises
    ------
    ValueError
        ``DIBA_NP_KERNEL`` names no path, or one that this CPU cannot run.
    """
    paths = available_paths()
    forced = os.environ.get(VARIABLE) or paths[-1]
    if forced not in PATHS:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(PATHS)}, got {forced!r}")
    if forced not in paths:
        raise ValueError(
            f"{VARIABLE} must be a path that this CPU can run ({', '.join(paths)}), got {forced!r}"
        )
    return forced


@functools.cache
def has_rounded() -> bool:
    """Tell whether 16-bit tables are used: with AVX2 or NEON, with AVX-512 if it has VNNI."""
    path = kernel_path()
    return path in ("avx2", "neon") or (path == "avx512" and "avx512vnni" in cpu_features())


@functools.cache
def has_bfloat16() -> bool:
    """Tell whether dots of bfloat16 are used: on the avx512 path of a CPU that has them."""
    return kernel_path() == "avx512" and "avx512bf16" in cpu_features()


def _cpu_name() -> str:
    """Return the CPU that Numba compiles for, as LLVM names it."""
    from llvmlite import binding

    name: str = numba.config.CPU_NAME or binding.get_host_cpu_name()
    return name


@functools.cache
def permutes_as_it_loads() -> bool:
    """Tell whether the CPU is one whose look-ups in registers beat those in memory."""
    return _cpu_name() in _PERMUTING_CPUS


@functools.cache
def vector_path() -> str:
    """Return the path of float32 products with a vector: `kernel_path`, unless another is faster.

    What ``DIBA_NP_KERNEL`` says holds in any case.
    """
    path = kernel_path()
    if path == "neon" and not os.environ.get(VARIABLE) and _cpu_name() in _FLOATS_FROM_MEMORY:
        return "portable"
    return path


def cache_folder() -> str | None:
    """Return the folder of cached compiled code, outside the package; None if there is no cache."""
    stats = lookup_portable.product_portable.stats  # None where Numba compiles nothing
    folder: str | None = stats and stats.cache_path
    return folder
