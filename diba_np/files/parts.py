"""Finished parts of a long run, kept in a folder until the whole is written."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from diba_np.errors import FormatError
from diba_np.files.atomic import atomic_path, beside
from diba_np.files.fingerprint import as_stored, differences
from diba_np.files.lock import FileLock


class OtherRunError(FormatError):
    """A folder holds parts of another run, or some of which it cannot be told whose they are."""


class Parts:
    """What is finished of a run, in a folder beside its output; locked while the run lasts.

    Parameters
    ----------
    output : Path
    fingerprint : dict
        Of the source and the settings; anything that JSON can hold.
    restart : bool
        Drop parts of a run that had another fingerprint.
    whole : Path, optional
        The folder that is to be deleted to begin anew, where more than these parts is kept and no
        restart can be asked for.

    Raises
    ------
    OtherRunError
        The parts are of a run with another fingerprint; it cannot be told whose they are.
    ValueError
        They are of another kind of run.
    OSError
        Another run writes to this output now; the folder cannot be read or written.
    """

    def __init__(
        self,
        output: Path,
        fingerprint: dict[str, Any],
        restart: bool = False,
        whole: Path | None = None,
    ) -> None:
        self.folder = beside(output, ".parts")
        self._whole = whole
        self._lock = self._acquire(output)
        try:
            self._check(as_stored(fingerprint), restart)
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
        kept = self._kept_run(path, restart)
        if kept is not None and kept != fingerprint:
            if not restart:
                raise OtherRunError(
                    f"{self._whole or self.folder} holds parts of another run "
                    f"({', '.join(differences(kept, fingerprint))}); finish that one, or "
                    f"{self._remedy()}"
                )
            kept = None
        if kept is None:
            self._refuse_folders()
            self.finish()
            _write_json(path, fingerprint)

    def _refuse_folders(self) -> None:
        """Refuse what no run of this kind has left, before anything is removed."""
        folders = sorted(path.name for path in self._contents() if path.is_dir())
        if folders:
            raise ValueError(
                f"{self.folder} holds {folders[0]}, which is of another kind of run; finish that "
                "one, or delete the folder"
            )

    def _kept_run(self, path: Path, restart: bool) -> dict[str, Any] | None:
        """Return the fingerprint of the run whose parts these are; None where none has begun."""
        try:
            kept = json.loads(path.read_text("utf-8"))
            if not isinstance(kept, dict):
                raise ValueError("no object")
        except FileNotFoundError:
            return None
        except ValueError as error:
            if restart:
                return None
            raise OtherRunError(f"{path}: not readable ({error}); {self._remedy()}") from error
        return kept

    def _remedy(self) -> str:
        if self._whole is None:
            return "delete the folder, or ask for a restart"
        return f"delete the folder {self._whole} to begin anew"

    def read(self, name: str) -> Any:
        """Return the value that was written under a name; None if there is nothing, or damaged."""
        try:
            stored = json.loads((self.folder / f"{name}.json").read_text("utf-8"))
            return stored["value"] if stored["digest"] == _digest(stored["value"]) else None
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None

    def write(self, name: str, value: Any) -> None:
        """Write a value that JSON can hold, with its digest."""
        _write_json(self.folder / f"{name}.json", {"digest": _digest(value), "value": value})

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


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _write_json(path: Path, value: Any) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value), "utf-8")
