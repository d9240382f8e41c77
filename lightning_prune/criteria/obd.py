"""Channels whose weights lie where the loss is flat go first: the diagonal of the Hessian."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.criteria.gathered import Gathered
from lightning_prune.criteria.readers import Reader, along_input, weight_of
from lightning_prune.types import ChannelGroup


class OBD(Gathered):
    """Optimal Brain Damage: score_k = 1/2 sum over the weights that read channel k of h_ii w_i^2.

    LeCun, Denker, Solla 1990, "Optimal Brain Damage" (NIPS), equation 5. The diagonal h_ii of the Hessian of the loss
    comes from Hutchinson's estimate, E[z * Hz] with z of random signs (Bekas et al. 2007; Yao et al. 2021,
    "AdaHessian"): one more backward pass for each probe, through the graph of the training's own forward pass. Look at
    few steps, with `window`; or without a Trainer call `see_loss(loss)` before `loss.backward()`.

    A score can be negative: there the loss is curved downwards.

    Args:
        probes: Random vectors for each step, 1 or more.
        seed: Of their signs; the same on all processes.

    Raises:
        ValueError: `probes` is below 1.
    """

    gradients: ClassVar[bool] = False

    def __init__(self, probes: int = 1, seed: int = 0) -> None:
        super().__init__()
        if probes < 1:
            raise ValueError(f"`probes` is the random vectors for each step, 1 or more; got {probes}.")
        self.probes, self.seed = probes, seed
        self._step: dict[str, Tensor] = {}
        self._count = 0

    @override
    def see_loss(self, loss: Tensor) -> None:
        """Estimate the diagonal before the backward pass of this loss; its graph stays."""
        weights = {name: weight_of(module) for name, module in self._modules.items()}
        weights = {name: weight for name, weight in weights.items() if weight.requires_grad}
        slopes: Sequence[Tensor | None] = torch.autograd.grad(
            loss, list(weights.values()), create_graph=True, allow_unused=True
        )
        reached = {name: slope for name, slope in zip(weights, slopes, strict=True) if slope is not None}
        self._reached |= reached.keys()
        for probe in range(self.probes):
            signs = self._signs(reached, probe)
            product = sum(((reached[name] * signs[name]).sum() for name in reached), start=loss.new_zeros(()))
            found = torch.autograd.grad(product, [weights[name] for name in reached], retain_graph=True)
            for name, curved in zip(reached, found, strict=True):
                self._add(name, signs[name] * curved * weights[name].detach().square() / (2 * self.probes))

    def _signs(self, like: dict[str, Tensor], probe: int) -> dict[str, Tensor]:
        """Draw -1 and 1, without touching the random state of the training."""
        generator = torch.Generator().manual_seed(hash((self.seed, self.steps, self._count, probe)) % 2**63)
        return {
            name: (2 * torch.randint(2, slope.shape, generator=generator) - 1).to(slope) for name, slope in like.items()
        }

    @torch.no_grad()
    def _add(self, name: str, costs: Tensor) -> None:
        found = along_input(self._modules[name], costs)
        self._step[name] = self._step[name] + found if name in self._step else found

    @override
    def _note(self, name: str, inputs: Tensor, gradient: Tensor | None) -> None:
        self._count = max(self._count, self._rows or len(inputs))

    @override
    def _of_step(self, scale: float) -> tuple[int, dict[str, Tensor]]:
        return self._count if self._step else 0, {name: found * scale for name, found in self._step.items()}

    @override
    def _drop_step(self) -> None:
        self._step, self._count = {}, 0

    @override
    def is_finite(self) -> bool:
        return all(bool(found.isfinite().all()) for found in self._step.values())

    @override
    def _scores(self, model: nn.Module, group: ChannelGroup, readers: Sequence[Reader]) -> Tensor | None:
        parts = [
            self._sums[reader.module][reader.positions].sum(1) for reader in readers if reader.module in self._sums
        ]
        return torch.stack([part.to(parts[0].device) for part in parts]).sum(0) / max(self.steps, 1)
