"""Modules that pruning puts into a network."""

from lightning_prune.layers.bernoulli import Bernoulli
from lightning_prune.layers.channel_select import ChannelSelect
from lightning_prune.layers.gate import Gate
from lightning_prune.layers.hard_concrete import HardConcrete

__all__ = ["Bernoulli", "ChannelSelect", "Gate", "HardConcrete"]
