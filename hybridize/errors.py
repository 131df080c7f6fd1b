"""The two kinds of errors that users see; the command line maps each to an exit code.

Messages name settings as in Python; the command line shows its flags instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_MARK = "\u2063"  # invisible, and used in no other text of this project


def setting(name: str, value: bool | None = None) -> str:
    """A setting's name, marked so that `with_settings` finds it in a message. value: the side of a
    switch that is meant, if it matters."""
    return f"{_MARK}{name}{'' if value is None else f'={value}'}{_MARK}"


def with_settings(message: str, shown: Callable[[str], str] = lambda name: name) -> str:
    """The message with each setting replaced by `shown(name)`, by default by its name in Python.
    For a switch that is off, the name is of the form `calibrate=False`."""
    return re.sub(f"{_MARK}([^{_MARK}]*){_MARK}", lambda found: shown(found[1]), message)


class _Explained(Exception):
    """An error whose message names settings; formatted into another message it keeps their marks."""

    def __str__(self) -> str:
        return with_settings(super().__str__())

    def __format__(self, spec: str) -> str:
        return format(super().__str__(), spec)


class InputError(_Explained, ValueError):
    """The user's input cannot be used; nothing was started or written (exit code 2)."""


class WorkError(_Explained, RuntimeError):
    """The work failed after it had started (exit code 1)."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
