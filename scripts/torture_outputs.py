"""Outputs under fire: every kind of place that a result can be sent to, each right or refused.

python scripts/torture_outputs.py            # the table; about a minute
python scripts/torture_outputs.py --smoke    # some of each kind, for the tests

The command line runs in this process, its outputs are links, pipes, devices, folders that cannot be
written, names at the file system's limit, files of certain modes, full disks, its own inputs. After
each run: is the result where it was sent, whole; is everything else as it was; has nothing been
left behind; does a refusal say why in one sentence?
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import stat
import subprocess
import sys
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import diba_np as dn
from diba_np.cli.main import main as command

RIGHT, REFUSED = "right", "refused with a sentence"


class Place:
    """A folder with inputs, and one command that writes a result of each kind.

    Attributes
    ----------
    kind : str
        "h5", "npy", "applied" or "model": what the command writes.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind
        rng = np.random.default_rng(0)
        self.matrix, self.stored = folder / "A.npy", folder / "A.h5"
        np.save(self.matrix, rng.normal(size=(18, 14)))
        dn.factorize(np.load(self.matrix), k=5, solver="greedy", threads=1).save(self.stored)
        np.savez(folder / "m.npz", w=rng.normal(size=(20, 16)))
        self.before = self.listing()

    def listing(self) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in self.folder.iterdir() if p.is_file()}

    def words(self, output: str | Path) -> list[str]:
        model = ["model", self.folder / "m.npz", "--bits", "4", "--jobs", "1"]
        known = {
            "h5": ["factorize", self.matrix, "--k", "4", "--solver", "greedy", "--quiet"],
            "npy": ["reconstruct", self.stored],
            "applied": ["apply", self.stored, self.folder / "X.npy"],
            "model": [*model, "--effort", "fast", "--quiet"],
        }
        return [*map(str, known[self.kind]), "-o", str(output)]

    def run(self, output: str | Path, *more: str) -> tuple[int, str]:
        """Return status and what was said."""
        if self.kind == "applied":
            np.save(self.folder / "X.npy", np.ones((3, 14)))
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            status = command([*self.words(output), *more])
        if self.kind == "applied":
            (self.folder / "X.npy").unlink()
        return status, errors.getvalue()

    def is_result(self, path: Path) -> bool:
        """Tell whether a file is the whole of what the command writes."""
        if self.kind == "npy":
            return np.load(path).shape == (18, 14)
        if self.kind == "applied":
            return np.load(path).shape == (3, 18)
        if self.kind == "model":
            from diba_np.models.file import open_model

            with open_model(path) as model:
                return list(model) == ["w"]
        return dn.load(path).k == 4


Case = Callable[[Place], str]


def _refused(place: Place, output: str | Path, *more: str) -> str:
    """Return how a refusal went."""
    status, said = place.run(output, *more)
    lines = [line for line in said.splitlines() if not line.startswith("diba-np: note")]
    if status != 1 or len(lines) != 1 or not lines[0].startswith("diba-np: error: "):
        return f"status {status}, said {said!r}"
    return REFUSED if "[Errno" not in said else f"an error number: {said}"


def _written(place: Place, output: str | Path, real: Path, *more: str) -> str:
    """Return how writing went: the result must lie in `real`."""
    status, said = place.run(output, *more)
    if status:
        return f"status {status}: {said}"
    return RIGHT if place.is_result(real) else "no result"


def new_file(place: Place) -> str:
    done = _written(place, place.folder / "out", place.folder / "out")
    plain = place.folder / "plain"
    plain.touch()
    same = plain.stat().st_mode == (place.folder / "out").stat().st_mode
    plain.unlink()
    return done if same else "another mode than that of a new file"


def existing_without_force(place: Place) -> str:
    (place.folder / "out").write_text("old")
    done = _refused(place, place.folder / "out")
    return done if (place.folder / "out").read_text() == "old" else "replaced"


def modes_are_kept(place: Place) -> str:
    for mode in (0o600, 0o640, 0o444, 0o755):
        out = place.folder / "out"
        out.write_text("old")
        out.chmod(mode)
        done = _written(place, out, out, "--force")
        if done != RIGHT or stat.S_IMODE(out.stat().st_mode) != mode:
            return f"{mode:o}: {done}, now {out.stat().st_mode:o}"
    return RIGHT


