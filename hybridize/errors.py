"""What can go wrong, by whose doing: the command line maps each kind to an exit code.

Messages name settings as Python has them; the command line shows its flags in their place.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_MARK = "\u2063"  # invisible, and in no text of ours


def setting(name: str, value: bool | None = None) -> str:
    """A setting's name inside a message, for `with_settings` to find. value: of a switch, where one
    side of it is meant."""
    return f"{_MARK}{name}{'' if value is None else f'={value}'}{_MARK}"


def with_settings(message: str, shown: Callable[[str], str] = lambda name: name) -> str:
    """A message with each setting as `shown` has it, `calibrate=False` for a switch that is off; by
    default as in Python."""
    return re.sub(f"{_MARK}([^{_MARK}]*){_MARK}", lambda found: shown(found[1]), message)


class _Explained(Exception):
    """Its text names settings; formatted into another error's message it keeps them marked."""

    def __str__(self) -> str:
        return with_settings(super().__str__())

    def __format__(self, spec: str) -> str:
        return format(super().__str__(), spec)


class InputError(_Explained, ValueError):
    """What the user gave cannot be used; nothing has started and nothing was written (exit 2)."""


class WorkError(_Explained, RuntimeError):
    """The work failed after it had started (exit 1)."""


def first_line(error: BaseException) -> str:
    """What an error of another library says, short enough for a sentence of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
