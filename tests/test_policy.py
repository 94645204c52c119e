"""Rules of the code base that no single test of behaviour would notice."""

import ast
import doctest
import functools
import hashlib
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import naive
import pytest

import diba_np

PACKAGE = Path(diba_np.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
HELPERS = (
    "_ir",
    "_barrier",
    "_flips",
    "_lookup",
    "_permute",
    "_stack",
    "_neon",
    "_terms",
    "_stages",
    "_words",
    "few_columns",
    "filters",
    "hadamard",
)  # compiled into the kernels of other files
KERNELS = sorted((PACKAGE / "kernels").glob("[a-z]*.py")) + [
    PACKAGE / "kernels" / f"{name}.py" for name in HELPERS if name[0] == "_" and name != "_ir"
]

# a folder may import from itself and from those below it in this list
FOLDERS = [
    "cli",
    "report",
    "networks",
    "models",
    "layers",
    "methods",
    "search",
    "training",
    "sources",
    "matrix",
    "products",
    "files",
    "machine",
    "kernels",
]
# in the root, for all of them; each may import those after it
ROOT = ["checks", "environment", "arrays", "errors", "_version"]


def module_name(path):
    dotted = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    return dotted.removesuffix(".__init__")


@functools.cache
def nodes_of(path):
    """The nodes of a file's syntax tree, the tree itself first; several tests look at each."""
    return list(ast.walk(ast.parse(path.read_text())))


MODULES = {module_name(path): path for path in SOURCES}


def floor_of(module):
    """The number of a module's floor, the highest 0."""
    _, _, place = module.partition(".")
    name = place.partition(".")[0]
    if name == "testing":  # for users' tests, above all; nothing imports it
        return -1
    floors = FOLDERS + ROOT
    assert name in floors, f"{module} is in no folder of the house"
    return floors.index(name)


def checked_for_types(nodes):
    """Nodes that only a type checker reads."""
    return {
        id(inner)
        for node in nodes
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }


def imports_of(path):
    """Modules of the package that a file imports, also those inside functions."""
    nodes = nodes_of(path)
    skipped = checked_for_types(nodes)
    for node in nodes:
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diba_np"):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)


def test_imports_run_down_the_house():
    for own, path in MODULES.items():
        if own in ("diba_np", "diba_np.__main__"):
            continue
        for other in imports_of(path):
            assert other != "diba_np", f"{own} imports the package, which stands above all"
            assert floor_of(other) >= floor_of(own), f"{own} imports {other}"


def test_no_circle_of_imports():
    graph = {own: set(imports_of(path)) - {own} for own, path in MODULES.items()}
    while graph:
        leaves = [own for own, others in graph.items() if not others & graph.keys()]
        assert leaves, f"a circle among {sorted(graph)}"
        for own in leaves:
            del graph[own]


def test_no_module_is_named_like_a_public_function():
    names = {module.rpartition(".")[2] for module in MODULES}
    assert not names & set(diba_np.__all__) - {"__version__"}


def test_the_page_for_contributors_shows_the_house_as_it_is():
    text = (PACKAGE / "docs" / "contributing.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)/` \|", text, re.M) == FOLDERS
    for name in re.findall(r"`(\w+/[\w/]+\.py)`", text):
        assert (PACKAGE / name).exists() or (PACKAGE.parent / name).exists(), name


def test_the_tests_mirror_the_package():
    here = Path(__file__).parent
    folders = {path.name for path in here.iterdir() if list(path.glob("test_*.py"))}
    assert set(FOLDERS) | {"scripts"} == folders
    names = sorted(path.name for path in here.rglob("test_*.py"))
    assert len(names) == len(set(names)), "pytest takes files of one name for one module"


def jitted(path):
    """(function, options of njit) of a file."""
    for node in nodes_of(path):
        if isinstance(node, ast.FunctionDef):
            for call in node.decorator_list:
                if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "njit":
                    yield node, {k.arg: ast.unparse(k.value) for k in call.keywords}


def test_every_kernel_states_fastmath_and_lives_in_kernels():
    for path in SOURCES:
        for node, options in jitted(path):
            assert path in KERNELS, f"{path.name}:{node.name} is compiled outside kernels/"
            assert options.get("fastmath", "True") != "True", f"{path.name}:{node.name}"
        assert "numba.njit" not in path.read_text() or path.name == "_jit.py", path


def test_parallel_kernels_start_threads_for_their_own_loops_alone():
    # Numba fills arrays made in a parallel function on all threads, which starts them once more
    filled = {"zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "arange"}
    for path in KERNELS:
        for node, options in jitted(path):
            if options.get("parallel") == "True":
                called = {
                    call.func.attr
                    for call in ast.walk(node)
                    if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
                }
                assert not called & filled, f"{path.name}:{node.name}"


def test_no_address_outlives_its_array():
    # Numba frees an array after the last use of its name, whoever still holds the address
    found = 0
    for path in KERNELS:
        for node, _ in jitted(path):
            loops = [loop for loop in ast.walk(node) if isinstance(loop, (ast.For, ast.While))]
            names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]

            def last(name, names=names):
                return max(n.lineno for n in names if n.id == name)

            for kept in ast.walk(node):
                if not isinstance(kept, ast.Assign) or ".ctypes.data" not in ast.unparse(kept):
                    continue
                found += 1
                (address,) = (target.id for target in kept.targets)
                array = ast.unparse(kept).partition(".ctypes.data")[0].split("(")[-1].split()[-1]
                array = array.lstrip("-")
                again = any(kept in list(ast.walk(loop)) for loop in loops)
                assert again or last(array) >= last(address), f"{path.name}:{kept.lineno}"
    assert found > 5


def test_no_kernel_calls_a_kernel_of_another_file():
    for path in KERNELS:
        used = {m for m in imports_of(path)}
        allowed = {"diba_np.kernels._jit", "diba_np.environment"}
        allowed |= {*(f"diba_np.kernels.{name}" for name in HELPERS)}
        assert used <= allowed, f"{path.name} imports {used}"
    helpers = PACKAGE / "kernels" / "_ir.py"
    assert not list(jitted(helpers)), "_ir.py is plain Python"
    assert not list(imports_of(helpers))


@pytest.mark.parametrize("name", HELPERS)
def test_kernel_files_carry_the_digest_of_the_helpers_that_they_compile_in(name):
    # Numba's cache looks at the kernel's own file only: an edit of a helper must change that too
    digest = hashlib.sha256((PACKAGE / "kernels" / f"{name}.py").read_bytes()).hexdigest()[:12]
    users = [p for p in KERNELS if f"diba_np.kernels.{name}" in imports_of(p)]
    assert users
    for path in users:
        ends = f"  # {name}.py {digest}"
        lines = [line for line in path.read_text().splitlines() if line.endswith(ends)]
        assert any(line.startswith("from diba_np.kernels") and name in line for line in lines), (
            f"{path.name} should say after its import: {ends}"
        )


def test_parallel_kernels_are_leaves_with_a_serial_twin():
    for path in KERNELS:
        made = dict(jitted(path))
        names = {node.name for node in made}
        for node, options in made.items():
            parallel = options.get("parallel") == "True"
            assert parallel == node.name.endswith("_par")
            if parallel:
                assert node.name.removesuffix("_par") in names
            called = {getattr(c.func, "id", "") for c in ast.walk(node) if isinstance(c, ast.Call)}
            assert not any(name.endswith("_par") for name in called), node.name


def test_every_public_kernel_has_a_naive_namesake():
    for path in KERNELS:
        for node, _ in jitted(path):
            if not node.name.startswith("_") and not path.stem.startswith("_"):
                assert hasattr(naive, node.name.removesuffix("_par")), node.name


def test_naive_imports_nothing_of_ours():
    imports = [n for n in ast.walk(ast.parse(Path(naive.__file__).read_text()))
               if isinstance(n, (ast.Import, ast.ImportFrom))]  # fmt: skip
    names = {a.name for n in imports for a in n.names}
    assert names == {"itertools", "numpy"}


def test_no_print_and_no_assert_in_the_library():
    for path in SOURCES:
        for node in nodes_of(path):
            printed = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
            assert not printed or path.parent.name == "cli", path
            assert not isinstance(node, ast.Assert), path


def modules():
    for info in pkgutil.walk_packages([str(PACKAGE)], "diba_np."):
        if not info.name.endswith("__main__"):
            importlib.import_module(info.name)
            yield sys.modules[info.name]


def public_things():
    for module in modules():
        for name, thing in vars(module).items():
            own = getattr(thing, "__module__", "") == module.__name__
            if own and not name.startswith("_") and callable(thing):
                yield f"{module.__name__}.{name}", thing


def test_everything_public_has_a_docstring_whose_parameters_exist():
    for name, thing in public_things():
        text = inspect.getdoc(thing)
        assert text, f"{name} has no docstring"
        section = re.search(r"Parameters\n-+\n(.*?)(?:\n\n[A-Z][a-z]+\n-+|\Z)", text, re.S)
        told = [
            part.strip()
            for line in (section[1].splitlines() if section else [])
            if line and not line.startswith(" ")
            for part in line.split(" : ")[0].split(",")
        ]
        plain = getattr(thing, "py_func", thing)
        plain = plain.__init__ if inspect.isclass(plain) else plain
        assert set(told) <= set(inspect.signature(plain).parameters), name


def test_docstring_examples():
    for module in modules():
        assert doctest.testmod(module).failed == 0, module.__name__


def in_fresh_interpreter(code, **environment):
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | environment
    )
    return done.stdout


