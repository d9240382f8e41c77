"""Small networks for the tests of reconstruction, each with one thing that makes it hard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from proof import Net
from torch import Generator, Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

IMAGE, TOKENS, ROWS, SIGNAL, VIDEO = (3, 8, 8), (6, 5), (7,), (3, 12), (2, 4, 4, 4)
CLASSES = 4


@dataclass(frozen=True)
class Hard:
    """A network.

    Attributes:
        build: Makes it.
        shape: The shape of an example.
        layers: The layers that a cut of all that can be cut refits, in order.
        beside: Layer -> the module that its output, or the norm's behind it, is added to the output of.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    layers: tuple[str, ...]
    beside: dict[str, str]

    def dense(self) -> nn.Module:
        """Return it with lively norms, in float64 and eval mode."""
        torch.manual_seed(0)
        return lively(self.build())

    @property
    def last(self) -> bool:
        """Whether channels come last even where there are positions."""
        return self.shape == TOKENS

    def batches(self, count: int = 4, size: int = 24) -> list[Tensor]:
        """Return inputs whose features depend on each other, as those of real data do."""
        return batches(self.shape, count, size)


def lively(net: nn.Module, seed: int = 0) -> nn.Module:
    """Give norms statistics and scales of their own; return the network in float64 and eval mode."""
    generator = Generator().manual_seed(seed)
    for module in net.modules():
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensor = getattr(module, name, None)
            if isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)) and tensor is not None:
                noise = torch.rand(tensor.shape, generator=generator)
                tensor.data.copy_(noise + 0.5 if name in ("weight", "running_var") else 0.4 * noise - 0.2)
    return net.double().eval()


def batches(shape: Sequence[int], count: int = 4, size: int = 24, seed: int = 0) -> list[Tensor]:
    """Return mixtures of a few patterns, plus noise."""
    generator = Generator().manual_seed(seed)
    patterns = torch.randn(6, *shape, generator=generator, dtype=torch.float64)
    mixed = torch.randn(count * size, 6, generator=generator, dtype=torch.float64) @ patterns.flatten(1)
    noise = torch.randn(count * size, *shape, generator=generator, dtype=torch.float64)
    return list((mixed.view(noise.shape) / 2 + noise / 2).split(size))


def conv(inputs: int, outputs: int, kernel: int = 3, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **settings)


def normed(inputs: int, outputs: int, kernel: int = 3, **settings: Any) -> tuple[nn.Module, ...]:
    """Return a convolution without a bias, a BatchNorm and a ReLU."""
    return conv(inputs, outputs, kernel, bias=False, **settings), nn.BatchNorm2d(outputs), nn.ReLU()


def readout(width: int, *, bias: bool = True) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES, bias=bias)


class Basic(nn.Module):
    """A basic block of a ResNet; `shortcut` and `out` are there to be looked at."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, inner, bias=False, stride=stride), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = conv(inner, outputs, bias=False), nn.BatchNorm2d(outputs)
        project = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
        self.shortcut = nn.Identity() if inputs == outputs and stride == 1 else project
        self.out = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.out(y + self.shortcut(x)))


class PreActivation(nn.Module):
    """A block whose norms come first."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), conv(width, inner, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(inner), conv(inner, width, bias=False)
        self.shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x)))
        y = self.conv2(F.relu(self.bn2(y)))
        y += self.shortcut(x)
        return y


