"""The one place that talks to people: results on stdout, all else on stderr; errors as one sentence and an exit code."""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import typer

from hybridize.errors import InputError, WorkError, first_line

from .interrupts import interruptible

F = TypeVar("F", bound=Callable[..., None])
EXIT_FAILED, EXIT_INPUT, EXIT_GATE, EXIT_INTERRUPTED = 1, 2, 3, 130
LESS_MEMORY = (
    "a smaller --batch-size or --seq-len helps; distill has --micro-batch-size, --gradient-checkpointing, --offload-teacher, "
    "--train mixers and more GPUs under torchrun, and its --dry-run says what is needed; export has --no-verify"
)
WIDE = 300  # columns where there is no terminal: nothing is cut there
EVERY = 10.0  # seconds between progress lines where there is no terminal


class Output:
    """as_json: nothing but one JSON object on stdout. quiet: nothing but errors."""

    unended = False  # whether the terminal's last line is progress that the next one would be glued to

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json, self.quiet = as_json, quiet
        self._said = 0.0

    def note(self, text: str) -> None:
        """A line about what is going on, to stderr."""
        if not self.quiet:
            say(text)

    def warn(self, text: str) -> None:
        say(f"warning: {text}")

    def progress(self, text: str, last: bool = False) -> None:
        """The latest state: rewritten in place on a terminal, a line every ten seconds elsewhere."""
        if self.quiet:
            return
        if sys.stderr.isatty():
            print(f"\r\x1b[K{text}", end="\n" if last else "", file=sys.stderr, flush=True)
            Output.unended = not last
        elif last or time.monotonic() - self._said >= EVERY:
            self._said = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def result(self, value: dict[str, Any], human: Callable[[], None] | None = None) -> None:
        """What the command found: an object with --json, else whatever `human` prints on stdout."""
        if self.as_json:
            print(json.dumps(value, allow_nan=False))
        elif not self.quiet and human is not None:
            human()

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """On stdout; plain and uncut where stdout is no terminal."""
        from rich.console import Console
        from rich.table import Table

        table = Table()
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 or not column else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        terminal = sys.stdout.isatty()
        console = Console(file=sys.stdout, force_terminal=None if terminal else False, width=None if terminal else WIDE)
        console.print(title, soft_wrap=True, markup=False, highlight=False)
        console.print(table)


def say(text: str) -> None:
    """A line of its own on stderr."""
    if Output.unended:
        print(file=sys.stderr)
        Output.unended = False
    print(text, file=sys.stderr, flush=True)


def guarded(function: F) -> F:
    """Maps what goes wrong to one sentence on stderr and an exit code; HYBRIDIZE_DEBUG=1 shows the traceback."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        try:
            with interruptible():
                function(*args, **kwargs)
        except typer.Exit:
            raise
        except KeyboardInterrupt:
            _fail("interrupted", EXIT_INTERRUPTED)
        except InputError as error:
            _fail(str(error), EXIT_INPUT)
        except WorkError as error:
            _fail(str(error), EXIT_FAILED)
        except MemoryError:
            _fail(f"out of memory; {LESS_MEMORY}", EXIT_FAILED)
        except OSError as error:
            _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error), EXIT_FAILED)
        except Exception as error:
            if type(error).__name__ == "OutOfMemoryError":
                _fail(f"out of GPU memory; {LESS_MEMORY}", EXIT_FAILED)
            _fail(f"{type(error).__name__}: {first_line(error)} (HYBRIDIZE_DEBUG=1 shows where)", EXIT_FAILED)

    return wrapper  # type: ignore[return-value]


def _fail(message: str, code: int) -> None:
    error = sys.exception()
    if os.environ.get("HYBRIDIZE_DEBUG") == "1" and error is not None:
        raise error
    say(f"error: {message}")
    raise typer.Exit(code)
