"""Finished parts of a long run, kept in a folder until the whole is written."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from diba_np.files.atomic import atomic_path, beside
from diba_np.files.lock import FileLock


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
        self.folder = beside(output, ".parts")
        self._lock = self._acquire(output)
        try:
            self._check(json.loads(json.dumps(fingerprint)), restart)
        except BaseException:
            self._lock.close()
            raise

    def _acquire(self, output: Path) -> FileLock:
        while True:
            self.folder.mkdir(exist_ok=True)
            try:
                return FileLock(self.folder / "lock")
            except FileNotFoundError:  # the folder was removed by a run that ended just now
                continue
            except BlockingIOError:
                raise OSError(f"{output}: another run writes to it now") from None

    def _check(self, fingerprint: dict[str, Any], restart: bool) -> None:
        path = self.folder / "run.json"
        there = self.read("run")
        if there is not None and there != fingerprint:
            if not restart:
                differences = ", ".join(
                    f"{key}: {_short(there.get(key))} there, {_short(value)} here"
                    for key, value in fingerprint.items()
                    if there.get(key) != value
                )
                raise ValueError(
                    f"{self.folder} holds parts of another run ({differences}); finish that one, "
                    "delete the folder, or ask for a restart"
                )
            there = None
        if there is None:
            self.finish()
            _write_json(path, fingerprint)

    def read(self, name: str) -> Any:
        """Return the value that was written under a name; None if there is nothing readable."""
        try:
            return json.loads((self.folder / f"{name}.json").read_text("utf-8"))
        except (OSError, ValueError):
            return None

    def write(self, name: str, value: Any) -> None:
        """Write a value that JSON can hold."""
        _write_json(self.folder / f"{name}.json", value)

    def path(self, number: int, suffix: str = "h5") -> Path:
        """Return where a task's part lies."""
        return self.folder / f"{number}.{suffix}"

    def finish(self) -> None:
        """Remove what is in the folder: the whole is written."""
        for path in self._contents():
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let others write; remove the folder if nothing is in it but the fingerprint."""
        if {path.name for path in self._contents()} - {"run.json"}:
            self._lock.close()
            return
        self.finish()
        self._lock.remove()
        with suppress(OSError):  # another run has begun
            self.folder.rmdir()

    def _contents(self) -> list[Path]:
        return [path for path in self.folder.glob("*") if path.name != "lock"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else "other"


def _write_json(path: Path, value: Any) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value), "utf-8")