def owners_are_kept(place: Place) -> str:
    out = place.folder / "out"
    out.write_text("old")
    with contextlib.suppress(PermissionError):
        os.chown(out, 4321, 1234)
    was = out.stat()
    done = _written(place, out, out, "--force")
    now = out.stat()
    return done if (was.st_uid, was.st_gid) == (now.st_uid, now.st_gid) else "another owner"


def link_to_a_file(place: Place) -> str:
    (place.folder / "sub").mkdir()
    real, link = place.folder / "sub" / "real", place.folder / "out"
    real.write_text("old")
    real.chmod(0o600)
    link.symlink_to(Path("sub") / "real")
    done = _written(place, link, real, "--force")
    if not link.is_symlink() or stat.S_IMODE(real.stat().st_mode) != 0o600:
        return "the link was replaced, or the mode changed"
    return done


def dangling_link(place: Place) -> str:
    link = place.folder / "out"
    link.symlink_to("not yet")
    done = _written(place, link, place.folder / "not yet")
    return done if link.is_symlink() else "the link was replaced"


def link_to_nowhere(place: Place) -> str:
    (place.folder / "out").symlink_to(place.folder / "gone" / "file")
    return _refused(place, place.folder / "out")


def links_in_a_circle(place: Place) -> str:
    (place.folder / "out").symlink_to("other")
    (place.folder / "other").symlink_to("out")
    return _refused(place, place.folder / "out", "--force")


def hard_link(place: Place) -> str:
    (place.folder / "other").write_text("old")
    os.link(place.folder / "other", place.folder / "out")
    done = _written(place, place.folder / "out", place.folder / "out", "--force")
    return done if (place.folder / "other").read_text() == "old" else "half a change"


def null_device(place: Place) -> str:
    was = os.stat("/dev/null")
    if place.kind == "model":
        done = _refused(place, "/dev/null", "--force")
    else:
        done = RIGHT if place.run("/dev/null", "--force")[0] == 0 else "failed"
    now = os.stat("/dev/null")
    same = (was.st_mode, was.st_rdev, was.st_ino) == (now.st_mode, now.st_rdev, now.st_ino)
    return done if same else "the device was replaced"


def own_device(place: Place) -> str:
    out = place.folder / "null"
    try:
        os.mknod(out, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        return RIGHT
    if place.kind == "model":
        done = _refused(place, out, "--force")
    else:
        done = RIGHT if place.run(out, "--force")[0] == 0 else "failed"
    return done if stat.S_ISCHR(out.stat().st_mode) else "the device was replaced"


def full_device(place: Place) -> str:
    return _refused(place, "/dev/full", "--force")


def disk_device(place: Place) -> str:
    out = place.folder / "disk"
    try:
        os.mknod(out, 0o600 | stat.S_IFBLK, os.makedev(1, 99))
    except PermissionError:
        return REFUSED
    return _refused(place, out, "--force")


def pipe(place: Place) -> str:
    out = place.folder / "pipe"
    os.mkfifo(out)
    if place.kind == "model":
        return _refused(place, out, "--force")
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(out.read_bytes()), daemon=True)
    reader.start()
    status, said = place.run(out)
    reader.join(20)
    if status or not got or not stat.S_ISFIFO(out.stat().st_mode):
        return f"status {status}: {said}"
    (place.folder / "copy").write_bytes(got[0])
    return RIGHT if place.is_result(place.folder / "copy") else "other bytes"


def socket_file(place: Place) -> str:
    import socket

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(place.folder / "socket"))
        return _refused(place, place.folder / "socket", "--force")


def folder(place: Place) -> str:
    (place.folder / "out").mkdir()
    return _refused(place, place.folder / "out", "--force")


def missing_folder(place: Place) -> str:
    return _refused(place, place.folder / "gone" / "out")


def file_as_a_folder(place: Place) -> str:
    return _refused(place, place.matrix / "out")


