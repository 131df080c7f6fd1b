"""Settings of a training run, from flags and an optional file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args, get_type_hints

from hybridize.checkpoint.json_files import load_yaml
from hybridize.distillation.settings import DistillSettings
from hybridize.errors import InputError, first_line


def settings_of(given: dict[str, Any], config: Path | None) -> DistillSettings:
    """Training settings: flags override the file `config`, which overrides the defaults. Parameters
    that are not training settings, and flags that are None, are ignored."""
    known = get_type_hints(DistillSettings)
    flags = {key: value for key, value in given.items() if key in known and value is not None}
    filed = _from_file(config)
    if "tokens" in flags:  # a length on the command line overrides both kinds of length in the file
        filed.pop("steps", None)
    return DistillSettings(**(filed | flags))


def _from_file(path: Path | None) -> dict[str, Any]:
    """Settings from a YAML or TOML file. InputError if it cannot be read or has an unknown key."""
    if path is None:
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            import tomllib

            found: Any = tomllib.loads(text)
        else:
            found = load_yaml(text)
    except OSError as error:
        raise InputError(f"--config {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"--config {path} is not valid: {error}") from error
    except Exception as error:  # YAMLError is not a ValueError
        raise InputError(f"--config {path} is not valid YAML: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise InputError(f"--config {path} must be a table of settings")
    found = {str(key).replace("-", "_"): value for key, value in found.items()}
    hints = get_type_hints(DistillSettings)
    for key, value in found.items():
        if key not in hints:
            raise InputError(f"--config {path}: unknown setting {key!r}")
        found[key] = _typed(value, hints[key], f"--config {path}: {key}")
    return found


def _typed(value: Any, hint: Any, where: str) -> Any:
    """`value` converted to the type of its setting; InputError if it has another. YAML reads 1e-3
    as a string, so strings are accepted as floats."""
    kinds = [kind for kind in (get_args(hint) or (hint,)) if kind is not type(None)]
    try:
        if kinds == [float] and not isinstance(value, bool):
            return float(value)
    except (TypeError, ValueError):
        pass
    if type(value) is kinds[0] or (value is None and type(None) in get_args(hint)):
        return value
    raise InputError(f"{where} is {value!r}, not of type {kinds[0].__name__}")
