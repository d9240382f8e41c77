"""Layers that read gated channels: what a gate multiplies goes into their weight, or into their input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from typing_extensions import Self, override

from lightning_prune.layers.gate import Gate

READING: Final = "reading"
"""Under this key a gated layer's `__dict__` holds its reading, which is registered elsewhere, with all others."""


class Reading(nn.Module):
    """What gates let through to one layer.

    Args:
        channels: Gates of the channels that the layer reads; they are registered elsewhere.
        index: Integer tensor (inputs,): for each channel of the layer's input its gate, counted through all of
            `channels` from 1 on; 0 is none.
        inputs: A gate on each channel of the layer's input, of shape (inputs,).
        weights: A gate on each of the layer's weights, of the weight's shape.
    """

    index: Tensor

    def __init__(
        self, channels: Sequence[Gate], index: Tensor, inputs: Gate | None = None, weights: Gate | None = None
    ) -> None:
        super().__init__()
        self.index = index  # no buffer: averaged copies (EMA) must not average it
        self.channels = tuple(channels)
        self._own = (inputs, weights)  # in a tuple, since a module that is an attribute would be registered
        self._is_whole = self._has_all_in_order()

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the index along."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.index = fn(self.index)
        return self

    @property
    def inputs(self) -> Gate | None:
        """The gate on each channel of the input, if there is one."""
        return self._own[0]

    @property
    def weights(self) -> Gate | None:
        """The gate on each weight, if there is one."""
        return self._own[1]

    def of_input(self, training: bool) -> Tensor:
        """Return what each channel of the input is multiplied by: (inputs,), or (examples, inputs)."""
        own = None if self.inputs is None else self.inputs.values(training)
        return self.along_input([gate.values(training) for gate in self.channels], own)

    def along_input(self, channels: Sequence[Tensor], own: Tensor | None = None) -> Tensor:
        """Put what each gate has in its places along the layer's input; where no gate is, it is 1.

        Args:
            channels: What the gates of channels have, each (size,) or (examples, size).
            own: What the gate on the inputs has, (inputs,) or (examples, inputs).
        """
        if not channels:
            return torch.ones_like(self.index, dtype=torch.float32) if own is None else own
        if self._is_whole:
            along = channels[0]
        else:
            one = channels[0].new_ones((*channels[0].shape[:-1], 1))
            along = torch.cat([one, *channels], -1).index_select(-1, self.index)
        return along if own is None else along * own

    def of_weight(self, layer: nn.Module, weight: Tensor, training: bool) -> Tensor:
        """Return what each weight is multiplied by, of a shape that broadcasts with the weight's."""
        if self.weights is not None and not self.channels and self.inputs is None:
            return self.weights.values(training)
        along = spread(layer, weight, self.of_input(training))
        return along if self.weights is None else along * self.weights.values(training)

    def own_mask(self, layer: nn.Module, weight: Tensor) -> Tensor:
        """Return which weights the layer's own gates let through, those of channels aside: bool, of its shape."""
        mask = torch.ones_like(weight, dtype=torch.bool)
        if self.inputs is not None:
            mask &= spread(layer, weight, self.inputs.is_open())
        return mask if self.weights is None else mask & self.weights.is_open()

    def renumber(self, inputs: Tensor | None) -> None:
        """Count anew after a cut, in which some places and with them some channels of each gate have gone.

        Args:
            inputs: The channels of the layer's input that have stayed; None for all.
        """
        index = self.index if inputs is None else self.index[inputs.to(self.index.device)]
        left = index.unique()
        left = left[left > 0]
        self.restore(torch.where(index > 0, torch.searchsorted(left, index) + 1, 0))

    def restore(self, index: Tensor) -> None:
        """Set the index."""
        self.index = index
        self._is_whole = self._has_all_in_order()

    def _has_all_in_order(self) -> bool:
        return len(self.channels) == 1 and torch.equal(
            self.index, torch.arange(1, len(self.index) + 1, device=self.index.device)
        )


def weight_name(layer: nn.Module) -> str:
    """Return the name of the parameter with which a layer reads its input."""
    return "in_proj_weight" if isinstance(layer, nn.MultiheadAttention) else "weight"


def input_dim(layer: nn.Module) -> int:
    """Return the dimension of that parameter along which the input lies: with convolution groups, that of each."""
    return 0 if isinstance(layer, _ConvTransposeNd) else 1


