"""Finished parts of a long run, kept in a folder until the whole is written."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from diba_np.files.atomic import atomic_path


class Parts:
    """What is finished of a run, in a folder beside its output; locked while the run lasts.

    Parameters
    ----------
    output : Path
    fingerprint : dict
        Of the source and the settings; anything that JSON can hold.
    restart : bool
        Drop parts of a run that had another fingerprint.

    Raises
    ------
    ValueError
        The parts are of a run with another fingerprint.
    OSError
        Another run writes to this output now; the folder cannot be written.
    """

    def __init__(self, output: Path, fingerprint: dict[str, Any], restart: bool = False) -> None:
        self.folder = output.with_name(output.name + ".parts")
        self._lock = self._acquire(output)
        try:
            self._check(json.loads(json.dumps(fingerprint)), restart)
        except BaseException:
            self._lock.close()
            raise

    def _acquire(self, output: Path) -> TextIO:
        while True:
            self.folder.mkdir(exist_ok=True)
            path = self.folder / "lock"
            try:
                lock = open(path, "a", encoding="ascii")
            except FileNotFoundError:  # removed by a run that ended just now
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(lock.fileno()).st_ino == path.stat().st_ino:
                    return lock
            except BlockingIOError:
                lock.close()
                raise OSError(f"{output}: another run writes to it now") from None
            except FileNotFoundError:
                pass
            lock.close()

    def _check(self, fingerprint: dict[str, Any], restart: bool) -> None:
        path = self.folder / "run.json"
        found = self.read("run")
        if found is not None and found != fingerprint:
            if not restart:
                differ = [key for key in fingerprint if found.get(key) != fingerprint[key]]
                told = ", ".join(
                    f"{key}: {_short(found.get(key))} there, {_short(fingerprint[key])} here"
                    for key in differ
                )
                raise ValueError(
                    f"{self.folder} holds parts of another run ({told}); finish that one, delete "
                    "the folder, or ask for a restart"
                )
            found = None
        if found is None:
            for old in self.folder.iterdir():
                if old.name != "lock":
                    old.unlink()
            _write_json(path, fingerprint)

    def read(self, name: str) -> Any:
        """Return what `write` kept under a name; None if there is nothing readable."""
        try:
            return json.loads((self.folder / f"{name}.json").read_text("utf-8"))
        except (OSError, ValueError):
            return None

    def write(self, name: str, value: Any) -> None:
        """Keep what JSON can hold."""
        _write_json(self.folder / f"{name}.json", value)

    def path(self, number: int, suffix: str = "h5") -> Path:
        """Return where a task's part lies."""
        return self.folder / f"{number}.{suffix}"

    def finish(self) -> None:
        """Remove the folder."""
        with suppress(FileNotFoundError):
            shutil.rmtree(self.folder)

    def close(self) -> None:
        """Let others write; remove the folder if nothing is kept in it."""
        kept = {item.name for item in self.folder.glob("*")} - {"lock", "run.json"}
        if not kept:
            self.finish()
        self._lock.close()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else "other"


def _write_json(path: Path, value: Any) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value), "utf-8")
