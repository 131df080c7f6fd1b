"""The one place that talks to people: results on stdout, all else on stderr; errors as one sentence
and an exit code."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import typer

from hybridize.errors import InputError, WorkError, first_line, with_settings
from hybridize.notes import Notes

from .interrupts import interruptible

F = TypeVar("F", bound=Callable[..., None])
EXIT_FAILED, EXIT_INPUT, EXIT_GATE, EXIT_INTERRUPTED = 1, 2, 3, 130
LESS_MEMORY = (
    "a smaller --batch-size or --seq-len helps; distill has --micro-batch-size, --gradient-checkpointing, --offload-teacher, "
    "--train mixers and more GPUs under torchrun, and its --dry-run says what is needed; export has --no-verify"
)
WIDE = 300  # columns where there is no terminal: nothing is cut there
EVERY = 10.0  # seconds between progress lines where there is no terminal
# Seconds of silence after which a command says what it is at: a user waits at most 10 on a
# terminal, and 60 in a log.
PATIENCE = {"terminal": 5.0, "log": 30.0}
RESULT = "HYBRIDIZE_RESULT"  # names a file that the result is written to as well, as --json has it: for `hybridize run`
OTHER_RANK = os.environ.get("RANK", "0") != "0"  # of a torchrun one process speaks
STARTING = "starting"


class Output(Notes):
    """as_json: nothing but one JSON object on stdout. quiet: nothing but errors."""

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json, self.quiet = as_json, quiet
        LINES.silent = quiet or OTHER_RANK

    def note(self, text: str) -> None:
        """A line about what is going on, to stderr."""
        if not self.quiet:
            LINES.say(text)

    def warn(self, text: str) -> None:
        LINES.say(f"warning: {text}")

    def doing(self, text: str) -> None:
        """What begins now and may take long."""
        LINES.doing(text)

    def progress(self, text: str, last: bool = False) -> None:
        """The latest state: rewritten in place on a terminal, a line every ten seconds elsewhere."""
        if not self.quiet:
            LINES.progress(text, last)

    def result(self, value: dict[str, Any], human: Callable[[], None] | None = None) -> None:
        """What the command found: an object with --json, else whatever `human` prints on stdout."""
        LINES.end()
        if told := os.environ.get(RESULT):
            Path(told).write_text(json.dumps(value, allow_nan=False), encoding="utf-8")
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


class Lines:
    """The lines of one command on stderr, and a thread that breaks long silences by saying what the
    command is at."""

    def __init__(self) -> None:
        self.silent = False  # whether long silences are to be broken
        self._lock = threading.RLock()
        self._unended = False  # whether the terminal's last line is progress that the next one would be glued to
        self._at, self._since = STARTING, time.monotonic()
        self._last = self._progressed = -EVERY

    def say(self, text: str) -> None:
        """A line of its own; settings that the library names are shown as flags."""
        with self._lock:
            self.end()
            self._write(with_settings(text, flag_of) + "\n")

    def progress(self, text: str, last: bool = False) -> None:
        with self._lock:
            self._at, self._since = text, time.monotonic()
            if sys.stderr.isatty():
                self._write(f"\r\x1b[K{text}" + "\n" * last)
                self._unended = not last
            elif last or time.monotonic() - self._progressed >= EVERY:
                self._progressed = time.monotonic()
                self._write(text + "\n")

    def doing(self, text: str) -> None:
        """What begins now and may take long: shown at once on a terminal, and wherever nothing else
        has been said for long."""
        with self._lock:
            self._at, self._since = text, time.monotonic()
            if not self.silent and sys.stderr.isatty():
                self._write(f"\r\x1b[K{text} ...")
                self._unended = True

    def wake(self, silent: bool, text: str) -> None:
        """Speaks again, unless it is to be silent, after something else has spoken."""
        with self._lock:
            self.silent, self._last = silent or OTHER_RANK, time.monotonic()
            self.doing(text)

    def end(self) -> None:
        """The next line begins on a line of its own."""
        with self._lock:
            if self._unended:
                self._write("\n")
                self._unended = False

    @contextlib.contextmanager
    def alive(self) -> Iterator[None]:
        """As long as the block lasts no silence is longer than PATIENCE, unless the command is to
        be silent."""
        self.silent, self._at, self._since = OTHER_RANK, STARTING, time.monotonic()
        self._last, self._progressed = time.monotonic(), -EVERY
        done = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(done,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join(timeout=5)

    def _watch(self, done: threading.Event) -> None:
        patience = PATIENCE["terminal" if sys.stderr.isatty() else "log"]
        while not done.wait(min(1.0, patience / 5)):
            if not self._lock.acquire(timeout=patience):  # an interrupt may have left it held
                continue
            try:
                if self.silent or time.monotonic() - self._last < patience or done.is_set():
                    continue
                text = f"{self._at}: {time.monotonic() - self._since:.0f} s so far"
                terminal = sys.stderr.isatty()
                self._write(f"\r\x1b[K{text}" if terminal else text + "\n")
                self._unended = terminal
            finally:
                self._lock.release()

    def _write(self, text: str) -> None:
        self._last = time.monotonic()
        sys.stderr.write(text)
        sys.stderr.flush()


LINES = Lines()


def flag_of(name: str) -> str:
    """The flag of a parameter, `calibrate=False` being that of a switch turned off."""
    odd = {"form": "--format", "license_": "--license", "output": "-o"}
    name, off, _ = name.partition("=False")
    return odd.get(name, f"--{'no-' if off else ''}{name.replace('_', '-')}")


def guarded(function: F) -> F:
    """Maps what goes wrong to one sentence on stderr and an exit code; HYBRIDIZE_DEBUG=1 shows the
    traceback."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        try:
            with interruptible(), LINES.alive():
                function(*args, **kwargs)
        except typer.Exit:
            raise
        except KeyboardInterrupt:
            _fail("interrupted", EXIT_INTERRUPTED)
        except InputError as error:
            _fail(f"{error}", EXIT_INPUT)
        except WorkError as error:
            _fail(f"{error}", EXIT_FAILED)
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
    LINES.say(f"error: {message}")
    raise typer.Exit(code)
