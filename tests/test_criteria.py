"""Criteria: scores in numbers, from every place where a channel lives, and what is no score."""

from __future__ import annotations

from math import inf, nan, sqrt

import pytest
import torch
from proof import permute_channels, randomise
from torch import Tensor, nn

from lightning_prune import ChannelGroup, find_groups, history_of, prune
from lightning_prune.criteria import BNScale, Criterion, Magnitude, Random, bn_scales, gather, score_groups
from lightning_prune.errors import ScoreError
from lightning_prune.tensors import named_tensors
from lightning_prune.types import Member


def fill(net: nn.Module, values: dict[str, list[float]]) -> None:
    """Put numbers into a network's tensors; what is not named becomes 0."""
    for name, tensor in named_tensors(net).items():
        tensor.data.zero_()
        if name in values:
            tensor.data.copy_(torch.tensor(values[name], dtype=tensor.dtype).reshape(tensor.shape))


def conv_bn_conv() -> nn.Sequential:
    """Two channels; their parameters are 3 4 | 1 2 | 2 -2 | 1 1 | 5 -5, 1 -1 and the like."""
    net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 1))
    values = {
        "0.weight": [3.0, -4.0, 1.0, 2.0],  # rows: channel 0 owns 3 -4, channel 1 owns 1 2
        "0.bias": [2.0, -2.0],
        "1.weight": [1.0, -1.0],
        "1.bias": [0.5, 0.0],
        "1.running_mean": [100.0, 0.0],  # buffers do not count
        "1.running_var": [1.0, 900.0],
        "3.weight": [5.0, -1.0, 1.0, 2.0],  # columns: channel 0 is read by 5 1, channel 1 by -1 2
        "3.bias": [7.0, 70.0],  # belongs to the next group
    }
    fill(net, values)
    return net


def group_of(net: nn.Module, example: Tensor, name: str = "0") -> ChannelGroup:
    return next(group for group in find_groups(net, example) if group.name == name)


def scored(criterion: Criterion, net: nn.Module, example: Tensor) -> dict[str, list[float]]:
    scores = score_groups(criterion, net, find_groups(net, example))
    assert all(values.dtype == torch.float64 for values in scores.values())
    return {name: values.tolist() for name, values in scores.items()}


L1_NORMS = [3 + 4 + 2 + 1 + 0.5 + 5 + 1, 1 + 2 + 2 + 1 + 0 + 1 + 2]
L2_NORMS = [sqrt(9 + 16 + 4 + 1 + 0.25 + 25 + 1), sqrt(1 + 4 + 4 + 1 + 0 + 1 + 4)]


@pytest.mark.parametrize(("p", "norms"), [(1, L1_NORMS), (2, L2_NORMS)])
def test_magnitude_counts_all_parameters_of_a_channel_and_no_buffer(p: int, norms: list[float]) -> None:
    scores = scored(Magnitude(p, normalize=None), conv_bn_conv(), torch.zeros(1, 2, 3, 3))
    assert scores == {"0": pytest.approx(norms)}


@pytest.mark.parametrize(("p", "norms"), [(1, L1_NORMS), (2, L2_NORMS)])
def test_magnitude_divides_by_the_mean(p: int, norms: list[float]) -> None:
    scores = scored(Magnitude(p), conv_bn_conv(), torch.zeros(1, 2, 3, 3))
    mean = sum(norms) / 2
    assert scores == {"0": pytest.approx([norm / mean for norm in norms])}


def test_magnitude_of_a_group_of_zeros_is_zero() -> None:
    net = conv_bn_conv()
    fill(net, {})
    assert scored(Magnitude(), net, torch.zeros(1, 2, 3, 3)) == {"0": [0.0, 0.0]}


@pytest.mark.parametrize("p", [1, 2])
def test_magnitude_behind_a_flatten_counts_all_positions_of_a_channel(p: int) -> None:
    """Two channels of 2x2 pixels: the linear layer reads channel c in columns 4 c to 4 c + 3."""
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Flatten(), nn.Linear(8, 1, bias=False))
    fill(net, {"0.weight": [3.0, -1.0], "2.weight": [1.0, 2.0, 3.0, 4.0, 0.0, -1.0, 0.0, 2.0]})
    powers = [3**p + sum(v**p for v in (1, 2, 3, 4)), 1 + 1 + 2**p]
    scores = scored(Magnitude(p, normalize=None), net, torch.zeros(1, 1, 2, 2))
    assert scores == {"0": pytest.approx([power ** (1 / p) for power in powers])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [1, 2])
def test_magnitude_in_half_precision(p: int, dtype: torch.dtype) -> None:
    net = conv_bn_conv().to(dtype)
    scores = scored(Magnitude(p, normalize=None), net, torch.zeros(1, 2, 3, 3, dtype=dtype))
    assert scores == {"0": pytest.approx([L1_NORMS, L2_NORMS][p - 1], rel=1e-6)}


@pytest.mark.parametrize("criterion", [Magnitude(1), Magnitude(2), BNScale()])
def test_scores_move_with_their_channels(criterion: Criterion) -> None:
    net = randomise(nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 3)))
    example = torch.zeros(1, 1, 4, 4)
    groups = find_groups(net, example)
    before = score_groups(criterion, net, groups)["0"]
    permute_channels(net, [group for group in groups if not group.frozen])
    after = score_groups(criterion, net, groups)["0"]
    assert not torch.equal(after, before)
    assert torch.allclose(after.sort().values, before.sort().values)


