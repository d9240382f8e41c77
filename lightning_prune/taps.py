"""What the taps of a kernel meet: the map, or the zeros with which it is padded."""

from __future__ import annotations

from functools import cache, reduce
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_prune.handlers import Call


class Axis(NamedTuple):
    """A convolution along one dimension of a map; all in positions."""

    size: int
    taps: int
    stride: int
    padding: int
    dilation: int


def tap_weights(call: Call, image: tuple[int, ...], kernel: tuple[int, ...]) -> Tensor:
    """Return how often each tap of a kernel meets the map: what it counts for where the map is the same everywhere.

    Where most positions of the output see no padding, every tap counts fully: the sum over taps is exactly what these
    positions see. On smaller maps a tap counts by the share of positions at which it meets the map, which is right on
    average: of a 3 x 3 kernel that is put on a map of 1 x 1, only the tap in the middle meets it.

    Args:
        call: The convolution; transposed ones meet all of the map with each tap.
        image: The shape of its input, (batch, channels, *map) or (channels, *map).
        kernel: The shape of its weight, (out, in, *taps).

    Returns:
        Of shape (taps,), flattened as the kernel is, in [0, 1], float64.
    """
    taps = kernel[2:]
    if call["transposed"]:
        return torch.ones(prod(taps), dtype=torch.float64)
    settings = (_spread(call[name], len(taps)) for name in ("stride", "padding", "dilation"))
    return _weights(tuple(map(Axis, image[-len(taps) :], taps, *settings)))


def _spread(setting: list[int], count: int) -> list[int]:
    return list(setting) if len(setting) == count else list(setting) * count


@cache
def _weights(axes: tuple[Axis, ...]) -> Tensor:
    met = [_met(axis) for axis in axes]
    if 2 * prod(float(along.all(0).double().mean()) for along in met) > 1:
        return torch.ones(prod(axis.taps for axis in axes), dtype=torch.float64)
    return reduce(torch.kron, (along.double().mean(1) for along in met))


def _met(axis: Axis) -> Tensor:
    """Tell for each tap and each position of the output whether the one meets the map at the other."""
    reach = axis.dilation * (axis.taps - 1)
    starts = torch.arange(-axis.padding, axis.size + axis.padding - reach, axis.stride)
    places = starts + axis.dilation * torch.arange(axis.taps).unsqueeze(1)
    return (places >= 0) & (places < axis.size)
