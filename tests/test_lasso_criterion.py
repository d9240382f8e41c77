"""The order in which channels enter the LASSO, as scores; and two baselines that look at less."""

from __future__ import annotations

import pytest
import torch
from rebuilt_networks import HARD, batches
from torch import Tensor, nn

from lightning_prune import find_groups, prune
from lightning_prune.allocation import ByCost, Global, ShallowToDeep
from lightning_prune.criteria import FirstK, Lasso, MaxResponse, score_groups
from lightning_prune.criteria.lasso import ranked
from lightning_prune.errors import ScoreError
from lightning_prune.moments import Responses

ROWS, IMAGE = batches((4,), 2, 50), torch.zeros(1, 1, 2, 2, dtype=torch.float64)


def chain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)),
    ).double()


def gathered(net: nn.Module, rows: list[Tensor] = ROWS, points: int = 2) -> Lasso:
    criterion = Lasso(points)
    with torch.no_grad(), criterion.gathering(net, rows[0]):
        for batch in rows:
            net(batch)
            criterion.take()
    return criterion


def scores(net: nn.Module, criterion: Lasso | MaxResponse | FirstK) -> dict[str, Tensor]:
    return score_groups(criterion, net, find_groups(net, ROWS[0]))


def test_channels_at_right_angles_score_their_share() -> None:
    """By hand: energies 9, 4 and 1 of 14, entering from the largest on."""
    energies = torch.tensor([4.0, 9.0, 1.0], dtype=torch.float64)
    found = ranked(Responses(energies.diag(), energies, 14.0))
    assert found.tolist() == pytest.approx([4 / 14, 9 / 14, 1 / 14])


