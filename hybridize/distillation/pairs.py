"""Flags that are lists of names with numbers: `a=0.7,b=0.3`."""

from __future__ import annotations

from hybridize.errors import InputError


def named_numbers(text: str, flag: str, default: float | None = None) -> list[tuple[str, float]]:
    """NAME=NUMBER, with commas between; a NAME alone has the default, where there is one.

    The last = of a part counts. InputError that names `flag` where a name is missing or a number is not positive and finite.
    """
    found = []
    for part in (part.strip() for part in text.split(",")):
        name, equals, number = part.rpartition("=") if "=" in part else (part, "", "")
        try:
            value = float(number) if equals or default is None else default
        except ValueError:
            value = 0.0
        if not name or not 0 < value < float("inf"):
            raise InputError(f"{flag} {part!r}: after a name and = there must be a positive number")
        found.append((name, value))
    return found
