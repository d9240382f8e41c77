"""Networks whose norms read a shared trunk: published parameter counts, shapes, and groups that the proof confirms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from proof import prove
from torch import nn

from lightning_prune.graph import find_groups
from lightning_prune.workbench import DenseNet, MnistFC, PreActResNet, densenet40, resnet164

SMALL: dict[str, Callable[..., nn.Module]] = {
    "preact": lambda **sizes: PreActResNet(2, width=0.25, bn_scale=0.5, **sizes),
    "dense": lambda **sizes: DenseNet(2, growth=3, bn_scale=0.5, **sizes),
    "mnist_fc": lambda **sizes: MnistFC(bn_scale=0.5, **sizes),
}


def parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def layers(net: nn.Module) -> int:
    return sum(isinstance(module, (nn.Conv2d, nn.Linear)) and "shortcut" not in n for n, module in net.named_modules())


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("image_size", [8, 28])
@pytest.mark.parametrize("name", SMALL)
def test_every_net_takes_every_image(name: str, image_size: int, in_channels: int) -> None:
    net = SMALL[name](in_channels=in_channels, image_size=image_size, num_classes=7)
    assert net(torch.randn(2, in_channels, image_size, image_size)).shape == (2, 7)


@pytest.mark.parametrize(
    ("make", "depth", "count", "published"),
    [
        (resnet164, 164, 1_703_258, 1.70e6),
        (densenet40, 40, 1_019_722, 1.02e6),
        (MnistFC, 3, 785 * 500 + 2 * 500 + 501 * 300 + 2 * 300 + 301 * 10, 0.5e6),
    ],
)
def test_layers_and_parameters_as_published(
    make: Callable[[], nn.Module], depth: int, count: int, published: float
) -> None:
    net = make()
    assert layers(net) == depth
    assert parameters(net) == count == pytest.approx(published, rel=0.1 if depth == 3 else 0.005)


@pytest.mark.parametrize("name", SMALL)
def test_scales_start_where_they_are_told_to(name: str) -> None:
    norms = [m for m in SMALL[name]().modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    assert norms
    assert all(bool((norm.weight == 0.5).all()) for norm in norms)


def test_width_and_growth_scale_the_channels() -> None:
    assert resnet164(width=0.5).fc.in_features == 128
    assert densenet40(growth=2).fc.in_features == 16 + 3 * 12 * 2


def test_one_group_for_the_trunk_of_a_stage_and_two_in_each_block() -> None:
    net = SMALL["preact"]()
    groups = find_groups(net, torch.randn(2, 3, 32, 32))
    free = [group for group in groups if not group.frozen]
    assert sorted(group.size for group in free) == sorted([4, 16, 32, 64] + 2 * [4, 4, 8, 8, 16, 16])
    prove(net, torch.randn(2, 3, 32, 32), groups)


def test_one_group_for_each_layer_of_a_dense_block() -> None:
    net = SMALL["dense"]()
    groups = find_groups(net, torch.randn(2, 3, 32, 32))
    free = [group for group in groups if not group.frozen]
    assert sorted(group.size for group in free) == sorted([16, 22, 28] + 6 * [3])
    prove(net, torch.randn(2, 3, 32, 32), groups)


@pytest.mark.parametrize(("make", "groups"), [(resnet164, 4 + 3 * 18 * 2), (densenet40, 3 + 3 * 12)])
def test_the_whole_net_is_read(make: Callable[..., nn.Module], groups: int) -> None:
    net, images = make(in_channels=1, image_size=8), torch.randn(2, 1, 8, 8)
    found = find_groups(net, images)
    assert sum(not group.frozen for group in found) == groups
    prove(net, images, found)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PreActResNet(0), r"`blocks` .* got 0\."),
        (lambda: PreActResNet(1, image_size=3), r"`image_size` .* got 3\. Enlarge"),
        (lambda: PreActResNet(1, width=0), r"`width` .* got 0\."),
        (lambda: DenseNet(0), r"`layers` .* got 0\."),
        (lambda: DenseNet(1, growth=0), r"`growth` .* got 0\."),
        (lambda: MnistFC(0), r"`in_channels` .* got 0\."),
    ],
)
def test_nets_refuse_wrong_sizes(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
