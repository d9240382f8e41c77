"""Networks in which a normalisation reads a trunk that many layers share, so that each reader could choose its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.workbench.pieces import check_sizes, conv3x3, start_from, widened


class PreActBottleneck(nn.Module):
    """Norm, ReLU and convolution, three times, beside a trunk that nothing is done to.

    Source: He, Zhang, Ren, Sun 2016, "Identity mappings in deep residual networks", figure 4 (e). Where the shape
    changes, the 1x1 convolution of the shortcut reads the trunk as it is, as in the code of Liu et al. 2017.

    Args:
        in_channels: Channels of the trunk.
        channels: Channels inside; the trunk behind has four times as many.
        stride: Step of the 3x3 convolution.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = 4 * channels
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels, stride)
        self.bn3 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, kernel_size=1, bias=False)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)

    def forward(self, trunk: Tensor) -> Tensor:
        """Map (batch, in_channels, h, w) to (batch, 4 * channels, h / stride, w / stride)."""
        x = self.conv1(F.relu(self.bn1(trunk)))
        x = self.conv2(F.relu(self.bn2(x)))
        x = self.conv3(F.relu(self.bn3(x)))
        added: Tensor = x + self.shortcut(trunk)
        return added


class PreActResNet(nn.Module):
    """The pre-activation residual network for small images: three stages of bottlenecks with 16, 32 and 64 channels.

    Source: He, Zhang, Ren, Sun 2016, "Identity mappings in deep residual networks", section 5.

    Args:
        blocks: Blocks in each of the three stages; n of them make 9 n + 2 layers.
        in_channels: Colours of an image.
        image_size: Pixels per side, 4 or more; the map is halved twice.
        num_classes: Length of the output.
        width: Factor on the channels of every stage.
        bn_scale: What the scales of the batch norms start from; the slimming paper takes 0.5.
    """

    def __init__(
        self,
        blocks: int,
        in_channels: int = 3,
        image_size: int = 32,
        *,
        num_classes: int = 10,
        width: float = 1.0,
        bn_scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_sizes(in_channels, image_size, num_classes, smallest=4)
        if blocks < 1:
            raise ValueError(f"`blocks` counts the blocks of a stage, 1 or more; got {blocks}. ResNet-164 has 18.")
        w16, w32, w64 = (widened(channels, width) for channels in (16, 32, 64))
        self.conv1 = conv3x3(in_channels, w16)
        self.stage1 = _stage(blocks, w16, w16, stride=1)
        self.stage2 = _stage(blocks, 4 * w16, w32, stride=2)
        self.stage3 = _stage(blocks, 4 * w32, w64, stride=2)
        self.bn = nn.BatchNorm2d(4 * w64)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * w64, num_classes)
        start_from(self, bn_scale)

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, in_channels, image_size, image_size) to logits (batch, num_classes)."""
        trunk = self.stage3(self.stage2(self.stage1(self.conv1(images))))
        logits: Tensor = self.fc(self.pool(F.relu(self.bn(trunk))).flatten(1))
        return logits


class DenseLayer(nn.Module):
    """Norm, ReLU and a 3x3 convolution, whose channels are put behind those that it reads.

    Source: Huang, Liu, van der Maaten, Weinberger 2017, "Densely connected convolutional networks", equation 2.

    Args:
        in_channels: Channels of the trunk.
        growth: Channels that the layer adds to it.
    """

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = conv3x3(in_channels, growth)

    def forward(self, trunk: Tensor) -> Tensor:
        """Map (batch, in_channels, h, w) to (batch, in_channels + growth, h, w)."""
        return torch.cat((trunk, self.conv(F.relu(self.bn(trunk)))), 1)


class Transition(nn.Module):
    """Norm, ReLU, a 1x1 convolution that keeps the number of channels, and a pooling that halves the map.

    Source: Huang et al. 2017, "Densely connected convolutional networks", section 3, without compression.

    Args:
        channels: Channels before and behind.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, kernel_size=1, bias=False)

    def forward(self, trunk: Tensor) -> Tensor:
        """Map (batch, channels, h, w) to (batch, channels, h / 2, w / 2)."""
        return F.avg_pool2d(self.conv(F.relu(self.bn(trunk))), 2)


class DenseNet(nn.Module):
    """The densely connected network for small images: three dense blocks without bottlenecks, two transitions.

    Source: Huang, Liu, van der Maaten, Weinberger 2017, "Densely connected convolutional networks", section 4.2;
    as pruned in Liu et al. 2017, "Learning efficient convolutional networks through network slimming".

    Args:
        layers: Layers in each of the three blocks; n of them make 3 n + 4 layers.
        in_channels: Colours of an image.
        image_size: Pixels per side, 4 or more; the map is halved twice.
        num_classes: Length of the output.
        growth: Channels that each layer adds.
        bn_scale: What the scales of the batch norms start from; the slimming paper takes 0.5.
    """

    def __init__(
        self,
        layers: int,
        in_channels: int = 3,
        image_size: int = 32,
        *,
        num_classes: int = 10,
        growth: int = 12,
        bn_scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_sizes(in_channels, image_size, num_classes, smallest=4)
        if layers < 1:
            raise ValueError(f"`layers` counts the layers of a dense block, 1 or more; got {layers}. Take 12 or more.")
        if growth < 1:
            raise ValueError(
                f"`growth` is the channels that a layer adds, 1 or more; got {growth}. The paper takes 12."
            )
        first, second, third = (_STEM + n * layers * growth for n in range(3))
        last = third + layers * growth
        self.conv1 = conv3x3(in_channels, _STEM)
        self.block1 = _dense_block(layers, first, growth)
        self.transition1 = Transition(second)
        self.block2 = _dense_block(layers, second, growth)
        self.transition2 = Transition(third)
        self.block3 = _dense_block(layers, third, growth)
        self.bn = nn.BatchNorm2d(last)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(last, num_classes)
        start_from(self, bn_scale)

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, in_channels, image_size, image_size) to logits (batch, num_classes)."""
        trunk = self.transition1(self.block1(self.conv1(images)))
        trunk = self.block3(self.transition2(self.block2(trunk)))
        logits: Tensor = self.fc(self.pool(F.relu(self.bn(trunk))).flatten(1))
        return logits


def resnet164(
    in_channels: int = 3, image_size: int = 32, num_classes: int = 10, *, width: float = 1.0, bn_scale: float = 1.0
) -> PreActResNet:
    """Pre-activation ResNet-164 (He et al. 2016, section 5); the arguments are those of `PreActResNet`."""
    return PreActResNet(18, in_channels, image_size, num_classes=num_classes, width=width, bn_scale=bn_scale)


def densenet40(
    in_channels: int = 3, image_size: int = 32, num_classes: int = 10, *, growth: int = 12, bn_scale: float = 1.0
) -> DenseNet:
    """DenseNet-40 (Huang et al. 2017, section 4.2); the arguments are those of `DenseNet`."""
    return DenseNet(12, in_channels, image_size, num_classes=num_classes, growth=growth, bn_scale=bn_scale)


_STEM = 16
"""Channels of the first convolution (Huang et al. 2017, section 3)."""


def _stage(blocks: int, in_channels: int, channels: int, *, stride: int) -> nn.Sequential:
    first = PreActBottleneck(in_channels, channels, stride)
    return nn.Sequential(first, *(PreActBottleneck(4 * channels, channels, 1) for _ in range(blocks - 1)))


def _dense_block(layers: int, in_channels: int, growth: int) -> nn.Sequential:
    return nn.Sequential(*(DenseLayer(in_channels + n * growth, growth) for n in range(layers)))
