"""Sparse training from scratch: masks drawn by lot, and the weights that they exchange while the network trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import cos, floor, inf, pi
from typing import Literal, TypeAlias
from zlib import crc32

import torch
from torch import Tensor, nn

from lightning_prune.allocation import DenseLayer, Global, MaskedLayer, WeightAllocation
from lightning_prune.masks.allocations import ERK, LAMP, StdThreshold
from lightning_prune.masks.held import Masks
from lightning_prune.masks.maskable import maskable
from lightning_prune.ranking import lowest

Growth: TypeAlias = Literal["gradient", "random"]
"""Which weights grow: those with the largest gradient (RigL), or any (SET)."""

Decay: TypeAlias = Callable[[float], float]
"""Pure function from progress to the share of the drop fraction that is left, [0, 1] -> [0, 1]."""


def cosine_decay(progress: float) -> float:
    """Exchange less and less: (1 + cos(pi t)) / 2 (Evci et al. 2020, "Rigging the Lottery", section 3, part 2).

    >>> [round(cosine_decay(progress), 4) for progress in (0.0, 0.25, 0.5, 1.0)]
    [1.0, 0.8536, 0.5, 0.0]
    """
    return (1 + cos(pi * progress)) / 2


def constant(progress: float) -> float:
    """Exchange equally much each time.

    >>> constant(0.9)
    1.0
    """
    return 1.0


def random_masks(
    model: nn.Module,
    sparsity: float,
    allocation: WeightAllocation | None = None,
    *,
    ignore: Sequence[str] = (),
    seed: int = 0,
) -> Masks:
    """Draw by lot which weights a sparse network starts with, by exact count in each layer.

    The draw depends on the seed and on the weights' names and shapes alone, not on the state of torch's generators.

    Args:
        model: The model; it is not changed.
        sparsity: Fraction of the weights that are pruned, in [0, 1).
        allocation: How it is shared out over the layers; `ERK()` if None.
        ignore: Patterns of module names that are not to be touched.
        seed: Of the draw.

    Returns:
        Name -> mask, on the device of its weight.

    Raises:
        ValueError: `sparsity` is out of range.
        TypeError: The allocation ranks weights by their scores, of which there are none before training; or it is
            one of channels.
        PruningError: There is no weight to mask.

    Example:
        >>> net = nn.Linear(8, 4)
        >>> int(random_masks(net, 0.75)["weight"].count_nonzero())
        8
    """
    check_sparsity(sparsity)
    allocation = check_allocation(allocation or ERK())
    weights = maskable(model, ignore)
    layers = {
        name: MaskedLayer(lot(weight.shape, seed, name), weight, DenseLayer(tuple(weight.shape)), weight.numel())
        for name, weight in weights.items()
    }
    kept = allocation.kept(layers, sparsity)
    return {
        name: torch.empty_like(weight, dtype=torch.bool).copy_(lowest(layers[name].scores, kept[name]))
        for name, weight in weights.items()
    }


def check_sparsity(sparsity: float) -> None:
    """See that a sparsity is one.

    Raises:
        ValueError: It is not in [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"`sparsity` is the fraction of weights that are pruned, in [0, 1); got {sparsity}. Try 0.9.")


def check_allocation(allocation: object) -> WeightAllocation:
    """Return an allocation that can share out weights before anything is known of them.

    Raises:
        TypeError: It ranks weights by their scores, or shares out channels.
    """
    if not isinstance(allocation, WeightAllocation) or isinstance(allocation, (Global, LAMP, StdThreshold)):
        raise TypeError(
            "`allocation` says how many weights each layer has when they are drawn by lot, before any has a score; got "
            f"{allocation!r}. Use ERK(), Uniform() or PerLayer({{...}})."
        )
    return allocation


def lot(shape: Sequence[int], seed: int, *purpose: object) -> Tensor:
    """Draw numbers in [0, 1) on the CPU that depend on a seed and a purpose only: the same on every rank and device.

    Example:
        >>> torch.equal(lot((2, 3), 7, "fc", 100), lot((2, 3), 7, "fc", 100))
        True
    """
    generator = torch.Generator().manual_seed(crc32(f"{seed}:{purpose}".encode()))
    return torch.rand(tuple(shape), generator=generator)


def exchange(mask: Tensor, weight: Tensor, wanted: Tensor, share: float) -> Tensor:
    """Return a layer's mask after some weights have been dropped and as many have grown.

        k = floor(share * kept);  drop the k kept weights of smallest |w|;  grow the k others of largest |wanted|

    Evci et al. 2020 ("Rigging the Lottery", algorithm 1). A weight that has just been dropped is among those that may
    grow: it comes back where nothing is wanted more, and where no place is wanted at all (all |wanted| 0). Of equal
    weights the first are dropped, of equally wanted places the first grow. The authors' code breaks ties by noise of
    1e-5 on |w|, which reorders weights of that size; nothing is random here.

    Args:
        mask: True where the layer has a weight.
        weight: The weights; 0 where there is none.
        wanted: The loss's gradient at all places, also at pruned ones (RigL), or numbers by lot (SET); finite, of the
            weight's shape.
        share: Fraction of the kept weights that go, in [0, 1].

    Returns:
        The new mask with as many weights; the old one itself where not one weight can be exchanged.

    Example:
        >>> mask = torch.tensor([True, True, False, False])
        >>> exchange(mask, torch.tensor([0.1, -2.0, 0.0, 0.0]), torch.tensor([0.2, 9.0, -3.0, 1.0]), 0.5)
        tensor([False,  True,  True, False])
    """
    kept = int(mask.count_nonzero())
    count = floor(share * kept + 1e-9)
    if count == 0 or kept == mask.numel():
        return mask
    dropped = lowest(weight.detach().abs().masked_fill_(~mask, inf), count)
    stays = mask & ~dropped
    scores = wanted.detach().abs()
    scores.masked_fill_(dropped & (scores == 0), torch.finfo(scores.dtype).tiny)
    return stays | lowest(scores.neg_().masked_fill_(stays, inf), count)
