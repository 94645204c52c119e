"""Compiled code: where it is cached, and that no state of the cache is fatal."""

import importlib
import os
import pkgutil
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import diba_np
from diba_np import kernels

PACKAGE = Path(diba_np.__file__).parent
PRODUCT = """
import numpy as np
from diba_np.kernels.transpose import transpose
from diba_np.products.cpu import cache_folder

out = np.empty((3, 2), np.float32)
transpose(np.arange(6, dtype=np.float32).reshape(2, 3), out)
print(out.sum(), cache_folder(), __import__("diba_np").__file__)
"""


def run(code, package=PACKAGE, **environment):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "DIBA_NP_"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=package.parent,
        env=inherited | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_compiled_code_lies_in_the_users_cache_folder_and_not_in_the_package(tmp_path):
    package = tmp_path / "site" / "diba_np"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "docs"))
    remains = package / "kernels" / "__pycache__"
    remains.mkdir()
    for name in ("flips.sweep-1.py310.nbi", "flips.sweep-1.py310.1.nbc"):
        (remains / name).write_bytes(b"of an earlier version")
    total, folder, imported = run(PRODUCT, package, XDG_CACHE_HOME=str(tmp_path / "user"))
    assert (total, Path(imported).parent) == ("15.0", package)
    assert not [p for p in package.rglob("*") if p.suffix in (".nbi", ".nbc")]
    if sys.platform.startswith("linux"):
        assert Path(folder).is_relative_to(tmp_path / "user")
        assert list(Path(folder).glob("transpose.*.nbc"))
    # another place of the package has another folder
    assert run(PRODUCT, XDG_CACHE_HOME=str(tmp_path / "user"))[1] != folder


def test_numbas_variable_moves_the_cache_and_ours_switches_it_off(tmp_path):
    _, folder, _ = run(PRODUCT, NUMBA_CACHE_DIR=str(tmp_path))
    assert Path(folder).is_relative_to(tmp_path)
    assert run(PRODUCT, NUMBA_CACHE_DIR=str(tmp_path), DIBA_NP_CACHE="0")[1] == "None"


@pytest.mark.skipif(os.name == "nt", reason="needs folders that cannot be made")
def test_without_any_folder_to_write_to_code_is_compiled():
    nowhere = {"XDG_CACHE_HOME": "/proc/none", "HOME": "/proc/none"}
    assert run(PRODUCT, **nowhere)[:2] == ["15.0", "None"]


@pytest.mark.parametrize(
    ("suffix", "content"), [("nbi", b""), ("nbi", b"\x80\x04garbage"), ("nbc", b"\x80")]
)
def test_a_damaged_cache_is_not_read(tmp_path, suffix, content):
    cache = {"NUMBA_CACHE_DIR": str(tmp_path)}
    first = run(PRODUCT, **cache)
    paths = list(tmp_path.rglob(f"*.{suffix}"))
    assert paths
    for path in paths:
        path.write_bytes(content)
    assert run(PRODUCT, **cache) == first


def test_no_space_for_the_cache_is_no_error(tmp_path):
    full = (
        "import errno\nfrom numba.core import caching\n"
        "def no_space(*args): raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "caching.IndexDataCacheFile.save = no_space\n"
    )
    assert run(full + PRODUCT, NUMBA_CACHE_DIR=str(tmp_path))[0] == "15.0"
    assert not list(tmp_path.rglob("*.nbc"))


def test_no_two_jitted_functions_have_one_name():
    # of two that were compiled in different processes the first loaded would run in place of both;
    # what closes over nothing is the same however often it was made
    modules = [
        importlib.import_module(f"diba_np.kernels.{found.name}")
        for found in pkgutil.iter_modules(kernels.__path__)
    ]
    waiting = [value for module in modules for value in vars(module).values()]
    functions = {}
    while waiting:
        function = getattr(waiting.pop(), "py_func", None)
        if function is not None:
            functions[function if function.__closure__ else function.__code__] = function
            waiting += [cell.cell_contents for cell in function.__closure__ or ()]
    names = Counter((function.__module__, function.__qualname__) for function in functions.values())
    assert sum("<locals>" in name for _, name in names) > 20
    assert not [name for name, count in names.items() if count > 1]
