"""How long work speaks to whoever started it. The library says what is worth saying; who shows it
decides how."""

from __future__ import annotations


class Notes:
    """Says nothing; the command line's `Output` is one that does."""

    def note(self, text: str) -> None:
        """A line about what is going on."""

    def warn(self, text: str) -> None:
        """A line about what may not be as the user thinks."""

    def doing(self, text: str) -> None:
        """What begins now and may take long."""

    def progress(self, text: str, last: bool = False) -> None:
        """The latest state of what is going on. last: no other follows."""


SILENT = Notes()
