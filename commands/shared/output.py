"""All output of the command line: results on stdout, everything else on stderr, errors as one
sentence and an exit code."""

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
WIDE = 300  # columns without a terminal, so that no table is cut
EVERY = 10.0  # seconds between progress lines without a terminal
# Seconds of silence after which a command prints what it is doing, so that a user never waits more
# than 10 on a terminal or 60 in a log.
PATIENCE = {"terminal": 5.0, "log": 30.0}
RESULT = "HYBRIDIZE_RESULT"  # environment variable of `hybridize run`: a file that also gets the JSON result
OTHER_RANK = os.environ.get("RANK", "0") != "0"  # under torchrun only one process prints
STARTING = "starting"


class Output(Notes):
    """Output of one command. as_json: one JSON object and nothing else on stdout. quiet: only
    errors."""

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json, self.quiet = as_json, quiet
        LINES.silent = quiet or OTHER_RANK

    def note(self, text: str) -> None:
        """Prints an information line on stderr."""
        if not self.quiet:
            LINES.say(text)

    def warn(self, text: str) -> None:
        """Prints a warning on stderr, even with --quiet."""
        LINES.say(f"warning: {text}")

    def doing(self, text: str) -> None:
        """Announces a phase that may take long."""
        LINES.doing(text)

    def progress(self, text: str, last: bool = False) -> None:
        """Shows the latest state: rewritten in place on a terminal, otherwise a line every ten
        seconds."""
        if not self.quiet:
            LINES.progress(text, last)

    def result(self, value: dict[str, Any], human: Callable[[], None] | None = None) -> None:
        """Prints the command's result on stdout: as JSON with --json, otherwise whatever `human`
        prints."""
        LINES.end()
        if file := os.environ.get(RESULT):
            Path(file).write_text(json.dumps(value, allow_nan=False), encoding="utf-8")
        if self.as_json:
            print(json.dumps(value, allow_nan=False))
        elif not self.quiet and human is not None:
            human()

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """Prints a table on stdout; plain and not cut if stdout is no terminal."""
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
    """The lines of one command on stderr, with a thread that prints the current phase when nothing
    else has been printed for long."""

    def __init__(self) -> None:
        self.silent = False  # whether the thread prints nothing
        self._lock = threading.RLock()
        self._unended = False  # whether the last line on the terminal has no newline yet
        self._at, self._since = STARTING, time.monotonic()
        self._last = self._progressed = -EVERY

    def say(self, text: str) -> None:
        """Prints a line of its own, with the settings in library messages shown as flags."""
        with self._lock:
            self.end()
            self._write(with_settings(text, flag_of) + "\n")

    def progress(self, text: str, last: bool = False) -> None:
        """Shows the latest state, see Output.progress."""
        with self._lock:
            self._at, self._since = text, time.monotonic()
            if sys.stderr.isatty():
                self._write(f"\r\x1b[K{text}" + "\n" * last)
                self._unended = not last
            elif last or time.monotonic() - self._progressed >= EVERY:
                self._progressed = time.monotonic()
                self._write(text + "\n")

    def doing(self, text: str) -> None:
        """Announces a phase that may take long: at once on a terminal, otherwise only after a long
        silence."""
        with self._lock:
            self._at, self._since = text, time.monotonic()
            if not self.silent and sys.stderr.isatty():
                self._write(f"\r\x1b[K{text} ...")
                self._unended = True

    def wake(self, silent: bool, text: str) -> None:
        """Continues after another process has printed. silent: whether the thread stays silent."""
        with self._lock:
            self.silent, self._last = silent or OTHER_RANK, time.monotonic()
            self.doing(text)

    def end(self) -> None:
        """Ends an unfinished line, so that the next output starts on a new one."""
        with self._lock:
            if self._unended:
                self._write("\n")
                self._unended = False

    @contextlib.contextmanager
    def alive(self) -> Iterator[None]:
        """Runs the thread during the block: no silence is longer than PATIENCE, unless `silent` is
        set."""
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
            if not self._lock.acquire(timeout=patience):  # an interrupt may have left the lock held
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
    """The flag of a parameter; `calibrate=False` stands for the flag that turns a switch off."""
    odd = {"form": "--format", "license_": "--license", "output": "-o"}
    name, off, _ = name.partition("=False")
    return odd.get(name, f"--{'no-' if off else ''}{name.replace('_', '-')}")


def guarded(function: F) -> F:
    """Decorator that turns exceptions into one sentence on stderr and an exit code; with
    HYBRIDIZE_DEBUG=1 the traceback is shown."""

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
            _fail(f"{type(error).__name__}: {first_line(error)} (HYBRIDIZE_DEBUG=1 shows the traceback)", EXIT_FAILED)

    return wrapper  # type: ignore[return-value]


def _fail(message: str, code: int) -> None:
    error = sys.exception()
    if os.environ.get("HYBRIDIZE_DEBUG") == "1" and error is not None:
        raise error
    LINES.say(f"error: {message}")
    raise typer.Exit(code)
