"""Memory layouts: work plane by plane on channels that lie last in memory, and give all back as it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def layout_of(x: Tensor) -> torch.memory_format:
    """Return `torch.channels_last` or its like in 3d where channels lie last in memory, else `contiguous_format`."""
    for dims, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dims and not x.is_contiguous() and x.is_contiguous(memory_format=layout):
            return layout
    return torch.contiguous_format


def in_planes(x: Tensor, layout: torch.memory_format) -> Tensor:
    """Put each channel in one piece of memory; the gradient goes back in the layout that x has.

    Left as it comes, it would take the layers before, BatchNorm above all, several times longer.
    """
    if layout is torch.contiguous_format:
        return x
    planes: Tensor = _InPlanes.apply(x, layout)
    return planes


class _InPlanes(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, layout: torch.memory_format) -> Tensor:
        return x.contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, torch.memory_format], output: Tensor) -> None:
        ctx.layout = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.contiguous(memory_format=ctx.layout), None
