"""Reads training rows from files or a hub data set and checks their fields before anything starts;
forms.py has the forms of rows.

Independent of tokenizers.
"""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hybridize.data.files import KNOWN, Labelled, Table, open_rows
from hybridize.data.forms import check_row
from hybridize.errors import InputError, first_line, setting
from hybridize.parsing import named_numbers

Row = dict[str, Any]


class Rows(Sequence[Row]):
    """Rows, each with a name (`file:line`) for error messages. A view: holds no rows in memory
    besides `rows`."""

    def __init__(self, name: str, rows: Sequence[Row], unit: str, begin: int = 0, end: int | None = None) -> None:
        self.name, self._rows, self._unit = name, rows, unit
        self._at = range(begin, len(rows) if end is None else end)

    def __len__(self) -> int:
        return len(self._at)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[self._at[index]]

    def where(self, index: int) -> str:
        """The name of a row."""
        place = self._at[index]
        return self._rows.where(place) if isinstance(self._rows, Labelled) else f"{self.name}:{self._unit}{place + 1}"

    def part(self, begin: int, end: int) -> Rows:
        """Rows begin..end - 1, named as in the whole."""
        return Rows(self.name, self._rows, self._unit, self._at.start + begin, self._at.start + end)

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """The concatenation of parts, in which each row keeps its name. A single part is returned
        as it is."""
        return parts[0] if len(parts) == 1 else cls(", ".join(part.name for part in parts), _Chain(parts), "")


class _Chain(Sequence[Row]):
    """The concatenation of several `Rows`."""

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


def find_data(data: str | None, teacher: Path | None) -> str:
    """`data`, or the first default that exists: $HYBRIDIZE_DATA, ./traces.jsonl, the teacher's own
    traces.jsonl. InputError if there is none."""
    candidates = [data, os.environ.get("HYBRIDIZE_DATA"), "traces.jsonl" if Path("traces.jsonl").is_file() else None]
    if teacher is not None and (teacher / "traces.jsonl").is_file():
        candidates.append(str(teacher / "traces.jsonl"))
    found = next((c for c in candidates if c), None)
    if found is None:
        raise InputError(f"no data: give {setting('data')} FILE, set HYBRIDIZE_DATA, or put a traces.jsonl into this directory")
    return found


def read_mixture(spec: str, limit: int | None = None, what: str = "data") -> list[tuple[Rows, float]]:
    """The sources of a specification, SPEC or SPEC=WEIGHT,SPEC=WEIGHT,..., each with its weight in
    the mixture of tokens, 1 by default; see read_rows.

    limit: most rows per source; what: the setting that the specification comes from.
    """
    if Path(spec).expanduser().is_file() or not set(spec) & set(",="):
        return [(read_rows(spec, limit, what), 1.0)]
    return [(read_rows(name, limit, what), weight) for name, weight in named_numbers(spec, what, 1.0)]


def read_rows(spec: str, limit: int | None = None, what: str = "data", check: Callable[[Any, str], None] | None = None) -> Rows:
    """The rows of a local file (see files.open_rows), or of a hub data set: its `train` split, or
    the split in ID:SPLIT.

    check: validates a row [default: check_row]. InputError if there are no rows, or naming file and
    line if a row lacks its fields.
    """
    path = Path(spec).expanduser()
    if path.is_file():
        rows = Rows(str(path), *open_rows(path))
    elif spec.startswith((".", "/", "~")) or path.suffix in KNOWN:
        raise InputError(f"{setting(what)} {spec} does not exist")
    else:
        rows = _read_hub(spec, what)
    if limit is not None:
        rows = rows.part(0, min(limit, len(rows)))
    if not len(rows):
        raise InputError(f"{spec} has no rows")
    for index in range(len(rows)):
        (check or check_row)(rows[index], rows.where(index))
    return rows


def _read_hub(spec: str, what: str) -> Rows:
    from datasets import load_dataset

    name, _, split = spec.partition(":")
    try:
        return Rows(spec, Table(load_dataset(name, split=split or "train")), "row ")
    except Exception as error:  # datasets raises many kinds for an unavailable data set
        raise InputError(
            f"{setting(what)} {spec} is not a local file, and could not be fetched from the hub: {first_line(error)}"
        ) from error
