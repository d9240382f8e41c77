"""A target for what gates leave of a network, as a Lagrangian constraint whose multiplier is learned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_RATE, _DAMPING = 100.0, 20.0
"""A gap of 1 over all steps adds 100 to the multiplier, and a gap of 1 pulls with 20 at once."""

_RISEN, _ARRIVED = 0.5, 0.9
"""Shares of the steps after which all is asked for, and after which only gates count that have closed."""


class Constraint:
    """Pulls at gates until a fraction of the network's cost is gone, and no more.

    The Lagrangian is loss + multiplier * (asked - gone). The gates descend on it with the expected cost, which is
    differentiable; the multiplier ascends on what the test gates leave, which is what is cut in the end (a proxy
    Lagrangian: Cotter, Jiang, Sridharan 2019, arXiv 1804.06500). A part in proportion to the gap keeps it from
    swinging. It can be below 0: what has closed too much is opened again.

    What is asked rises evenly over the first half of the steps. Since gates travel for long before they close, those
    that are near count as closed already: else the multiplier would grow meanwhile, and all of them come too far. What
    is near shrinks to nothing over the first nine tenths.

    Args:
        ratio: The fraction that is to be gone, in (0, 1).
        steps: So many steps there are, 1 or more.
        way: How far a fresh log alpha has to go until its gate closes.
    """

    def __init__(self, ratio: float, steps: float, way: float) -> None:
        self.ratio = ratio
        self.steps = max(steps, 1)
        self.way = way
        self.done = 0
        self.multiplier: Tensor = torch.zeros(())

    @property
    def asked(self) -> float:
        """The fraction that is asked for at present."""
        return self.ratio * min(1.0, self.done / (_RISEN * self.steps))

    @property
    def margin(self) -> float:
        """How near a log alpha is to where its gate closes, for the gate to count as closed."""
        return max(0.0, self.way / 2) * max(0.0, 1 - self.done / (_ARRIVED * self.steps))

    def pull(self, gone: Tensor) -> Tensor:
        """Take a step of the multiplier.

        Args:
            gone: The fraction that is gone where gates within `margin` of closing are closed, a scalar.

        Returns:
            What a unit of cost, in fractions of the dense one, is worth in units of the loss: a scalar.
        """
        gap = self.asked - gone
        self.done += 1
        self.multiplier = self.multiplier.to(gap.device) + _RATE / self.steps * gap
        return self.multiplier + _DAMPING * gap

    def state_dict(self) -> dict[str, Any]:
        """Return how far it has come."""
        return {"multiplier": self.multiplier, "done": self.done, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up an interrupted training."""
        self.multiplier, self.done, self.steps = state["multiplier"], state["done"], state["steps"]
