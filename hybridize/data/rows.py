"""Training rows from files or a hub data set, checked field by field before anything starts; see
forms.py for what a row is.

Knows nothing of tokenizers.
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
    """Rows with a name for each (`file:line`), so that an error can point at it. Holds no more of
    them than `rows` does."""

    def __init__(self, name: str, rows: Sequence[Row], unit: str, begin: int = 0, end: int | None = None) -> None:
        self.name, self._rows, self._unit = name, rows, unit
        self._at = range(begin, len(rows) if end is None else end)

    def __len__(self) -> int:
        return len(self._at)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[self._at[index]]

    def where(self, index: int) -> str:
        place = self._at[index]
        return self._rows.where(place) if isinstance(self._rows, Labelled) else f"{self.name}:{self._unit}{place + 1}"

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


def find_data(data: str | None, teacher: Path | None) -> str:
    """`data`, or what it is when omitted: $HYBRIDIZE_DATA, ./traces.jsonl, then the teacher's own
    traces.jsonl."""
    candidates = [data, os.environ.get("HYBRIDIZE_DATA"), "traces.jsonl" if Path("traces.jsonl").is_file() else None]
    if teacher is not None and (teacher / "traces.jsonl").is_file():
        candidates.append(str(teacher / "traces.jsonl"))
    found = next((c for c in candidates if c), None)
    if found is None:
        raise InputError(f"no data: give {setting('data')} FILE, set HYBRIDIZE_DATA, or put a traces.jsonl into this folder")
    return found


def read_mixture(spec: str, limit: int | None = None, what: str = "data") -> list[tuple[Rows, float]]:
    """The sources of SPEC, or of SPEC=WEIGHT,SPEC=WEIGHT,..., each with its share of the tokens, 1
    unless given; see read_rows.

    limit: rows of each; what: the setting that SPEC is.
    """
    if Path(spec).expanduser().is_file() or not set(spec) & set(",="):
        return [(read_rows(spec, limit, what), 1.0)]
    return [(read_rows(name, limit, what), weight) for name, weight in named_numbers(spec, what, 1.0)]


def read_rows(spec: str, limit: int | None = None, what: str = "data", check: Callable[[Any, str], None] | None = None) -> Rows:
    """Rows of a local file (see files.open_rows), or of a hub data set: its `train` split, or
    ID:SPLIT.

    check: what a row must be [default: check_row]. Raises InputError naming file and line when
    there are no rows or one lacks its fields.
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
    except Exception as error:  # datasets raises many kinds, all meaning: not to be had
        raise InputError(
            f"{setting(what)} {spec} is no local file, and the hub did not give it: {first_line(error)}"
        ) from error
