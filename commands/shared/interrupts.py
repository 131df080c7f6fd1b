"""Turns SIGINT and SIGTERM into KeyboardInterrupt in the main thread, and repeats an interrupt that
Python drops."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

AGAIN = 0.05  # seconds until a dropped interrupt is repeated; longer than a destructor runs


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Makes both signals interrupt the block, wherever the main thread is.

    An exception cannot leave a destructor or the callback of a weak reference (the import system
    has one for each module): if a signal raises one there, Python reports it to
    `sys.unraisablehook` and continues. In that case the signal is sent again.
    """
    if threading.current_thread() is not threading.main_thread():  # Python sets signal handlers only there
        yield
        return
    pending: list[threading.Timer] = []
    before, hook = signal.signal(signal.SIGTERM, _raise), sys.unraisablehook

    def dropped(what: Any) -> None:
        if not issubclass(what.exc_type, KeyboardInterrupt) or threading.current_thread() is not threading.main_thread():
            hook(what)
            return
        number = what.exc_value.args[0] if what.exc_value is not None and what.exc_value.args else signal.SIGINT
        timer = threading.Timer(AGAIN, signal.pthread_kill, (threading.main_thread().ident, number))
        timer.daemon = True
        pending.append(timer)
        timer.start()

    sys.unraisablehook = dropped
    try:
        try:
            yield
        finally:
            for timer in pending:  # the block has ended, so there is nothing left to interrupt
                timer.cancel()
                timer.join()
    finally:  # also if a timer could not be cancelled in time and interrupts the loop
        sys.unraisablehook = hook
        signal.signal(signal.SIGTERM, before)


def _raise(number: int, _: Any) -> None:
    """Signal handler; the exception carries the number of the signal."""
    raise KeyboardInterrupt(number)
