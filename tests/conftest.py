"""What all tests share: one thread, so that parallel runs do not fight, and no global state used or left behind."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

# Looking for doctests imports every module; this one changes the Trainer for the pages' programs, and for nobody else.
collect_ignore = ["docs_scene.py"]


@pytest.fixture(autouse=True)
def _same_random_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let timings of this machine lie in a folder of the run: those of its user are none of its business."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_PRUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def _handlers() -> Iterator[None]:
    """Put all handlers back: Lightning ignores Ctrl+C for good once it has come."""
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    yield
    for number, handler in before.items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture
def in_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
