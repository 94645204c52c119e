"""Patterns of names, as `include`, `exclude` and `weights` take them."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase


def matches(pattern: str, names: Collection[str]) -> set[str]:
    """Return the names that a pattern stands for; one that is itself a name is that alone.

    >>> sorted(matches("w[0]", ["w[0]", "w0"])), sorted(matches("w*", ["w[0]", "w0"]))
    (['w[0]'], ['w0', 'w[0]'])
    """
    if pattern in names:
        return {pattern}
    return {name for name in names if fnmatchcase(name, pattern)}
