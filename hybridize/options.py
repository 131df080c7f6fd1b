"""Settings that a user can choose: fields of dataclasses, each with a description and bounds.

The flags of the command line with their help and defaults, the keys of configuration files and the
reference in the documentation are all derived from these fields. Imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import MISSING, field, fields
from typing import Any

from hybridize.errors import InputError, setting

CALIBRATION_TOKENS = 32768  # default of everything that calibrates new mixers


def option(default: Any, text: str, *, least: float | None = None, above: float | None = None) -> Any:
    """A field of a settings class. text: one short sentence for the help, without the default,
    which `described` adds. least, above: inclusive and exclusive lower bounds of the value."""
    return field(default=default, metadata={"text": text, "least": least, "above": above})


def described(settings: type) -> dict[str, str]:
    """Each option's help line, with its default unless that is None, False or an empty text."""
    found = {}
    for one in fields(settings):
        if "text" not in one.metadata:
            continue
        shown = one.default is not MISSING and one.default is not None and one.default is not False and one.default != ""
        found[one.name] = one.metadata["text"].removesuffix(".") + (f" [default: {one.default}]." if shown else ".")
    return found


def check_bounds(settings: Any) -> None:
    """InputError naming the first option outside its bounds; None is always allowed."""
    for one in fields(settings):
        value = getattr(settings, one.name)
        least, above = one.metadata.get("least"), one.metadata.get("above")
        if value is None:
            continue
        if above is not None and not value > above:
            raise InputError(f"{setting(one.name)} {value} must be {'positive' if above == 0 else f'above {above}'}")
        if least is not None and not value >= least:
            raise InputError(f"{setting(one.name)} {value} must {'not be negative' if least == 0 else f'be at least {least}'}")
