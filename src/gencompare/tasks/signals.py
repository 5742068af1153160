"""Signals that unwind a block."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGTERM_CODE = 128 + signal.SIGTERM


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """SIGTERM unwinds the block as Ctrl-C does. (While a model trains, `GracefulStop` has the signal.)"""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(SIGTERM_CODE)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