def test_of_twins_the_second_scores_nothing() -> None:
    gram = torch.tensor([[4.0, 4.0, 0.0], [4.0, 4.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    found = ranked(Responses(gram, gram.sum(1), float(gram.sum())))
    assert found.tolist() == pytest.approx([16 / 17, 0, 1 / 17])


def test_a_channel_that_entered_earlier_never_has_less() -> None:
    """By hand: the first enters at |t| = 10 and explains 10^2 / 100 of 30, the second, at 5, explains 5^2 / 1."""
    gram, target = torch.tensor([100.0, 1.0]).double().diag(), torch.tensor([10.0, 5.0]).double()
    assert ranked(Responses(gram, target, 30.0)).tolist() == pytest.approx([25 / 30, 25 / 30])


def test_scores_are_those_of_all_that_the_readers_were_given() -> None:
    """From the rows: z_i is what channel i gives the next layer's outputs, less its mean."""
    net = chain()
    found = scores(net, gathered(net))["0"]
    with torch.no_grad():
        x = net[1](net[0](torch.cat(ROWS)))
        z = torch.einsum("rc,oc->cro", x, net[2].weight)
        z = (z - z.mean(1, keepdim=True)).flatten(1).T
    wanted = ranked(Responses(z.T @ z, (z.T @ z).sum(1), float((z.T @ z).sum())))
    assert torch.allclose(found.double(), wanted, atol=1e-10)
    assert float(found.sum()) == pytest.approx(1, abs=1e-8)


@pytest.mark.parametrize("name", HARD)
def test_every_group_of_every_network_is_scored_or_passed_over(name: str) -> None:
    hard = HARD[name]
    net = hard.dense()
    criterion = Lasso(points=4)
    with torch.no_grad(), criterion.gathering(net, hard.batches()[0]):
        for batch in hard.batches():
            net(batch)
            criterion.take()
    groups = find_groups(net, hard.batches()[0])
    found = score_groups(criterion, net, groups)
    assert found
    for group in groups:
        if group.name in found:
            assert found[group.name].shape == (group.size,)
            assert bool((found[group.name] >= 0).all())
    assert criterion.examples == 96


def test_inside_of_prune_by_gathering() -> None:
    net = chain()
    criterion = gathered(net)
    lowest = scores(net, criterion)["0"].argsort()[:4].sort().values
    record = prune(net, ROWS[0], pruning_ratio=0.5, criterion=criterion)
    assert sorted(set(range(8)) - set(record.kept["0.weight"][0])) == lowest.tolist()


def test_before_it_has_looked_it_says_so() -> None:
    with pytest.raises(ScoreError, match="Lasso has seen nothing"):
        prune(chain(), ROWS[0], pruning_ratio=0.5, criterion=Lasso())


@pytest.mark.parametrize("allocation", [ByCost(), Global(), ShallowToDeep()], ids=repr)
def test_it_shares_out_over_groups(allocation: Global) -> None:
    net = chain()
    record = prune(net, ROWS[0], pruning_ratio=0.4, of="macs", criterion=gathered(net), allocation=allocation)
    assert 0.4 <= record.reached < 0.65


def test_it_comes_back_from_its_state() -> None:
    hard = HARD["residual"]
    net = hard.dense()
    criterion, again = Lasso(), Lasso()
    with torch.no_grad(), criterion.gathering(net, hard.batches()[0]):
        net(hard.batches()[0])
        criterion.take()
    with again.gathering(net, hard.batches()[0]):
        pass
    again.load_state_dict(criterion.state_dict())
    groups = find_groups(net, hard.batches()[0])
    one, other = score_groups(criterion, net, groups), score_groups(again, net, groups)
    assert one.keys() == other.keys()
    assert all(torch.equal(values, other[name]) for name, values in one.items())


def test_it_looks_on_without_touching_anything() -> None:
    net = chain()
    with torch.no_grad():
        before = net(ROWS[0])
        criterion = gathered(net)
        assert torch.equal(net(ROWS[0]), before)
    assert not any(module._forward_pre_hooks for module in net.modules())
    assert criterion.steps == 2


@pytest.mark.parametrize("count", range(1, 9))
def test_exactly_so_many_are_chosen(count: int) -> None:
    z = torch.randn(50, 8, dtype=torch.float64)
    z[:, 5] = z[:, 1]
    z[:, 6] = 0
    found = Lasso.choose(Responses(z.T @ z, z.T @ z.sum(1), float(z.sum(1).square().sum())), count)
    assert found.tolist() == sorted(set(found.tolist()))
    assert len(found) == count
    assert count > 6 or not {1, 5} <= set(found.tolist())


def test_points_that_are_none() -> None:
    with pytest.raises(ValueError, match="`points` is positions of an output that are looked at, 1 or more; got 0"):
        Lasso(points=0)


def test_max_response_by_hand() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    net[2].weight.data = torch.tensor([[1.0, -2.0, 0.0], [-3.0, 0.5, 0.0]])
    net[0].weight.data.fill_(100)
    found = score_groups(MaxResponse(), net, find_groups(net, torch.zeros(1, 2)))
    assert found["0"].tolist() == [4, 2.5, 0]


def test_max_response_sums_over_readers_taps_and_positions() -> None:
    """A flatten gives each channel four columns of the Linear layer."""
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(12, 2)).double()
    found = score_groups(MaxResponse(), net, find_groups(net, IMAGE))
    assert torch.allclose(found["0"], net[1].weight.detach().abs().sum((0, 2, 3)))
    assert torch.allclose(found["1"], net[3].weight.detach().abs().sum(0).view(3, 4).sum(1))


@pytest.mark.parametrize("groups", [1, 2])
def test_max_response_of_transposed_convolutions(groups: int) -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ConvTranspose2d(4, 2, 2, groups=groups)).double()
    found = score_groups(MaxResponse(), net, find_groups(net, IMAGE))["0"]
    wanted = net[1].weight.detach().abs().sum((1, 2, 3))
    assert torch.allclose(found, wanted if groups == 1 else wanted.view(2, 2).sum(0))


def test_the_first_ones_stay() -> None:
    net = chain()
    record = prune(net, ROWS[0], pruning_ratio=0.5, criterion=FirstK())
    assert (record.kept["0.weight"][0], record.kept["2.weight"][0]) == ((0, 1, 2, 3), (0, 1, 2))
