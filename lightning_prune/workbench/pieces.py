"""The small pieces that all networks of the workbench are built from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal, TypeAlias

from torch import nn

from lightning_prune.layers import BatchDecorrelation, ChannelEquilibrium, Equilibrated, InstanceReweighting

Norm: TypeAlias = Literal["bn", "bd", "ir", "ce"]
"""BatchNorm alone, or with a Channel Equilibrium block behind it, or with one of its branches."""

_BLOCKS: Final[dict[str, Callable[[int], ChannelEquilibrium | BatchDecorrelation | InstanceReweighting]]] = {
    "bd": BatchDecorrelation,
    "ir": InstanceReweighting,
    "ce": ChannelEquilibrium,
}


def check_sizes(in_channels: int, image_size: int, num_classes: int, *, smallest: int) -> None:
    """Refuse sizes that a network cannot take.

    Args:
        in_channels: Colours of an image, 1 or more.
        image_size: Pixels per side, `smallest` or more.
        num_classes: Length of the output, 1 or more.
        smallest: The fewest pixels per side that leave a map behind every layer.

    Raises:
        ValueError: One of them is too small.
    """
    if in_channels < 1:
        raise ValueError(f"`in_channels` counts the colours of an image, 1 or more; got {in_channels}.")
    if image_size < smallest:
        raise ValueError(
            f"`image_size` is the pixels per side, {smallest} or more for this network; got {image_size}. "
            "Enlarge the images or take LeNet300."
        )
    if num_classes < 1:
        raise ValueError(f"`num_classes` is the length of the output, 1 or more; got {num_classes}.")


def widened(channels: int, width: float) -> int:
    """The channels of a layer at this width, 1 or more.

    Raises:
        ValueError: `width` is not greater than 0.
    """
    if width <= 0:
        raise ValueError(f"`width` is the factor on the channels, greater than 0; got {width}.")
    return max(1, round(channels * width))


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size of the map, or divides it by the stride; a norm takes its bias' place."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)


def batch_norm(channels: int, norm: Norm = "bn") -> nn.BatchNorm2d | Equilibrated:
    """A BatchNorm, and what `norm` names behind it.

    Raises:
        ValueError: `norm` is unknown.
    """
    if norm == "bn":
        return nn.BatchNorm2d(channels)
    if norm not in _BLOCKS:
        raise ValueError(f"`norm` is one of 'bn', {', '.join(map(repr, _BLOCKS))}; got {norm!r}.")
    return Equilibrated(nn.BatchNorm2d(channels), _BLOCKS[norm](channels))


def start_from(net: nn.Module, bn_scale: float) -> None:
    """Set the scales of all batch norms."""
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.constant_(module.weight, bn_scale)
