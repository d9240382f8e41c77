"""Modules that pruning puts into a network."""

from lightning_prune.layers.channel_select import ChannelSelect

__all__ = ["ChannelSelect"]
