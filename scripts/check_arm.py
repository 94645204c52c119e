"""Run the tests of products on 64-bit Arm, emulated: a Debian for arm64 under QEMU, made here.

    sudo python scripts/check_arm.py [--root build/arm64] [--again] [tests and options of pytest]

Needs Debian or Ubuntu, ``apt-get install debootstrap qemu-user-static`` and the network: the first
run takes some hundred megabytes, later ones (``--again``: the packages too) reuse the folder. The
packages that diba_np needs come as wheels for aarch64, this package from the working tree. What is
run is the kernels' arithmetic, not their speed: a time under emulation says nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
PACKAGES = ["numpy", "numba", "scipy", "h5py", "pytest", "hypothesis"]
PLATFORMS = ["manylinux2014_aarch64", "manylinux_2_26_aarch64", "manylinux_2_27_aarch64",
             "manylinux_2_28_aarch64"]  # fmt: skip
SUITE, PYTHON = "bookworm", "3.11"
BINFMT = Path("/proc/sys/fs/binfmt_misc")


def run(*command: str, **options: object) -> None:
    sys.stderr.write(f"$ {' '.join(command)}\n")
    subprocess.run(command, check=True, **options)  # type: ignore[call-overload]


def register_emulator() -> None:
    """Let the kernel start programs for aarch64 through QEMU."""
    if not (BINFMT / "register").exists():
        run("mount", "-t", "binfmt_misc", "binfmt_misc", str(BINFMT))
    if not (BINFMT / "qemu-aarch64").exists():
        description = Path("/usr/lib/binfmt.d/qemu-aarch64.conf").read_text().strip()
        (BINFMT / "register").write_text(description)


def prepare(root: Path) -> None:
    """Make the system: Debian's Python for arm64, and the packages' wheels."""
    if not (root / "usr/bin/python3").exists() or (root / "debootstrap").exists():
        run("debootstrap", "--arch=arm64", "--variant=minbase", "--include=python3", SUITE,
            str(root))  # fmt: skip
    wheels = root / "opt/wheels"
    if not (wheels / "numba").exists():
        platforms = [part for name in PLATFORMS for part in ("--platform", name)]
        run(sys.executable, "-m", "pip", "install", "--quiet", "--target", str(wheels), *platforms,
            "--python-version", PYTHON, "--only-binary=:all:", *PACKAGES)  # fmt: skip


def mount_proc(root: Path) -> None:
    """Let programs inside read what processor they seem to run on."""
    if not (root / "proc/cpuinfo").exists():
        run("mount", "-t", "proc", "proc", str(root / "proc"))


def copy_project(root: Path) -> None:
    target = root / "opt/project"
    shutil.rmtree(target, ignore_errors=True)
    for name in ("diba_np", "tests", "scripts", "data"):
        shutil.copytree(HERE / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg"):
        shutil.copy(HERE / name, target / name)


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--root", type=Path, default=HERE / "build" / "arm64")
    parser.add_argument("--again", action="store_true", help="fetch the packages anew")
    args, rest = parser.parse_known_args()
    missing = [name for name in ("debootstrap", "qemu-aarch64-static") if not shutil.which(name)]
    if missing or os.geteuid():
        parser.error("run it as root, with debootstrap and qemu-user-static installed")
    root = args.root.resolve()
    if args.again:
        shutil.rmtree(root / "opt", ignore_errors=True)
    register_emulator()
    prepare(root)
    mount_proc(root)
    copy_project(root)
    environment = {
        "PATH": "/usr/bin:/bin:/usr/sbin:/sbin",
        "PYTHONPATH": "/opt/wheels:/opt/project",
        "NUMBA_CACHE_DIR": "/opt/cache",
        "HOME": "/root",
        "LANG": "C.UTF-8",
    }
    inside = ["chroot", str(root), "/usr/bin/env", "--chdir=/opt/project"]
    about = (
        "import platform, numba, numpy; from diba_np.products.cpu import available_paths, "
        "has_rounded, kernel_path; print(platform.machine(), platform.python_version(), 'numpy', "
        "numpy.__version__, 'numba', numba.__version__, available_paths(), kernel_path(), "
        "'16-bit tables', has_rounded())"
    )
    run(*inside, "python3", "-c", about, env=environment)
    start = time.monotonic()
    tests = rest or ["-q", "tests/products"]
    command = [*inside, "python3", "-m", "pytest", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, check=False, env=environment)
    sys.stderr.write(f"{time.monotonic() - start:.0f} s\n")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
