"""What a long run is recognised by when it goes on: its settings and digests of its data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# characters of a value that a message shows whole
_SHOWN = 40


def as_stored(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return a fingerprint as JSON gives it back."""
    stored: dict[str, Any] = json.loads(json.dumps(fingerprint))
    return stored


def differences(kept: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return "name was this and is now that" for what two stored fingerprints differ in."""
    names = sorted(name for name in kept.keys() | now.keys() if kept.get(name) != now.get(name))
    return [f"{n} was {_short(kept.get(n))} and is now {_short(now.get(n))}" for n in names]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:12]}..."
