"""How often the taps of a kernel meet a padded map, as torch itself tells, and what absorption makes of it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from test_absorption import lively
from torch import Tensor, nn

from lightning_prune import prune
from lightning_prune.criteria import BNScale
from lightning_prune.handlers import Call
from lightning_prune.taps import tap_weights

EXACT = 1e-12
small = st.integers(1, 3)


def conv_call(sizes: tuple[int, int], taps: tuple[int, int], settings: dict[str, list[int]]) -> Call:
    args = [torch.zeros(1, 1, *sizes), torch.zeros(1, 1, *taps), None, *settings.values(), False, [0, 0], 1]
    return Call(torch.ops.aten.convolution.default, tuple(args), {}, None)


@settings(deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    taps=st.tuples(small, small),
    stride=st.tuples(small, small),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(small, small),
)
@example(sizes=(1, 1), taps=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1))
@example(sizes=(8, 8), taps=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1))
def test_each_tap_counts_as_torch_counts_it(
    sizes: tuple[int, int],
    taps: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> None:
    lengths = zip(sizes, taps, padding, dilation, strict=True)
    assume(all(size + 2 * pad > reach * (count - 1) for size, count, pad, reach in lengths))
    how = {"stride": list(stride), "padding": list(padding), "dilation": list(dilation)}
    one_tap_each = torch.eye(taps[0] * taps[1], dtype=torch.float64).view(-1, 1, *taps)
    met = F.conv2d(torch.ones(1, 1, *sizes, dtype=torch.float64), one_tap_each, **how)[0].flatten(1)
    mostly_inside = 2 * met.all(0).double().mean() > 1
    expected = torch.ones(len(met), dtype=torch.float64) if mostly_inside else met.mean(1)
    got = tap_weights(conv_call(sizes, taps, how), (1, 1, *sizes), (1, 1, *taps))
    torch.testing.assert_close(got, expected, rtol=0, atol=EXACT)


def padded(size: int, second: nn.Module) -> tuple[nn.Module, Tensor, Tensor]:
    """A network whose second layer reads dead channels through its padding; images; and what it says of them."""
    torch.manual_seed(0)
    net = lively(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), second))
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    return net, images, net(images)


def test_on_a_map_of_one_position_nothing_changes() -> None:
    net, images, before = padded(1, nn.Conv2d(8, 4, 3, padding=1))
    prune(net, images, pruning_ratio=0.5, criterion=BNScale())
    assert (net(images) - before).abs().max() < EXACT


@pytest.mark.parametrize("size", [2, 3, 4])
def test_on_small_maps_it_is_right_on_average(size: int) -> None:
    net, images, before = padded(size, nn.Conv2d(8, 4, 3, padding=1, bias=False))
    naive = copy.deepcopy(net)
    prune(net, images, pruning_ratio=0.5, criterion=BNScale())
    prune(naive, images, pruning_ratio=0.5, criterion=BNScale(), constants="drop")
    assert (net(images) - before).mean((2, 3)).abs().max() < EXACT
    assert (naive(images) - before).mean((2, 3)).abs().max() > 1e-2


def test_through_a_depthwise_layer_too() -> None:
    depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    net, images, before = padded(1, nn.Sequential(depthwise, nn.LeakyReLU(), nn.Conv2d(8, 4, 1)))
    prune(net, images, pruning_ratio=0.5, criterion=BNScale())
    assert (net(images) - before).abs().max() < EXACT
