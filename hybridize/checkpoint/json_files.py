"""Reads JSON and YAML files that may be damaged or untrusted. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hybridize.errors import InputError

MOST_JSON = 64 << 20  # bytes of a config, index, manifest, score or result file


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. InputError naming the file if it is missing, too large, not JSON,
    or not an object."""
    try:
        if path.stat().st_size > MOST_JSON:
            raise InputError(f"{path} has {path.stat().st_size >> 20} MiB; at most {MOST_JSON >> 20} MiB are read")
        value = json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=_no_constant)
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing") from error
    except InputError:
        raise
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def load_yaml(text: str) -> Any:
    """The value of a YAML text. ValueError for a duplicate key, of which YAML would silently drop
    the first; YAMLError for any other defect."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise ValueError(f"line {node.start_mark.line + 1}: duplicate key {key!r}")
            return dict(super().construct_mapping(node, deep=deep))

    return yaml.load(text, Loader)
