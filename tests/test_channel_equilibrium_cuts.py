"""Networks with Channel Equilibrium are cut: blocks go along with their channels."""

from __future__ import annotations

import copy

import pytest
import torch
from proof import outputs, prove, randomise, relative_error, summary
from torch import nn

from lightning_prune import find_groups, prune
from lightning_prune.allocation import Global
from lightning_prune.criteria import BNScale, Random
from lightning_prune.layers import BatchDecorrelation, ChannelEquilibrium, Equilibrated
from lightning_prune.tensors import named_tensors


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        Equilibrated(nn.BatchNorm2d(8), ChannelEquilibrium(8, group_size=4)),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        Equilibrated(nn.BatchNorm2d(6), BatchDecorrelation(6, group_size=3)),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )


PICTURES = torch.randn(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
GATE = "1.equilibrium.reweighting.gate"


class TestPruning:
    def test_groups_tie_the_channels_in_the_same_place(self) -> None:
        groups = find_groups(small(), PICTURES.float())
        assert summary(groups) == {"0": 4, f"{GATE}.0": 4, "3": 3, "8": "reaches the model's output"}
        members = {(member.tensor, member.dim): member.positions for member in groups[0].members}
        assert members["1.norm.weight", 0].tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
        for dim in (1, 2):
            whitening = members["1.equilibrium.decorrelation.running_whitening", dim]
            assert whitening.tolist() == [[0], [1], [2], [3]]
        hidden = {(member.tensor, member.dim) for member in groups[1].members}
        assert hidden == {
            (f"{GATE}.0.weight", 0),
            (f"{GATE}.1.weight", 0),
            (f"{GATE}.1.bias", 0),
            (f"{GATE}.3.weight", 1),
        }

    def test_they_are_proven(self) -> None:
        prove(small(), PICTURES, find_groups(small(), PICTURES.float()))

    def test_on_tensors_without_memory(self) -> None:
        found = find_groups(small().to("meta"), PICTURES.float().to("meta"))
        assert summary(found) == summary(find_groups(small(), PICTURES.float()))

    def test_zeroing_equals_removing(self) -> None:
        net = randomise(small().double()).eval()
        dense, cut = copy.deepcopy(net), copy.deepcopy(net)
        how = {"allocation": Global(cap=0.8), "criterion": Random(seed=1), "constants": "drop", "ignore": [f"{GATE}*"]}
        record = prune(cut, PICTURES, pruning_ratio=0.5, **how)
        assert record.reached > 0.3
        for path, dims in record.kept.items():
            for dim, places in dims.items():
                tensor = named_tensors(dense)[path].data
                tensor.index_fill_(dim, torch.tensor(sorted(set(range(tensor.shape[dim])) - set(places))), 0)
        assert relative_error(outputs(cut, PICTURES), outputs(dense, PICTURES)) < 1e-12
        assert relative_error(outputs(net, PICTURES), outputs(dense, PICTURES)) > 1e-3

    def test_a_cut_network_trains_on(self) -> None:
        net = small().double()
        net(PICTURES)
        prune(net, PICTURES, pruning_ratio=0.5)
        first, second = net[1].equilibrium, net[4].equilibrium
        assert first.decorrelation.running_whitening.shape == (2, 2, 2)
        assert second.running_whitening.shape[1] == second.running_whitening.shape[2] < 3
        assert first.reweighting.gate[0].in_features == first.reweighting.gate[3].out_features == 4
        assert len(first.scale()) == net[1].norm.num_features == 4
        before = first.decorrelation.running_whitening.clone()
        net.train()(PICTURES).square().sum().backward()
        assert not torch.equal(first.decorrelation.running_whitening, before)
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in net.parameters())
        assert net.eval()(PICTURES).isfinite().all()


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("block", [BatchDecorrelation, ChannelEquilibrium])
def test_any_number_of_groups_can_be_cut(block: type[ChannelEquilibrium], size: int) -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), Equilibrated(nn.BatchNorm2d(16), block(16, group_size=size)))
    net.extend([nn.ReLU(), nn.Conv2d(16, 5, 1)])
    group = find_groups(net.eval(), PICTURES[:2].float())[0]
    assert (group.size, group.frozen) == (size, None)


def test_blocks_with_one_position_are_cut_like_others() -> None:
    """Their gates have nothing to do, are read all the same, and stay as they are."""
    norms = [Equilibrated(nn.BatchNorm2d(8), ChannelEquilibrium(8, group_size=4)) for _ in range(2)]
    net = nn.Sequential(nn.Conv2d(3, 8, 3), norms[0], nn.ReLU(), nn.Conv2d(8, 8, 4), norms[1], nn.ReLU(), nn.Flatten())
    net.append(nn.Linear(8, 5))
    for ratio in (0.5, 0.75):  # the second time on what the first has left
        prune(net.eval(), PICTURES[:2].float(), pruning_ratio=ratio, criterion=BNScale())
    assert [norms[place].norm.num_features for place in (0, 1)] == [2, 2]
    assert norms[1].equilibrium.decorrelation.running_whitening.shape == (2, 1, 1)
    net.train()(PICTURES.float()).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
