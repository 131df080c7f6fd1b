"""SIGINT and SIGTERM during training: held back for as long as a step takes, or noted for all ranks
to stop after the same one."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def noted_signals(wait: bool) -> Iterator[list[int]]:
    """SIGINT and SIGTERM, if `wait`, into the list that is handed out, for all ranks to stop after
    the same step; a second one interrupts at once."""
    asked: list[int] = []

    def note(number: int, _: Any) -> None:
        asked.append(number)
        if len(asked) > 1:
            raise KeyboardInterrupt

    with _handling(note) if wait else contextlib.nullcontext():
        yield asked


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds back SIGINT and SIGTERM until the block is done: an optimizer step is taken whole or
    not at all."""
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
    """SIGINT and SIGTERM go to `handler`, where this is the thread that may say so; yields what
    they went to before."""
    if threading.current_thread() is not threading.main_thread():
        yield {}
        return
    before: dict[int, Any] = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield before
    finally:
        for number, old in before.items():
            signal.signal(number, old)
