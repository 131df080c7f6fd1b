"""The file that answers are written to: lines as they come into FILE.part, FILE itself, in order, once all are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hybridize.checkpoint.writer import write_text_atomic
from hybridize.errors import InputError


class Traces:
    """settings: all that decides the answers; another run's are not gone on with. InputError where something is in the way."""

    def __init__(self, path: Path, settings: dict[str, Any], resume: bool, overwrite: bool) -> None:
        self.path, self.part = path, path.with_name(path.name + ".part")
        self.lines: dict[tuple[int, int], dict[str, Any]] = {}
        if path.is_dir():
            raise InputError(f"{path} is a directory; it names a file")
        if path.exists() and not overwrite:
            raise InputError(f"{path} exists; give another -o or --overwrite")
        if self.part.exists() and not (resume or overwrite):
            raise InputError(f"{self.part} is an unfinished run; --resume goes on with it, --overwrite starts anew")
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = self._read(settings) if resume and self.part.exists() else 0
        self.file = self.part.open("r+b" if kept else "wb")
        self.file.truncate(kept)
        self.file.seek(kept)
        if not kept:
            self._put({"settings": settings})

    def _read(self, settings: dict[str, Any]) -> int:
        """Takes up whole lines; returns how many bytes of the file they are."""
        kept, data = 0, self.part.read_bytes()
        for number, line in enumerate(data.splitlines(keepends=True)):
            if not line.endswith(b"\n"):  # torn off when the run was killed
                break
            try:
                found = json.loads(line)
                if number == 0:
                    before = found["settings"]
                else:
                    self.lines[int(found["row"]), int(found["sample"])] = found
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{self.part}:{number + 1} is no line of a run of generate; --overwrite starts anew"
                ) from error
            if number == 0 and before != settings:
                other = sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key))
                raise InputError(f"{self.part} was begun with another {', '.join(other)}; --overwrite starts anew")
            kept += len(line)
        return kept

    def _put(self, line: dict[str, Any]) -> None:
        self.file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self.file.flush()

    def add(self, key: tuple[int, int], line: dict[str, Any]) -> None:
        self.lines[key] = {**line, "row": key[0], "sample": key[1]}
        self._put(self.lines[key])

    def finish(self) -> list[dict[str, Any]]:
        """All answers in the order of their prompts. Empty ones are not written: there is nothing to learn from them."""
        lines = [self.lines[key] for key in sorted(self.lines)]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines if line["tokens"])
        write_text_atomic(self.path, text)
        self.file.close()
        self.part.unlink()
        return lines
