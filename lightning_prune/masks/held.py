"""Masks on weights: put on a model, measured, carried through a cut, packed into bytes and read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.cut import Cut, cut_tensor
from lightning_prune.errors import HistoryError, PruningError
from lightning_prune.tensors import named_parameters, unwrapped

Masks: TypeAlias = Mapping[str, Tensor]
"""Name of a parameter -> bool tensor of its shape: True keeps, False prunes."""

KEY = "pruning_masks"
"""Under this key the packed masks lie in a checkpoint."""

ATTRIBUTE = "_pruning_masks"
"""Under this key the masks lie in a model's `__dict__`, so that they can be set together with a cut."""


def masks_of(model: nn.Module) -> Masks:
    """Return the masks that a model holds; none where it has never been masked."""
    masks: Masks = unwrapped(model).__dict__.get(ATTRIBUTE, {})
    return masks


def hold(model: nn.Module, masks: Masks) -> None:
    """Let a model hold masks in place of those that it held; no weight is touched.

    Raises:
        PruningError: A mask does not fit.
    """
    check_fit(masks, model)
    unwrapped(model).__dict__[ATTRIBUTE] = dict(masks)


def apply(masks: Masks, model: nn.Module) -> None:
    """Set every pruned weight to exactly 0, whatever it was: also NaN, and never -0.

    Raises:
        PruningError: A mask does not fit; no weight has changed.
    """
    check_fit(masks, model)
    weights = named_parameters(unwrapped(model))
    with torch.no_grad():
        for name, mask in masks.items():
            weights[name].masked_fill_(~mask.to(weights[name].device), 0)


def check_fit(masks: Masks, model: nn.Module) -> None:
    """See that every mask is one of a model's parameters.

    Raises:
        PruningError: A mask has no parameter, or another type or shape.
    """
    weights = named_parameters(unwrapped(model))
    for name, mask in masks.items():
        if name not in weights:
            raise PruningError(f"There is a mask for {name!r}, but the model has no such parameter. {_WAY_OUT}")
        if mask.dtype is not torch.bool or mask.shape != weights[name].shape:
            raise PruningError(
                f"The mask for {name!r} is {mask.dtype} of shape {tuple(mask.shape)}, but the weight has the shape "
                f"{tuple(weights[name].shape)}. {_WAY_OUT}"
            )


def check_zeros(masks: Masks, weights: Mapping[str, Tensor]) -> None:
    """See that what masks prune is 0, as it is wherever masks were put on.

    Args:
        masks: The masks.
        weights: Name -> weight of the mask's shape.

    Raises:
        PruningError: A pruned weight is not 0.
    """
    for name, mask in masks.items():
        left = int(weights[name].detach()[~mask.to(weights[name].device)].count_nonzero())
        if left:
            raise PruningError(
                f"The mask for {name!r} prunes {left} weights that are not 0: the checkpoint is damaged, or the masks "
                "were never applied. Load another one, or call `lightning_prune.masks.apply(masks_of(model), model)`."
            )


_WAY_OUT = "Make the masks from this model, or take the model that they were made from, in the same shapes."


def sparsity(masks: Masks) -> float:
    """Return the share of masked weights that are pruned, in [0, 1]; 0 without masks."""
    total = sum(mask.numel() for mask in masks.values())
    return 1 - sum(map(_kept, masks.values())) / total if total else 0.0


def layer_sparsity(masks: Masks) -> dict[str, float]:
    """Return the share of pruned weights of each mask, in [0, 1]."""
    return {name: 1 - _kept(mask) / mask.numel() for name, mask in masks.items()}


def _kept(mask: Tensor) -> int:
    return int(mask.count_nonzero())


def cut_masks(masks: Masks, cut: Cut) -> Masks:
    """Carry masks through a channel cut: each weight that stays keeps its mask.

    Raises:
        PruningError: A mask has not the shape that its tensor had before the cut.
    """
    renamed = {cut.renamed(name): mask for name, mask in masks.items()}
    for name, mask in renamed.items():
        if name in cut.kept and tuple(mask.shape) != tuple(cut.shapes[name]):
            raise PruningError(
                f"The mask for {name!r} has the shape {tuple(mask.shape)}, but the cut is one of a tensor of shape "
                f"{tuple(cut.shapes[name])}. Carry masks through every cut, in order."
            )
    return {name: cut_tensor(mask, cut.kept[name]) if name in cut.kept else mask for name, mask in renamed.items()}


def pack(masks: Masks) -> dict[str, dict[str, Any]]:
    """Pack masks into one bit a weight, as names, numbers and byte tensors, which `weights_only` loading reads.

    Returns:
        Name -> {"shape": list of sizes, "bits": uint8 tensor on the CPU, first weight in the highest bit}.
    """
    return {name: {"shape": list(mask.shape), "bits": packed_bits(mask)} for name, mask in masks.items()}


def unpack(packed: object, model: nn.Module) -> Masks:
    """Read what `pack` has made; every part is looked at.

    Args:
        packed: What a checkpoint holds.
        model: The model that the masks are for, in the shapes that they were packed in; it is not changed.

    Returns:
        The masks, each on the device of its weight.

    Raises:
        HistoryError: It is something else, or does not fit the model.
    """
    weights = named_parameters(unwrapped(model))
    try:
        if type(packed) is not dict:
            raise TypeError(f"a {type(packed).__name__} in place of a dict")
        masks = {name: _mask(name, plain, weights) for name, plain in packed.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise HistoryError(
            f"The pruning masks do not fit the model, or are damaged ({type(error).__name__}: {str(error)[:200]}). "
            "Build the model with the arguments that it was trained with, and load a checkpoint of that training."
        ) from error
    return masks


def _mask(name: object, plain: Any, weights: Mapping[str, nn.Parameter]) -> Tensor:
    if type(name) is not str or name not in weights:
        raise ValueError(f"the model has no parameter {name!r}")
    if type(plain) is not dict or plain.keys() != {"shape", "bits"}:
        raise TypeError(f"the mask for {name!r} is no shape with bits")
    weight = weights[name]
    if type(plain["shape"]) is not list or plain["shape"] != list(weight.shape):
        raise ValueError(f"the mask for {name!r} has the shape {plain['shape']}, the weight {list(weight.shape)}")
    return unpacked_bits(plain["bits"], weight.shape).to(weight.device)


def packed_bits(mask: Tensor) -> Tensor:
    """Pack a bool tensor into bytes on the CPU, the first element in the highest bit; the last byte ends with zeros."""
    return torch.from_numpy(np.packbits(mask.detach().cpu().numpy()))


def unpacked_bits(bits: object, shape: Sequence[int]) -> Tensor:
    """Read what `packed_bits` has made.

    Raises:
        TypeError: It is no tensor of bytes.
        ValueError: There are too many or too few bytes, or something stands behind the last bit.
    """
    if type(bits) is not Tensor or bits.dtype is not torch.uint8 or bits.layout is not torch.strided or bits.is_meta:
        raise TypeError("the bits of a mask are no tensor of bytes")
    size = prod(shape)
    if bits.shape != ((size + 7) // 8,):
        raise ValueError(f"{tuple(bits.shape)} bytes for a mask of {size} weights")
    whole = np.unpackbits(bits.cpu().numpy())
    if whole[size:].any():
        raise ValueError(f"bits behind the last of {size} weights")
    return torch.from_numpy(whole[:size].view(np.bool_)).view(tuple(shape))
