"""Structured pruning for PyTorch Lightning: networks that get smaller while they train."""

from lightning_prune.__version__ import __version__
from lightning_prune.graph import find_groups
from lightning_prune.history import history_of, load_pruned, save_pruned
from lightning_prune.one_shot import Reconstructed, reconstruct
from lightning_prune.pruner import prune
from lightning_prune.reconstruction import Reconstruction
from lightning_prune.report import describe
from lightning_prune.types import ChannelGroup, ChannelGroups, Member, PruneRecord

__all__ = [
    "ChannelGroup",
    "ChannelGroups",
    "Member",
    "PruneRecord",
    "Reconstructed",
    "Reconstruction",
    "__version__",
    "describe",
    "find_groups",
    "history_of",
    "load_pruned",
    "prune",
    "reconstruct",
    "save_pruned",
]
