"""The interface through which long work reports notes, warnings and progress. The library decides
what to report, the caller how to show it."""

from __future__ import annotations


class Notes:
    """Discards everything; the command line's `Output` is a subclass that shows it."""

    def note(self, text: str) -> None:
        """A line of information."""

    def warn(self, text: str) -> None:
        """A line about something that the user may not expect."""

    def doing(self, text: str) -> None:
        """Names a step that begins now and may take long."""

    def progress(self, text: str, last: bool = False) -> None:
        """The latest state of the current step. last: no other state follows."""


SILENT = Notes()
