"""Signals wait while the network changes, so that no handler ever sees it half changed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
]


@contextmanager
def signals_wait() -> Iterator[None]:
    """Let signals wait until this is over: Ctrl+C, the end of a job, and those that Lightning saves a checkpoint at.

    Those without a handler in Python act as ever: they end the process, and files are written whole or not at all.
    Other threads than the main one never handle signals, and there this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    own = {number: signal.getsignal(number) for number in _SIGNALS}
    handled = {number: handler for number, handler in own.items() if callable(handler)}
    waiting: list[tuple[int, FrameType | None]] = []
    for number in handled:
        signal.signal(number, lambda came, frame: waiting.append((came, frame)))
    try:
        yield
    finally:
        for number, handler in handled.items():
            signal.signal(number, handler)
        for number, frame in waiting:
            handled[signal.Signals(number)](number, frame)
