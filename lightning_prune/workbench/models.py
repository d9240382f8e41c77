"""The small image networks that pruning papers measure themselves on."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.workbench.extras import optional
from lightning_prune.workbench.pieces import Norm, batch_norm, check_sizes, conv3x3, start_from, widened

_VGG11 = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")
_VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


class LeNet300(nn.Module):
    """LeNet-300-100: two hidden layers of 300 and 100 channels.

    Source: LeCun, Bottou, Bengio, Haffner 1998, "Gradient-based learning applied to document recognition".

    Args:
        in_channels: Colours of an image.
        image_size: Pixels per side.
        num_classes: Length of the output.
    """

    def __init__(self, in_channels: int = 1, image_size: int = 28, num_classes: int = 10) -> None:
        super().__init__()
        check_sizes(in_channels, image_size, num_classes, smallest=1)
        self.fc1 = nn.Linear(in_channels * image_size**2, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, in_channels, image_size, image_size) to logits (batch, num_classes)."""
        x = F.relu(self.fc1(images.flatten(1)))
        logits: Tensor = self.fc3(F.relu(self.fc2(x)))
        return logits


class LeNet5(nn.Module):
    """Caffe's LeNet-5: convolutions of 20 and 50 channels, a hidden layer of 500.

    Images of less than 16 pixels are padded by 2 before each convolution, which would eat them up otherwise.

    Source: LeCun et al. 1998; Jia et al. 2014, "Caffe", examples/mnist/lenet.prototxt.

    Args:
        in_channels: Colours of an image.
        image_size: Pixels per side, 4 or more.
        num_classes: Length of the output.
    """

    def __init__(self, in_channels: int = 1, image_size: int = 28, num_classes: int = 10) -> None:
        super().__init__()
        check_sizes(in_channels, image_size, num_classes, smallest=4)
        padding = 2 if image_size < 16 else 0
        side = image_size
        for _ in range(2):
            side = (side + 2 * padding - 4) // 2
        self.conv1 = nn.Conv2d(in_channels, 20, kernel_size=5, padding=padding)
        self.conv2 = nn.Conv2d(20, 50, kernel_size=5, padding=padding)
        self.fc1 = nn.Linear(50 * side**2, 500)
        self.fc2 = nn.Linear(500, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, in_channels, image_size, image_size) to logits (batch, num_classes)."""
        x = F.max_pool2d(self.conv1(images), 2)
        x = F.max_pool2d(self.conv2(x), 2)
        logits: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return logits


class MnistFC(nn.Module):
    """The slimming paper's network for MNIST: hidden layers of 500 and 300 channels, each with a batch norm.

    Source: Liu et al. 2017, "Learning efficient convolutional networks through network slimming", table 2.

    Args:
        in_channels: Colours of an image.
        image_size: Pixels per side.
        num_classes: Length of the output.
        bn_scale: What the scales of the batch norms start from; the slimming paper takes 0.5.
    """

    def __init__(
        self, in_channels: int = 1, image_size: int = 28, num_classes: int = 10, *, bn_scale: float = 1.0
    ) -> None:
        super().__init__()
        check_sizes(in_channels, image_size, num_classes, smallest=1)
        self.fc1 = nn.Linear(in_channels * image_size**2, 500)
        self.bn1 = nn.BatchNorm1d(500)
        self.fc2 = nn.Linear(500, 300)
        self.bn2 = nn.BatchNorm1d(300)
        self.fc3 = nn.Linear(300, num_classes)
        start_from(self, bn_scale)

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, in_channels, image_size, image_size) to logits (batch, num_classes)."""
        x = F.relu(self.bn1(self.fc1(images.flatten(1))))
        logits: Tensor = self.fc3(F.relu(self.bn2(self.fc2(x))))
        return logits


