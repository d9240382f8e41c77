"""Python's garbage collector waits while thousands of objects are made that all stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_held() -> Iterator[None]:
    """Let the garbage collector wait; it goes on afterwards, unless it was off.

    It would look through all that a reading makes again and again, the more often the longer the network, and find
    nothing: at a thousand residual blocks that was half of the time.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
