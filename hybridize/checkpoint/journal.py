"""A file of JSON lines that a long run writes as it goes, so that what it has found is not lost
with it.

The first line holds the settings of the run; a run with others does not go on from it.
"""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

from hybridize.errors import InputError, setting


def part_of(path: Path) -> Path:
    """Where the lines of a file lie until it is whole."""
    return path.with_name(path.name + ".part")


def check_journal(path: Path, resume: bool, overwrite: bool) -> bool:
    """Whether an unfinished run has left answers there. InputError where it has, and neither flag
    says what to do with them."""
    if not path.exists():
        return False
    with path.open("rb") as lines:
        begun = (
            sum(1 for _, line in zip(range(2), lines, strict=False) if line.endswith(b"\n")) > 1
        )  # settings alone are no loss
    if begun and not (resume or overwrite):
        raise InputError(
            f"{path} is an unfinished run; {setting('resume')} goes on with it, {setting('overwrite')} starts anew"
        )
    return begun


class Journal:
    """lines: those of the run before, if this one goes on with it (`resume`). InputError where
    another run is in the way."""

    def __init__(self, path: Path, settings: dict[str, Any], resume: bool, overwrite: bool) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        begun = check_journal(path, resume, overwrite)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("ab+")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"{path} is being written by another process") from error
        kept = self._read(settings, overwrite) if resume and begun else 0
        self.file.truncate(kept)
        if not kept:
            self.put({"settings": settings})

    def _read(self, settings: dict[str, Any], overwrite: bool) -> int:
        """Takes up whole lines; returns how many bytes of the file they are. Those of another run
        go where `overwrite` is."""
        kept = 0
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True)):
            if not line.endswith(b"\n"):  # torn off when the run was killed
                break
            try:
                found = json.loads(line)
                before = found["settings"] if number == 0 else settings
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{self.path}:{number + 1} is no line of an unfinished run; {setting('overwrite')} starts anew"
                ) from error
            if before != settings and overwrite:
                return 0
            if before != settings:
                other = sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key))
                raise InputError(f"{self.path} was begun with another {', '.join(other)}; {setting('overwrite')} starts anew")
            self.lines += [found] if number else []
            kept += len(line)
        return kept

    def put(self, line: dict[str, Any]) -> None:
        self.file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self.file.flush()

    def remove(self) -> None:
        """Once all of it is elsewhere."""
        self.file.close()
        self.path.unlink()