class VGG16BN(nn.Module):
    """VGG-16 with batch normalisation for small images: 13 convolutions and one linear layer.

    Pooling is left out once the map is one pixel wide, so that small images pass.

    Source: Simonyan, Zisserman 2015, "Very deep convolutional networks for large-scale image recognition";
    in this form Liu et al. 2017, "Learning efficient convolutional networks through network slimming".

    Args:
        in_channels: Colours of an image.
        image_size: Pixels per side.
        num_classes: Length of the output.
        width: Factor on the channels of every convolution.
        bn_scale: What the scales of the batch norms start from; the slimming paper takes 0.5.
        norm: What stands behind each convolution.
    """

    steps: ClassVar[Sequence[int | str]] = _VGG16

    def __init__(
        self,
        in_channels: int = 3,
        image_size: int = 32,
        num_classes: int = 10,
        *,
        width: float = 1.0,
        bn_scale: float = 1.0,
        norm: Norm = "bn",
    ) -> None:
        super().__init__()
        check_sizes(in_channels, image_size, num_classes, smallest=1)
        layers: list[nn.Module] = []
        channels, side = in_channels, image_size
        for step in self.steps:
            if isinstance(step, int):
                out = widened(step, width)
                layers += [conv3x3(channels, out), batch_norm(out, norm), nn.ReLU(inplace=True)]
                channels = out
            elif side > 1:
                layers.append(nn.MaxPool2d(2))
                side //= 2
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        start_from(self, bn_scale)

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, in_channels, image_size, image_size) to logits (batch, num_classes)."""
        logits: Tensor = self.classifier(self.pool(self.features(images)).flatten(1))
        return logits


class VGG11BN(VGG16BN):
    """VGG-11 with batch normalisation for small images; the arguments are those of `VGG16BN`.

    Source: Simonyan, Zisserman 2015, "Very deep convolutional networks for large-scale image recognition", table 1.
    """

    steps = _VGG11


class PaddedShortcut(nn.Module):
    """Option A of He et al. 2015: every second pixel, and zeros for the channels that are new.

    Args:
        stride: Step between the pixels that are kept.
        extra: How many channels of zeros are put behind.
    """

    def __init__(self, stride: int, extra: int) -> None:
        super().__init__()
        self.stride = stride
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels, h, w) to (batch, channels + extra, h / stride, w / stride)."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut.

    Source: He, Zhang, Ren, Sun 2015, "Deep residual learning for image recognition", figure 2.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Step of the first convolution.
        option: Shortcut where the shape changes, see `ResNet`.
        norm: What stands behind the second convolution.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, *, option: Literal["A", "B"], norm: Norm
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = batch_norm(out_channels, norm)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = _shortcut(in_channels, out_channels, stride, option)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in_channels, h, w) to (batch, out_channels, h / stride, w / stride)."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """The residual network for small images: a convolution, three stages of 16, 32 and 64 channels, a linear layer.

    Source: He, Zhang, Ren, Sun 2015, "Deep residual learning for image recognition", section 4.2.

    Args:
        blocks: Blocks in each of the three stages; n of them make 6 n + 2 layers.
        in_channels: Colours of an image.
        image_size: Pixels per side, 4 or more; the map is halved twice.
        num_classes: Length of the output.
        option: Shortcut where the shape changes: "A" takes no parameters, "B" is a 1x1 convolution.
        width: Factor on the channels of every stage.
        norm: What stands behind the first convolution, and at the end of each block but those of the last stage, as
            Shao et al. 2020 place Channel Equilibrium in a ResNet; elsewhere it is a BatchNorm.
    """

    def __init__(
        self,
        blocks: int,
        in_channels: int = 3,
        image_size: int = 32,
        *,
        num_classes: int = 10,
        option: Literal["A", "B"] = "B",
        width: float = 1.0,
        norm: Norm = "bn",
    ) -> None:
        super().__init__()
        check_sizes(in_channels, image_size, num_classes, smallest=4)
        if option not in ("A", "B"):
            raise ValueError(f'`option` names the shortcut of He et al., "A" or "B"; got {option!r}.')
        w16, w32, w64 = (widened(channels, width) for channels in (16, 32, 64))
        self.conv1 = conv3x3(in_channels, w16)
        self.bn1 = batch_norm(w16, norm)
        self.stage1 = _stage(blocks, w16, w16, stride=1, option=option, norm=norm)
        self.stage2 = _stage(blocks, w16, w32, stride=2, option=option, norm=norm)
        self.stage3 = _stage(blocks, w32, w64, stride=2, option=option, norm="bn")
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(w64, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, in_channels, image_size, image_size) to logits (batch, num_classes)."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.stage3(self.stage2(self.stage1(x)))
        logits: Tensor = self.fc(self.pool(x).flatten(1))
        return logits


def resnet20(
    in_channels: int = 3,
    image_size: int = 32,
    num_classes: int = 10,
    *,
    option: Literal["A", "B"] = "B",
    width: float = 1.0,
    norm: Norm = "bn",
) -> ResNet:
    """ResNet-20 for small images (He et al. 2015, section 4.2); the arguments are those of `ResNet`."""
    return ResNet(3, in_channels, image_size, num_classes=num_classes, option=option, width=width, norm=norm)


def resnet56(
    in_channels: int = 3,
    image_size: int = 32,
    num_classes: int = 10,
    *,
    option: Literal["A", "B"] = "B",
    width: float = 1.0,
    norm: Norm = "bn",
) -> ResNet:
    """ResNet-56 for small images (He et al. 2015, section 4.2); the arguments are those of `ResNet`."""
    return ResNet(9, in_channels, image_size, num_classes=num_classes, option=option, width=width, norm=norm)


def torchvision_model(
    name: str, num_classes: int, in_channels: int = 3, image_size: int | None = None, **kwargs: Any
) -> nn.Module:
    """A classifier of torchvision, untrained unless `weights` says otherwise.

    Source: the paper named in torchvision's documentation of the model.

    Args:
        name: As `torchvision.models.list_models()` prints it.
        num_classes: Length of the output.
        in_channels: Colours of an image; if not 3, a fresh first convolution is put in.
        image_size: Pixels per side, for those models that are built for one size (vision transformers).
        **kwargs: What the builder of the model takes.

    Raises:
        ImportError: torchvision is not installed.
        ValueError: torchvision has no classifier of that name, or its first convolution does not take 3 colours.
    """
    models = optional("torchvision.models", extra="vision")
    known: Sequence[str] = models.list_models(module=models)
    if name not in known:
        near = ", ".join(difflib.get_close_matches(name, known, n=5)) or "see torchvision.models.list_models()"
        raise ValueError(f"`name` is a classifier in torchvision.models; got {name!r}. Near matches: {near}.")
    if image_size is not None and name.startswith("vit_"):
        kwargs["image_size"] = image_size
    net: nn.Module = models.get_model(name, num_classes=num_classes, **kwargs)
    if in_channels != 3:
        _replace_first_convolution(net, in_channels)
    return net


def _replace_first_convolution(net: nn.Module, in_channels: int) -> None:
    path, old = next(((path, m) for path, m in net.named_modules() if isinstance(m, nn.Conv2d)), ("", None))
    if old is None or old.in_channels != 3:
        raise ValueError(
            f"`in_channels` must stay 3 where the model does not start with a convolution on 3 colours; "
            f"got {in_channels}. Repeat the images' channel instead."
        )
    new = nn.Conv2d(
        in_channels,
        old.out_channels,
        (old.kernel_size[0], old.kernel_size[1]),
        (old.stride[0], old.stride[1]),
        padding=old.padding if isinstance(old.padding, str) else (old.padding[0], old.padding[1]),
        bias=old.bias is not None,
    )
    net.set_submodule(path, new)


def _shortcut(in_channels: int, out_channels: int, stride: int, option: Literal["A", "B"]) -> nn.Module:
    if option == "A":
        return PaddedShortcut(stride, out_channels - in_channels)
    projection = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)
    return nn.Sequential(projection, nn.BatchNorm2d(out_channels))


def _stage(
    blocks: int, in_channels: int, out_channels: int, *, stride: int, option: Literal["A", "B"], norm: Norm
) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride, option=option, norm=norm)
    rest = (BasicBlock(out_channels, out_channels, 1, option=option, norm=norm) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)
