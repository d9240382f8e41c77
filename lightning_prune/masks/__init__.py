"""Masks on single weights: which of them stay, chosen, held, carried through cuts, and grown again."""

from lightning_prune.masks.allocations import ERK, LAMP, PerLayer, StdThreshold
from lightning_prune.masks.granularity import NM, Blocks, Granularity, Weights
from lightning_prune.masks.held import (
    ATTRIBUTE,
    KEY,
    Masks,
    apply,
    check_fit,
    check_zeros,
    cut_masks,
    hold,
    layer_sparsity,
    masks_of,
    pack,
    sparsity,
    unpack,
)
from lightning_prune.masks.magnitude import magnitude_masks

__all__ = [
    "ATTRIBUTE",
    "ERK",
    "KEY",
    "LAMP",
    "NM",
    "Blocks",
    "Granularity",
    "Masks",
    "PerLayer",
    "StdThreshold",
    "Weights",
    "apply",
    "check_fit",
    "check_zeros",
    "cut_masks",
    "hold",
    "layer_sparsity",
    "magnitude_masks",
    "masks_of",
    "pack",
    "sparsity",
    "unpack",
]
