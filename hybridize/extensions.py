"""Loads packages that add mixers, families, formats, scorers or losses. Importing one registers
what it adds.

Extensions are named by the entry points of the group `hybridize.extensions`, each a module, and by
the environment variable HYBRIDIZE_EXTENSIONS: modules or paths of Python files, separated by
commas.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from hybridize.errors import InputError, first_line

Entry = TypeVar("Entry")
GROUP, VARIABLE = "hybridize.extensions", "HYBRIDIZE_EXTENSIONS"


def load_extensions() -> list[str]:
    """Imports all extensions, each once, and returns their names. InputError naming the first one
    that cannot be imported."""
    named = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    installed = [point.value for point in metadata.entry_points(group=GROUP)]
    for name in [*installed, *named]:
        _load(name)
    return [*installed, *named]


def register(registry: dict[str, Entry], name: str, entry: Entry) -> Entry:
    """Adds an entry and returns it. Raises ValueError if the name belongs to something else
    already."""
    known = registry.get(name)
    if known is not None and known is not entry:
        raise ValueError(f"{name!r} is registered already, by {_home(known)}; {_home(entry)} needs another name")
    registry[name] = entry
    return entry


def _home(entry: object) -> str:
    """Returns the module and class of a registered object."""
    owner = entry if isinstance(entry, type) else type(entry)
    return f"{owner.__module__}.{owner.__qualname__}"


@functools.cache
def _load(name: str) -> None:
    try:
        if not name.endswith(".py"):
            importlib.import_module(name)
            return
        path = Path(name).resolve()
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    except Exception as error:  # an extension's code may raise anything
        raise InputError(f"the extension {name} cannot be imported: {type(error).__name__}: {first_line(error)}") from error