def test_gather_sums_over_positions() -> None:
    member = Member("w", 0, torch.tensor([[0, 3], [1, 4]]))
    assert gather(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), member).tolist() == [9.0, 18.0]


@pytest.mark.parametrize("p", [0, 3, "2", None])
def test_magnitude_of_another_order(p: object) -> None:
    with pytest.raises(ValueError, match=f"`p` is the order of the norm, 1 or 2; got {p!r}"):
        Magnitude(p)  # type: ignore[arg-type]


def test_magnitude_with_another_normalisation() -> None:
    with pytest.raises(ValueError, match="`normalize` is \"mean\" or None; got 'max'"):
        Magnitude(normalize="max")  # type: ignore[arg-type]


# BatchNorm scales


class Residual(nn.Module):
    """x + f(x): the BatchNorms of both branches scale the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3)
        self.conv, self.bn1 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.head = nn.Conv2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn0(self.stem(x))
        return self.head(y + self.bn1(self.conv(y)))


def test_bn_scale_is_the_mean_over_the_batchnorms_of_a_residual_group() -> None:
    net, example = Residual(), torch.zeros(1, 1, 2, 2)
    fill(net, {"bn0.weight": [1.0, -2.0, 0.0], "bn1.weight": [0.0, 4.0, -0.5]})
    assert [member.tensor for member in bn_scales(net, group_of(net, example, "stem"))] == ["bn0.weight", "bn1.weight"]
    assert scored(BNScale(), net, example) == {"stem": [0.5, 3.0, 0.25]}


def test_bn_scale_of_a_single_batchnorm_is_its_absolute_value() -> None:
    assert scored(BNScale(), conv_bn_conv(), torch.zeros(1, 2, 3, 3)) == {"0": [1.0, 1.0]}


def test_bn_scale_passes_over_groups_without_batchnorm() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    assert scored(BNScale(), net, torch.zeros(2, 2)) == {"0": [1.0, 1.0, 1.0]}
    assert BNScale().score(net, group_of(net, torch.zeros(2, 2), "2")) is None


def test_bn_scale_without_learnt_scales_finds_nothing() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, affine=False), nn.Linear(3, 1))
    with pytest.raises(ValueError, match="BNScale finds nothing to prune in Sequential"):
        prune(net, torch.zeros(2, 2), pruning_ratio=0.5, criterion=BNScale())


# lots


def test_random_depends_on_seed_and_name_alone() -> None:
    net, example = conv_bn_conv(), torch.zeros(1, 2, 3, 3)
    group = group_of(net, example)
    first = Random(7).score(net, group)
    torch.rand(5)
    assert torch.equal(Random(7).score(randomise(conv_bn_conv()), group), first)
    assert not torch.equal(Random(8).score(net, group), first)
    assert not torch.equal(Random(7).score(net, ChannelGroup("other", 2, group.members)), first)
    assert bool(((first >= 0) & (first < 1)).all())


def test_random_leaves_the_global_generator_alone() -> None:
    net = conv_bn_conv()
    state = torch.get_rng_state()
    scored(Random(), net, torch.zeros(1, 2, 3, 3))
    assert torch.equal(torch.get_rng_state(), state)


# what is no score


class Given(Criterion):
    def __init__(self, scores: Tensor | None) -> None:
        self.scores = scores

    def score(self, model: nn.Module, group: ChannelGroup) -> Tensor | None:
        return self.scores


@pytest.mark.parametrize("scores", [torch.ones(3), torch.ones(2, 1), torch.tensor(1.0)])
def test_scores_of_another_shape(scores: Tensor) -> None:
    with pytest.raises(ScoreError, match=r"Given gave scores of shape .* for 0, which has 2 channels"):
        scored(Given(scores), conv_bn_conv(), torch.zeros(1, 2, 3, 3))


@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_scores_that_are_no_numbers(bad: float) -> None:
    with pytest.raises(ScoreError, match=r"Given gave NaN or infinite scores for 0\. Nothing was cut"):
        scored(Given(torch.tensor([1.0, bad])), conv_bn_conv(), torch.zeros(1, 2, 3, 3))


def test_a_criterion_may_pass_over_a_group() -> None:
    assert scored(Given(None), conv_bn_conv(), torch.zeros(1, 2, 3, 3)) == {}


def test_integer_scores_will_do() -> None:
    assert scored(Given(torch.tensor([3, 1])), conv_bn_conv(), torch.zeros(1, 2, 3, 3)) == {"0": [3.0, 1.0]}


@pytest.mark.parametrize("bad", [nan, inf, -inf])
@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.weight", "1.running_mean", "1.running_var", "3.weight"])
def test_weights_that_are_no_numbers(name: str, bad: float) -> None:
    net = conv_bn_conv()
    named_tensors(net)[name].data.view(-1)[-1] = bad
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ScoreError, match=rf"{name} holds NaN or infinite values\. Nothing was cut.*lower the learning"):
        prune(net, torch.zeros(1, 2, 3, 3), pruning_ratio=0.5, criterion=Random())
    assert not history_of(net)
    assert all(torch.equal(value, before[key]) or key == name for key, value in net.state_dict().items())


def test_finite_values_whose_sum_overflows_are_no_error() -> None:
    """In float16 a layer of 512 variances of 200 sums up to more than there is."""
    net = nn.Sequential(nn.Linear(4, 512), nn.BatchNorm1d(512), nn.Linear(512, 2))
    net[1].running_var.fill_(200.0)
    record = prune(net.half(), torch.zeros(2, 4, dtype=torch.float16), pruning_ratio=0.5)
    assert record.reached == 0.5
