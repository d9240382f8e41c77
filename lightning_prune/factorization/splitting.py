"""Which convolutions can be split in two, what that costs, and the two modules that take the place of one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor, nn

from lightning_prune.factorization.record import Kind
from lightning_prune.factorization.spectrum import Spectrum
from lightning_prune.graph import Graph
from lightning_prune.steps import Seen
from lightning_prune.tensors import named_modules


@dataclass(frozen=True)
class Splittable:
    """A convolution that can be split.

    Attributes:
        conv: The layer.
        kind: How.
        whole: Multiply-accumulates of it as it is, for the whole batch of the example inputs.
        per_rank: Those of its two factors for each channel between them.
    """

    conv: nn.Conv2d
    kind: Kind
    whole: int
    per_rank: int

    @classmethod
    def of(cls, conv: nn.Conv2d, kind: Kind, calls: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> Splittable:
        """Count what a layer costs, from the shapes of what it reads and returns each time that it is called."""
        whole = sum(conv.weight.numel() * (prod(out) // out[1]) for _, out in calls)
        return cls(conv, kind, whole, sum(_macs_per_rank(conv, kind, *call) for call in calls))

    @property
    def full_rank(self) -> int:
        """The rank at which nothing is lost."""
        return full_rank(self.conv, self.kind)


def full_rank(conv: nn.Conv2d, kind: Kind) -> int:
    """Return the rank at which the factors of a convolution lose nothing."""
    (height, width), c, n = conv.kernel_size, conv.in_channels, conv.out_channels
    return min(c * height, n * width) if kind == "spatial" else min(n, c * height * width)


def _macs_per_rank(conv: nn.Conv2d, kind: Kind, read: tuple[int, ...], out: tuple[int, ...]) -> int:
    (height, width), c, n = conv.kernel_size, conv.in_channels, conv.out_channels
    positions = prod(out) // out[1]
    if kind == "channel":
        return positions * (c * height * width + n)
    between = out[0] * out[2] * _width_read(conv, read, out)  # what went down is as wide as the input still
    return between * c * height + positions * width * n


def _width_read(conv: nn.Conv2d, read: tuple[int, ...], out: tuple[int, ...]) -> int:
    """Return how wide the input is, where what the convolution proper reads may have been padded already."""
    if isinstance(conv.padding, str):
        return out[3] if conv.padding == "same" else read[3]
    return read[3] if conv.padding_mode == "zeros" else read[3] - 2 * conv.padding[1]


def reasons_against(model: nn.Module, kind: Kind) -> dict[str, str | None]:
    """Return for each `Conv2d` by its name in words why it cannot be split, or None; "it ..." reads as a sentence."""
    modules = named_modules(model)
    held = Counter(
        id(part)
        for module in modules.values()
        for part in (*module._modules.values(), *module._parameters.values())
        if part is not None
    )
    return {
        name: _reason(module, kind, held, name) for name, module in modules.items() if isinstance(module, nn.Conv2d)
    }


def _reason(conv: nn.Conv2d, kind: Kind, held: Mapping[int, int], name: str) -> str | None:
    weight = conv._parameters.get("weight")
    if not name:
        return "is the model itself, in which nothing can take its place"
    if type(conv) is not nn.Conv2d:
        return f"is a {type(conv).__name__}, which may do more than a Conv2d"
    if type(weight) is not nn.Parameter or conv._buffers or conv._modules or not weight.is_floating_point():
        return "has a weight that is no ordinary parameter"
    if "forward" in conv.__dict__ or any(value for key, value in conv.__dict__.items() if key.endswith("_hooks")):
        return "has hooks, or a forward of its own"
    if any(held[id(part)] > 1 for part in (conv, weight, conv.bias)):
        return "is shared, or shares parameters"
    if conv.groups > 1:
        return f"has {conv.groups} convolution groups"
    if kind == "spatial" and 1 in conv.kernel_size:
        return "has a kernel of one row or one column"
    return None


def calls_of(graph: Graph) -> dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """Return name of a weight -> the shapes that convolutions with it have read and returned, for each call."""
    found: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    for step in next(iter(graph.runs.values())).steps:
        weight = step.args[1] if step.op.overloadpacket is torch.ops.aten.convolution else None
        if isinstance(weight, Seen) and isinstance(weight.origin, str):
            found.setdefault(weight.origin, []).append((tuple(step.inputs[0]), tuple(step.outputs[0][0])))
    return found


def split(conv: nn.Conv2d, kind: Kind, rank: int, *, bias: bool) -> nn.Sequential:
    """Make the two modules that can take a convolution's place, with the weights that torch gives new modules.

    Args:
        conv: The layer.
        kind: "spatial" or "channel".
        rank: Channels between the two.
        bias: Whether the second has a bias.
    """
    c, n, mode = conv.in_channels, conv.out_channels, conv.padding_mode
    kernel, stride, dilation = map(_two, (conv.kernel_size, conv.stride, conv.dilation))
    padding = conv.padding if isinstance(conv.padding, str) else _two(conv.padding)
    make = partial(nn.Conv2d, device=conv.weight.device, dtype=conv.weight.dtype)
    if kind == "channel":
        first = make(c, rank, kernel, stride, padding, dilation, bias=False, padding_mode=mode)
        second = make(rank, n, 1, bias=bias)
    else:
        above, beside = (padding, padding) if isinstance(padding, str) else ((padding[0], 0), (0, padding[1]))
        (kh, kw), (sh, sw), (dh, dw) = kernel, stride, dilation
        first = make(c, rank, (kh, 1), (sh, 1), above, (dh, 1), bias=False, padding_mode=mode)
        second = make(rank, n, (1, kw), (1, sw), beside, (1, dw), bias=bias, padding_mode=mode)
    pair = nn.Sequential(first, second).train(conv.training)
    if not conv.weight.is_contiguous() and conv.weight.is_contiguous(memory_format=torch.channels_last):
        pair.to(memory_format=torch.channels_last)
    pair.requires_grad_(conv.weight.requires_grad)
    if conv.bias is not None and second.bias is not None:
        second.bias.requires_grad_(conv.bias.requires_grad)
    return pair


def _two(values: tuple[int, ...]) -> tuple[int, int]:
    return values[0], values[1]


def factors(conv: nn.Conv2d, kind: Kind, rank: int, spectrum: Spectrum) -> nn.Sequential:
    """Make the two modules with the weights of a rank."""
    bias = spectrum.bias(rank, conv.bias)
    pair = split(conv, kind, rank, bias=bias is not None)
    values: list[tuple[object, Tensor | None]] = [
        (pair[0].weight, spectrum.first[:rank]),
        (pair[1].weight, spectrum.second[:, :rank]),
        (pair[1].bias, bias),
    ]
    with torch.no_grad():
        for parameter, value in values:
            if isinstance(parameter, Tensor) and value is not None:
                parameter.copy_(value)
    return pair
