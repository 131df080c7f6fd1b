"""Flags from dataclasses: a command's parameter whose type is a dataclass becomes one flag per
field.

Fields are either library options (hybridize/options.py), for which flags are created here, or
annotated with a Typer option of their own (see options.py).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import Field, dataclass, fields, is_dataclass
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer

from hybridize.options import described

F = TypeVar("F", bound=Callable[..., None])
KEYWORD = inspect.Parameter.KEYWORD_ONLY


@dataclass(frozen=True)
class Given:
    """Marks a parameter as `Annotated[dict[str, Any], Given(Settings)]`. It receives only the
    options that the user has given, so that a file can supply the others."""

    settings: type


def expanded(function: F) -> F:
    """Decorator that replaces a command's settings parameters with flags, and builds the settings
    from the flags when the command is called."""
    signature = inspect.signature(function, eval_str=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[type, bool]] = {}
    for parameter in signature.parameters.values():
        settings, partial = _settings_of(parameter.annotation)
        if settings is None:
            parameters.append(parameter.replace(kind=KEYWORD))
            continue
        groups[parameter.name] = settings, partial
        hints = get_type_hints(settings, include_extras=True)
        parameters += [_parameter(one, hints[one.name], settings, partial) for one in fields(settings)]

    @functools.wraps(function)
    def wrapper(**values: Any) -> None:
        for name, (settings, partial) in groups.items():
            own = {one.name: values.pop(one.name) for one in fields(settings)}
            given = {key: value for key, value in own.items() if value is not None}
            values[name] = given if partial else settings(**own)
        function(**values)

    wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper  # type: ignore[return-value]


def _settings_of(annotation: Any) -> tuple[type | None, bool]:
    """Returns the settings class of a parameter, None for a plain parameter, and whether it
    receives only the given options (see Given)."""
    if get_origin(annotation) is Annotated:
        marks = [mark for mark in get_args(annotation) if isinstance(mark, Given)]
        return (marks[0].settings, True) if marks else (None, False)
    return (annotation, False) if is_dataclass(annotation) and isinstance(annotation, type) else (None, False)


def _parameter(one: Field[Any], hint: Any, settings: type, partial: bool) -> inspect.Parameter:
    """A function parameter for a field, from which Typer creates a flag."""
    if get_origin(hint) is Annotated:  # it already has a Typer option
        return inspect.Parameter(one.name, KEYWORD, default=one.default, annotation=hint)
    flag = f"--{one.name.replace('_', '-')}"
    plain = next(kind for kind in (get_args(hint) or (hint,)) if kind is not type(None))
    if plain is bool:
        flag = f"{flag}/--no-{flag[2:]}"
    text = described(settings)[one.name]
    made = typer.Option(flag, help=text, show_default=False)
    default, kind = (None, plain | None) if partial else (one.default, hint)
    return inspect.Parameter(one.name, KEYWORD, default=default, annotation=Annotated[kind, made])