@pytest.mark.parametrize(
    "code", ["import diba_np", "from diba_np.cli.main import build_parser as b; b()"]
)
def test_import_and_help_load_nothing_heavy(code):
    check = (
        f"{code}\nimport sys\n"
        "print([m for m in ('numba', 'h5py', 'scipy.sparse.linalg', 'numpy') if m in sys.modules])"
    )
    assert in_fresh_interpreter(check) == "[]\n"


def test_importing_every_module_compiles_nothing():
    check = (
        "import pkgutil, importlib, sys, diba_np, numba\n"
        "for i in pkgutil.walk_packages(diba_np.__path__, 'diba_np.'):\n"
        "    if not i.name.endswith('__main__'): importlib.import_module(i.name)\n"
        "made = [f for n, m in sys.modules.items() if n.startswith('diba_np')\n"
        "        for f in vars(m).values() if isinstance(f, numba.core.dispatcher.Dispatcher)]\n"
        "print(len(made) > 3, sum(len(f.overloads) for f in made))"
    )
    assert in_fresh_interpreter(check) == "True 0\n"


def test_public_names_stay_functions_whatever_is_imported_first():
    check = (
        "import types, diba_np.search.factorization, diba_np\n"
        "print(isinstance(diba_np.factorize, types.FunctionType))\n"
        "print(all(hasattr(diba_np, n) for n in diba_np.__all__))"
    )
    assert in_fresh_interpreter(check) == "True\nTrue\n"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        diba_np.nothing  # noqa: B018


