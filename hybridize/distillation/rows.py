"""Training rows from jsonl, parquet, plain text or a hub data set, checked field by field before anything starts.

A row has `messages` (chat), `prompt` and `response`, or `text`. Knows nothing of tokenizers.
"""

from __future__ import annotations

import bisect
import itertools
import json
import os
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hybridize.distillation.pairs import named_numbers
from hybridize.errors import InputError, first_line

Row = dict[str, Any]


class Rows(Sequence[Row]):
    """Rows with a name for each (`file:line`), so that an error can point at it. Holds no more of them than `rows` does."""

    def __init__(self, name: str, rows: Sequence[Row], unit: str, begin: int = 0, end: int | None = None) -> None:
        self.name, self._rows, self._unit = name, rows, unit
        self._at = range(begin, len(rows) if end is None else end)

    def __len__(self) -> int:
        return len(self._at)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[self._at[index]]

    def where(self, index: int) -> str:
        place = self._at[index]
        return self._rows.where(place) if isinstance(self._rows, _Chain) else f"{self.name}:{self._unit}{place + 1}"

    def part(self, begin: int, end: int) -> Rows:
        """Rows begin..end - 1, still called by their places in the whole."""
        return Rows(self.name, self._rows, self._unit, self._at.start + begin, self._at.start + end)

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """One after the other; each row keeps its name. One part is itself."""
        return parts[0] if len(parts) == 1 else cls(", ".join(part.name for part in parts), _Chain(parts), "")


class _Chain(Sequence[Row]):
    """Several rows, one after the other."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts, self._ends = parts, [0, *itertools.accumulate(len(part) for part in parts)]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: Any) -> Any:
        part, place = self._find(index)
        return part[place]

    def where(self, index: int) -> str:
        part, place = self._find(index)
        return part.where(place)

    def _find(self, index: int) -> tuple[Rows, int]:
        which = bisect.bisect_right(self._ends, index) - 1
        return self._parts[which], index - self._ends[which]


class _Lines(Sequence[Any]):
    """The lines of a JSON-lines file, read off the disk one by one: eight bytes of memory a line. InputError where the file
    was changed meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path, self._ends, self._file = path, array("q"), path.open("rb")
        self._before = self._state()
        at = last = 0
        for line in self._file:
            at += len(line)
            self._ends.append(at)
            last = len(self._ends) if line.strip() else last
        del self._ends[last:]

    def _state(self) -> tuple[int, int]:
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        begin, end = self._ends[index - 1] if index else 0, self._ends[index]
        line = os.pread(self._file.fileno(), end - begin, begin)  # any thread may: there is no position to share
        if self._state() != self._before:
            raise InputError(f"{self.path} was changed while it was in use")
        try:
            return json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path}:{index + 1} is not UTF-8 text: {error}") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.path}:{index + 1} is not JSON: {error}") from error


def find_data(flag: str | None, teacher: Path | None) -> str:
    """What `--data` means when omitted: $HYBRIDIZE_DATA, ./traces.jsonl, then the teacher's own traces.jsonl."""
    candidates = [flag, os.environ.get("HYBRIDIZE_DATA"), "traces.jsonl" if Path("traces.jsonl").is_file() else None]
    if teacher is not None and (teacher / "traces.jsonl").is_file():
        candidates.append(str(teacher / "traces.jsonl"))
    found = next((c for c in candidates if c), None)
    if found is None:
        raise InputError("no data: give --data FILE, set HYBRIDIZE_DATA, or put a traces.jsonl into this folder")
    return found


def read_mixture(spec: str, limit: int | None = None, flag: str = "--data") -> list[tuple[Rows, float]]:
    """The sources of SPEC, or of SPEC=WEIGHT,SPEC=WEIGHT,..., each with its share of the tokens, 1 unless given; see read_rows.

    limit: rows of each; flag: what a message calls SPEC.
    """
    if Path(spec).expanduser().is_file() or not set(spec) & set(",="):
        return [(read_rows(spec, limit, flag), 1.0)]
    return [(read_rows(name, limit, flag), weight) for name, weight in named_numbers(spec, flag, 1.0)]


