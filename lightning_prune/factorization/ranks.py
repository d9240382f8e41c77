"""Which rank each layer gets, so that all together are as fast as asked and keep as much energy as they can."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_prune.errors import PruningError
from lightning_prune.factorization.spectrum import Spectrum


@dataclass(frozen=True)
class Menu:
    """What a layer can cost, ascending: ranks 1, 2, ... as long as they save something, and whole last.

    Attributes:
        costs: Multiply-accumulates.
        energies: The logarithm of the share of the energy that is retained, ascending to 0.
    """

    costs: NDArray[np.int64]
    energies: NDArray[np.float64]

    @classmethod
    def of(cls, whole: int, per_rank: int, spectrum: Spectrum) -> Menu:
        """Write down what a layer costs whole, and what its factors cost for each rank."""
        costs = per_rank * np.arange(1, len(spectrum.energies) + 1)
        saving = costs < whole
        retained = torch.log(spectrum.retained).numpy()[saving]
        return cls(np.append(costs[saving], whole), np.append(retained, 0.0))

    @property
    def whole(self) -> int:
        """The place of the layer as it is."""
        return len(self.costs) - 1

    def cheaper(self, at: int) -> tuple[float, int]:
        """Return the least loss of energy per MAC saved, and the place that it leads to; infinite at the cheapest."""
        if not at:
            return np.inf, at
        loss = (self.energies[at] - self.energies[:at]) / (self.costs[at] - self.costs[:at])
        best = at - 1 - int(loss[::-1].argmin())
        return float(loss[best]), best

    def dearer(self, at: int, budget: int) -> tuple[float, int]:
        """Return the most energy gained per MAC for at most so many MACs more, and where; -infinite if none."""
        affordable = self.costs[at + 1 :] - self.costs[at] <= budget
        if not affordable.any():
            return -np.inf, at
        gain = (self.energies[at + 1 :] - self.energies[at]) / (self.costs[at + 1 :] - self.costs[at])
        best = int(np.where(affordable, gain, -np.inf).argmax())
        return float(gain[best]), at + 1 + best


def choose_ranks(menus: Mapping[str, Menu], speed_up: float) -> dict[str, int]:
    """Find the ranks whose product of retained energies is large, among those that are fast enough.

    From whole layers on, the step that loses least of the logarithm of the energy for each MAC that it saves is taken
    until the budget is met, and what is left of that is spent again where it gains most. After Zhang et al. 2015,
    section 3 ("rank selection for whole-model acceleration"); that a step may be longer than one rank lets a layer
    leap over the ranks at which two layers would cost more than one.

    Args:
        menus: Name of a layer -> what it can cost.
        speed_up: All layers together are to cost so many times less at least; above 1.

    Returns:
        Name -> rank, for those that do not stay whole.

    Raises:
        PruningError: At rank 1 they still cost too much.
    """
    total = sum(int(menu.costs[-1]) for menu in menus.values())
    least = sum(int(menu.costs[0]) for menu in menus.values())
    budget = int(total / speed_up)
    if least > budget:
        raise PruningError(
            f"`speed_up` {speed_up} is out of reach: with rank 1 everywhere, the layers that can be factorised are "
            f"{total / least:.2f} times as fast. Ask for less, or loosen `ignore`."
        )
    places = {name: menu.whole for name, menu in menus.items()}
    moves = {name: menu.cheaper(menu.whole) for name, menu in menus.items()}
    spent = total
    while spent > budget:
        name = min(moves, key=lambda name: moves[name][0])
        spent -= int(menus[name].costs[places[name]] - menus[name].costs[moves[name][1]])
        places[name] = moves[name][1]
        moves[name] = menus[name].cheaper(places[name])
    while True:
        name, (gain, place) = max(
            ((name, menu.dearer(places[name], budget - spent)) for name, menu in menus.items()),
            key=lambda offer: offer[1][0],
        )
        if gain <= 0:
            return {name: place + 1 for name, place in places.items() if place < menus[name].whole}
        spent += int(menus[name].costs[place] - menus[name].costs[places[name]])
        places[name] = place
