"""The proof of a channel group: permuting its channels everywhere leaves the network's output unchanged."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_prune.handlers import tensors_in
from lightning_prune.tensors import named_tensors
from lightning_prune.types import ChannelGroup


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and statistic a random value, so that no proof can pass on zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in named_tensors(model).items():
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
            fan = max(tensor[0].numel(), 1) if tensor.dim() > 1 else 1
            positive = tensor.dim() < 2 and not name.endswith("bias") and "mean" not in name
            tensor.data.copy_(0.5 + noise if positive else (noise - 0.5) * (12 / fan) ** 0.5)
    return model


def permute_channels(model: nn.Module, groups: Iterable[ChannelGroup], seed: int = 0) -> None:
    """Permute the channels of each group at random, in every tensor that it touches."""
    generator = torch.Generator().manual_seed(seed)
    tensors = named_tensors(model)
    for group in groups:
        order = torch.randperm(group.size, generator=generator)
        for member in group.members:
            tensor = tensors[member.tensor].data
            moved = tensor.index_select(member.dim, member.positions[order].reshape(-1))
            tensor.index_copy_(member.dim, member.positions.reshape(-1), moved)


def outputs(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """Run the model without gradients and list the tensors that it returns."""
    with torch.no_grad():
        return list(tensors_in(model(inputs)))


def relative_error(left: Iterable[Tensor], right: Iterable[Tensor]) -> float:
    """Return the largest difference of two lists of tensors, relative to the largest value of each pair."""
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in zip(left, right, strict=True))
