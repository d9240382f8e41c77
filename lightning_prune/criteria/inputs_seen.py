"""Sums, over calls, of something that the inputs of the readers show of each channel; gradients are not looked at."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.criteria.gathered import Gathered
from lightning_prune.criteria.readers import Reader, channel_dim
from lightning_prune.types import ChannelGroup


class InputsSummed(Gathered):
    """Sums up, over calls, tensors that say something of what the readers are given."""

    gradients: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self._step: dict[str, Tensor] = {}
        self._count = 0

    @override
    @torch.no_grad()
    def _note(self, name: str, inputs: Tensor, gradient: Tensor | None) -> None:
        self._count = max(self._count, self._rows or len(inputs))
        for key, found in self._of_call(name, inputs).items():
            self._step[key] = self._step[key] + found if key in self._step else found

    @override
    def _of_step(self, scale: float) -> tuple[int, dict[str, Tensor]]:
        return self._count, dict(self._step)

    @override
    def _drop_step(self) -> None:
        self._step, self._count = {}, 0

    @override
    def is_finite(self) -> bool:
        return True

    @abstractmethod
    def _of_call(self, name: str, inputs: Tensor) -> Mapping[str, Tensor]:
        """Return what is summed up of a reader's input, under names that no other reader has."""


class InputsSeen(InputsSummed):
    """Sums up, over calls, one number for each channel that a reader is given.

    A channel has the mean of its readers; where it lies at several positions of an input, these add up.
    """

    @override
    def _of_call(self, name: str, inputs: Tensor) -> Mapping[str, Tensor]:
        return {name: self._of_inputs(inputs.movedim(channel_dim(self._modules[name]), 1))}

    @override
    def _scores(self, model: nn.Module, group: ChannelGroup, readers: Sequence[Reader]) -> Tensor | None:
        found = [self._of_reader(reader) for reader in readers]
        return torch.stack([scores.to(found[0].device) for scores in found]).mean(0)

    def _of_reader(self, reader: Reader) -> Tensor:
        """Return the scores of a group's channels from what one of its readers was given."""
        sums = self._averaged(self._sums[reader.module], self._modules[reader.module])
        return sums[reader.positions.to(sums.device)].sum(1)

    @abstractmethod
    def _of_inputs(self, inputs: Tensor) -> Tensor:
        """Turn an input of shape (rows, channels, ...) into one number for each channel, summed over the rows."""

    @abstractmethod
    def _averaged(self, sums: Tensor, module: nn.Module) -> Tensor:
        """Turn the sums over all calls of a reader, of shape (channels,), into scores."""