def test_show_versions(capsys):
    diba_np.show_versions()
    out = capsys.readouterr().out
    assert out.startswith(f"diba_np {diba_np.__version__}\n")
    assert "numba " in out


@pytest.mark.parametrize("variable", ["DIBA_NP_CACHE=0", "NUMBA_CACHE_DIR=/proc/none"])
def test_works_without_a_cache(variable):
    name, value = variable.split("=")
    code = (
        "import numpy as np, diba_np as d\n"
        "f = d.factorize(np.ones((3, 3)), k=1)\n"
        "print(f.k, np.round(f @ np.ones(3, np.float32)))"
    )
    assert in_fresh_interpreter(code, **{name: value}) == "1 [3. 3. 3.]\n"


def test_public_docstrings_are_complete():
    """What ``python -m pydoc diba_np.factorize`` shows is enough to work from (numpydoc)."""

    def check(name, thing, function, kind):
        text = inspect.getdoc(thing) or ""
        first = text.split("\n\n")[0]
        assert first.endswith((".", ":")) and "\n" not in first, f"{name}: one line first"
        parts = dict(
            re.findall(r"^(\w[\w ]*)\n-{3,}\n(.*?)(?=\n\n\w[\w ]*\n-{3,}\n|\Z)", text, re.S | re.M)
        )
        signature = inspect.signature(function)
        names = [p.lstrip("*") for p in signature.parameters if p not in ("self", "cls")]
        told = re.findall(
            r"^(\*{0,2}\w+(?:, \*{0,2}\w+)*)(?: : .*)?$", parts.get("Parameters", ""), re.M
        )
        told = [one.strip().lstrip("*") for group in told for one in group.split(",")]
        if kind == "function" or (kind == "class" and names):
            assert sorted(told) == sorted(names), f"{name}: documents {told}, takes {names}"
        assert set(told) <= set(names), f"{name}: documents {told}, takes {names}"
        if kind == "function":
            assert "Returns" in parts or signature.return_annotation in ("None", None), name
            assert "Raises" in parts or not names, f"{name}: which errors?"

    for name in diba_np.__all__:
        thing = getattr(diba_np, name)
        if inspect.isfunction(thing):
            check(name, thing, thing, "function")
        elif inspect.isclass(thing):
            check(
                name,
                thing,
                thing.__init__,
                "class" if not issubclass(thing, Exception | Warning) else "error",
            )
            for part, member in vars(thing).items():
                if not part.startswith("_") and inspect.isfunction(member):
                    check(f"{name}.{part}", member, member, "method")
