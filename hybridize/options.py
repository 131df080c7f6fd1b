"""Settings that a user can choose: fields of dataclasses, each with what there is to say about it.

The command line makes its flags, their help and defaults from these fields, a configuration file is
read by them, and so is the reference in the documentation. Imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import MISSING, field, fields
from typing import Any

from hybridize.errors import InputError, setting


def option(default: Any, text: str, *, least: float | None = None, above: float | None = None) -> Any:
    """A field of a settings class. text: one short sentence for --help, without the default, which
    is added where it says something. least, above: what its value must not be below, or at or
    below."""
    return field(default=default, metadata={"text": text, "least": least, "above": above})


def described(settings: type) -> dict[str, str]:
    """Each option's help line, with its default."""
    found = {}
    for one in fields(settings):
        if "text" not in one.metadata:
            continue
        shown = one.default is not MISSING and one.default is not None and one.default is not False and one.default != ""
        found[one.name] = one.metadata["text"].removesuffix(".") + (f" [default: {one.default}]." if shown else ".")
    return found


def check_bounds(settings: Any) -> None:
    """InputError naming the first option that is given and outside its bounds."""
    for one in fields(settings):
        value = getattr(settings, one.name)
        least, above = one.metadata.get("least"), one.metadata.get("above")
        if value is None:
            continue
        if above is not None and not value > above:
            raise InputError(f"{setting(one.name)} {value} must be {'positive' if above == 0 else f'above {above}'}")
        if least is not None and not value >= least:
            raise InputError(f"{setting(one.name)} {value} must {'not be negative' if least == 0 else f'be at least {least}'}")
