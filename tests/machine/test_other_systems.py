"""What Windows lacks is taken away: the package still imports, factorizes, saves, loads, runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# third parties first: they choose their own code by the system that is really there
PROLOGUE = """
import multiprocessing.connection, multiprocessing.spawn, multiprocessing.popen_spawn_posix
import os, signal, sys, types
import h5py, numba, numpy as np, scipy.linalg, scipy.optimize, scipy.sparse.linalg
held = set()
def locking(handle, mode, size):
    # as msvcrt's: a lock belongs to the file, and a second one is refused
    place = os.fstat(handle).st_ino
    if place in {p for h, p in held if alive(h, p)}:
        raise PermissionError(13, "Permission denied")
    held.add((handle, place))
def alive(handle, place):
    try:
        return os.fstat(handle).st_ino == place
    except OSError:
        return False
msvcrt = types.ModuleType("msvcrt")
msvcrt.locking, msvcrt.LK_NBLCK = locking, 2
sys.modules["msvcrt"] = msvcrt
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for module, names in (
    (signal, ("pthread_kill", "pthread_sigmask", "SIGALRM", "SIGHUP", "SIGUSR1", "setitimer",
              "alarm")),
    (os, ("sched_getaffinity", "register_at_fork", "fork", "getloadavg", "geteuid", "getuid",
          "O_DIRECTORY", "O_NOFOLLOW", "killpg", "setsid", "sysconf", "fchmod")),
):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
flags, open_handle, flush = {}, os.open, os.fsync
def open_as_there(path, how, *rest, **more):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    handle = open_handle(path, how, *rest, **more)
    flags[handle] = how
    return handle
def flush_as_there(handle):
    if flags.get(handle, os.O_RDWR) & 3 == os.O_RDONLY:
        raise OSError(9, "Bad file descriptor")
    flush(handle)
send = os.kill
def kill(process, number):
    assert number, "a process is ended on Windows by whatever signal"
    send(process, number)
os.open, os.fsync, os.kill = open_as_there, flush_as_there, kill
sys.platform = "win32"
"""

USE = """
from pathlib import Path
import diba_np as dn
folder = Path(sys.argv[1])
rng = np.random.default_rng(0)
A = rng.normal(size=(24, 20)).astype(np.float32)
f = dn.factorize(A, k=10, effort="fast", checkpoint=folder / "c.h5")
f.save(folder / "f.h5")
f.save(folder / "f.h5")  # over itself
g = dn.load(folder / "f.h5")
assert (g @ A.T == f @ A.T).all()
np.savez(folder / "weights.npz", one=A, two=A.T.copy())
dn.factorize_model(folder / "weights.npz", output=folder / "model.h5", bits=3.0, effort="fast")
with h5py.File(folder / "model.h5") as file:
    assert len(file) > 0
print("done", sorted(p.name for p in folder.iterdir()))
"""

COMMAND = """
from diba_np.cli.main import main
code = main(sys.argv[2:])
sys.exit(code)
"""


def run(code, *arguments, **environment):
    command = [sys.executable, "-c", PROLOGUE + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=False, env=os.environ | environment)


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nothing to take away there")


def test_the_library_without_what_windows_lacks(tmp_path):
    done = run(USE, tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.startswith(b"done")
    # whole files alone: no lock, no temporary file, no checkpoint of a finished run
    assert set(done.stdout.decode().partition("[")[2].strip("]\n'").split("', '")) >= {
        "f.h5", "model.h5", "weights.npz",
    }  # fmt: skip


def test_the_command_line_without_what_windows_lacks_on_a_console_of_a_few_letters(tmp_path):
    import numpy as np

    folder = tmp_path / "Müller ж"
    folder.mkdir()
    np.save(folder / "A.npy", np.random.default_rng(0).normal(size=(20, 16)))
    source, target = folder / "A.npy", folder / "A.h5"
    # cp1252 has no letter of the folder's name but one
    narrow = {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    words = ["factorize", source, "--k", "8", "--effort", "fast", "-o", target]
    done = run(COMMAND, "-", *words, **narrow)
    assert done.returncode == 0, done.stderr
    done = run(COMMAND, "-", "info", target, **narrow)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    done = run(COMMAND, "-", "info", folder / "no.h5", **narrow)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr


def test_no_file_of_the_package_imports_what_windows_lacks_unasked():
    # imports at the top of a module, outside any condition
    import diba_np

    lacking = ("import fcntl", "import resource", "import pwd", "import grp", "import termios")
    for path in Path(diba_np.__file__).parent.rglob("*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert not [line for line in lines if line.startswith(lacking)], path