def longest_name(place: Place) -> str:
    for name in ("x" * 255, "ü" * 127, "x" * 251 + ".npy"):
        done = _written(place, place.folder / name, place.folder / name)
        if done != RIGHT:
            return f"{len(os.fsencode(name))} bytes: {done}"
    return RIGHT


def name_too_long(place: Place) -> str:
    return _refused(place, place.folder / ("x" * 256))


def odd_names(place: Place) -> str:
    for name in ("a b", "new\nline", "tab\t", "--force", "%s", "*", b"\xff\xfe", "\x1b[2J"):
        out = place.folder / os.fsdecode(name)
        done = _written(place, out, out)
        if done != RIGHT:
            return f"{name!r}: {done}"
    return RIGHT


def its_own_input(place: Place) -> str:
    source = {"h5": place.matrix, "model": place.folder / "m.npz"}.get(place.kind, place.stored)
    alias = place.folder / "alias"
    for out in (source, alias):
        if out is alias:
            alias.symlink_to(source)
        done = _refused(place, out, "--force")
        if done != REFUSED:
            return done
    return REFUSED


def full_disk(place: Place) -> str:
    """A process whose files may have so many bytes and no more."""
    out = place.folder / "out"
    out.write_text("old")
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from diba_np.cli.main import main\n"
        "import numpy, h5py\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    if place.kind == "applied":
        np.save(place.folder / "X.npy", np.ones((3, 14)))
    done = subprocess.run(
        [sys.executable, "-c", code, *place.words(out), "--force"],
        capture_output=True,
        text=True,
        check=False,
    )
    (place.folder / "X.npy").unlink(missing_ok=True)
    errors = [line for line in done.stderr.splitlines() if "note:" not in line]
    if done.returncode != 1 or len(errors) != 1 or "error: " not in errors[0]:
        return f"status {done.returncode}: {done.stderr[-300:]}"
    return REFUSED if out.read_text() == "old" else "half a file"


CASES: list[Case] = [
    new_file,
    existing_without_force,
    modes_are_kept,
    owners_are_kept,
    link_to_a_file,
    dangling_link,
    link_to_nowhere,
    links_in_a_circle,
    hard_link,
    null_device,
    own_device,
    full_device,
    disk_device,
    pipe,
    socket_file,
    folder,
    missing_folder,
    file_as_a_folder,
    longest_name,
    name_too_long,
    odd_names,
    its_own_input,
    full_disk,
]

KINDS = ("h5", "npy", "applied", "model")


def cases(smoke: bool) -> Iterator[tuple[str, Case]]:
    for number, case in enumerate(CASES):
        for kind in KINDS[number % 2 :: 2] if smoke else KINDS:
            yield kind, case


def judge(kind: str, case: Case) -> str:
    """Run a case in a folder of its own; tell also what it has done to all else."""
    with tempfile.TemporaryDirectory() as name:
        place = Place(Path(name), kind)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = case(place)
        after = place.listing()
        changed = [each for each, raw in place.before.items() if after.get(each) != raw]
        left = [each.name for each in place.folder.rglob("*.part")]
        if case is not full_disk:  # there a model's finished parts wait for the next run
            left += [each.name for each in place.folder.glob("*.parts")]
        if changed or left:
            return f"{outcome}; changed {changed}, left {left}"
        return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="some of each kind")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    counts: dict[str, Counter[str]] = {}
    failures = []
    for kind, case in cases(args.smoke):
        outcome = judge(kind, case)
        counts.setdefault(case.__name__.replace("_", " "), Counter())[outcome] += 1
        if outcome not in (RIGHT, REFUSED):
            failures.append(f"{case.__name__}, {kind}: {outcome}")
            print(failures[-1], file=sys.stderr, flush=True)
    if args.json:
        print(json.dumps({"cases": {k: dict(v) for k, v in counts.items()}, "failures": failures}))
        return bool(failures)
    print(f"| output | runs | {RIGHT} | {REFUSED} | failed |\n|---|--:|--:|--:|--:|")
    for name, count in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        good = [count[RIGHT], count[REFUSED]]
        total = count.total()
        print(f"| {name} | {total} | {good[0]} | {good[1]} | {total - sum(good)} |")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
