"""A signal ends a command wherever it falls, also where Python drops the exception that it raises."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hybridize.commands.shared.interrupts import interruptible

from hybridize.checkpoint import reader
from tests.conftest import Runner


class Held:
    """A destructor in which a signal arrives."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self.number)
        time.sleep(0)  # the handler runs here


def destructor(number: int) -> None:
    Held(number)


def callback(number: int) -> None:
    """What the import system does for each module's lock."""

    def gone(_: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(0)

    class Lock:
        pass

    lock = Lock()
    seen = weakref.ref(lock, gone)
    del lock
    assert seen() is None


@pytest.fixture(autouse=True)
def unharmed() -> Iterator[None]:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), sys.unraisablehook, threading.active_count()
    yield
    assert before == (
        signal.getsignal(signal.SIGINT),
        signal.getsignal(signal.SIGTERM),
        sys.unraisablehook,
        threading.active_count(),
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", [destructor, callback])
def test_a_dropped_interrupt_is_raised_again(
    cli: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Callable[[int], None], number: int
) -> None:
    began = time.monotonic()

    def struck(*_: object, **__: object) -> None:
        where(number)
        time.sleep(60)  # as long as the command would go on

    monkeypatch.setattr(reader, "resolve_checkpoint", struck)
    assert cli.fails("verify", tmp_path, code=130) == "error: interrupted"
    assert time.monotonic() - began < 30


def test_dropped_again_and_again() -> None:
    struck = []

    class Slow:
        def __del__(self) -> None:
            struck.append(1)
            time.sleep(20)

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), interruptible():
        destructor(signal.SIGTERM)
        for _ in range(3):
            Slow()
        time.sleep(20)
    assert len(struck) == 3
    assert time.monotonic() - began < 15


def test_nothing_is_sent_when_the_work_is_over() -> None:
    with interruptible():
        destructor(signal.SIGTERM)
    time.sleep(0.2)  # a SIGTERM now would end the tests


def test_one_that_is_too_late_to_be_cancelled_leaves_all_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading.Timer, "cancel", lambda _: None)
    with pytest.raises(KeyboardInterrupt), interruptible():
        destructor(signal.SIGTERM)


def test_other_things_that_destructors_raise_go_on_being_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: told.append(what.exc_type))

    class Broken:
        def __del__(self) -> None:
            raise ValueError

    with interruptible():
        Broken()
    assert told == [ValueError]


def test_in_another_thread_nothing_changes() -> None:
    hook, seen = sys.unraisablehook, []

    def work() -> None:
        with interruptible():
            seen.append(sys.unraisablehook)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [hook]
