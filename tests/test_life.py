"""No command is silent for long, on a device that is slow. What a user waits at most is played
twelve times faster."""

from __future__ import annotations

import contextlib
import io
import itertools
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hybridize.commands.shared import output

from tests.conftest import Runner, make_place
from tests.test_cli import write_tasks

SLOW = 0.0015  # seconds that each projection takes on the device that is played
PATIENCE = 0.4  # instead of 5 seconds on a terminal, and 30 in a log
MOST = 2 * PATIENCE  # instead of 10 seconds, and 60


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = make_place(tmp_path_factory.mktemp("life"), ("replace", "--indices", "1,2", "-o", "h2"))
    write_tasks(place / "tasks")
    return place


class Clocked(io.TextIOWrapper):
    """Standard error that notes when something was written to it."""

    def __init__(self, terminal: bool) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8")
        self.times, self.terminal = [time.monotonic()], terminal

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        self.times.append(time.monotonic())
        return super().write(text)

    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode()  # type: ignore[attr-defined]


class Control(threading.Thread):
    """How much later than asked any thread here wakes up, for whatever keeps the machine or the
    interpreter busy."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.late, self.done = 0.0, threading.Event()

    def run(self) -> None:
        while not self.done.is_set():
            began = time.monotonic()
            time.sleep(0.02)
            self.late = max(self.late, time.monotonic() - began - 0.02)


@contextlib.contextmanager
def slow_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each linear layer waits, as for a device that is busy, and lets other threads run meanwhile."""
    forward = torch.nn.Linear.forward

    def waiting(self: Any, given: torch.Tensor) -> torch.Tensor:
        time.sleep(SLOW)
        return forward(self, given)

    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.Linear, "forward", waiting)
        yield


COMMANDS = {
    "score-loo": ("score-loo", "teacher", "--metric", "kl", "--windows", 4, "--seq-len", 32),
    "score-mmr": ("score-mmr", "teacher", "--steps", 3, "--batch-size", 2, "--seq-len", 32),
    "score-restore": ("score-restore", "teacher", "--steps", 2, "--batch-size", 2, "--seq-len", 32, "--windows", 4),
    "replace": ("replace", "teacher", "--indices", "1,2"),
    "distill": ("distill", "h2", "--steps", 3, "--batch-size", 2, "--seq-len", 32, "--eval-windows", 2),
    "eval": ("eval", "h2", "--tasks", "tiny_choice,tiny_exact", "--include-path", "tasks"),
    "export": ("export", "h2", "--format", "granite"),
    "generate": ("generate", "h2", "--prompts", "traces.jsonl", "--limit", 2, "--max-new-tokens", 8),
    "bench": ("bench", "teacher", "h2", "--contexts", 16, "--batches", 1, "--steps", 4, "--repeats", 2),
}


@pytest.mark.parametrize(
    ("name", "terminal"), [(name, place % 2 == 0) for place, name in enumerate(COMMANDS)], ids=list(COMMANDS)
)
def test_a_slow_command_says_what_it_is_at(
    place: Path, tmp_path: Path, name: str, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(output, "PATIENCE", dict.fromkeys(("terminal", "log"), PATIENCE))
    clocked = Clocked(terminal)
    from hybridize.commands import app

    command, control = [str(part) for part in COMMANDS[name]], Control()
    control.start()
    with slow_device(monkeypatch), monkeypatch.context() as patched, contextlib.redirect_stdout(io.StringIO()):
        patched.setattr(sys, "stderr", clocked)
        with pytest.raises(SystemExit) as ended:
            app([*command, "-o", str(tmp_path / "out")])
    assert ended.value.code == 0, clocked.text()
    clocked.times.append(time.monotonic())
    control.done.set()
    gaps = [later - earlier for earlier, later in itertools.pairwise(clocked.times)]
    assert max(gaps) <= MOST + 2 * control.late, (max(gaps), control.late, clocked.text())
    assert len(clocked.times) > 2 or clocked.times[-1] - clocked.times[0] <= MOST


def test_silence_is_broken_only_where_it_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "PATIENCE", {"log": 0.2, "terminal": 0.2})
    clocked = Clocked(False)
    monkeypatch.setattr(sys, "stderr", clocked)
    lines = output.Lines()
    with lines.alive():
        lines.doing("adding up")
        time.sleep(0.05)
        assert clocked.text() == ""
        time.sleep(0.4)
        assert clocked.text().startswith("adding up: 0 s so far\n")
        lines.silent = True
        before = clocked.text()
        time.sleep(0.4)
        assert clocked.text() == before
    with lines.alive():
        time.sleep(0.4)
        assert clocked.text().removeprefix(before).startswith("starting: 0 s so far\n")


def test_quiet_is_quiet(place: Path, tmp_path: Path, cli: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(output, "PATIENCE", dict.fromkeys(("terminal", "log"), 0.1))
    with slow_device(monkeypatch):
        cli("replace", "teacher", "--indices", "1", "-o", tmp_path / "out", "--quiet")
    lines = [line for line in cli.stderr.splitlines() if not line.startswith(("starting", "warning: "))]
    assert lines == []


def test_a_terminals_line_of_progress_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes after it, on either stream, stands on a line of its own."""
    clocked = Clocked(True)
    monkeypatch.setattr(sys, "stderr", clocked)
    lines = output.Lines()
    lines.progress("1 of 2")
    lines.doing("the rest")
    lines.say("warning: odd")
    lines.progress("2 of 2", last=True)
    assert clocked.text() == "\r\x1b[K1 of 2\r\x1b[Kthe rest ...\nwarning: odd\n\r\x1b[K2 of 2\n"
    lines.progress("3 of 2")
    monkeypatch.setattr(output, "LINES", lines)
    output.Output().result({}, lambda: None)
    assert clocked.text().endswith("3 of 2\n")
