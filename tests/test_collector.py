"""The garbage collector waits while a network is read, and is afterwards what it was."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from lightning_prune import prune
from lightning_prune.collector import collector_held
from lightning_prune.graph import read

SEEN: list[bool] = []
"""Whether the collector was at work, run by run; what a network keeps of a reading is taken back."""


class Watching(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        SEEN.append(gc.isenabled())
        return super().forward(x)


def net() -> Watching:
    SEEN.clear()
    return Watching(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def test_it_waits_while_a_network_is_read_and_goes_on_afterwards() -> None:
    read(net(), torch.zeros(1, 4))
    assert SEEN
    assert not any(SEEN)
    assert gc.isenabled()


def test_it_goes_on_after_an_error_too() -> None:
    def fail() -> None:
        raise RuntimeError("oh")

    with pytest.raises(RuntimeError), collector_held():
        fail()
    assert gc.isenabled()


def test_where_it_was_off_it_stays_off() -> None:
    gc.disable()
    try:
        record = prune(net(), torch.zeros(1, 4), pruning_ratio=0.5)
        assert record.channels
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_one_inside_another_leaves_it_to_the_outer() -> None:
    with collector_held():
        with collector_held():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
