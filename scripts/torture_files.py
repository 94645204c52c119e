"""Files under fire: thousands of damaged and hostile files, each refused or read back exactly.

python scripts/torture_files.py            # the table; a few minutes
python scripts/torture_files.py --smoke    # some of each kind, for the tests

Small valid files of every kind are changed: bytes in every 16-byte window, truncations, bytes put
in or taken out, attributes and datasets replaced, deleted or led elsewhere, sizes declared huge.
Worker processes, with 1 GiB of memory beyond what they hold at the start, read each one. It must be
refused with FormatError or give exactly the original's contents. Where a hostile writer put a
fitting digest on what it changed, the contents are what it says: refused or read. So with .npy
files, which have no checksum: the command has to end with a sentence, or to read.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import select
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from damage import Case, hdf5_cases, link_cases, npy_cases

import diba_np as dn
from diba_np import methods
from diba_np.files import container
from diba_np.models.file import open_model

LIMIT = 1 << 30  # bytes of memory that reading a file of a few KiB may take
PATIENCE = 60.0  # seconds; reading takes milliseconds

SAME, REFUSED, READ = "read back exactly", "refused", "read as it says"


# -- the files -------------------------------------------------------------------------------------


SMOKED = ("qswd", "mesa")  # methods of the smoke run


def make_files(folder: Path, labels: Iterable[str]) -> dict[str, Path]:
    """Write small valid files of every kind, of these methods; return them by name."""
    rng = np.random.default_rng(0)
    A = (rng.normal(size=(18, 4)) @ rng.normal(size=(4, 14)) + rng.normal(size=(18, 14))) / 2
    f = dn.factorize(A, k=9, max_sweeps=5)
    kinds = ("diba", "coded", "terms", "many", *labels)
    files = {name: folder / f"{name}.h5" for name in kinds}
    biased = dn.DiBAFactors(f.d1, f.b1, f.d2 * 1e-20, f.b2, f.d3, record=f.record, bias=A[:, 0])
    biased.save(files["diba"])
    dn.factorize(A, k=9, max_sweeps=5, scale_bits=(4, 3, 5)).save(files["coded"])
    terms = [f, dn.factorize(A - f.to_dense(), k=5, max_sweeps=5, scale_bits=3)]
    dn.DiBAFactors.from_terms(terms, f.record, bias=A[:, 1]).save(files["terms"])
    for group, made in (("a", f), ("deep/er", f.T), ("b", methods.fit("rtn", A, 4))):
        made.save(files["many"], group=group)
    for name in labels:
        methods.fit(name, A, 6).save(files[name])
    files["model"] = folder / "model.h5"
    arrays = {"x/y.weight": rng.normal(size=(24, 20)), "bias": np.arange(5.0)}
    dn.factorize_model(arrays, bits=3, output=files["model"], jobs=1, effort="fast").close()
    return files


def facts_of(made: Any) -> str:
    """Return a digest of all that a compressed matrix says."""
    if isinstance(made, dn.DiBAFactors):
        parts = [made.bias]
        for term in made.terms:
            parts += [term.b1.words, term.b2.words, term.d1, term.d2, term.d3]
        told: dict[str, Any] = {
            "shift": made.shift,
            "scale_bits": [term.scale_bits for term in made.terms],
        }
    else:
        told, arrays = made.to_datasets()
        parts = [arrays[name] for name in sorted(arrays)]
    head = [type(made).__name__, made.shape, made.record, told]
    sha = hashlib.sha256(json.dumps(head, sort_keys=True, default=str).encode())
    for part in parts:
        sha.update(b"-" if part is None else np.ascontiguousarray(part).tobytes())
    return sha.hexdigest()


def read_hdf5(path: Path, groups: list[str]) -> list[str]:
    """Return for each group what it says, or that it is refused."""
    told = []
    for group in groups:
        try:
            told.append(facts_of(dn.load(path, group=group or None)))
        except dn.FormatError as error:
            cause = error.__cause__
            if isinstance(cause, MemoryError):
                raise cause from error
            told.append(REFUSED)
    for look in (container.groups, lambda p: sorted(open_model(p))):
        with contextlib.suppress(dn.FormatError):
            look(path)
    return told


def read_npy(path: Path) -> list[str]:
    """Run the command on a .npy; it ends with a sentence, or reads what the file holds."""
    from diba_np.cli.main import main

    errors = io.StringIO()
    args = ["factorize", str(path), "--k", "1", "--max-sweeps", "1", "--solver", "greedy"]
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        status = main([*args, "--quiet", "--force", "-o", str(path.with_suffix(".out"))])
    if status == 0:
        return [READ]
    lines = [
        line for line in errors.getvalue().splitlines() if not line.startswith("diba-np: note")
    ]
    if len(lines) != 1 or not lines[0].startswith("diba-np: error: "):
        raise AssertionError(f"not one sentence: {lines}")
    return [REFUSED]


# -- workers ---------------------------------------------------------------------------------------


def work() -> None:
    """Answer requests, a line of JSON each, until standard input ends."""
    import resource

    limited = False
    for line in sys.stdin:
        path, groups = json.loads(line)
        try:
            told: Any = read_npy(Path(path)) if groups is None else read_hdf5(Path(path), groups)
        except BaseException as error:
            told = f"{type(error).__name__}: {error}"[:300]
        print(json.dumps(told), flush=True)
        if not limited and groups == []:  # the warm-up is over: from here on memory counts
            held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (held + LIMIT, held + LIMIT))
            limited = True


class Worker:
    """A process that reads files; started anew when one has ended it."""

    def __init__(self, warm: list[tuple[Path, list[str] | None]]) -> None:
        self.warm = warm
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        one = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "NUMBA")}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | one,
        )
        for path, groups in self.warm:
            told = self.ask(path, groups)
            if not isinstance(told, list):
                raise SystemExit(f"{path}: a valid file is not read: {told}")
        self.ask(self.warm[0][0], [])

    def ask(self, path: Path, groups: list[str] | None) -> Any:
        """Return the answer: a list, or a text that says what went wrong."""
        if self.process is None:
            self.start()
        process = self.process
        if process is None or process.stdin is None or process.stdout is None:
            raise RuntimeError("no worker")
        process.stdin.write(json.dumps([str(path), groups]) + "\n")
        process.stdin.flush()
        answered, _, _ = select.select([process.stdout], [], [], PATIENCE)
        line = process.stdout.readline() if answered else ""
        if line:
            return json.loads(line)
        self.close()
        return f"crash (exit {process.returncode})" if answered else "hang"

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    pipe.close()
            self.process = None


# -- the run ---------------------------------------------------------------------------------------


def run(folder: Path, smoke: bool, seed: int) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Read every case; return how often (class, outcome) was met, and the failures."""
    files = make_files(folder, SMOKED if smoke else methods.METHODS)
    if smoke:
        del files["terms"]
    keys = {"many": ["a", "deep/er", "b"], "model": [container.group_key("x/y.weight"), "bias"]}
    np.save(folder / "warm.npy", np.eye(3))
    asked = {name: keys.get(name, [""]) for name in files}
    worker = Worker([*((files[name], asked[name]) for name in files), (folder / "warm.npy", None)])
    rng = np.random.default_rng(seed)
    counts: Counter[tuple[str, str]] = Counter()
    failures: list[str] = []

    def judge(case: Case, groups: list[str] | None, expected: list[str]) -> None:
        kind, told, path, strict = case
        answer = worker.ask(path, groups)
        if not isinstance(answer, list):
            outcome = answer
        elif all(item == REFUSED for item in answer):
            outcome = REFUSED
        elif groups is not None and all(
            item in (REFUSED, right) for item, right in zip(answer, expected, strict=True)
        ):
            outcome = SAME
        else:
            outcome = "different data" if strict else READ
        counts[kind, outcome] += 1
        if outcome not in (SAME, REFUSED, READ):
            failures.append(f"{kind}, {told}: {outcome}")
            print(failures[-1], file=sys.stderr, flush=True)

    try:
        worker.start()
        for name, path in files.items():
            right = worker.ask(path, asked[name])
            for case in hdf5_cases(name, path, asked[name], folder, rng, smoke):
                judge(case, asked[name], right)
        right = worker.ask(files["many"], ["deep/er", "b"])
        for case, groups in link_cases(folder, files, smoke):
            judge(case, groups, right if len(groups) == 2 else [""])
        for case in npy_cases(folder, rng, smoke):
            judge(case, None, [])
    finally:
        worker.close()
    return counts, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="some of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        warnings.simplefilter("ignore")
        work()
        return 0
    with tempfile.TemporaryDirectory() as folder:
        counts, failures = run(Path(folder), args.smoke, args.seed)
    kinds = sorted({kind for kind, _ in counts})
    if args.json:
        table = {kind: {o: n for (k, o), n in counts.items() if k == kind} for kind in kinds}
        print(json.dumps({"files": counts.total(), "kinds": table, "failures": failures}))
        return bool(failures)
    print(f"| damage | files | {REFUSED} | {SAME} | {READ} | failed |")
    print("|---|--:|--:|--:|--:|--:|")
    for kind in [*kinds, "all"]:
        of = {o: 0 for o in (REFUSED, SAME, READ)} | Counter({o: 0 for _, o in counts})
        for (k, outcome), n in counts.items():
            if kind in (k, "all"):
                of[outcome] += n
        good = [of[o] for o in (REFUSED, SAME, READ)]
        total = sum(of.values())
        print(f"| {kind} | {total} | {' | '.join(map(str, good))} | {total - sum(good)} |")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
