"""Handling of SIGINT and SIGTERM during training: delayed until a step ends, or recorded so that
all ranks stop after the same step."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def noted_signals(wait: bool) -> Iterator[list[int]]:
    """Records SIGINT and SIGTERM in the yielded list if `wait` is set, so that all ranks can stop
    after the same step; a second signal interrupts at once."""
    received: list[int] = []

    def note(number: int, _: Any) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt

    with _handling(note) if wait else contextlib.nullcontext():
        yield received


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Delays SIGINT and SIGTERM until the block ends, so that an optimizer step is complete or not
    taken at all."""
    held: list[int] = []
    with _handling(lambda number, _: held.append(number)) as before:
        yield
    if held:
        if callable(before[held[0]]):
            signal.raise_signal(held[0])
        else:
            raise KeyboardInterrupt


@contextlib.contextmanager
def _handling(handler: Callable[[int, Any], None]) -> Iterator[dict[int, Any]]:
    """Installs `handler` for SIGINT and SIGTERM during the block and yields the previous handlers.
    Does nothing outside the main thread, where Python does not allow it."""
    if threading.current_thread() is not threading.main_thread():
        yield {}
        return
    before: dict[int, Any] = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield before
    finally:
        for number, old in before.items():
            signal.signal(number, old)
