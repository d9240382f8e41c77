"""Criteria of other papers, each against its formula; and what all criteria have in common."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from test_conf import composed, names
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.func import functional_call

from lightning_prune.criteria import CHIP, LAMP, OBD, Criterion, Gathered, GeometricMedian, HRank, Wanda, score_groups
from lightning_prune.graph import read


def of_group(criterion: Criterion, net: nn.Module, inputs: Tensor, name: str = "0") -> Tensor:
    """The scores of a group, after one look where the criterion wants one."""
    if isinstance(criterion, Gathered):
        with criterion.gathering(net, inputs):
            loss = net(inputs).square().flatten(1).sum(1).mean()
            criterion.see_loss(loss)
            loss.backward()
            criterion.take()
    return score_groups(criterion, net, read(net, inputs).groups)[name]


def test_wanda_by_hand() -> None:
    net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 2))
    net[0].weight.data = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    net[2].weight.data = torch.tensor([[1.0, -1.0, 0.5], [-2.0, 0.0, 0.5]])
    inputs = torch.tensor([[3.0, 1.0], [4.0, 0.0]])
    # hidden: (3, 2, 4) and (4, 0, 4); norms 5, 2, sqrt(32); sums of |W| 3, 1, 1
    assert of_group(Wanda(), net, inputs).tolist() == pytest.approx([15.0, 2.0, 32**0.5])


@pytest.mark.parametrize("reader", ["grouped", "transposed", "flattened"])
def test_wanda_sums_over_all_weights_that_read_a_channel(reader: str) -> None:
    torch.manual_seed(0)
    second = {
        "grouped": nn.Conv2d(4, 6, 3, groups=2, padding=1),
        "transposed": nn.ConvTranspose2d(4, 3, 2, stride=2),
        "flattened": nn.Sequential(nn.Flatten(), nn.Linear(4 * 9, 2)),
    }[reader]
    net, inputs = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), second), torch.rand(5, 1, 3, 3) + 0.1
    hidden = net[:2](inputs).detach()
    norms = hidden.square().sum((0, 2, 3)).sqrt()
    weight = (second[1] if reader == "flattened" else second).weight.detach().abs()
    if reader == "transposed":
        expected = norms * weight.sum((1, 2, 3))
    elif reader == "flattened":
        expected = (hidden.square().sum(0).sqrt().flatten() * weight.sum(0)).view(4, 9).sum(1)
    else:  # the groups' channels go together: 0 with 2, 1 with 3
        each = norms * torch.cat([weight[:3].sum((0, 2, 3)), weight[3:].sum((0, 2, 3))])
        expected = each[:2] + each[2:]
    torch.testing.assert_close(of_group(Wanda(), net, inputs).float(), expected)


def test_hrank_counts_the_rank_of_maps() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 2, 1))
    net[0].weight.data = torch.eye(3)[:, :, None, None]
    images = torch.zeros(2, 3, 4, 4)
    images[:, 0] = torch.eye(4)
    images[:, 1] = torch.outer(torch.arange(4.0), torch.ones(4))
    images[0, 2, :2, :2] = torch.eye(2)
    assert of_group(HRank(), net, images).tolist() == [4.0, 1.0, 1.0]


@pytest.mark.parametrize("side", [2, 5])
def test_chip_is_what_the_nuclear_norm_loses(side: int) -> None:
    torch.manual_seed(0)
    net, images = nn.Sequential(nn.Conv2d(2, 6, 1), nn.Tanh(), nn.Conv2d(6, 2, 1)), torch.randn(3, 2, side, side)
    maps = net[:2](images).detach().double().flatten(2)
    expected = torch.zeros(6).double()
    for example in maps:
        for channel in range(6):
            without = example.clone()
            without[channel] = 0
            expected[channel] += (torch.linalg.svdvals(example).sum() - torch.linalg.svdvals(without).sum()) / 3
    torch.testing.assert_close(of_group(CHIP(), net, images), expected, rtol=1e-3, atol=1e-3)


def test_the_geometric_median_by_hand() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    net[0].weight.data = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    net[1].weight.data = torch.zeros(1, 3)
    assert of_group(GeometricMedian(), net, torch.zeros(1, 2)).tolist() == pytest.approx([0.75, 1.5, 0.75])


def test_lamp_by_hand() -> None:
    net = nn.Sequential(nn.Linear(1, 3, bias=False), nn.Linear(3, 1, bias=False))
    net[0].weight.data = torch.tensor([[2.0], [1.0], [3.0]])
    net[1].weight.data = torch.zeros(1, 3)
    assert of_group(LAMP(), net, torch.zeros(1, 1)).tolist() == pytest.approx([4 / 13, 1 / 14, 1.0])
    net[0].weight.data = torch.zeros(3, 1)
    assert of_group(LAMP(), net, torch.zeros(1, 1)).tolist() == [0.0, 0.0, 0.0]


def test_obd_comes_near_the_diagonal_of_the_hessian() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    inputs = torch.randn(6, 3, dtype=torch.float64)

    def loss(weight: Tensor) -> Tensor:
        outputs = functional_call(net, {"2.weight": weight}, (inputs,))
        return outputs.square().flatten(1).sum(1).mean()

    weight = net[2].weight.detach()
    curves = hessian(loss, weight).flatten(2).flatten(0, 1).diagonal().view_as(weight)
    expected = (curves * weight.square()).sum(0) / 2
    torch.testing.assert_close(of_group(OBD(probes=4000), net, inputs), expected, rtol=0.1, atol=0)
    with pytest.raises(ValueError, match=r"`probes` is the random vectors.*got 0"):
        OBD(probes=0)


def test_obd_is_exact_where_the_hessian_is_diagonal_and_leaves_the_random_state() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 1, bias=False)).double()
    net[0].weight.data = torch.eye(3).double()
    inputs = torch.eye(3).double() * torch.tensor([1.0, 2.0, 3.0]).double()
    state = torch.get_rng_state()
    expected = net[1].weight.detach()[0].square() * torch.tensor([1.0, 4.0, 9.0]).double() / 3
    torch.testing.assert_close(of_group(OBD(), net, inputs), expected)
    assert torch.equal(torch.get_rng_state(), state)


class Small(nn.Module):
    """Two convolutions with norms, a residual sum and a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.body, self.head = nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6 * 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(images)))
        logits: Tensor = self.head(F.max_pool2d(F.relu(x + self.body(x)), 2).flatten(1))
        return logits


