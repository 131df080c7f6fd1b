"""Training rows from jsonl, parquet, plain text or a hub data set, checked field by field before anything starts.

A row has `messages` (chat), `prompt` and `response`, or `text`. Knows nothing of tokenizers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybridize.distillation.pairs import named_numbers
from hybridize.errors import InputError

Row = dict[str, Any]


class Rows(Sequence[Row]):
    """Rows with a name for each (`file:line`), so that an error can point at it."""

    def __init__(self, name: str, rows: Sequence[Row], unit: str, first: int = 1) -> None:
        self.name, self._rows, self._unit, self._first = name, rows, unit, first
        self._names: list[str] = []

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """One after the other; each row keeps its name. One part is itself."""
        if len(parts) == 1:
            return parts[0]
        whole = cls(", ".join(part.name for part in parts), [row for part in parts for row in part], "")
        whole._names = [part.where(index) for part in parts for index in range(len(part))]
        return whole

    def where(self, index: int) -> str:
        return self._names[index] if self._names else f"{self.name}:{self._unit}{index + self._first}"

    def part(self, begin: int, end: int) -> Rows:
        """Rows begin..end - 1, still called by their places in the whole."""
        return Rows(self.name, [self._rows[i] for i in range(begin, end)], self._unit, self._first + begin)


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


def read_rows(spec: str, limit: int | None = None, flag: str = "--data") -> Rows:
    """Rows of a local .jsonl (or .json, a row a line), .parquet or .txt file, or of a hub data set:
    its `train` split, or ID:SPLIT.

    A .txt file is one `text` row. Raises InputError naming file and line when there are no rows or one lacks its fields.
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
        check_row(rows[index], rows.where(index))
    return rows


def _read_file(path: Path) -> Rows:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            return Rows(str(path), pyarrow.parquet.read_table(path).to_pylist(), "row ")
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is not a readable parquet file: {error}") from error
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error
    if path.suffix == ".txt":
        return Rows(str(path), [{"text": text}] if text.strip() else [], "")
    rows: list[Row] = []
    for number, line in enumerate(text.rstrip().split("\n") if text.strip() else [], start=1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number} is not JSON: {error}") from error
    return Rows(str(path), rows, "")


def _read_hub(spec: str, flag: str) -> Rows:
    from datasets import load_dataset

    name, _, split = spec.partition(":")
    try:
        return Rows(spec, load_dataset(name, split=split or "train"), "row ")
    except Exception as error:  # datasets raises many kinds, all meaning: not to be had
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{flag} {spec} is no local file, and the hub did not give it: {first}") from error


def check_row(row: Any, where: str) -> None:
    """InputError naming the row unless it has one of the three forms with text in every field."""
    if not isinstance(row, dict):
        raise InputError(f"{where} is not a JSON object")
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or not messages:
            raise InputError(f"{where}: `messages` must be a list with at least one message")
        for message in messages:
            if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
                raise InputError(f"{where}: each message needs a `role` and a `content`, both text")
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
