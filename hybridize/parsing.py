"""Settings that are written as lists: `a=0.7,b=0.3` and `3,5-8`."""

from __future__ import annotations

from hybridize.errors import InputError, setting


def named_numbers(text: str, what: str, default: float | None = None) -> list[tuple[str, float]]:
    """NAME=NUMBER, with commas between; a NAME alone has the default, where there is one.

    The last = of a part counts. InputError that names `what`, a setting, where a name is missing or
    a number is not positive and finite.
    """
    found = []
    for part in (part.strip() for part in text.split(",")):
        name, equals, number = part.rpartition("=") if "=" in part else (part, "", "")
        try:
            value = float(number) if equals or default is None else default
        except ValueError:
            value = 0.0
        if not name or not 0 < value < float("inf"):
            raise InputError(f"{setting(what)} {part!r}: after a name and = there must be a positive number")
        found.append((name, value))
    return found


def parse_indices(text: str, what: str = "indices") -> list[int]:
    """`3,5-8` -> [3, 5, 6, 7, 8]; InputError that names `what`, a setting, on anything else."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise InputError(f"{setting(what)} {text!r} is not a list like 3,5-8")
        low, high = int(first), int(last or first)
        if high < low:
            raise InputError(f"{setting(what)}: the range {part.strip()} runs backwards")
        found.extend(range(low, high + 1))
    if len(set(found)) != len(found):
        raise InputError(f"{setting(what)} {text!r} names a layer twice")
    return sorted(found)


def check_either(why: str, one: str, first: object, other: str, second: object) -> None:
    """InputError unless exactly one of two settings is given. why, one, other: how the message has
    it."""
    if (first is None) == (second is None):
        raise InputError(f"{why}: either {one} or {other}")
