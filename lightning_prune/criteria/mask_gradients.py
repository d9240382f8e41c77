"""Gradients with respect to a factor on each channel, example by example, from the backward passes of the training."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.criteria.gathered import Gathered, Reduction
from lightning_prune.criteria.readers import Reader, channel_dim
from lightning_prune.errors import ScoreError
from lightning_prune.graph import Graph
from lightning_prune.types import ChannelGroup


class MaskGradients(Gathered):
    """Sums up, over steps, something of g_nk = dl_n / dm_k, where m_k = 1 multiplies channel k wherever it is read.

    g_nk = sum over readers and positions of a_nk dl_n/da_nk, with the gradient that comes through that reader alone:
    no forward or backward pass more than the training has.

    Args:
        reduction: How the loss puts the examples of a batch together: "mean" (the gradients that arrive are then
            multiplied by the batch size) or "sum".

    Raises:
        ValueError: `reduction` is neither.
    """

    def __init__(self, reduction: Reduction = "mean") -> None:
        super().__init__()
        if reduction not in ("mean", "sum"):
            raise ValueError(f'`reduction` is how the loss joins its examples, "mean" or "sum"; got {reduction!r}.')
        self.reduction = reduction
        self._step: dict[str, Tensor] = {}
        self._by_reader: dict[str, list[tuple[str, Reader]]] = {}

    @override
    def begin(self, model: nn.Module, graph: Graph) -> None:
        super().begin(model, graph)
        self._by_reader = {}
        for name, readers in self._readers.items():
            for reader in readers:
                self._by_reader.setdefault(reader.module, []).append((name, reader))

    @override
    def _note(self, name: str, inputs: Tensor, gradient: Tensor | None) -> None:
        assert gradient is not None
        products = self._products(name, inputs, gradient)
        for group, reader in self._by_reader[name]:
            share = _of_channels(products, reader.positions)
            known = self._step.get(group)
            if known is not None and len(known) != len(share):
                raise ScoreError(
                    f"{group} is read with {len(known)} examples in one place and with {len(share)} in {name}, so "
                    f"what belongs to which example is not known. Put {name!r} under `ignore`."
                )
            self._step[group] = share if known is None else known + share

    def _products(self, name: str, inputs: Tensor, gradient: Tensor) -> Tensor:
        """Return input times gradient, summed over positions: (examples, channels)."""
        precise = torch.promote_types(inputs.dtype, torch.float32)
        products = inputs.to(precise) * gradient.to(precise)
        channels = channel_dim(self._modules[name]) % products.dim()
        products = self._unfolded(products, name)
        channels += products.dim() - inputs.dim()
        others = [dim for dim in range(1, products.dim()) if dim != channels]
        return products.sum(others) if others else products

    @override
    def _of_step(self, scale: float) -> tuple[int, dict[str, Tensor]]:
        count = max(map(len, self._step.values()), default=0)
        factor = scale * count if self.reduction == "mean" else scale
        sizes = {name: len(readers[0].positions) for name, readers in self._readers.items()}
        device = next((found.device for found in self._step.values()), None)
        return count, {
            name: self._concluded(self._step[name] * factor) if name in self._step else torch.zeros(size, device=device)
            for name, size in sizes.items()
        }

    @override
    def is_finite(self) -> bool:
        return all(bool(found.isfinite().all()) for found in self._step.values())

    @override
    def _drop_step(self) -> None:
        self._step = {}

    @abstractmethod
    def _concluded(self, gradients: Tensor) -> Tensor:
        """Turn the g_nk of one step, of shape (examples, channels), into what is summed, of shape (channels,)."""

    @abstractmethod
    def _averaged(self, sums: Tensor) -> Tensor:
        """Turn the sums over all steps into scores."""

    @override
    def _scores(self, model: nn.Module, group: ChannelGroup, readers: Sequence[Reader]) -> Tensor | None:
        return self._averaged(self._sums[group.name])


def _of_channels(products: Tensor, positions: Tensor) -> Tensor:
    """Sum products (examples, positions) over the positions of each channel."""
    positions = positions.to(products.device)
    if positions.shape[1] > 1:
        return products[:, positions].sum(2)
    return products.index_select(1, positions.squeeze(1))
