"""Results of a study kept as they come, so that a study that was ended goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sources import cache_folder

from diba_np.files.atomic import atomic_path
from diba_np.files.lock import FileLock


class Results:
    """Rows of a study by key, in a JSON file that is rewritten after each.

    Parameters
    ----------
    name : str
        Of the study.
    settings : dict
        What every row depends on: rows made under other settings are dropped.
    folder : path, optional
        By default that of the downloads.
    """

    def __init__(self, name: str, settings: dict[str, Any], folder: Path | None = None) -> None:
        self.path = (folder or cache_folder() / "studies") / f"{name}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.rows: dict[str, Any] = self._read()

    def _read(self) -> dict[str, Any]:
        if self.path.is_file():
            held = json.loads(self.path.read_text("utf-8"))
            if held["settings"] == self.settings:
                rows: dict[str, Any] = held["rows"]
                return rows
        return {}

    def reread(self) -> None:
        """Take in the rows that other runs have kept meanwhile."""
        self.rows = {**self._read(), **self.rows}

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """Return the row of that key, made and kept if there is none yet.

        Rows that another run of the same settings has kept meanwhile stay.
        """
        if key not in self.rows:
            row = json.loads(json.dumps(make()))
            with FileLock(self.path.parent, wait=60.0):
                self.rows = {**self._read(), **self.rows, key: row}
                text = json.dumps({"settings": self.settings, "rows": self.rows})
                with atomic_path(self.path) as part:
                    part.write_text(text, "utf-8")
        return self.rows[key]
