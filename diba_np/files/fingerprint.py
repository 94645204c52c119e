"""What a long run is recognised by when it goes on: its settings and digests of its data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# most characters of a value that a message shows; a digest or a list of arrays is no help
_SHOWN = 40


def as_stored(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return a fingerprint as JSON gives it back."""
    stored: dict[str, Any] = json.loads(json.dumps(fingerprint))
    return stored


def differences(kept: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return "name was this and is now that" for what two stored fingerprints differ in.

    Where both are too long to be shown "not the same name".
    """
    names = sorted(name for name in kept.keys() | now.keys() if kept.get(name) != now.get(name))
    return [
        _difference(name, json.dumps(kept.get(name)), json.dumps(now.get(name))) for name in names
    ]


def _difference(name: str, was: str, now: str) -> str:
    if min(len(was), len(now)) > _SHOWN:
        return f"not the same {name}"
    return f"{name} was {_short(was)} and is now {_short(now)}"


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:12]}..."
