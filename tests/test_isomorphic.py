"""Groups that look alike compete with each other, and with no others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import prune
from lightning_prune.allocation import Isomorphic
from lightning_prune.allocation.isomorphic import kinds_of
from lightning_prune.criteria import Magnitude
from lightning_prune.graph import read


class TwoKinds(nn.Module):
    """Two convolutions of one kind, and two hidden layers of another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.mix = nn.Conv2d(4, 6, 1)
        self.up, self.down, self.head = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.mix(torch.relu(self.b(torch.relu(self.a(images))))))
        logits: Tensor = self.head(torch.relu(self.down(torch.relu(self.up(x.mean((2, 3)))))))
        return logits


def test_each_kind_gives_the_same_fraction_and_the_lowest_of_it_go() -> None:
    torch.manual_seed(0)
    net = TwoKinds()
    with torch.no_grad():
        net.a.weight[:6] *= 1e-3  # in its kind, `a` has the weak ones, whatever the linear layers have
        net.b.weight[:, :6] *= 1e-3
        net.up.weight *= 1e-6
    prune(net, torch.zeros(2, 1, 4, 4), pruning_ratio=0.5, criterion=Magnitude(normalize=None), allocation=Isomorphic())
    assert (net.a.out_channels, net.b.out_channels) == (2, 4)
    assert net.up.out_features + net.down.out_features == 6
    assert net.up.out_features < 4


def test_kinds_do_not_depend_on_sizes() -> None:
    net = TwoKinds()
    graph = read(net, torch.zeros(2, 1, 4, 4))
    kinds = kinds_of(net, graph.groups)
    assert kinds["a"] == kinds["b"] != kinds["mix"]
    assert kinds["up"] == kinds["down"] != kinds["a"]


def test_it_must_know_the_groups() -> None:
    with pytest.raises(ValueError, match=r"does not know which groups are alike.*knowing"):
        Isomorphic().widths({"a": torch.ones(3)}, {"a": 3}, 0.5, {"a": 0})
    with pytest.raises(ValueError, match=r"`cap` is the fraction"):
        Isomorphic(cap=0)
