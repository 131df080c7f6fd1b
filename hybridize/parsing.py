"""Parses settings that are written as lists: `a=0.7,b=0.3` and `3,5-8`."""

from __future__ import annotations

from hybridize.errors import InputError, setting


def named_numbers(text: str, what: str, default: float | None = None) -> list[tuple[str, float]]:
    """The pairs of a comma-separated list of NAME=NUMBER; a NAME alone gets the default, if any.

    A name may contain =, since the last one separates. InputError naming the setting `what` if a
    name is missing or a number is not positive and finite.
    """
    found = []
    for part in (part.strip() for part in text.split(",")):
        name, equals, number = part.rpartition("=") if "=" in part else (part, "", "")
        try:
            value = float(number) if equals or default is None else default
        except ValueError:
            value = 0.0
        if not name or not 0 < value < float("inf"):
            raise InputError(f"{setting(what)} {part!r} must have the form NAME=NUMBER, with a positive number")
        found.append((name, value))
    return found


def parse_indices(text: str, what: str = "indices") -> list[int]:
    """`3,5-8` -> [3, 5, 6, 7, 8]. InputError naming the setting `what` if the text has no such form
    or names a layer twice."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise InputError(f"{setting(what)} {text!r} is not a list like 3,5-8")
        low, high = int(first), int(last or first)
        if high < low:
            raise InputError(f"{setting(what)}: the range {part.strip()} ends before it begins")
        found.extend(range(low, high + 1))
    if len(set(found)) != len(found):
        raise InputError(f"{setting(what)} {text!r} names a layer twice")
    return sorted(found)


def check_either(why: str, one: str, first: object, other: str, second: object) -> None:
    """InputError unless exactly one of two settings is given. The message is `why`, followed by the
    settings' names `one` and `other`."""
    if (first is None) == (second is None):
        raise InputError(f"{why}: either {one} or {other}")
