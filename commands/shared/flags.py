"""Flags out of dataclasses: a command's parameter whose type is one becomes a flag for each of its
fields.

Fields are either library options (hybridize/options.py), of which flags are made here, or Annotated
with a Typer option of their own (see options.py).
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
    """Marks a parameter `Annotated[dict[str, Any], Given(Settings)]`: the options that the user
    gave, and no others, so that a file may have the rest."""

    settings: type


def expanded(function: F) -> F:
    """The command with flags in place of its parameters that are settings; it is called with these
    put together again."""
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
    """The settings class of a parameter, None for a plain one; whether only what was given is
    wanted."""
    if get_origin(annotation) is Annotated:
        marks = [mark for mark in get_args(annotation) if isinstance(mark, Given)]
        return (marks[0].settings, True) if marks else (None, False)
    return (annotation, False) if is_dataclass(annotation) and isinstance(annotation, type) else (None, False)


def _parameter(one: Field[Any], hint: Any, settings: type, partial: bool) -> inspect.Parameter:
    """A field as a parameter that Typer makes a flag of."""
    if get_origin(hint) is Annotated:  # it has a Typer option already
        return inspect.Parameter(one.name, KEYWORD, default=one.default, annotation=hint)
    flag = f"--{one.name.replace('_', '-')}"
    plain = next(kind for kind in (get_args(hint) or (hint,)) if kind is not type(None))
    if plain is bool:
        flag = f"{flag}/--no-{flag[2:]}"
    text = described(settings)[one.name]
    made = typer.Option(flag, help=text, show_default=False)
    default, kind = (None, plain | None) if partial else (one.default, hint)
    return inspect.Parameter(one.name, KEYWORD, default=default, annotation=Annotated[kind, made])
