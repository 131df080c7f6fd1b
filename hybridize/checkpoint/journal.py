"""A file of JSON lines to which a long run appends its results, so that they survive a crash.

The first line holds the settings of the run; only a run with the same settings continues it.
"""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

from hybridize.errors import InputError, setting


def part_of(path: Path) -> Path:
    """The path of the lines while the file is incomplete."""
    return path.with_name(path.name + ".part")


def check_journal(path: Path, resume: bool, overwrite: bool) -> bool:
    """Whether an unfinished run has left results in the file. InputError if it has and neither
    `resume` nor `overwrite` is set."""
    if not path.exists():
        return False
    with path.open("rb") as lines:
        begun = (
            sum(1 for _, line in zip(range(2), lines, strict=False) if line.endswith(b"\n")) > 1
        )  # a line of settings alone has no results
    if begun and not (resume or overwrite):
        raise InputError(
            f"{path} holds an unfinished run; continue it with {setting('resume')}, or start over with {setting('overwrite')}"
        )
    return begun


class Journal:
    """Appends lines to the file. lines: those of the run that this one continues (`resume`).
    InputError if the file has lines of another run, or is being written by another process."""

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
        """Reads the complete lines into `lines` and returns their size in bytes; 0 if they belong
        to another run that `overwrite` replaces."""
        kept = 0
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True)):
            if not line.endswith(b"\n"):  # cut off when the run was killed
                break
            try:
                found = json.loads(line)
                before = found["settings"] if number == 0 else settings
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{self.path}:{number + 1} is not a line of an unfinished run; start over with {setting('overwrite')}"
                ) from error
            if before != settings and overwrite:
                return 0
            if before != settings:
                other = sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key))
                raise InputError(
                    f"{self.path} was started with another {', '.join(other)}; start over with {setting('overwrite')}"
                )
            self.lines += [found] if number else []
            kept += len(line)
        return kept

    def put(self, line: dict[str, Any]) -> None:
        self.file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self.file.flush()

    def remove(self) -> None:
        """Closes and deletes the file, when its content is stored elsewhere."""
        self.file.close()
        self.path.unlink()
