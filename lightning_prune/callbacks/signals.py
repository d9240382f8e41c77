"""Signals wait while the network changes, so that no handler ever sees it half changed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeAlias

Handler: TypeAlias = Callable[[int, "FrameType | None"], Any]


@contextmanager
def signals_wait() -> Iterator[None]:
    """Let signals wait until this is over: Ctrl+C, the end of a job, and those that Lightning saves a checkpoint at.

    Those without a handler in Python act as ever: they end the process, and files are written whole or not at all.
    Other threads than the main one never handle signals, and there this does nothing. If handlers raise, all of them
    have run before, and the first one's exception goes on.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    own = {number: handler for number in signal.valid_signals() if callable(handler := signal.getsignal(number))}
    waiting: list[tuple[int, FrameType | None]] = []
    raised: list[BaseException] = []
    try:
        for each in own:
            signal.signal(each, lambda came, frame: waiting.append((came, frame)))
        yield
    finally:
        _put_back(dict(own), raised)
        for number, frame in waiting:
            try:
                own[signal.Signals(number)](number, frame)
            except BaseException as error:
                raised.append(error)
        if raised:
            raise raised[0]


def _put_back(handlers: dict[signal.Signals, Handler], raised: list[BaseException]) -> None:
    """Put all handlers back, also where one that is back already raises."""
    while handlers:
        number, handler = next(iter(handlers.items()))
        try:
            signal.signal(number, handler)
            del handlers[number]
        except BaseException as error:
            raised.append(error)
