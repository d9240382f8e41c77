"""Recurrent layers: hidden channels go with their gates, inputs with what makes them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from proof import outputs, permute_channels, randomise, relative_error
from torch import Tensor, nn

from lightning_prune import find_groups, prune

SIGNAL = torch.randn(2, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Reader(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.a = nn.Linear(5, 12)
        self.rnn = kind(12, 16, batch_first=True, **options)
        self.head = nn.Linear(32 if options.get("bidirectional") else 16, 3)

    def forward(self, signal: Tensor) -> Tensor:
        return self.head(self.rnn(torch.relu(self.a(signal)))[0])


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bidirectional": True}], ids=str)
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_layers_are_cut_exactly(kind: type[nn.RNNBase], options: dict[str, Any]) -> None:
    net = randomise(Reader(kind, **options).double().eval())
    groups = find_groups(net, SIGNAL)
    assert [(group.name, group.size, group.frozen is None) for group in groups] == [
        ("a", 12, True),
        ("rnn", 16, True),
        ("head", 3, False),
    ]
    permuted = copy.deepcopy(net)
    permute_channels(permuted, [group for group in groups if not group.frozen])
    assert relative_error(outputs(permuted, SIGNAL), outputs(net, SIGNAL)) < 1e-12
    prune(net, SIGNAL, pruning_ratio=0.5)
    assert (net.a.out_features, net.rnn.input_size, net.rnn.hidden_size) == (6, 6, 8)
    net.train()(SIGNAL).sum().backward()
    assert net.rnn.weight_hh_l0.grad.shape == net.rnn.weight_hh_l0.shape


def test_a_failure_that_names_nobody_is_tried_group_by_group() -> None:
    class Checked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(self.a(x).relu()).relu()
            torch.zeros(1)
            if x.shape[-1] != 8:
                raise ValueError("eight, please")
            return self.c(x)

    net = Checked()
    record = prune(net, torch.zeros(2, 5), pruning_ratio=0.5)
    assert (net.a.out_features, net.b.out_features) == (4, 8)
    assert "eight, please" in record.held_back["b"]
    assert "a" not in record.held_back
