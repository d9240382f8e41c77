"""From weights and a ratio to masks: the weights with the smallest magnitude go, or those that carry least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from operator import gt

import torch
from torch import Tensor, nn

from lightning_prune.allocation import DenseLayer, MaskedLayer, Uniform, WeightAllocation
from lightning_prune.errors import PruningError, ScoreError
from lightning_prune.masks.allocations import StdThreshold, deviation
from lightning_prune.masks.granularity import NM, Granularity
from lightning_prune.masks.granularity import granularity as read_granularity
from lightning_prune.masks.held import Masks, check_fit
from lightning_prune.masks.maskable import input_first, maskable
from lightning_prune.ranking import lowest


def magnitude_masks(
    model: nn.Module,
    ratio: float,
    granularity: str | Granularity = "weights",
    *,
    allocation: WeightAllocation | None = None,
    ignore: Sequence[str] = (),
    before: Masks | None = None,
    dense: Mapping[str, DenseLayer] | None = None,
    information: Mapping[str, Tensor] | None = None,
) -> Masks:
    """Choose the weights that stay: of each layer those with the largest |w|, by exact count.

    Of equal ones the first go. What was pruned before stays pruned and counts as gone. No weight is touched.

    Args:
        model: The model.
        ratio: Fraction of the dense weights to be gone afterwards, in [0, 1). n:m patterns, `StdThreshold` and
            `PerLayer` say themselves how many go.
        granularity: What goes as one: "weights", "2:4" or another n:m, "blocks" or sides such as "8x1".
        allocation: How the ratio is shared out over the layers; `Uniform()` if None.
        ignore: Patterns of module names that are not to be touched.
        before: The masks that there are; None says that nothing has been pruned yet.
        dense: What `dense_layers` gave before any pruning; None takes the shapes that there are now, and the deviations
            too where nothing has been pruned.
        information: Name -> the Fisher information of each weight, of its shape (see `fisher_information`): weights are
            ranked by F w^2, twice what their removal adds to the loss (Theis et al. 2018, equation 7), in place of |w|.

    Returns:
        Name -> mask, on the device of its weight.

    Raises:
        ValueError: An argument is out of range, or does not fit the layers or another argument.
        TypeError: `allocation` is one of channels only.
        ScoreError: A weight is NaN or infinite; the layer is named.
        PruningError: There is nothing to mask, or `before` does not fit.

    Example:
        >>> net = nn.Linear(4, 1, bias=False)
        >>> net.weight.data = torch.tensor([[3.0, -1.0, 0.5, -2.0]])
        >>> magnitude_masks(net, 0.5)
        {'weight': tensor([[ True, False, False,  True]])}
    """
    unit = read_granularity(granularity)
    _check(ratio, unit, allocation)
    layers = _layers(model, ignore, before or {})
    if information is not None:
        layers = _weighed(layers, information, allocation)
    for layer in layers.values():
        layer.check(unit)
    if isinstance(unit, NM):
        return {name: layer.mask(unit, unit.keep(layer.scores(unit))) for name, layer in layers.items()}
    known = dense if dense is not None else _as_they_are(layers)
    masked = {name: _known(name, layer, unit, known) for name, layer in layers.items()}
    kept = (allocation or Uniform()).kept(masked, ratio)
    return {name: layer.mask(unit, _highest(masked[name].scores, kept[name])) for name, layer in layers.items()}


@dataclass(frozen=True, eq=False)
class _Layer:
    """A weight, whether its first dimension is the input, and its mask so far."""

    name: str
    weight: Tensor
    input_first: bool
    before: Tensor | None
    factors: Tensor | None = None

    def turned(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the weight's shape as (out, in, *kernel), or the other way round."""
        return tensor.transpose(0, 1) if self.input_first else tensor

    def check(self, unit: Granularity) -> None:
        name = self.name.rpartition(".")[0] or self.name
        unit.check(name, self.turned(self.weight).shape)
        if not all(bool(piece.isfinite().all()) for piece in self.weight.reshape(-1).split(2**22)):
            raise ScoreError(
                f"The weight of {name!r} holds NaN or infinite values, which cannot be ranked. Load weights from "
                "before they came, or put the layer in `ignore`."
            )

    def scores(self, unit: Granularity) -> Tensor:
        scores = unit.scores(self.turned(self.weight if self.factors is None else self.weight * self.factors))
        if self.before is None:
            return scores
        return scores.masked_fill_(~unit.units(self.turned(self.before)), -1)

    def mask(self, unit: Granularity, kept: Tensor) -> Tensor:
        """Spread a mask over units to the weight's shape, in its memory format."""
        shape = self.turned(self.weight).shape
        mask = torch.empty_like(self.weight, dtype=torch.bool).copy_(self.turned(unit.spread(kept, shape)))
        return mask if self.before is None else mask.logical_and_(self.before)