def convolution_groups(layer: nn.Module) -> int:
    """Return in how many parts a layer reads its input with the same positions of its weight."""
    return layer.groups if isinstance(layer, _ConvNd) and not isinstance(layer, _ConvTransposeNd) else 1


def spread(layer: nn.Module, weight: Tensor, along: Tensor) -> Tensor:
    """Let what lies along a layer's input, (inputs,), broadcast with its weight."""
    trailing = (1,) * (weight.dim() - 2)
    if isinstance(layer, _ConvTransposeNd):
        return along.view(-1, 1, *trailing)
    groups = convolution_groups(layer)
    if groups == 1:
        return along.view(1, -1, *trailing)
    each = along.view(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1)
    return each.reshape(weight.shape[0], -1, *trailing)


class _Gated(nn.Module):
    """A layer whose weight, or input, is multiplied by what gates let through: whichever is smaller."""

    weight: Tensor

    def gated(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return input and weight, one of them gated."""
        reading: Reading = self.__dict__[READING]
        if reading.weights is None and inputs.numel() < self.weight.numel():
            factor = _beside(reading.of_input(self.training), inputs, self)
            return inputs * factor.to(inputs.dtype), self.weight
        return inputs, self.weight * reading.of_weight(self, self.weight, self.training).to(self.weight.dtype)


class GatedLinear(_Gated, nn.Linear):
    """A linear layer that reads gated channels."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(*self.gated(input), self.bias)


class GatedConv1d(_Gated, nn.Conv1d):
    """A 1d convolution that reads gated channels."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self._conv_forward(*self.gated(input), self.bias)
        return output


class GatedConv2d(_Gated, nn.Conv2d):
    """A 2d convolution that reads gated channels."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self._conv_forward(*self.gated(input), self.bias)
        return output


class GatedConv3d(_Gated, nn.Conv3d):
    """A 3d convolution that reads gated channels."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self._conv_forward(*self.gated(input), self.bias)
        return output


GATED: Mapping[type[nn.Module], type[nn.Module]] = {
    nn.Linear: GatedLinear,
    nn.Conv1d: GatedConv1d,
    nn.Conv2d: GatedConv2d,
    nn.Conv3d: GatedConv3d,
}
"""Layers whose weight can be gated -> what they are meanwhile; of all others, subclasses too, the input is gated."""


def stay_in_sight(layer: nn.Module, args: tuple[Any, ...]) -> None:
    """Do nothing: a forward pre-hook, for fused kernels that would read the weight itself skip layers with hooks."""


def gate_input(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Multiply what a layer reads by what its gates let through: a forward pre-hook."""
    reading: Reading = layer.__dict__[READING]
    factor = reading.of_input(layer.training)
    read = ("query", "key", "value") if isinstance(layer, nn.MultiheadAttention) else ("input", "x")
    first = 3 if isinstance(layer, nn.MultiheadAttention) else 1
    gated: dict[int, Tensor] = {}

    def through(value: Tensor) -> Tensor:
        if id(value) not in gated:  # one that stands in several places stays one
            gated[id(value)] = value * _beside(factor, value, layer).to(value.dtype)
        return gated[id(value)]

    inputs = [through(value) for value in args[:first]]
    return (*inputs, *args[first:]), {key: through(value) if key in read else value for key, value in kwargs.items()}


def _beside(factor: Tensor, inputs: Tensor, layer: nn.Module) -> Tensor:
    """Give a factor, (inputs,) or (examples, inputs), a shape that broadcasts with a layer's input.

    Raises:
        RuntimeError: There are other rows than examples.
    """
    behind = len(layer.kernel_size) if isinstance(layer, _ConvNd) else 0
    if factor.dim() == 1:
        return factor.view(-1, *(1,) * behind)
    before = 0 if getattr(layer, "batch_first", True) else 1
    between = inputs.dim() - 2 - behind - before
    if between < 0 or factor.shape[0] != inputs.shape[before]:
        raise RuntimeError(
            f"A gate has a sample for each of {factor.shape[0]} examples, and a {type(layer).__name__} reads an input "
            f"of shape {tuple(inputs.shape)}. Take one sample per batch: per_example=False."
        )
    return factor.view(*(1,) * before, factor.shape[0], *(1,) * between, -1, *(1,) * behind)