class Mixing(nn.Module):
    """A pre-norm MLP on a trunk, as in a ViT."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        return shortcut + self.down(F.gelu(self.up(self.norm(x))))


def concatenating() -> nn.Module:
    """Layers that read all that came before, with a norm of their own."""

    def run(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        for layer in (net.first, net.second):
            x = torch.cat([x, layer(x)], 1)
        return net.head(x)

    def dense(width: int) -> nn.Sequential:
        return nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), conv(width, 6, bias=False))

    head = nn.Sequential(nn.BatchNorm2d(20), nn.ReLU(), *readout(20))
    return Net(run, stem=conv(3, 8), first=dense(8), second=dense(14), head=head)


def mobile() -> nn.Module:
    """An inverted residual: wide, depthwise, narrow."""

    def run(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        return net.head(net.shortcut(x) + net.norm(net.narrow(net.deep(net.wide(x)))))

    return Net(
        run,
        stem=nn.Sequential(*normed(3, 8)),
        wide=nn.Sequential(*normed(8, 16, 1)),
        deep=nn.Sequential(*normed(16, 16, groups=16)),
        narrow=nn.Conv2d(16, 8, 1, bias=False),
        norm=nn.BatchNorm2d(8),
        shortcut=nn.Identity(),
        head=nn.Sequential(*readout(8)),
    )


def twice() -> nn.Module:
    """A layer that is called on two inputs."""

    def run(net: Any, x: Tensor) -> Tensor:
        left, right = net.a(x).relu(), net.a(-x).relu()
        return net.head(net.twice(left).relu() + 0.5 * net.twice(right).relu())

    return Net(run, a=conv(3, 12), twice=conv(12, 10), head=nn.Sequential(*readout(10)))


def tied(norm: Callable[[int], nn.Module]) -> nn.Module:
    """Two layers with one weight, between others."""
    net = nn.Sequential(nn.Linear(7, 12), norm(12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
    net[5].weight = net[3].weight
    return net.extend([nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, CLASSES)])


def parametrised() -> nn.Module:
    """A layer whose weight is computed, between others."""
    return nn.Sequential(
        *(conv(3, 12), nn.ReLU(), weight_norm(conv(12, 10)), nn.ReLU()), *(conv(10, 8), nn.ReLU(), *readout(8))
    )


def behind_norms() -> nn.Module:
    """A layer whose weight is computed, reading what a BatchNorm tells the mean of."""
    return nn.Sequential(
        *(*normed(3, 12), weight_norm(conv(12, 10)), nn.BatchNorm2d(10), nn.ReLU()),
        *(conv(10, 8), nn.ReLU(), *readout(8)),
    )


def one_norm_for_two() -> nn.Module:
    """Two layers before one and the same BatchNorm."""

    def run(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        return net.head(net.norm(net.a(x)).relu() + 0.5 * net.norm(net.b(x)).relu())

    a, b = (conv(12, 10, bias=False) for _ in range(2))
    stem = nn.Sequential(*normed(3, 12))
    return Net(run, stem=stem, a=a, b=b, norm=nn.BatchNorm2d(10), head=nn.Sequential(*readout(10)))


def upward(groups: int, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    return nn.Sequential(
        *(conv(3, 12, stride=2), norm(12), nn.ReLU()),
        *(nn.ConvTranspose2d(12, 8, 3, 2, 1, 1, groups=groups, bias=False), norm(8), nn.ReLU()),
        *(nn.ConvTranspose2d(8, 8, 2, groups=groups), nn.ReLU(), *readout(8)),
    )


def group_norm(width: int) -> nn.Module:
    return nn.GroupNorm(2, width)


def grouped(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    return nn.Sequential(
        *(conv(3, 12), norm(12), nn.ReLU(), conv(12, 16, groups=2), norm(16), nn.ReLU()),
        *(conv(16, 8, groups=4), nn.ReLU(), *readout(8)),
    )


def separable(norm: Callable[[int], nn.Module], factor: int = 1, *, up: bool = False) -> nn.Module:
    """A depthwise layer that makes several channels of each; or one that makes the map larger."""
    wide = 12 * factor
    deep = nn.ConvTranspose2d(12, wide, 2, 2, groups=12) if up else conv(12, wide, groups=12)
    return nn.Sequential(
        *(conv(3, 12), norm(12), nn.ReLU(), deep, norm(wide), nn.ReLU()), *(conv(wide, 8, 1), *readout(8))
    )


def chain(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    """A VGG: its flatten gives each channel several columns of the Linear layer."""
    return nn.Sequential(
        *(conv(3, 12), norm(12), nn.ReLU(), conv(12, 10), norm(10), nn.ReLU(), nn.MaxPool2d(4)),
        *(nn.Flatten(), nn.Linear(40, 12), nn.ReLU(), nn.Linear(12, CLASSES)),
    )


def last_norm() -> nn.Module:
    """A LayerNorm over channels that come last, between convolutions."""

    def run(net: Any, x: Tensor) -> Tensor:
        x = net.norm(net.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return net.head(net.b(x).relu())

    return Net(run, a=conv(3, 12), norm=nn.LayerNorm(12), b=conv(12, 10), head=nn.Sequential(*readout(10)))


def no_bias() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(7, 12, bias=False), nn.Tanh(), nn.Linear(12, 10, bias=False), nn.ReLU()),
        nn.Linear(10, CLASSES, bias=False),
    )


HARD: dict[str, Hard] = {
    "chain, flatten": Hard(chain, IMAGE, ("3", "8", "10"), {}),
    "residual": Hard(
        lambda: nn.Sequential(*normed(3, 10), Basic(10, 8, 10), Basic(10, 12, 14, 2), *readout(14)),
        IMAGE,
        ("3.conv1", "3.conv2", "4.conv1", "4.conv2", "4.shortcut", "7"),
        {"3.conv2": "3.shortcut", "4.conv2": "4.shortcut", "4.shortcut": "4.bn2"},
    ),
    "pre-activation": Hard(
        lambda: nn.Sequential(
            *(conv(3, 10), PreActivation(10, 8), PreActivation(10, 12)), *(nn.BatchNorm2d(10), nn.ReLU(), *readout(10))
        ),
        IMAGE,
        ("1.conv1", "1.conv2", "2.conv1", "2.conv2", "7"),
        {"1.conv2": "1.shortcut", "2.conv2": "2.shortcut"},
    ),
    "concatenating": Hard(concatenating, IMAGE, ("first.2", "second.2", "head.4"), {}),
    "depthwise": Hard(mobile, IMAGE, ("wide.0", "deep.0", "narrow", "head.2"), {"narrow": "shortcut"}),
    "grouped": Hard(grouped, IMAGE, ("3", "6", "10"), {}),
    "transposed": Hard(lambda: upward(1), IMAGE, ("3", "6", "10"), {}),
    "transposed, grouped": Hard(lambda: upward(2), IMAGE, ("3", "6", "10"), {}),
    "depthwise, up": Hard(lambda: separable(nn.BatchNorm2d, up=True), IMAGE, ("3", "6", "9"), {}),
    "MLP without bias": Hard(no_bias, ROWS, ("2", "4"), {}),
    "MLP on tokens": Hard(
        lambda: nn.Sequential(nn.Linear(5, 8), Mixing(8, 16), Mixing(8, 12), nn.LayerNorm(8), nn.Linear(8, CLASSES)),
        TOKENS,
        ("1.up", "1.down", "2.up", "2.down", "4"),
        {"1.down": "1.shortcut", "2.down": "2.shortcut"},
    ),
    "signals": Hard(
        lambda: nn.Sequential(
            *(nn.Conv1d(3, 10, 3), nn.ReLU(), nn.Conv1d(10, 8, 3, padding="same"), nn.ReLU(), nn.Flatten()),
            nn.Linear(80, CLASSES),
        ),
        SIGNAL,
        ("2", "5"),
        {},
    ),
    "video": Hard(
        lambda: nn.Sequential(
            *(nn.Conv3d(2, 10, 2), nn.ReLU(), nn.Conv3d(10, 6, 2), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten()),
            nn.Linear(6, CLASSES),
        ),
        VIDEO,
        ("2", "6"),
        {},
    ),
    "called twice": Hard(twice, IMAGE, ("twice", "head.2"), {}),
    "tied": Hard(lambda: tied(nn.Identity), ROWS, ("7", "9"), {}),
    "tied, normed": Hard(lambda: tied(nn.BatchNorm1d), ROWS, ("7", "9"), {}),
    "parametrised": Hard(parametrised, IMAGE, ("4", "8"), {}),
    "parametrised, normed": Hard(behind_norms, IMAGE, ("6", "10"), {}),
    "one norm for two": Hard(one_norm_for_two, IMAGE, ("a", "b", "head.2"), {}),
    "GroupNorm": Hard(lambda: chain(group_norm), IMAGE, ("3", "8", "10"), {}),
    "GroupNorm, grouped": Hard(lambda: grouped(group_norm), IMAGE, ("3", "6", "10"), {}),
    "GroupNorm, depthwise": Hard(lambda: separable(group_norm), IMAGE, ("3", "6", "9"), {}),
    "GroupNorm, depthwise, twice": Hard(lambda: separable(group_norm, 2), IMAGE, ("3", "6", "9"), {}),
    "GroupNorm, depthwise, up": Hard(lambda: separable(group_norm, up=True), IMAGE, ("3", "6", "9"), {}),
    "GroupNorm, depthwise, up, twice": Hard(lambda: separable(group_norm, 2, up=True), IMAGE, ("3", "6", "9"), {}),
    "GroupNorm, transposed": Hard(lambda: upward(1, group_norm), IMAGE, ("3", "6", "10"), {}),
    "GroupNorm, transposed, grouped": Hard(lambda: upward(2, group_norm), IMAGE, ("3", "6", "10"), {}),
    "LayerNorm": Hard(last_norm, IMAGE, ("b", "head.2"), {}),
}
