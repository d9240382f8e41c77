"""What earlier tasks have fixed: where each parameter was, and how much it matters there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_prune.cut import Cut, Offsets, cut_tensor
from lightning_prune.errors import PruningError

Named: TypeAlias = Mapping[str, Tensor]
"""Name of a parameter -> a tensor of its shape."""


@dataclass(frozen=True, eq=False)
class Consolidation:
    """The quadratic penalty of elastic weight consolidation.

        strength / 2 * sum_i F_i (theta_i - theta*_i)^2

    Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks" (arXiv 1612.00796, equation 3).

    However many tasks there were, it is one penalty: centred at the last optimum, where the sum of all earlier ones
    has its place, with the sum of all F (Huszar 2017, arXiv 1712.03847).

    Attributes:
        anchors: theta*, the parameters where the last task left them.
        information: F, >= 0.
        tasks: How many tasks there were.
    """

    anchors: Named = field(default_factory=dict)
    information: Named = field(default_factory=dict)
    tasks: int = 0

    def then(self, parameters: Named, information: Named, decay: float = 1.0) -> Consolidation:
        """Return what holds after another task: theta* is where it ended, F <- decay * F + its F.

        Args:
            parameters: All parameters now.
            information: F of this task, for those that it has trained.
            decay: What is left of the earlier F, in [0, 1]; less than 1 is online EWC (Schwarz et al. 2018, arXiv
                1805.06370).
        """
        summed = {name: decay * old.to(parameters[name].device) for name, old in self.information.items()}
        for name, new in information.items():
            summed[name] = summed[name] + new if name in summed else new
        anchors = {name: parameters[name].detach().clone() for name in summed}
        return Consolidation(anchors, summed, self.tasks + 1)

    def check_fit(self, parameters: Named) -> None:
        """See that all anchors are those of a model's parameters.

        Raises:
            PruningError: A parameter is missing, or has another shape.
        """
        for name, anchor in self.anchors.items():
            found = tuple(parameters[name].shape) if name in parameters else None
            if found != tuple(anchor.shape):
                has = "has no such parameter" if found is None else f"has it in the shape {found}"
                raise PruningError(
                    f"An earlier task was consolidated with {name!r} of shape {tuple(anchor.shape)}, but the model "
                    f"{has}. Go on with that model, or consolidate the task anew with this one."
                )

    def beside(self, parameters: Named) -> Consolidation:
        """Return it on the devices of the parameters."""
        anchors = {name: anchor.to(parameters[name].device) for name, anchor in self.anchors.items()}
        information = {name: each.to(parameters[name].device) for name, each in self.information.items()}
        return Consolidation(anchors, information, self.tasks)

    def penalty(self, parameters: Named, strength: float) -> Tensor:
        """Return the penalty as a number that can be differentiated."""
        sums = [
            (self.information[name] * (parameters[name] - anchor).square()).sum()
            for name, anchor in self.anchors.items()
        ]
        return 0.5 * strength * torch.stack(sums).sum()

    @torch.no_grad()
    def add_to_gradients(self, parameters: Named, strength: float, masks: Named) -> Tensor:
        """Add strength * F_i (theta_i - theta*_i) to the gradients of parameters that have one.

        Args:
            parameters: Some parameters of the model, all with an anchor, and at least one with a gradient.
            strength: lambda; negative for an optimizer that maximizes.
            masks: Bool tensors for some of them; where they are False nothing pulls.

        Returns:
            The penalty of these parameters, a number on their device.
        """
        gradients = {name: each.grad for name, each in parameters.items() if each.grad is not None}
        away = torch._foreach_sub([parameters[name] for name in gradients], [self.anchors[name] for name in gradients])
        pulls = torch._foreach_mul([self.information[name] for name in gradients], away)
        for name, pull in zip(gradients, pulls, strict=True):
            if name in masks:
                pull.masked_fill_(~masks[name].to(pull.device), 0)
        torch._foreach_add_(list(gradients.values()), pulls, alpha=strength)
        energies = [far.flatten().dot(pull.flatten()) for far, pull in zip(away, pulls, strict=True)]
        return 0.5 * strength * torch.stack(energies).sum()

    def after(self, cut: Cut, offsets: Offsets) -> Consolidation:
        """Return it for the model after a cut: what stays keeps its F and its distance from its anchor.

        A constant that is absorbed into a parameter moves the anchor as far: the parameter is no further from where
        the task left it. Biases that are made to absorb one are free.
        """
        moved = {name: _added(anchor, offsets.added.get(cut.renamed(name))) for name, anchor in self.anchors.items()}
        return Consolidation(_cut(moved, cut), _cut(self.information, cut), self.tasks)


def _added(anchor: Tensor, offset: Tensor | None) -> Tensor:
    return anchor if offset is None else (anchor + offset.to(anchor.device)).to(anchor.dtype)


def _cut(tensors: Named, cut: Cut) -> dict[str, Tensor]:
    """Cut tensors of a model's parameters along with them."""
    renamed = {cut.renamed(name): tensor for name, tensor in tensors.items()}
    return {name: cut_tensor(tensor, cut.kept.get(name, {})) for name, tensor in renamed.items()}
