"""The directory that an unfinished run leaves next to its output, and whether a command may
continue it. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hybridize.checkpoint.json_files import read_json
from hybridize.errors import InputError, setting

SETTINGS = "settings.json"


def run_path(output: Path) -> Path:
    """The directory of the run that makes `output`."""
    return output.with_name(output.name + ".run")


def check_unfinished(run: Path, settings: dict[str, Any], resume: bool, overwrite: bool) -> None:
    """InputError if the directory `run` holds an unfinished run and neither `resume` nor
    `overwrite` is set, or `resume` is set and its settings differ. settings: those known so far;
    others are not compared."""
    if not (run / SETTINGS).exists():
        return
    if resume:
        for name, before, now in _changed(read_json(run / SETTINGS), settings):
            raise InputError(f"{setting('resume')}: {name} was {before!r}, now it is {now!r}")
    elif not overwrite:
        raise InputError(
            f"{run} holds an unfinished run; continue it with {setting('resume')}, or start over with {setting('overwrite')}"
        )


def _changed(before: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name and both values of each setting that differs; in nested settings, of the inner one."""
    for key, value in now.items():
        found = before.get(key)
        if isinstance(value, dict) and isinstance(found, dict):
            yield from _changed(found, value)
        elif found != value:
            yield key, found, value
