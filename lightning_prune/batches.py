"""A batch of a data loader, taken apart into what the model reads and what it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.inputs import Inputs, bind, tensors_in


@dataclass(frozen=True)
class Batch:
    """A batch, taken apart.

    Attributes:
        inputs: What the model's forward is called with.
        targets: The last entry of a list or tuple; of any other batch the batch itself.
        size: Examples in it: the size of dimension 0 of the first tensor of the targets, or of the inputs.
    """

    inputs: Inputs
    targets: Any
    size: int

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return the same batch with each tensor changed."""
        inputs, (targets,) = self.inputs.map(change), Inputs((self.targets,)).map(change).args
        return Batch(inputs, targets, _size(targets, inputs))

    def part(self, begin: int, end: int) -> Batch:
        """Return the examples from one place to before another."""
        return self.map(lambda tensor: tensor[begin:end])


def taken_apart(model: nn.Module, batch: Any) -> Batch:
    """Take a batch apart, and bind its inputs to the model's forward."""
    inputs, targets = batch, batch
    if isinstance(batch, (list, tuple)) and batch:
        *leading, targets = batch
        inputs = leading[0] if len(leading) == 1 else tuple(leading) or targets
    return Batch(bind(model, inputs), targets, _size(targets, inputs))


def _size(targets: Any, inputs: Any) -> int:
    tensor = next(tensors_in((targets, inputs)), torch.empty(()))
    return tensor.shape[0] if tensor.dim() else 1
