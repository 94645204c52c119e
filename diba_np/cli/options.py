"""What options of the command line have in common: their types, and those of a search."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from diba_np.search.options import SHARED, SearchOptions


def positive(kind: type, most: float = sys.float_info.max) -> Callable[[str], Any]:
    """Return what parses a number above 0, up to the most."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not 0 < value <= most:
            rule = "be above 0" if most == sys.float_info.max else f"lie in (0, {most:g}]"
            raise argparse.ArgumentTypeError(f"must {rule}, got {text}")
        return value

    parse.__name__ = kind.__name__  # what argparse calls it in "invalid int value"
    return parse


def within(kind: type, least: float, most: float = sys.float_info.max) -> Callable[[str], Any]:
    """Return what parses a number in an interval."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not least <= value <= most:
            rule = f"lie in [{least:g}, {most:g}]"
            if most == sys.float_info.max:
                rule = f"be at least {least:g}" if least > -most else "be finite"
            raise argparse.ArgumentTypeError(f"must {rule}, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def share(text: str) -> float:
    """Parse a number above 0, or a fraction as 1/32."""
    above, _, below = text.partition("/")
    return float(positive(float)(above)) / float(positive(float)(below or "1"))


share.__name__ = "number or fraction"


def scale_bits(text: str) -> Any:
    """Parse 16, 32, a code width, three of them as in 4,3,4, or auto."""
    from diba_np.search.options import check_scales

    parts = text.split(",")
    if text == "auto":
        return text
    widths = int(text) if len(parts) == 1 else tuple(int(part) for part in parts)
    try:
        return check_scales(widths)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


scale_bits.__name__ = "scale bits"


def terms(text: str) -> Any:
    """Parse a number of terms, or auto."""
    return text if text == "auto" else positive(int)(text)


terms.__name__ = "number of terms"


MATRIX = "the matrix, (m, n) real numbers"

# options of a search that the points of a curve have in common
SWEPT = (*SHARED, "time_limit", "threads")


def _type_of(rule: Any, name: str) -> Callable[[str], Any]:
    """Return what parses an option of a search by the rule of its field."""
    if name == "scale_bits":
        return scale_bits
    if name == "terms":
        return terms
    kind: type = rule["kind"]
    if rule["above"] is not None or (kind is int and rule["least"] == 1):
        return positive(kind)
    most = sys.float_info.max if rule["most"] is None else rule["most"]
    return within(kind, rule["least"], most)


def add_search_options(command: argparse.ArgumentParser, *names: str, **defaults: Any) -> None:
    """Add options of a search to a command, from the fields of `SearchOptions`.

    Parameters
    ----------
    command : ArgumentParser
    names : str
        Fields; all without any.
    defaults
        Where the command's differ from the fields'.
    """
    for one in fields(SearchOptions):
        if names and one.name not in names:
            continue
        rule = one.metadata
        how: dict[str, Any] = {"default": defaults.get(one.name, one.default), "help": rule["help"]}
        if rule["choices"]:
            how["choices"] = rule["choices"]
        else:
            how |= {"type": _type_of(rule, one.name), "metavar": rule["metavar"]}
        command.add_argument("--" + one.name.replace("_", "-"), **how)


def search_options(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the options of a search that were parsed, as keywords; all without names."""
    known = names or tuple(one.name for one in fields(SearchOptions))
    return {name: getattr(args, name) for name in known}
