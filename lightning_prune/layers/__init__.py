"""Modules that pruning puts into a network."""

from lightning_prune.layers.bernoulli import Bernoulli
from lightning_prune.layers.channel_equilibrium import BatchDecorrelation, ChannelEquilibrium, InstanceReweighting
from lightning_prune.layers.channel_select import ChannelSelect
from lightning_prune.layers.gate import Gate
from lightning_prune.layers.hard_concrete import HardConcrete
from lightning_prune.layers.norms import Equilibrated

__all__ = [
    "BatchDecorrelation",
    "Bernoulli",
    "ChannelEquilibrium",
    "ChannelSelect",
    "Equilibrated",
    "Gate",
    "HardConcrete",
    "InstanceReweighting",
]
