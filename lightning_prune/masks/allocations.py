"""Rules for weights only: how many of its weights each layer keeps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from fnmatch import fnmatchcase
from math import floor, isfinite, prod
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lightning_prune.allocation import MaskedLayer, WeightAllocation, kept_of_all

StdOf = Literal["dense", "current", "nonzero"]
"""The weights whose standard deviation a threshold is measured in."""


class LAMP(WeightAllocation):
    """The lowest layer-adaptive magnitudes of the whole model go.

    score(u) = w_u^2 / sum_{v >= u} w_v^2, the weights of a layer sorted ascending: Lee et al. 2021 ("Layer-adaptive
    Sparsity for the Magnitude-based Pruning", eq. 2). Within a layer the order is that of |w|, so that LAMP says only
    how many go; the largest weight of each layer scores 1 and goes last.
    """

    def kept(self, layers: Mapping[str, MaskedLayer], ratio: float) -> dict[str, int]:
        """Rank the scores of all layers, and count those that do not go."""
        return kept_of_all(layers, {name: lamp_scores(layer.scores) for name, layer in layers.items()}, ratio)

    def __repr__(self) -> str:
        return "LAMP()"


def lamp_scores(magnitudes: Tensor) -> Tensor:
    """Return the LAMP scores of a layer, ascending; -1 stays -1.

    Args:
        magnitudes: |w|, and -1 for what is pruned.

    Example:
        >>> lamp_scores(torch.tensor([3.0, 1.0, 2.0]))  # 1/14, 4/13, 9/9
        tensor([0.0714, 0.3077, 1.0000])
    """
    wide = magnitudes if magnitudes.dtype is torch.float64 else magnitudes.float()
    scores = np.sort(wide.detach().cpu().numpy(), axis=None)
    pruned, largest, above = int(np.searchsorted(scores, 0)), float(scores[-1]) or 1.0, 0.0
    for stop in range(len(scores), pruned, -_PIECE):
        piece = scores[max(stop - _PIECE, pruned) : stop]
        squares = np.square(piece.astype(np.float64) / largest)
        from_here_on = np.cumsum(squares[::-1])[::-1] + above
        above = float(from_here_on[0])
        piece[:] = np.divide(squares, from_here_on, out=np.zeros_like(squares), where=from_here_on > 0)
    return torch.from_numpy(scores)


_PIECE = 2**20
"""So many weights are scored at a time."""


class ERK(WeightAllocation):
    """Layers are the denser the smaller they are: the Erdos-Renyi-Kernel rule.

    density_l = eps * sum(shape_l) / prod(shape_l): Evci et al. 2020 ("Rigging the Lottery", section 3), after
    Mocanu et al. 2018, whose (n_in + n_out) / (n_in * n_out) it is for linear layers. eps is such that the ratio is
    met exactly; layers whose density would exceed 1 stay dense, and eps is found again for the others.
    """

    def kept(self, layers: Mapping[str, MaskedLayer], ratio: float) -> dict[str, int]:
        """Round the densities to whole units; the largest remainders get what is over."""
        dense = {name: layer.units for name, layer in layers.items()}
        total = sum(dense.values()) - floor(ratio * sum(dense.values()) + 0.5)
        densities = erk_densities({name: layer.dense.shape for name, layer in layers.items()}, dense, total)
        exact = {name: densities[name] * units for name, units in dense.items()}
        kept = {name: floor(share + 1e-9) for name, share in exact.items()}
        remainders = sorted(exact, key=lambda name: kept[name] - exact[name])
        for name in remainders[: total - sum(kept.values())]:
            kept[name] += 1
        return {
            name: min(max(count, layers[name].least()), layers[name].scores.numel()) for name, count in kept.items()
        }

    def __repr__(self) -> str:
        return "ERK()"


def erk_densities(shapes: Mapping[str, tuple[int, ...]], units: Mapping[str, int], total: int) -> dict[str, float]:
    """Return the fraction of each layer that stays.

    Args:
        shapes: Name -> shape of the dense weight.
        units: Name -> how many units it is made of.
        total: Units that stay in all layers together.

    Example:
        >>> shapes = {"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}
        >>> found = erk_densities(shapes, {name: rows * columns for name, (rows, columns) in shapes.items()}, 26620)
        >>> {name: round(density, 4) for name, density in found.items()}
        {'fc1': 0.0796, 'fc2': 0.2302, 'fc3': 1.0}
    """
    raw = {name: sum(shape) / prod(shape) for name, shape in shapes.items()}
    full: set[str] = set()
    while True:
        left = total - sum(units[name] for name in full)
        share = sum(raw[name] * units[name] for name in raw if name not in full)
        eps = left / share if share else 0.0
        over = {name for name in raw if name not in full and eps * raw[name] > 1}
        if not over:
            return {name: 1.0 if name in full else eps * density for name, density in raw.items()}
        full |= over


class _ByPattern(WeightAllocation):
    """A rule with a number for each layer, found by module-name patterns; no ratio is asked.

    A layer takes the number of the first pattern that matches it; one that none matches stays as it is.
    """

    def __init__(self, numbers: Mapping[str, float]) -> None:
        self.numbers = dict(numbers)

    def kept(self, layers: Mapping[str, MaskedLayer], ratio: float) -> dict[str, int]:
        """Count each layer by its own number.

        Raises:
            ValueError: A pattern matches no layer.
        """
        modules = {name: name.rpartition(".")[0] for name in layers}
        for pattern in self.numbers:
            if not any(fnmatchcase(module, pattern) for module in modules.values()):
                raise ValueError(
                    f"Pattern {pattern!r} of {self!r} matches no layer with weights to prune. These are "
                    f"{', '.join(sorted(set(modules.values())))}."
                )
        return {name: self._kept(name, layer, self._number(modules[name])) for name, layer in layers.items()}

    def _number(self, module: str) -> float | None:
        return next((number for pattern, number in self.numbers.items() if fnmatchcase(module, pattern)), None)

    def _kept(self, name: str, layer: MaskedLayer, number: float | None) -> int:
        there = layer.scores.numel()
        return there if number is None else min(max(self._count(name, layer, number), layer.least()), there)

    @abstractmethod
    def _count(self, name: str, layer: MaskedLayer, number: float) -> int:
        """Return how many units a layer with this number keeps."""


class StdThreshold(_ByPattern):
    """Weights below a multiple of their layer's standard deviation go; the ratio asked is not used.

    |w| <= q * std(W) goes: Han et al. 2015 ("Learning both Weights and Connections", section 3.1). Of normally
    distributed weights that is the fraction erf(q / sqrt 2): 38.3 % at 0.5, 68.3 % at 1, 95.4 % at 2. The deviation
    is that of the population (divided by n). For blocks it is their mean |w| that is compared.

    Args:
        q: The multiple, above 0, for all layers or by module-name pattern (`fnmatch` style): the first pattern that
            matches a layer holds, and a layer that none matches stays as it is.
        of: Whose deviation: that of the weights before any pruning ("dense"), of all that there are now with zeros
            ("current"), or of those that are not 0 ("nonzero"). The latter two move with every event.

    Raises:
        ValueError: A multiple is not above 0, or `of` is none of the three.
    """

    def __init__(self, q: float | Mapping[str, float] = 1.0, of: StdOf = "dense") -> None:
        super().__init__(q if isinstance(q, Mapping) else {"*": q})
        for pattern, multiple in self.numbers.items():
            if not (isfinite(multiple) and multiple > 0):
                raise ValueError(
                    f"`q` is the threshold in standard deviations, above 0; got {multiple} for {pattern!r}. "
                    "Put layers that stay as they are in `ignore`."
                )
        if of not in get_args(StdOf):
            raise ValueError(f'`of` is "dense", "current" or "nonzero"; got {of!r}.')
        self.of = of

    def _count(self, name: str, layer: MaskedLayer, number: float) -> int:
        return int((layer.scores > number * self._std(name, layer)).count_nonzero())

    def _std(self, name: str, layer: MaskedLayer) -> float:
        if self.of != "dense":
            return deviation(layer.weight if self.of == "current" else layer.weight[layer.weight != 0])
        if layer.dense.std is None:
            raise ValueError(
                f"The standard deviation of the dense weights of {name!r} is not known any more. Keep `dense_layers` "
                'from before the first pruning and pass it as `dense`, or ask for StdThreshold(of="nonzero").'
            )
        return layer.dense.std

    def __repr__(self) -> str:
        return f"StdThreshold({self.numbers}, of={self.of!r})"


def deviation(weight: Tensor) -> float:
    """Return the standard deviation of the population of a layer's weights; 0 of none."""
    wide = weight.detach()
    wide = (
        wide
        if wide.dtype in (torch.float32, torch.float64)
        else wide.to(torch.promote_types(wide.dtype, torch.float32))
    )
    return float(wide.std(correction=0)) if wide.numel() else 0.0


class PerLayer(_ByPattern):
    """Each layer has a ratio of its own; the ratio asked of the whole is not used.

    Args:
        ratios: Module-name pattern (`fnmatch` style) -> fraction of the layer's dense weights to be gone, in [0, 1).
            The first pattern that matches a layer holds; a layer that none matches stays as it is.

    Raises:
        ValueError: A ratio is outside [0, 1), or there is none.
    """

    def __init__(self, ratios: Mapping[str, float]) -> None:
        super().__init__(ratios)
        if not ratios:
            raise ValueError("`ratios` is empty; name a layer, for example PerLayer({'fc*': 0.9}).")
        for pattern, ratio in ratios.items():
            if not 0 <= ratio < 1:
                raise ValueError(
                    f"A ratio is the fraction of weights to remove, in [0, 1); got {ratio} for {pattern!r}."
                )

    def _count(self, name: str, layer: MaskedLayer, number: float) -> int:
        return layer.units - floor(number * layer.units + 0.5)

    def __repr__(self) -> str:
        return f"PerLayer({self.numbers})"
