"""Environment variables of Numba: each fault is one sentence that names the variable."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from diba_np import environment
from diba_np.machine.versions import OPTIONAL

# what a user runs -> the lines of Python
RUNS = {
    "factorize": "dn.factorize(np.eye(4), k=2)",
    "product": "dn.load(golden) @ np.ones(dn.load(golden).shape[1])",
    "doctor": "from diba_np.products.cpu import cache_folder; dn.PackedBits(np.eye(2)).tiles",
}
FAULTS = {
    "NUMBA_NUM_THREADS": ["abc", "0", "-2", "1.5", "100000"],
    "NUMBA_THREADING_LAYER": ["foo", ""],
    "NUMBA_DISABLE_JIT": ["1"],
}


def run(code, **variables):
    """Run Python in a process of its own; return it."""
    source = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import numpy as np, diba_np as dn\n"
        f"golden = {str(GOLDEN)!r}\n{code}"
    )
    environ = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
    environ |= {k: v for k, v in os.environ.items() if k == "NUMBA_CACHE_DIR"} | variables
    return subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, env=environ, check=False
    )


GOLDEN = os.path.join(os.path.dirname(__file__), "..", "..", "data", "golden_v1.h5")


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in FAULTS.items() for value in values]
)
def test_every_entry_point_names_the_variable(name, value):
    for what in ("factorize",) if value not in ("1", "abc") else RUNS:
        done = run(RUNS[what], **{name: value})
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith(f"ValueError: {name} must be "), what


def test_doctor_names_each_and_nothing_where_there_is_none():
    code = "from diba_np.cli.doctor import diagnose\nprint(*diagnose()['problems'], sep='\\n')"
    assert run(code).stdout.strip() == ""
    for name, values in FAULTS.items():
        for value in values[:1]:
            assert run(code, **{name: value}).stdout.startswith(f"{name} must be "), value
    assert "NUMBA_NUM_THREADS is set to nothing" in run(code, NUMBA_NUM_THREADS=" ").stdout


def test_a_layer_that_is_not_installed_is_named_where_it_is_needed():
    code = (
        "import numba\n"
        "def absent(): raise ValueError('No threading layer could be loaded.\\nHINT: try')\n"
        "numba.get_num_threads = absent\n"
        "from diba_np.kernels.threads import number_of_threads\n"
        "number_of_threads()"
    )
    wanted = "ValueError: NUMBA_THREADING_LAYER must be a layer that Numba can load here, got 'tbb'"
    assert run(code, NUMBA_THREADING_LAYER="tbb").stderr.splitlines()[-1].startswith(wanted)
    assert "Numba can load no threading layer: No threading layer" in run(code).stderr


def test_an_empty_number_of_threads_counts_as_unset():
    done = run("print(dn.factorize(np.eye(4), k=2).k)", NUMBA_NUM_THREADS="")
    assert done.stdout == "2\n"


def test_files_are_read_without_compiled_code():
    assert run("print(dn.load(golden).to_dense().shape)", NUMBA_DISABLE_JIT="1").returncode == 0


def test_the_number_of_threads_is_read_as_numba_reads_it(monkeypatch):
    monkeypatch.setenv("NUMBA_NUM_THREADS", " 3 ")
    assert environment.numba_threads() == 3
    monkeypatch.delenv("NUMBA_NUM_THREADS")
    assert environment.numba_threads() is None
    monkeypatch.setenv("NUMBA_THREADING_LAYER", "OMP")  # Numba takes any case, and one name
    environment.check_layer()
    monkeypatch.setenv("NUMBA_THREADING_LAYER", "omp tbb")
    with pytest.raises(ValueError, match=r"must be one of default, .* got 'omp tbb'"):
        environment.check_layer()


def test_doctor_tells_of_all_that_the_extras_add():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8")
    extras = re.findall(r"^(?:plot|progress|networks|distributed) = (.*)$", project, re.M)
    assert len(extras) == 4
    assert {*re.findall(r'"(\w+)>', "".join(extras))} < {*OPTIONAL}
