"""Normalisation layers: which layers of a network they are, how many channels they have, and where these lie."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin

from lightning_prune.layers.channel_equilibrium import BatchDecorrelation, ChannelEquilibrium, InstanceReweighting

EQUILIBRIA: Final = (ChannelEquilibrium, BatchDecorrelation, InstanceReweighting)
"""The Channel Equilibrium block, and its branches alone."""

_ALONG_LAST: tuple[type[nn.Module], ...] = (nn.LayerNorm, *filter(None, [getattr(nn, "RMSNorm", None)]))
_NORMS: tuple[type[nn.Module], ...] = (_BatchNorm, _InstanceNorm, nn.GroupNorm, *_ALONG_LAST)


class Equilibrated(nn.Sequential):
    """A norm, and the equilibrium block behind it.

    Args:
        norm: The norm.
        equilibrium: The block, or one of its branches.
    """

    norm: nn.Module
    equilibrium: ChannelEquilibrium | BatchDecorrelation | InstanceReweighting

    def __init__(
        self, norm: nn.Module, equilibrium: ChannelEquilibrium | BatchDecorrelation | InstanceReweighting
    ) -> None:
        super().__init__(OrderedDict(norm=norm, equilibrium=equilibrium))


def named_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Name the norms of a network, in order; one with an equilibrium block stands there as `Equilibrated`.

    Norms are BatchNorm, InstanceNorm, GroupNorm, LayerNorm and RMSNorm, and classes made from them. A LayerNorm or
    RMSNorm over several dimensions has no channels, and does not count; one that stands in several places does once.
    """
    found: dict[str, nn.Module] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, (Equilibrated, *EQUILIBRIA)):
            inside.update(module.modules())
        is_norm = isinstance(module, _NORMS) and module not in inside and has_channels(module)
        if is_norm or isinstance(module, Equilibrated):
            found[name] = module
    return found


def has_channels(norm: nn.Module) -> bool:
    """Tell whether a norm knows its channels: not if it is lazy, or normalises several dimensions at once."""
    if isinstance(norm, LazyModuleMixin):
        return False
    return not isinstance(norm, _ALONG_LAST) or len(norm.normalized_shape) == 1  # type: ignore[arg-type]


def activates(norm: nn.Module) -> bool:
    """Tell whether a norm applies an activation itself, as timm's BatchNormAct2d does."""
    inner = getattr(norm, "act", None)
    return isinstance(inner, nn.Module) and not isinstance(inner, nn.Identity)


def num_channels(norm: nn.Module) -> int:
    """Return how many channels a norm has."""
    if isinstance(norm, Equilibrated):
        return num_channels(norm.norm)
    if isinstance(norm, nn.GroupNorm):
        return norm.num_channels
    if isinstance(norm, (_BatchNorm, _InstanceNorm)):
        return norm.num_features
    return int(norm.normalized_shape[0])  # type: ignore[index]


def channel_dim(norm: nn.Module) -> int:
    """Return where channels lie in what a norm returns: -1 behind LayerNorm and RMSNorm, else 1.

    Subclasses that end on 2d, as the LayerNorm2d of torchvision and timm, take images: 1.
    """
    if isinstance(norm, Equilibrated):
        return channel_dim(norm.norm)
    return -1 if isinstance(norm, _ALONG_LAST) and not type(norm).__name__.lower().endswith("2d") else 1


def scale_and_shift(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return gamma and beta of a norm, each (c,); None where it has none. A missing beta is 0."""
    if isinstance(norm, Equilibrated):
        return scale_and_shift(norm.norm)
    scale, shift = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if scale is None:
        return None
    return scale.detach(), torch.zeros_like(scale) if shift is None else shift.detach()