def _weighed(
    layers: Mapping[str, _Layer], information: Mapping[str, Tensor], allocation: WeightAllocation | None
) -> dict[str, _Layer]:
    """Let |w| sqrt(F) stand for |w|, which ranks as F w^2 does."""
    if isinstance(allocation, StdThreshold):
        raise ValueError(
            f"`allocation` {allocation!r} compares weights with their deviation, and `information` ranks them by "
            "F w^2. Leave one of them out."
        )
    weighed = {}
    for name, layer in layers.items():
        found = information.get(name)
        if found is None or found.shape != layer.weight.shape:
            shape = None if found is None else tuple(found.shape)
            raise ValueError(
                f"`information` has the shape {shape} for {name!r}, which has {tuple(layer.weight.shape)}. Estimate it "
                "for this model as it is now, or put the layer in `ignore`."
            )
        weighed[name] = replace(layer, factors=found.to(layer.weight).clamp(min=0).sqrt())
    return weighed


def _check(ratio: float, unit: Granularity, allocation: object) -> None:
    if not 0 <= ratio < 1:
        raise ValueError(f"`ratio` is the fraction of weights to remove, in [0, 1); got {ratio}.")
    if allocation is None:
        return
    if isinstance(unit, NM):
        raise ValueError(
            f"`granularity` {unit!r} says of each layer how many weights go, so there is nothing to share out; got "
            f"`allocation` {allocation!r}. Leave it out, or prune single weights."
        )
    if not isinstance(allocation, WeightAllocation):
        raise TypeError(
            f"`allocation` {allocation!r} does not share weights out. Use Uniform(), Global(), LAMP(), ERK(), "
            "StdThreshold(q) or PerLayer({...}), or prune channels with it."
        )


def _layers(model: nn.Module, ignore: Sequence[str], before: Masks) -> dict[str, _Layer]:
    weights = maskable(model, ignore)
    check_fit(before, model)
    foreign = before.keys() - weights.keys()
    if foreign:
        raise PruningError(
            f"`before` masks {min(foreign)!r}, which is no weight to be masked now. Use the same `ignore` as before."
        )
    turned = input_first(model)
    return {
        name: _Layer(name, weight.detach(), name in turned, before[name].to(weight.device) if name in before else None)
        for name, weight in weights.items()
    }


def _as_they_are(layers: Mapping[str, _Layer]) -> dict[str, DenseLayer]:
    untouched = all(layer.before is None for layer in layers.values())
    return {
        name: DenseLayer(tuple(layer.weight.shape), deviation(layer.weight) if untouched else None)
        for name, layer in layers.items()
    }


def _known(name: str, layer: _Layer, unit: Granularity, dense: Mapping[str, DenseLayer]) -> MaskedLayer:
    if name not in dense:
        raise ValueError(f"`dense` does not know {name!r}. Pass what `dense_layers` gave with the same `ignore`.")
    if len(dense[name].shape) != layer.weight.dim() or any(map(gt, layer.weight.shape, dense[name].shape)):
        raise ValueError(
            f"`dense` has {name!r} in the shape {dense[name].shape}, but now it is {tuple(layer.weight.shape)}, which "
            "is no part of it. Pass what `dense_layers` gave for this model."
        )
    return MaskedLayer(layer.scores(unit), layer.weight, dense[name], prod(dense[name].shape) // unit.size)


def _highest(scores: Tensor, count: int) -> Tensor:
    """Mark the highest scores by count; of equal ones the first are not among them."""
    return lowest(scores, scores.numel() - count).logical_not_()
