"""Kill runs with SIGKILL at random moments, resume them, and compare every result bit for bit.

Two runs of the command line are tried: one large ``factorize`` with ``--checkpoint``, and ``model``
on a folder of matrices. The first run of each is left alone and gives the reference. Then the same
command is started again and again; each start is killed after a random time until the given number
of kills is spent, and the run is finished. Kills fall on imports, iterations, writes of the
checkpoint and of the result alike, since times are drawn over the whole length of a run. At the end
the result must equal the reference, and nothing may be left beside it.

    python scripts/torture_resume.py               # 50 kills of each, a few minutes
    python scripts/torture_resume.py --smoke       # one kill of each on small matrices
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

# what may differ between two runs of one command
_OF_THE_RUN = "seconds"  # the end of their names in a record


def contents(path: Path) -> dict[str, object]:
    """Return all that a file holds by name: datasets as bytes, records without times."""
    found: dict[str, object] = {}

    def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = (item.dtype.str, item.shape, item[()].tobytes())
        for key, value in item.attrs.items():
            if "digest" not in key:  # it covers the record
                known = without_times(json.loads(value)) if key == "record" else value
                found[f"{name}@{key}"] = repr(known)

    with h5py.File(path, "r") as file:
        visit("", file)
        file.visititems(visit)
    return found


def without_times(value: object) -> object:
    """Drop what a record tells about the run instead of the result."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not k.endswith(_OF_THE_RUN)}
    if isinstance(value, list):
        return [without_times(item) for item in value]
    return value


def start(command: list[str]) -> subprocess.Popen[bytes]:
    # a group of its own, so that worker processes die with it
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def finish(command: list[str]) -> float:
    """Run a command to its end; return its seconds."""
    began = time.perf_counter()
    with start(command) as process:
        _, said = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{said.decode()}")
    return time.perf_counter() - began


def kill_after(command: list[str], seconds: float) -> bool:
    """Start a command and kill it and its children after some time; return whether it still ran."""
    with start(command) as process:
        try:
            _, said = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.communicate()
            return True
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{said.decode()}")
    return False


def left_over(folder: Path, expected: set[str]) -> list[str]:
    return sorted({path.name for path in folder.rglob("*") if path.is_file()} - expected)


def torture(
    name: str,
    command: list[str],
    folder: Path,
    output: Path,
    kills: int,
    rng: np.random.Generator,
    budget: float,
) -> bool:
    """Run a command with kills until they are spent; print a line, return whether all was well."""
    expected = {path.name for path in folder.rglob("*") if path.is_file()} | {output.name}
    length = finish(command)
    if kills > 1:  # the first run may have compiled
        length = finish(command)
    reference = contents(output)
    dirty = left_over(folder, expected)
    output.unlink()
    spent = runs = unequal = 0
    differing: set[str] = set()
    began = time.perf_counter()
    while spent < kills and time.perf_counter() - began < budget:
        # a run is killed a few times on its way, each time before it could end
        for _ in range(int(rng.integers(1, 6))):
            if spent == kills or not kill_after(command, float(rng.uniform(0.0, length))):
                break
            spent += 1
        finish(command)
        runs += 1
        found = contents(output)
        unequal += found != reference
        differing |= {
            key for key in found.keys() | reference if found.get(key) != reference.get(key)
        }
        dirty += left_over(folder, expected)
        output.unlink()
    print(
        f"{name:<10} {spent:>5} kills {runs:>4} runs {unequal:>4} unequal "
        f"{len(dirty):>4} files left {length:8.1f} s a run",
        flush=True,
    )
    for path in dirty:
        print(f"  left: {path}")
    for key in sorted(differing):
        print(f"  differs: {key}")
    return unequal == 0 and not dirty and spent > 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, nargs=2, default=(1536, 1024), metavar=("M", "N"))
    parser.add_argument("--only", choices=("factorize", "model"))
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds for each of the two")
    parser.add_argument("--smoke", action="store_true", help="one kill each, small matrices")
    args = parser.parse_args()
    kills = 1 if args.smoke else args.kills
    size = (96, 80) if args.smoke else tuple(args.size)
    rng = np.random.default_rng(args.seed)
    program = [sys.executable, "-m", "diba_np"]
    good = True
    with tempfile.TemporaryDirectory() as place:
        if args.only in (None, "factorize"):
            folder = Path(place) / "factorize"
            folder.mkdir()
            np.save(folder / "A.npy", rng.normal(size=size).astype(np.float32))
            output = folder / "A.h5"
            command = [*program, "factorize", str(folder / "A.npy"), "--bits", "1"]
            command += ["--scale-bits", "auto", "--effort", "fast", "--quiet", "--force"]
            command += ["-o", str(output), "--checkpoint", str(folder / "run.ckpt")]
            command += ["--checkpoint-every", "0.02" if args.smoke else "0.2"]
            good &= torture("factorize", command, folder, output, kills, rng, args.limit)
        if args.only in (None, "model"):
            folder = Path(place) / "model"
            source = folder / "weights"
            source.mkdir(parents=True)
            count, side = (2, 48) if args.smoke else (12, 256)
            for index in range(count):
                A = rng.normal(size=(side + 32 * (index % 3), side)).astype(np.float32)
                np.save(source / f"layer{index}.npy", A)
            output = folder / "model.h5"
            command = [*program, "model", str(source), "--bits", "1", "-o", str(output), "--force"]
            command += ["--jobs", "1"] if args.smoke else []
            good &= torture("model", command, folder, output, kills, rng, args.limit)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