@pytest.mark.parametrize("name", [name for name in names("criterion") if name not in ("random", "first_k")])
def test_scores_move_with_their_channels(name: str) -> None:
    """Every criterion of conf/: where channels lie must not matter, and the model must stay as it is."""
    torch.manual_seed(0)
    net, inputs = Small().double().eval(), torch.randn(4, 1, 4, 4).double()
    for norm in (net.norm.weight, net.norm.bias):
        norm.data = torch.rand(6).double() + 0.5
    moved, order = copy.deepcopy(net), torch.randperm(6)
    group = next(group for group in read(net, inputs).groups if not group.frozen)
    tensors = dict([*moved.named_parameters(), *moved.named_buffers()])
    for member in group.members:
        places = member.positions.flatten()
        to = member.positions[order].flatten()
        tensors[member.tensor].data.index_copy_(
            member.dim, places, tensors[member.tensor].data.index_select(member.dim, to)
        )
    torch.testing.assert_close(moved(inputs), net(inputs))

    def scores(model: nn.Module) -> Tensor:
        criterion = instantiate(composed("method=prune", f"criterion={name}").method).request.criterion
        if name == "obd":
            criterion.probes = 2000
        return of_group(criterion, model, inputs, group.name)

    before = copy.deepcopy(net.state_dict())
    expected = scores(net)[order]
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    torch.testing.assert_close(scores(moved), expected, rtol=0.2 if name == "obd" else 1e-4, atol=1e-6)
