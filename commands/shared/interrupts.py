"""SIGINT and SIGTERM, turned into KeyboardInterrupt in the main thread, and raised again where
Python drops it."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

AGAIN = 0.05  # seconds until a dropped interrupt is raised again: longer than a destructor takes


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Until the block ends either signal interrupts it, wherever the main thread is.

    An exception that a signal raises inside a destructor or a weak reference's callback (the import
    system has one for each module) cannot leave it: Python reports it to `sys.unraisablehook` and
    goes on. Here the signal is then sent once more.
    """
    if threading.current_thread() is not threading.main_thread():  # only it may say who handles signals
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
            for timer in pending:  # what was to be interrupted is over
                timer.cancel()
                timer.join()
    finally:  # also where one was too late to be cancelled and interrupts this
        sys.unraisablehook = hook
        signal.signal(signal.SIGTERM, before)


def _raise(number: int, _: Any) -> None:
    raise KeyboardInterrupt(number)
