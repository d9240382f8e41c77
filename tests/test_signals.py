"""Signals wait while the network changes, and all of them come."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from functools import partial
from itertools import count
from types import FrameType
from typing import Any

import pytest
from striking import FaultError, fails, handled, sends

from lightning_prune.callbacks.signals import signals_wait

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]


def waiting(*actions: Callable[[], object]) -> None:
    with signals_wait():
        for action in actions:
            action()


def all_handlers() -> dict[int, object]:
    return {number: signal.getsignal(number) for number in signal.valid_signals()}


@pytest.mark.usefixtures("_handlers")
def test_signals_wait_and_come_in_their_order() -> None:
    came: list[int] = []
    with handled(SIGNALS, lambda number, _: came.append(number)):
        before = all_handlers()
        with signals_wait():
            for number in reversed(SIGNALS):
                sends(number)
            assert came == []
        assert came == list(reversed(SIGNALS))
        assert all_handlers() == before
        sends(signal.SIGTERM)
        assert len(came) == 4


@pytest.mark.usefixtures("_handlers")
def test_signals_wait_for_the_outermost() -> None:
    came: list[int] = []
    with handled(SIGNALS, lambda number, _: came.append(number)), signals_wait():
        with signals_wait():
            sends(signal.SIGTERM)
        assert came == []
        sends(signal.SIGINT)
        assert came == []
    assert came == [signal.SIGTERM, signal.SIGINT]


@pytest.mark.usefixtures("_handlers")
def test_ctrl_c_comes_when_the_waiting_is_over() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before, after = all_handlers(), list[str]()
    with pytest.raises(KeyboardInterrupt):
        waiting(partial(sends, signal.SIGINT), partial(after.append, "went on"))
    assert after == ["went on"]
    assert all_handlers() == before


@pytest.mark.usefixtures("_handlers")
def test_a_failure_passes_and_signals_come_nevertheless() -> None:
    came: list[int] = []
    with handled(SIGNALS, lambda number, _: came.append(number)):
        before = all_handlers()
        with pytest.raises(FaultError):
            waiting(partial(sends, signal.SIGTERM), partial(fails, FaultError))
        assert came == [signal.SIGTERM]
        assert all_handlers() == before


@pytest.mark.usefixtures("_handlers")
def test_what_is_ignored_or_left_to_the_system_stays_so() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)
    with signals_wait():
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL
        sends(signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN


def test_in_another_thread_nothing_waits() -> None:
    before, inside = all_handlers(), []

    def run() -> None:
        with signals_wait():
            inside.append(all_handlers())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert inside == [before]


@pytest.mark.usefixtures("_handlers")
def test_no_signal_is_lost_where_the_handler_of_another_raises() -> None:
    came: list[int] = []
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with handled([signal.SIGTERM], lambda number, _: came.append(number)):
        with pytest.raises(KeyboardInterrupt):
            waiting(partial(sends, signal.SIGINT), partial(sends, signal.SIGTERM))
        assert came == [signal.SIGTERM]


@pytest.mark.usefixtures("_handlers")
def test_handlers_come_back_where_a_signal_comes_as_they_are_exchanged() -> None:
    """One signal after any of the six exchanges of three handlers; each handler raises, as that of Ctrl+C does."""
    real = signal.signal

    def fail(number: int, frame: FrameType | None) -> None:
        raise FaultError

    def left_over(number: int, fault: int) -> bool:
        exchanges = count()

        def exchange(which: int, handler: Any) -> Any:
            old = real(which, handler)
            if next(exchanges) == fault:
                sends(number)
            return old

        with handled(SIGNALS, fail):
            before = all_handlers()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(signal, "signal", exchange)
                with pytest.raises(FaultError):
                    waiting()
            return all_handlers() != before

    assert not [(number, fault) for number in SIGNALS for fault in range(6) if left_over(number, fault)]


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize(
    "name",
    ["SIGALRM", "SIGQUIT", "SIGRTMIN", "SIGCONT", "SIGXCPU", "SIGHUP", "SIGUSR2"],
)
def test_any_signal_with_a_handler_waits(name: str) -> None:
    """`signal.alarm` as a time limit, and whatever SLURM was told to announce the end of a job with."""
    number = getattr(signal, name)
    came: list[int] = []
    with handled([number], lambda number, _: came.append(number)):
        with signals_wait():
            sends(number)
            assert came == []
        assert came == [number]
