"""The file that answers are written to: lines as they come into FILE.part, FILE itself, in order, once all are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hybridize.checkpoint.atomic import write_text_atomic
from hybridize.checkpoint.journal import Journal
from hybridize.checkpoint.writer import check_writable
from hybridize.errors import InputError


class Traces:
    """settings: all that decides the answers; another run's are not gone on with. InputError where something is in the way."""

    def __init__(self, path: Path, settings: dict[str, Any], resume: bool, overwrite: bool) -> None:
        self.path = path
        if path.is_dir():
            raise InputError(f"{path} is a directory; it names a file")
        part = path.with_name(path.name + ".part")
        if path.exists() and not overwrite and not (resume and part.exists()):  # both: killed just before the end
            raise InputError(f"{path} exists; give another -o or --overwrite")
        check_writable(path)
        self.journal = Journal(part, settings, resume, overwrite)
        try:
            self.lines = {(int(line["row"]), int(line["sample"])): line for line in self.journal.lines}
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{self.journal.path} is not an unfinished run of generate; --overwrite starts anew") from error

    def add(self, key: tuple[int, int], line: dict[str, Any]) -> None:
        self.lines[key] = {**line, "row": key[0], "sample": key[1]}
        self.journal.put(self.lines[key])

    def finish(self) -> list[dict[str, Any]]:
        """All answers in the order of their prompts. Empty ones are not written: there is nothing to learn from them."""
        lines = [self.lines[key] for key in sorted(self.lines)]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines if line["tokens"])
        write_text_atomic(self.path, text)
        self.journal.remove()
        return lines
