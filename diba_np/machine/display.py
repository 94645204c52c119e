"""`Display`: how far something is, on standard error; `shown`: texts for a terminal."""

from __future__ import annotations

import importlib.util
import sys
import time
from typing import Any


def shown(text: str) -> str:
    """Return a text for a terminal: what is no character to be seen becomes an escape.

    >>> shown("a\\x1b[2Jb\\nc ü")
    'a\\\\x1b[2Jb\\\\nc ü'
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


class Display:
    """A tqdm bar where tqdm is installed, else a line now and then, on standard error.

    Parameters
    ----------
    unit : str
        What is counted, in the plural; empty for steps without a name.
    pause : float
        Seconds between two lines, at least.
    """

    def __init__(self, unit: str = "", pause: float = 0.0) -> None:
        self.unit, self.pause = unit, pause
        self._bar: Any = None
        self._title: str | None = None
        self._last_line = time.monotonic()

    def show(self, done: int, total: int, title: str = "", text: str = "") -> None:
        """Show that `done` of `total` are done; another title begins another bar.

        Parameters
        ----------
        done, total : int
        title : str
            What is under way.
        text : str
            What else there is to say, after the numbers.
        """
        title, text = shown(title), shown(text)  # with names that others chose
        if importlib.util.find_spec("tqdm") is not None:
            self._show_bar(done, total, title, text)
        elif time.monotonic() - self._last_line >= self.pause:
            self._last_line = time.monotonic()
            count = f"{done}/{total} {self.unit}".rstrip()
            begin = f"{title}: {count}" if title else count
            sys.stderr.write(f"{begin}, {text}\n" if text else f"{begin}\n")
            sys.stderr.flush()

    def _show_bar(self, done: int, total: int, title: str, text: str) -> None:
        from tqdm import tqdm

        if self._bar is None or title != self._title:
            self.close()
            named = {"unit": f" {self.unit}"} if self.unit else {}
            self._bar = tqdm(total=total, desc=title or None, file=sys.stderr, **named)
            self._title = title
        if text:
            self._bar.set_postfix_str(text, refresh=False)
        self._bar.total = total  # a search may be given more to do on its way
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