def read_rows(
    spec: str, limit: int | None = None, flag: str = "--data", check: Callable[[Any, str], None] | None = None
) -> Rows:
    """Rows of a local .jsonl (or .json, a row a line), .parquet or .txt file, or of a hub data set:
    its `train` split, or ID:SPLIT.

    A .txt file is one `text` row. check: what a row must be [default: check_row]. Raises InputError naming file and line when
    there are no rows or one lacks its fields.
    """
    path = Path(spec).expanduser()
    if path.is_file():
        rows = _read_file(path)
    elif spec.startswith((".", "/", "~")) or path.suffix in (".jsonl", ".json", ".parquet", ".txt"):
        raise InputError(f"{flag} {spec} does not exist")
    else:
        rows = _read_hub(spec, flag)
    if limit is not None:
        rows = rows.part(0, min(limit, len(rows)))
    if not len(rows):
        raise InputError(f"{spec} has no rows")
    for index in range(len(rows)):
        (check or check_row)(rows[index], rows.where(index))
    return rows


def _read_file(path: Path) -> Rows:
    if path.suffix == ".parquet":
        from datasets import Dataset, disable_progress_bars

        disable_progress_bars()
        try:
            return Rows(str(path), Dataset.from_parquet(str(path)), "row ")  # type: ignore[arg-type]
        except Exception as error:  # datasets wraps what pyarrow raises
            raise InputError(f"{path} is not a readable parquet file: {first_line(error)}") from error
    if path.suffix != ".txt":
        return Rows(str(path), _Lines(path), "")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error
    return Rows(str(path), [{"text": text}] if text.strip() else [], "")


def _read_hub(spec: str, flag: str) -> Rows:
    from datasets import load_dataset

    name, _, split = spec.partition(":")
    try:
        return Rows(spec, load_dataset(name, split=split or "train"), "row ")
    except Exception as error:  # datasets raises many kinds, all meaning: not to be had
        raise InputError(f"{flag} {spec} is no local file, and the hub did not give it: {first_line(error)}") from error


def check_prompt(row: Any, where: str) -> None:
    """InputError naming the row unless there is something to answer: `messages`, less a last answer, or a `prompt`."""
    _check_object(row, where)
    if "messages" in row:
        messages = _check_messages(row, where)
        if len(messages) == 1 and messages[0]["role"] == "assistant":
            raise InputError(f"{where}: there is no message before the assistant's")
    elif not isinstance(row.get("prompt"), str) or not row["prompt"]:
        raise InputError(f"{where} has neither `messages` nor a `prompt` with text")


def _check_object(row: Any, where: str) -> None:
    if not isinstance(row, dict):
        raise InputError(f"{where} is not a JSON object")


def _check_messages(row: Row, where: str) -> list[dict[str, str]]:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: `messages` must be a list with at least one message")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise InputError(f"{where}: each message needs a `role` and a `content`, both text")
    return messages


def check_row(row: Any, where: str) -> None:
    """InputError naming the row unless it has one of the three forms with text in every field."""
    _check_object(row, where)
    if "messages" in row:
        messages = _check_messages(row, where)
        if not any(message["role"] == "assistant" for message in messages):
            raise InputError(f"{where}: there is no assistant message to learn from")
        if not any(message["content"] for message in messages if message["role"] == "assistant"):
            raise InputError(f"{where}: the assistant says nothing")
    elif "prompt" in row or "response" in row:
        if not all(isinstance(row.get(key), str) for key in ("prompt", "response")):
            raise InputError(f"{where}: `prompt` and `response` must both be there, as text")
        if not row["response"]:
            raise InputError(f"{where}: the response is empty")
    elif not isinstance(row.get("text"), str):
        raise InputError(f"{where} has neither `messages`, nor `prompt` and `response`, nor `text`")
    elif not row["text"]:
        raise InputError(f"{where}: the text is empty")
